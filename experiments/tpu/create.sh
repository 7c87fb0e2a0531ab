#!/usr/bin/env bash
# Creates the slice, waits for it, and installs the project and FILES on every worker.
#
#   experiments/tpu/create.sh [--dry-run]
#
# On a slice that is there it only installs. Exits with 3 if the slice failed or was preempted meanwhile.
set -eu
. "$(dirname "$0")/gcloud.sh"

create() {
  local spot=()
  if [ "$SPOT" = 1 ]; then spot=(--spot); fi
  if [ "$QUEUED" = 1 ]; then
    tpus queued-resources create "$NAME" --node-id="$NAME" --accelerator-type="$TYPE" \
      --runtime-version="$RUNTIME" ${spot[@]+"${spot[@]}"}
  else
    tpus tpu-vm create "$NAME" --accelerator-type="$TYPE" --version="$RUNTIME" ${spot[@]+"${spot[@]}"}
  fi
}

wait_for_it() {
  local now last=
  while now=$(state) && [ "$now" != READY ]; do
    [ "$now" = "$last" ] || echo "$NAME: $now"
    last=$now
    case $now in
      FAILED | PREEMPTED | SUSPENDING | SUSPENDED | STOPPED | TERMINATED)
        echo "$NAME is $now: delete.sh removes it, keep.sh does so by itself and asks again" >&2
        exit 3
        ;;
    esac
    sleep "$POLL"
  done
}

if [ -n "$DRY_RUN" ]; then
  create
else
  if [ "$(state)" = NONE ]; then create; fi
  wait_for_it
fi

packed=$(mktemp -d)
trap 'rm -rf "$packed"' EXIT
git -C "$root" archive --format=tar.gz --output="$packed/espl_jax.tar.gz" HEAD
tpus tpu-vm scp "$packed/espl_jax.tar.gz" "$NAME:" --worker=all
on_workers all "set -eu
mkdir -p espl_jax && tar -xzf espl_jax.tar.gz -C espl_jax && cd espl_jax
python3 -m pip install --quiet --user uv
python3 -m uv venv --quiet --allow-existing --python $PYTHON .venv
python3 -m uv pip install --quiet --python .venv/bin/python -e '.[tpu,gcs]'"
if [ -n "$FILES" ]; then
  # shellcheck disable=SC2086 # several files
  tpus tpu-vm scp --recurse $FILES "$NAME:espl_jax/" --worker=all
fi
