#!/usr/bin/env bash
# Compares models with transformers: import, export, logits, greedy answers and
# losses, of small random checkpoints. torch and transformers get an environment
# of their own, .venv-hugging-face. Writes docs/results/hugging_face.md, or the
# file that is its argument.
set -euo pipefail
EXTRA=
source "$(dirname "$0")/environment.sh"
THEIRS=.venv-hugging-face
if [ ! -e "$THEIRS/.installed" ]; then
  echo "installing torch and transformers into $THEIRS (once)" >&2
  "$PYTHON" -m venv "$THEIRS"
  "$THEIRS/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 transformers==5.24.0 sentencepiece==0.2.3
  touch "$THEIRS/.installed"
fi
FOLDER=$(mktemp -d)
trap 'rm -rf "$FOLDER"' EXIT
mkdir "$FOLDER/theirs" "$FOLDER/exported"
"$THEIRS/bin/python" scripts/check_hugging_face.py theirs "$FOLDER"
"$VENV/bin/python" scripts/check_hugging_face.py ours "$FOLDER"
"$THEIRS/bin/python" scripts/check_hugging_face.py again "$FOLDER" \
  "${1:-docs/results/hugging_face.md}"
