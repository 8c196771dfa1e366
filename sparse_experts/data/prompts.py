"""What a model is asked, from a file instead of a task.

A text file asks once a line, of which none is blank. A file that ends in .jsonl
holds objects, one a line, with the text 'inputs' and maybe 'targets', the
answer one hopes for. Either may be a list of token ids instead: all that the
model reads, to which nothing is added.
"""

from __future__ import annotations

import codecs
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

import numpy as np
from etils import epath

from sparse_experts import storage
from sparse_experts.data import host_tensorflow, streams, tasks
from sparse_experts.data.dataset import Dataset
from sparse_experts.data.examples import check_lengths, splits
from sparse_experts.data.features.text import Text, TextToText

MOST_BYTES = 1_000_000  # Of a line. Models read far less.


Given = str | list[int]  # A text, or its token ids.


def read(path: epath.PathLike) -> list[dict[str, Given]]:
  """The examples of a file, with 'inputs' and maybe 'targets'.

  Raises:
    FileNotFoundError: there is none. ValueError: it is empty, or a line is too
      long, no UTF-8 or not what it should be; the message says which.
  """
  path = storage.given(path, '--input')
  if path.is_dir():
    raise ValueError(f'--input={path} is a folder: give a file.')
  if not path.is_file():
    raise FileNotFoundError(f'there is no input file {path}.')
  lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b'\n')
  if not lines[-1]:
    lines.pop()
  if not lines:
    raise ValueError(f'input file {path} is empty: give one example a line.')
  parse = _parse_json if path.suffix == '.jsonl' else _parse_text
  examples = []
  for number, line in enumerate(lines, 1):
    where = f'line {number} of {path}'
    if len(line) > MOST_BYTES:
      raise ValueError(
        f'{where} has {len(line):,} bytes, but at most {MOST_BYTES:,} are '
        'taken: cut it.'
      )
    try:
      text = line.decode()
    except UnicodeDecodeError as error:
      raise ValueError(
        f'{where} is not UTF-8 from byte {error.start} on: convert the file.'
      ) from error
    examples.append(parse(text, where))
  return examples


def _parse_text(line: str, where: str) -> dict[str, Given]:
  if not line.strip():
    raise ValueError(
      f'{where} is blank: delete it, or ask nothing in so many words, '
      '{"inputs": ""} in a .jsonl file.'
    )
  return {'inputs': line.removesuffix('\r')}


def _parse_json(line: str, where: str) -> dict[str, Given]:
  try:
    example = json.loads(line)
    texts = {k: example[k] for k in ('inputs', 'targets') if k in example}
    for text in texts['inputs'], texts.get('targets', ''):
      if not is_ids(text):
        text.encode()
  except (ValueError, TypeError, LookupError, AttributeError) as error:
    raise ValueError(
      f'{where} is no JSON object with a text "inputs" and maybe a text '
      '"targets", or lists of token ids: write {"inputs": "..."}.'
    ) from error
  return texts


def is_ids(text: Any) -> TypeGuard[list[int]]:
  """Whether a text is given by its token ids."""
  return isinstance(text, list) and all(type(i) is int for i in text)


def check_ids(read: Sequence[Mapping[str, Given]], embeddings: int) -> None:
  """Raises ValueError where a token id is none of so many."""
  for number, example in enumerate(read, 1):
    for name, ids in example.items():
      wrong = [i for i in ids if not 0 <= i < embeddings] if is_ids(ids) else []
      if wrong:
        raise ValueError(
          f'{name!r} of example {number} has token {wrong[0]}, and the model '
          f'has tokens 0 to {embeddings - 1}: give ids of its vocabulary.'
        )


@dataclasses.dataclass(frozen=True)
class Example:
  """A question, and the answer one hopes for if it is known.

  Attributes:
    features: what the model is asked, see `LanguageModel.start`; int32 [L].
    targets: token ids of that answer; empty if unknown.
    texts: 'inputs' and, if known, 'targets', as they were given; 'inputs_cut'
      and 'targets_cut' say how many tokens of a file's line did not fit.
  """

  features: Mapping[str, np.ndarray]
  targets: np.ndarray
  texts: Mapping[str, Any]


def of_task(dataset: Dataset, features: TextToText | Text) -> Iterator[Example]:
  """The examples of a dataset that is not packed, in order."""
  for batch in dataset.evaluation(features):
    for i in range(dataset.batch_size):
      row = {name: x[i] for name, x in batch.items()}
      inputs, targets = features.question(row), features.answer(row)
      if not len(targets):  # No example fills the last batch up.
        continue
      texts = {
        'inputs': dataset.text('inputs', inputs) if len(inputs) else '',
        'targets': dataset.text('targets', targets),
      }
      yield Example(row, targets, texts)


