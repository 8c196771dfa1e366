#!/usr/bin/env bash
# Installs the project and runs its main job: trains a small Switch Transformer
# on the documentation corpus, evaluates it, and prints which words it expects
# and what its experts took.
# Run it again to resume. Arguments go to every command: --gin.TRAIN_STEPS=800 --gin.DECAY_STEPS=800
set -euo pipefail
EXTRA=
source "$(dirname "$0")/environment.sh"
run() { "$VENV/bin/python" -m sparse_experts "$@"; }

echo '== train =='
run train --gin_file=gin/quickstart.gin "$@"
echo
echo '== evaluate: held-out text, and a package it has never seen =='
run evaluate --gin_file=gin/quickstart.gin "$@"
run evaluate --gin_file=gin/quickstart.gin --gin.EVAL_SPLIT=out_of_domain "$@"
echo
echo '== record: what each expert took of held-out text =='
run record --gin_file=gin/quickstart.gin "$@"
echo
echo '== infer: a word of a held-out sentence is missing; which does it expect? =='
# The first eight sentences of the split, whatever they are.
run infer --gin_file=gin/quickstart.gin --gin_file=gin/tasks/docs_cloze.gin \
  --gin.infer.infer.num_examples=8 --top=3 "$@"

cat << EOF
== three things to try next ==
# The run on one page: curves, loads, tokens and domains of every expert.
$VENV/bin/python -m sparse_experts report runs/quickstart

# The same of a package that it has never seen, about human language.
$VENV/bin/python -m sparse_experts infer --gin_file=gin/quickstart.gin --gin_file=gin/tasks/docs_cloze.gin --gin.EVAL_SPLIT=out_of_domain --top=3

# Its dense twin, with the same arithmetic for each token: what do experts add?
$VENV/bin/python -m sparse_experts train --gin_file=gin/quickstart_dense.gin
EOF
