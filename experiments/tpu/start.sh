#!/usr/bin/env bash
# Starts the run on every worker, or goes on with it: the same command resumes what WORKDIR holds.
#
#   experiments/tpu/start.sh [--dry-run]
#
# It runs in tmux session `espl_jax`, writes espl_jax/run.log, and leaves its exit code in espl_jax/exit_code.
# A file env.sh beside the project (see FILES) is read first: `export HF_TOKEN=...`.
set -eu
. "$(dirname "$0")/gcloud.sh"

script=$(mktemp -d)
trap 'rm -rf "$script"' EXIT
cat >"$script/run.sh" <<END
cd ~/espl_jax
rm -f exit_code
if [ -f env.sh ]; then . ./env.sh; fi
.venv/bin/python -m espl_jax.main $RUN --workdir=$WORKDIR >>run.log 2>&1
echo \$? >exit_code
END
if [ -n "$DRY_RUN" ]; then cat "$script/run.sh"; fi
tpus tpu-vm scp "$script/run.sh" "$NAME:espl_jax/run.sh" --worker=all
on_workers all "tmux has-session -t espl_jax 2>/dev/null ||
  tmux new-session -d -s espl_jax bash espl_jax/run.sh"
