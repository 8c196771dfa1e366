#!/usr/bin/env bash
# Writes the parts of docs/ that are made from the source (--write), or ends
# with 1 if one is stale (--check). Names of parts may follow.
set -euo pipefail
EXTRA=test
source "$(dirname "$0")/environment.sh"
JAX_PLATFORMS=cpu exec "$VENV/bin/python" scripts/docs.py "$@"