def of_file(
  read: Sequence[Mapping[str, Given]],
  dataset: Dataset,
  features: TextToText | Text,
) -> Iterator[Example]:
  """The examples of `read`, in the vocabulary and lengths of a dataset.

  A task without inputs, a language model's, continues them.

  Args:
    read: examples of a file, from `read`.
    dataset: whose task has the vocabulary, and which has lengths in tokens:
      what is longer is cut at its end.
    features: what a row is for the model.

  Raises:
    ValueError: the dataset's task is unknown, has other features than there are
      lengths, or does not say how a decoder alone reads inputs.
  """
  task = _task(dataset, features)
  lengths = dataset.feature_lengths
  asks = 'inputs' in task.output_features

  def tokenize(name: str, text: Given, end: bool) -> tuple[np.ndarray, int]:
    feature = task.output_features[name]
    end = end and feature.add_eos
    return _tokenize(text, feature.vocabulary, lengths[name], end)

  for texts in read:
    name = 'inputs' if asks else 'targets'
    tokens, cut = tokenize(name, texts['inputs'], end=asks)
    cuts = {'inputs_cut': cut} if cut else {}
    targets = np.zeros(0, np.int32)
    if 'targets' in texts:
      targets, cut = tokenize('targets', texts['targets'], end=True)
      cuts |= {'targets_cut': cut} if cut else {}
    asked = features
    if is_ids(texts['inputs']):  # They say themselves what they begin with.
      special_tokens = dataclasses.replace(features.special_tokens, start=None)
      asked = dataclasses.replace(features, special_tokens=special_tokens)
    yield Example(
      asked.prompt(tokens, lengths[name]),
      targets,
      {**texts, **cuts},
    )


class Tokenized(NamedTuple):
  """A text as an example of a task.

  Attributes:
    ids: by feature of the task, int32 [n], as long as it may be at most.
    texts: as they were given; 'inputs_cut' and 'targets_cut' say how many
      tokens did not fit.
  """

  ids: Mapping[str, np.ndarray]
  texts: Mapping[str, Any]


def cuts(texts: Mapping[str, Any]) -> list[str]:
  """What did not fit of `Example.texts` or `Tokenized.texts`, in sentences.

  >>> cuts({'inputs': 'a', 'targets_cut': 2})
  ['2 tokens of the text did not fit']
  """
  return [
    f'{texts[cut]} tokens of the {name if name in texts else "text"} did not '
    'fit'
    for name, cut in (('inputs', 'inputs_cut'), ('targets', 'targets_cut'))
    if cut in texts
  ]


def tokenized(
  read: Sequence[Mapping[str, Given]],
  dataset: Dataset,
  features: TextToText | Text,
) -> list[Tokenized]:
  """Texts as examples of a dataset's task, each with the end that it has there.

  Of a task without inputs, a language model's, they are targets. Targets that
  are not given are empty.

  Args:
    read: examples of a file, from `read`.
    dataset: whose task it is, and which has lengths in tokens.
    features: what a row is for the model.

  Raises:
    ValueError: as `of_file`, or some are token ids, or have targets that the
      task has no place for.
  """
  task = _task(dataset, features)
  lengths = dataset.feature_lengths
  found = []
  for number, texts in enumerate(read, 1):
    if any(map(is_ids, texts.values())):
      raise ValueError(
        f'example {number} is given by token ids, where texts are asked for; '
        'give the text that they are of.'
      )
    named = texts
    if 'inputs' not in lengths:
      if 'targets' in texts:
        raise ValueError(
          f'example {number} has targets apart from its inputs, and '
          f'{dataset.mixture_or_task_name!r} has no inputs: give the whole '
          'text as inputs.'
        )
      named = {'targets': texts['inputs']}
    ids, cuts = {}, {}
    for name, length in lengths.items():
      feature, ids[name] = task.output_features[name], np.zeros(0, np.int32)
      if name in named:
        ids[name], cut = _tokenize(
          named[name], feature.vocabulary, length, feature.add_eos
        )
        cuts |= {f'{name}_cut': cut} if cut else {}
    found.append(Tokenized(ids, {**texts, **cuts}))
  return found


def batches(
  given: Sequence[Tokenized], dataset: Dataset, features: TextToText | Text
) -> streams.WholeBatches:
  """Batches of texts as `Dataset.evaluation` would have them, unpacked.

  Args:
    given: from `tokenized`.
    dataset: that has the lengths and the size of a batch.
    features: what rows are.
  """
  tf = host_tensorflow.load()
  lengths = dataset.feature_lengths
  examples = tf.data.Dataset.from_generator(
    lambda: (text.ids for text in given),
    output_signature=dict.fromkeys(lengths, tf.TensorSpec([None], tf.int32)),
  )
  rows = features.rows(examples, lengths)
  return streams.WholeBatches(rows, dataset.batch_size, features)


def _task(dataset: Dataset, features: TextToText | Text) -> Any:
  """The task that texts are given to."""
  task = tasks.find(dataset.mixture_or_task_name, dataset.modules)
  lengths = dataset.feature_lengths
  check_lengths(task, lengths, set(lengths))
  is_alone = isinstance(features, Text)
  if is_alone and 'inputs' in lengths and not splits(task):
    # Inputs would end as an encoder's do, and a decoder would go on after that.
    raise ValueError(
      f'a decoder alone continues its text, and task {task.name!r} has no data '
      "that say how inputs end: set TASK_FEATURE_LENGTHS = {'targets': "
      f'{sum(lengths.values())}}}.'
    )
  return task


def _tokenize(
  text: Given, vocabulary: Any, length: int, end: bool
) -> tuple[np.ndarray, int]:
  """Token ids of a text, and how many more would not fit."""
  if is_ids(text):
    ids, last = text, []
  else:
    ids, last = vocabulary.encode(text), [vocabulary.eos_id] * end
  room = length - len(last)
  return np.array([*ids[:room], *last], np.int32), max(0, len(ids) - room)
