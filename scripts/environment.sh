# Sourced by the other scripts: makes or updates the virtual environment, fetches
# the small documentation corpus (`docs/corpus.md`), and sets VENV and VERSION.
# PYTHON chooses the interpreter, else it is the newest of those below that runs.
# One of another version than that of .venv gets a folder of its own, .venv-3.12
# say.
# Usage: EXTRA=test; source scripts/environment.sh (EXTRA may be empty)

cd "$(dirname "${BASH_SOURCE[0]}")/.."
version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }
if [ -z "${PYTHON:-}" ]; then
  for PYTHON in python3.13 python3.12 python3.11 python3; do
    if version_of "$PYTHON" > /dev/null 2>&1; then break; fi
  done
fi
VERSION=$(version_of "$PYTHON")
if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "error: Python 3.11 or newer is needed, $PYTHON is $VERSION; set PYTHON=python3.12, say." >&2
  exit 2
fi
VENV=.venv
if [ -x "$VENV/bin/python" ] && [ "$(version_of "$VENV/bin/python")" != "$VERSION" ]; then
  VENV=.venv-$VERSION
fi
echo "Python $VERSION ($PYTHON) in $VENV" >&2
# What is installed is up to date when setup.py is older than the stamp.
STAMP=$VENV/.installed${EXTRA:+-$EXTRA}
if [ ! -e "$STAMP" ] || [ setup.py -nt "$STAMP" ]; then
  echo "installing into $VENV (once; a few minutes)" >&2
  [ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
  "$VENV/bin/pip" install --quiet --disable-pip-version-check -e ".${EXTRA:+[$EXTRA]}"
  touch "$STAMP"
fi
# A request where it is not there yet. Who has no index can take the tasks that do
# without; a task that does not says the same again.
"$VENV/bin/python" -m sparse_experts corpus > /dev/null || true
