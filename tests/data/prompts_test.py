"""Texts of one's own are the rows that a task that held them would make."""

import re

import numpy as np
import pytest

from sparse_experts.data import prompts, vocabularies
from sparse_experts.data.dataset import Dataset
from sparse_experts.data.features.text import Text, TextToText

BOTH = {'inputs': 16, 'targets': 16}
SUMS = [(f'{a}+{b}', f'{a + b}') for a in (8, 9) for b in range(10)]


def sums(lengths, task='tiny_sums'):
  """The held-out sums in batches of 8."""
  return Dataset(
    task, lengths, batch_size=8, split='validation', pack=False,
    modules=('tiny_tasks',),
  )  # fmt: skip


def assert_rows_are_the_tasks(texts, dataset, features):
  given = prompts.tokenized(texts, dataset)
  found = list(prompts.batches(given, dataset, features))
  expected = list(dataset.evaluation(features))
  assert len(found) == len(expected) == 3  # The last one is filled up.
  for ours, theirs in zip(found, expected):
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
      np.testing.assert_array_equal(x, theirs[name], err_msg=name)
  return [text.texts for text in given]


@pytest.mark.parametrize('features', [TextToText(), Text()])
def test_rows_are_the_tasks(features):
  texts = [{'inputs': x, 'targets': y} for x, y in SUMS]
  assert assert_rows_are_the_tasks(texts, sums(BOTH), features) == texts


def test_rows_of_a_language_model(forget_new_tasks):
  """Two digits and an end are three tokens, of which two have room."""
  import seqio
  from tiny_tasks import Sums

  seqio.TaskRegistry.add(
    'tiny_answers',
    source=Sums(),
    preprocessors=[
      seqio.preprocessors.tokenize,
      seqio.preprocessors.append_eos_after_trim,
    ],
    output_features={'targets': seqio.Feature(vocabularies.byte())},
  )
  texts = [{'inputs': y} for _, y in SUMS]
  for length in (16, 2):
    dataset = sums({'targets': length}, 'tiny_answers')
    found = assert_rows_are_the_tasks(texts, dataset, Text())
    cuts = [text.get('targets_cut', 0) for text in found]
    assert cuts == [max(len(y) + 1 - length, 0) for _, y in SUMS]


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
    prompts.tokenized(texts, sums(lengths))
