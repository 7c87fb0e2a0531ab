#!/usr/bin/env bash
# Deletes the slice with its disks, and its place in the queue. WORKDIR in a bucket stays.
#
#   experiments/tpu/delete.sh [--dry-run]
set -eu
. "$(dirname "$0")/gcloud.sh"

if [ "$QUEUED" = 1 ]; then
  tpus queued-resources delete "$NAME" --force
else
  tpus tpu-vm delete "$NAME"
fi
