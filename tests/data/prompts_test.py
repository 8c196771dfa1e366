"""Texts of one's own are the rows that a task that held them would make."""

import re

import numpy as np
import pytest

from sparse_experts.data import prompts
from sparse_experts.data.dataset import Dataset
from sparse_experts.data.features.text import Text, TextToText

BOTH = {'inputs': 16, 'targets': 16}


def sums(**kwargs):
  """The held-out sums, '8+0' to '9+9', in batches of 8."""
  return Dataset(
    'tiny_sums', batch_size=8, split='validation', pack=False,
    modules=('tiny_tasks',), **kwargs,
  )  # fmt: skip


@pytest.mark.parametrize(
  'features, lengths',
  [
    (TextToText(), BOTH),
    (Text(), BOTH),
    (Text(), {'targets': 16}),
    (Text(), {'targets': 2}),  # '10' to '18' are cut to '1' and an end.
  ],
)
def test_rows_are_the_tasks(features, lengths):
  dataset = sums(feature_lengths=lengths)
  answers = [(f'{a}+{b}', f'{a + b}') for a in (8, 9) for b in range(10)]
  if 'inputs' in lengths:
    texts = [{'inputs': x, 'targets': y} for x, y in answers]
  else:
    texts = [{'inputs': y} for _, y in answers]
  given = prompts.tokenized(texts, dataset)
  found = list(prompts.batches(given, dataset, features))
  expected = list(dataset.evaluation(features))
  assert len(found) == len(expected) == 3  # The last one is filled up.
  for ours, theirs in zip(found, expected):
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
      np.testing.assert_array_equal(x, theirs[name], err_msg=name)
  cuts = [text.texts.get('targets_cut', 0) for text in given]
  assert cuts == [max(len(y) + 1 - lengths['targets'], 0) for _, y in answers]


@pytest.mark.parametrize(
  'texts, lengths, says',
  [
    ([{'inputs': 'a'}, {'inputs': [3]}], BOTH, 'example 2 is given by token'),
    (
      [{'inputs': 'a', 'targets': 'b'}],
      {'targets': 16},
      "'tiny_sums' has no inputs: give the whole text as inputs",
    ),
  ],
)
def test_what_cannot_be_a_row(texts, lengths, says):
  with pytest.raises(ValueError, match=re.escape(says)):
    prompts.tokenized(texts, sums(feature_lengths=lengths))
