#!/usr/bin/env bash
# Keeps the run going until it has ended: creates the slice, starts the run, and looks at both every POLL
# seconds. A slice that was preempted or failed is deleted and made anew, and the run started again, which
# resumes from WORKDIR.
#
#   experiments/tpu/keep.sh [--dry-run]
#
# Ends with the exit code of the run. Runs here, best in tmux; it can be stopped and started at any time.
set -eu
. "$(dirname "$0")/gcloud.sh"

if ! in_bucket; then
  echo "WORKDIR=$WORKDIR: name a bucket, gs://...; the disks of a slice that was preempted are lost" >&2
  exit 2
fi

# A slice that dies while it is being made is seen in the next round; what gcloud refuses is an error.
make() {
  local code=0
  "$here/create.sh" || code=$?
  case $code in
    0) "$here/start.sh" ;;
    3) ;;
    *) exit "$code" ;;
  esac
}

if [ -n "$DRY_RUN" ]; then
  make
  echo "# and where the slice was preempted:"
  "$here/delete.sh"
  make
  exit
fi

failed=
while :; do
  now=$(state)
  case $now in
    READY)
      # Nothing where a worker cannot be reached: the next round will see why.
      code=$(on_workers 0 "if [ -f espl_jax/exit_code ]; then cat espl_jax/exit_code
elif tmux has-session -t espl_jax 2>/dev/null; then echo running; else echo none; fi" | tail -n 1) || code=
      case $code in
        "" | running) ;;
        none) make ;;
        *)
          # A slice that is going down kills the run first: a failure counts if it is there a round later.
          if [ "$code" = 0 ] || [ "$code" = "$failed" ]; then
            echo "the run ended with exit code $code; watch.sh shows its log, fetch.sh copies its results"
            exit "$code"
          fi
          ;;
      esac
      failed=$code
      ;;
    NONE) make ;;
    FAILED | PREEMPTED | SUSPENDED | STOPPED | TERMINATED)
      echo "$NAME is $now: making it anew"
      "$here/delete.sh"
      make
      ;;
  esac
  sleep "$POLL"
done
