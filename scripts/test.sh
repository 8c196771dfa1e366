#!/usr/bin/env bash
# Installs the test extra and runs the checks. Plain: the default run; --all
# adds what is marked slow. Other arguments go to pytest.
set -euo pipefail
EXTRA=test
source "$(dirname "$0")/environment.sh"
marks=(-m 'not slow')
if [ "${1:-}" = --all ]; then
  marks=()
  shift
fi
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
# A file's tests stay in one process, which shares what it has compiled.
exec "$VENV/bin/python" -m pytest -n auto --dist loadfile "${marks[@]}" "$@"
