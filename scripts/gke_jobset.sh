#!/usr/bin/env bash
# Fills in scripts/gke_jobset.yaml and hands it to kubectl.
#
#   scripts/gke_jobset.sh [--dry_run] COMMAND [FLAG ...]
#
# COMMAND and flags are those of `python -m sparse_experts`. The variables, all
# in the environment, are those at the top of the template; SERVICE_ACCOUNT is
# `default` where it is not set. --dry_run prints the manifest instead.
set -euo pipefail

fail() {
  echo "error: $1" >&2
  exit 2
}

DRY_RUN=
if [ "${1:-}" = --dry_run ]; then
  DRY_RUN=1
  shift
fi
[ $# -gt 0 ] || fail 'what to run? Such as train --gin_file=FILE.'
SERVICE_ACCOUNT=${SERVICE_ACCOUNT:-default}
COMMAND=$(printf '%q ' "$@")
COMMAND=${COMMAND% }

manifest=$(grep -v '^#' "$(dirname "${BASH_SOURCE[0]}")/gke_jobset.yaml")
for variable in NAME IMAGE TPU TOPOLOGY HOSTS CHIPS_PER_HOST BUCKET \
  SERVICE_ACCOUNT COMMAND; do
  [ -n "${!variable:-}" ] || fail "$variable is not set; see scripts/gke_jobset.yaml."
  manifest=${manifest//"\${$variable}"/${!variable}}
done

if [ -n "$DRY_RUN" ]; then
  printf '%s\n' "$manifest"
else
  command -v kubectl > /dev/null || fail 'kubectl is not installed; or use --dry_run.'
  kubectl apply -f - <<< "$manifest"
fi
