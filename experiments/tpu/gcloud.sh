# Read by every script here: the configuration, checked, and how gcloud is called.
# shellcheck shell=bash disable=SC2034

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
config=${TPU_CONFIG:-$here/config.sh}
# shellcheck source=config.sh
. "$config"

export DRY_RUN=${DRY_RUN:-}
if [ "${1:-}" = --dry-run ]; then
  DRY_RUN=1
  shift
fi

missing=
for name in PROJECT ZONE NAME TYPE RUNTIME WORKDIR RUN; do
  [ -n "${!name}" ] || missing="$missing $name"
done
if [ -n "$missing" ]; then
  echo "missing:$missing; set them in $config or in the environment" >&2
  exit 2
fi

# Runs a command, or with DRY_RUN prints it.
run() {
  if [ -n "$DRY_RUN" ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

# gcloud compute tpus, in our project and zone: `tpus GROUP COMMAND ARGUMENTS`.
tpus() {
  run gcloud compute tpus "$@" --project="$PROJECT" --zone="$ZONE" --quiet
}

# Runs a command on `all` workers, or on the one of that number.
on_workers() {
  tpus tpu-vm ssh "$NAME" --worker="$1" --command="$2"
}

in_bucket() {
  case $WORKDIR in gs://*) ;; *) return 1 ;; esac
}

# What `describe` says is the state of a queued resource or of a slice; NONE where there is no such thing.
described() {
  local said
  if said=$(tpus "$1" describe "$NAME" --format="value($2)" 2>&1); then
    echo "$said" | tail -n 1
  else
    case $said in *NOT_FOUND*) echo NONE ;; *) echo "$said" >&2 && echo UNKNOWN ;; esac
  fi
}

# READY, NONE, UNKNOWN (gcloud failed), or what the slice waits for or died of.
state() {
  local queued=ACTIVE node
  if [ "$QUEUED" = 1 ]; then
    queued=$(described queued-resources state.state)
  fi
  if [ "$queued" != ACTIVE ]; then
    echo "$queued"
    return
  fi
  node=$(described tpu-vm state)
  # An active request whose slice has gone was preempted.
  if [ "$QUEUED" = 1 ] && [ "$node" = NONE ]; then node=PREEMPTED; fi
  echo "$node"
}
