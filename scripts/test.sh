#!/usr/bin/env bash
# Installs the test extra and runs the checks. Plain: the default run; --all
# adds what is marked slow; --smoke is what another stack of packages breaks
# first. Other arguments go to pytest.
set -euo pipefail
EXTRA=test
source "$(dirname "$0")/environment.sh"
# Seconds on two cores. Without the emitters that JAX 0.12 has no flag against,
# compiling takes a third of the time.
case $VERSION in 3.11) limit=900 ;; *) limit=1200 ;; esac
chosen=(-m 'not slow')
case ${1:-} in
  --all)
    limit=3600
    chosen=(--no-loadscope-reorder)  # As tests/durations.py puts them.
    shift
    ;;
  --smoke)
    limit=600
    chosen+=(tests/sharding tests/config tests/inference tests/evaluation
      tests/moe/{layer,dispatchers,grouped,nnx}_test.py
      tests/data/{streams,own_files,docstrings}_test.py
      tests/training/{resume,checksums,objectives}_test.py
      tests/convert/formats_test.py tests/commands/cli_test.py
      tests/planning/workload_test.py tests/models/distillation_test.py)
    shift
    ;;
esac
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
# A file's tests stay in one process, which shares what it has compiled.
exec "$VENV/bin/python" -m pytest -n auto --dist loadfile --seconds "$limit" \
  "${chosen[@]}" "$@"
