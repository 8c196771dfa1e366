#!/usr/bin/env bash
# Installs the project and runs its main job: trains a small Switch Transformer
# on the documentation corpus, evaluates it, and prints what it fills in.
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
echo '== infer: the model fills in held-out text =='
# A sentence or two at a time, to be read. Answers are drawn: what is likeliest
# after so short a training is a line break.
run infer --gin_file=gin/quickstart.gin --gin.TEMPERATURE=0.7 \
  --gin.TASK_FEATURE_LENGTHS="{'inputs': 48, 'targets': 12}" "$@"
