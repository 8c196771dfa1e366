"""Counts how often a model sees each token id, for balanced hash layers.

    python scripts/token_counts.py OUTPUT [TASK INPUTS TARGETS BATCHES]

    python scripts/token_counts.py counts.txt c4_span_corruption 512 114 2000

One count a line, from id 0, of the tokens that a router is asked about: inputs
of the encoder and of the decoder, padding left out. Batches are training's own,
of 64 rows. By default it counts 400 batches of docs_span_corruption, about one
epoch, in half a minute; sparse_experts/data/assets/docs_8k_counts.txt was made
of docs_installed_span_corruption.
"""

import pathlib
import sys

import numpy as np

from sparse_experts.data import streams, token_text
from sparse_experts.data.features.text import TextToText


def main(
  output: str,
  task: str = 'docs_span_corruption',
  inputs: str = '256',
  targets: str = '58',
  num_batches: str = '400',
) -> None:
  stream = streams.Batches(
    task,
    'train',
    {'inputs': int(inputs), 'targets': int(targets)},
    batch_size=64,
    features=TextToText(),
    seed=0,
  )
  counts = np.zeros(token_text.vocabulary_size(task), int)
  for _ in range(int(num_batches)):
    batch = next(stream)
    tokens = batch['encoder_input_tokens']
    counts += np.bincount(tokens[tokens > 0], minlength=len(counts))
    # The decoder's first input is 0, which is no padding there.
    real = batch['decoder_target_tokens'] > 0
    tokens = batch['decoder_input_tokens'][real]
    counts += np.bincount(tokens, minlength=len(counts))
  pathlib.Path(output).write_text('\n'.join(map(str, counts)) + '\n')


if __name__ == '__main__':
  main(*sys.argv[1:])
