#!/usr/bin/env bash
# Installs the project and runs its main job: trains a small Switch Transformer
# on the opening sentences of the documentation corpus, evaluates it, and prints
# what its experts took and which words it expects.
# Run it again to resume. Arguments go to every command: --gin.TRAIN_STEPS=800 --gin.DECAY_STEPS=800
set -euo pipefail
EXTRA=
source "$(dirname "$0")/environment.sh"
MODEL_DIR=runs/sentences
for argument in "$@"; do
  case $argument in --gin.MODEL_DIR=*) MODEL_DIR=${argument#*=} ;; esac
done
RECIPE=(
  --gin_file=gin/quickstart.gin --gin_file=gin/tasks/docs_sentence.gin
  "--gin.MODEL_DIR=$MODEL_DIR"
)
DENSE=(
  --gin_file=gin/quickstart_dense.gin --gin_file=gin/tasks/docs_sentence.gin
  "$@" "--gin.MODEL_DIR=$MODEL_DIR-dense"  # What comes last counts.
)
run() { "$VENV/bin/python" -m sparse_experts "$1" "${RECIPE[@]}" "${@:2}"; }

echo '== train: after three words of a sentence, the rest of it =='
run train "$@"
echo
echo '== evaluate: held-out sentences, and those of a package it has never seen =='
run evaluate "$@"
run evaluate --gin.EVAL_SPLIT=out_of_domain "$@"
echo
echo '== record: what each expert took of held-out sentences =='
echo "(The encoder's router is nearly uniform: docs/results/small_switch.md says why.)"
run record "$@"
echo
echo '== infer: the first held-out sentences, what it expects after each word =='
run infer --gin.infer.infer.num_examples=6 --top=3 "$@"

# A command, to be pasted into a shell.
say() { printf '%q ' "$VENV/bin/python" -m sparse_experts "$@"; }
cat << EOF
== three things to try next ==
# The run on a page of its own: curves, loads, classes and domains of tokens.
$(say report "$MODEL_DIR")

# A beginning of yours: how does it go on?
echo 'Return the number' > $(printf '%q' "$MODEL_DIR/mine.txt") && $(say infer "${RECIPE[@]}" "$@" "--input=$MODEL_DIR/mine.txt" --top=3 --gin.infer.infer.max_tokens=12)

# The dense twin, of the same arithmetic for each token: what do experts add?
$(say train "${DENSE[@]}") && $(say compare "$MODEL_DIR-dense" "$MODEL_DIR" "--output=$MODEL_DIR.html")
EOF
