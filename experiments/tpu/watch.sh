#!/usr/bin/env bash
# Follows the log of worker 0, or shows the last metrics.
#
#   experiments/tpu/watch.sh [--dry-run] [metrics]
#
# In a bucket, metrics appear when a checkpoint is made.
set -eu
. "$(dirname "$0")/gcloud.sh"

case ${1:-log} in
  log) on_workers 0 "tail -n 50 -F espl_jax/run.log" ;;
  metrics)
    if in_bucket; then
      run gcloud storage cat "$WORKDIR/metrics.jsonl/*" | tail -n 5
    else
      on_workers 0 "cd espl_jax && tail -n 5 -F $WORKDIR/metrics.jsonl"
    fi
    ;;
  *)
    echo "not understood: $1; give nothing for the log, or metrics" >&2
    exit 2
    ;;
esac
