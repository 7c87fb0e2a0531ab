#!/usr/bin/env bash
# Copies the work directory, and the log of worker 0 if there still is one, to a folder here.
#
#   experiments/tpu/fetch.sh [--dry-run] [FOLDER]      # runs/NAME by default
set -eu
. "$(dirname "$0")/gcloud.sh"

folder=${1:-$root/runs/$NAME}
run mkdir -p "$folder"
if in_bucket; then
  run gcloud storage rsync --recursive "$WORKDIR" "$folder"
else
  tpus tpu-vm scp --recurse "$NAME:espl_jax/$WORKDIR/*" "$folder" --worker=0
fi
tpus tpu-vm scp "$NAME:espl_jax/run.log" "$folder/run.log" --worker=0 ||
  echo "no log: the slice is gone, or nothing was started on it" >&2
