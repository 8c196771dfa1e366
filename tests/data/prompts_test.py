"""Texts of one's own are the rows that a task that held them would make."""

import re

import numpy as np
import pytest

from sparse_experts.data import own_files, prompts, tasks, vocabularies
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
  given = prompts.tokenized(texts, dataset, features)
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
      "'docs_lm' has no inputs: give the whole text as inputs",
    ),
    # Lengths of other features than the task has, either way.
    ([{'inputs': 'a'}], BOTH, "'docs_lm' has the features ['targets'], but"),
    ([{'inputs': 'a'}], {'targets': 16}, "['inputs', 'targets'], but lengths"),
  ],
)
def test_what_cannot_be_a_row(texts, lengths, says):
  task = 'docs_lm' if 'docs_lm' in says else 'tiny_sums'
  dataset = sums(lengths, task)
  with pytest.raises(ValueError, match=re.escape(says)):
    prompts.tokenized(texts, dataset, Text())
  if 'features' in says or 'but lengths' in says:  # Questions, too.
    with pytest.raises(ValueError, match=re.escape(says)):
      next(prompts.of_file(texts, dataset, Text()))


def test_a_prefix_has_no_end(forget_new_tasks, tmp_path):
  """As the tasks have none, whose prefixes are cut anywhere."""
  (tmp_path / 'a.txt').write_text('a')
  files = {'train': str(tmp_path / 'a.txt')}
  mine = own_files.text_task(files, 'prefix_lm', vocabulary='bytes')
  for name in (mine, 'docs_prefix_lm', 'c4_prefix_lm'):
    features = tasks.find(name).output_features
    assert not any(feature.add_eos for feature in features.values()), name
  dataset, texts = Dataset(mine, BOTH, 8), [{'inputs': 'ab'}]
  ids = vocabularies.byte().encode('ab')
  (given,) = prompts.tokenized(texts, dataset, TextToText())
  assert given.ids['inputs'].tolist() == ids
  texts = [{'inputs': 'ab', 'targets': 'ab'}]
  (asked,) = prompts.of_file(texts, dataset, TextToText())
  asked_L = asked.features['encoder_input_tokens']
  assert asked_L[asked_L > 0].tolist() == asked.targets.tolist() == ids


def test_a_decoder_alone_continues_questions_without_an_end(forget_new_tasks):
  texts, ids = [{'inputs': 'ab'}], vocabularies.byte().encode('ab')
  alone = {'targets': 16}
  dataset = Dataset(own_files.questions(alone, 'bytes'), alone, 8)
  (asked,) = prompts.of_file(texts, dataset, Text())
  assert asked.features['decoder_input_tokens'][:4].tolist() == [0, *ids, 0]
  dataset = Dataset(own_files.questions(BOTH, 'bytes'), BOTH, 8)
  (asked,) = prompts.of_file(texts, dataset, TextToText())
  assert asked.features['encoder_input_tokens'][:3].tolist() == [*ids, 1]
  with pytest.raises(ValueError, match=r"= \{'targets': 32\}"):
    next(prompts.of_file(texts, dataset, Text()))


def test_a_folder_is_no_file(tmp_path):
  for path in (tmp_path, ''):
    with pytest.raises(ValueError, match='is a folder: give a file'):
      prompts.read(path)


@pytest.mark.parametrize('name', ['a.txt', 'a.jsonl'])
def test_a_byte_order_mark_is_no_part_of_the_first_text(name, tmp_path):
  line = '{"inputs": "1+1"}' if name.endswith('.jsonl') else '1+1'
  (tmp_path / name).write_text(line + '\r\n', 'utf-8-sig')
  assert prompts.read(tmp_path / name) == [{'inputs': '1+1'}]
