#!/usr/bin/env bash
# A TPU VM pod through the gcloud command line: create it, install this project
# on all of its workers, train, go on after a preemption, tear down.
#
#   export PROJECT=my-project ZONE=us-central2-b NAME=switch-base
#   export ACCELERATOR=v4-8 BUCKET=gs://my-bucket
#   scripts/tpu_pod.sh create
#   scripts/tpu_pod.sh install
#   scripts/tpu_pod.sh run train --gin_file=gin/models/switch/base.gin ...
#   scripts/tpu_pod.sh resume train --gin_file=...  # Until it has ended.
#   scripts/tpu_pod.sh delete
#
# --dry_run before the command prints what it would run, and runs nothing.
#
# PROJECT, ZONE, NAME, ACCELERATOR: required. BUCKET: for `run` and `resume`;
# checkpoints go to $BUCKET/$NAME. VERSION: the TPU VM's software. SPOT=1: a
# preemptible pod. SOURCE: what pip installs. TFDS_DATA_DIR: prepared data.
set -euo pipefail

VERSION=${VERSION:-tpu-ubuntu2204-base}
SOURCE=${SOURCE:-sparse_experts}
TFDS_DATA_DIR=${TFDS_DATA_DIR:-${BUCKET:-}/tensorflow_datasets}
# Between asking for a pod and asking again.
RETRY_SECONDS=${RETRY_SECONDS:-60}
DRY_RUN=

fail() {
  echo "error: $1" >&2
  exit 2
}

usage() {
  sed -n '2,19s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
}

# Runs a command, or prints it as one could type it.
do_it() {
  if [ -z "$DRY_RUN" ]; then
    "$@"
    return
  fi
  local word line=
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@+-]+$ ]] || word=${word@Q}
    line+=" $word"
  done
  echo "${line# }"
}

tpu() { # VERB [FLAG ...]
  local verb=$1
  shift
  do_it gcloud compute tpus tpu-vm "$verb" "$NAME" \
    --project="$PROJECT" --zone="$ZONE" "$@"
}

# One command on every worker of the pod, all at the same time.
on_all_workers() {
  tpu ssh --worker=all "--command=$1"
}

create() {
  local flags=(--accelerator-type="$ACCELERATOR" --version="$VERSION")
  [ -z "${SPOT:-}" ] || flags+=(--spot)
  tpu create "${flags[@]}"
}

install_project() {
  on_all_workers "python3 -m venv env && env/bin/pip install --quiet $SOURCE jax[tpu]"
}

# The same command on every worker: they find each other by themselves.
run_project() {
  local words
  words=$(printf ' %q' "$@")
  words+=" --coordinator=auto --gin.MODEL_DIR=$BUCKET/$NAME"
  on_all_workers "TFDS_DATA_DIR=$TFDS_DATA_DIR env/bin/python -m sparse_experts$words"
}

state() {
  gcloud compute tpus tpu-vm describe "$NAME" --project="$PROJECT" \
    --zone="$ZONE" --format='value(state)' 2>/dev/null || echo ABSENT
}

# Makes a preempted pod anew and goes on, until a run ends on a pod that is still
# there: a run that is preempted saves, and ends well too. `train` goes on from
# its latest checkpoint by itself.
resume() {
  if [ -n "$DRY_RUN" ]; then
    echo '# while the pod is not READY:'
    tpu describe '--format=value(state)'
    tpu delete --quiet
    create
    install_project
    echo '# then, and again if the pod is preempted:'
    run_project "$@"
    return
  fi
  local code
  while true; do
    until [ "$(state)" = READY ]; do
      [ "$(state)" = ABSENT ] || tpu delete --quiet
      if create; then
        install_project
      else
        sleep "$RETRY_SECONDS"
      fi
    done
    code=0
    run_project "$@" || code=$?
    sleep "$RETRY_SECONDS"  # Until a preempted pod says so.
    [ "$(state)" != READY ] || return "$code"
  done
}

if [ "${1:-}" = --dry_run ]; then
  DRY_RUN=1
  shift
fi
COMMAND=${1:-}
case $COMMAND in
  create | install | run | resume | delete) shift ;;
  '' | help | --help)
    usage
    exit 0
    ;;
  *) fail "no command '$COMMAND': create, install, run, resume, delete, help." ;;
esac
for variable in PROJECT ZONE NAME ACCELERATOR; do
  [ -n "${!variable:-}" ] || fail "$variable is not set; see scripts/tpu_pod.sh help."
done
if [ "$COMMAND" = run ] || [ "$COMMAND" = resume ]; then
  [[ ${BUCKET:-} == gs://* ]] || fail "BUCKET must be a gs:// path, for checkpoints."
  [ $# -gt 0 ] || fail "$COMMAND takes a command, such as train --gin_file=FILE."
fi
if [ -z "$DRY_RUN" ] && ! command -v gcloud > /dev/null; then
  fail 'gcloud is not installed: https://cloud.google.com/sdk, or use --dry_run.'
fi

case $COMMAND in
  create) create ;;
  install) install_project ;;
  run) run_project "$@" ;;
  resume) resume "$@" ;;
  delete) tpu delete --quiet ;;
esac
