"""What a model is asked, from a file instead of a task.

A text file asks once a line. A file that ends in .jsonl holds objects, one a
line, with the text 'inputs' and maybe 'targets', the answer one hopes for.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from sparse_experts.data import tasks
from sparse_experts.data.dataset import Dataset

MOST_BYTES = 1_000_000  # Of a line. Models read far less.


def read(path: epath.PathLike) -> list[dict[str, str]]:
  """The examples of a file, with 'inputs' and maybe 'targets'.

  Raises:
    FileNotFoundError: there is none. ValueError: it is empty, or a line is too
      long, no UTF-8 or not what it should be; the message says which.
  """
  path = epath.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f'there is no input file {path}.')
  lines = path.read_bytes().split(b'\n')
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


def _parse_text(line: str, where: str) -> dict[str, str]:
  return {'inputs': line.removesuffix('\r')}


def _parse_json(line: str, where: str) -> dict[str, str]:
  try:
    example = json.loads(line)
    texts = {k: example[k] for k in ('inputs', 'targets') if k in example}
    texts['inputs'].encode() + texts.get('targets', '').encode()
  except (ValueError, TypeError, LookupError, AttributeError) as error:
    raise ValueError(
      f'{where} is no JSON object with a text "inputs" and maybe a text '
      '"targets": write {"inputs": "..."}.'
    ) from error
  return texts


@dataclasses.dataclass(frozen=True)
class Example:
  """A question, and the answer one hopes for if it is known.

  Attributes:
    features: what the model is asked, see `LanguageModel.start`; int32 [L].
    targets: token ids of that answer; empty if unknown.
    texts: 'inputs' and, if known, 'targets'; 'inputs_cut' says how many tokens
      of a file's line did not fit.
  """

  features: Mapping[str, np.ndarray]
  targets: np.ndarray
  texts: Mapping[str, Any]


def of_task(dataset: Dataset, converter: str) -> Iterator[Example]:
  """The examples of a dataset that is not packed, in order."""
  for batch in dataset.evaluation(converter):
    for i in np.flatnonzero(batch['decoder_loss_weights'].any(1)):
      row = {name: x[i] for name, x in batch.items()}
      wanted = row['decoder_loss_weights'] > 0
      targets = row['decoder_target_tokens'][wanted]
      inputs = row.get('encoder_input_tokens', ())
      if 'decoder_causal_attention' in row:
        inputs = row['decoder_target_tokens'][~wanted]
      texts = {
        'inputs': dataset.text('inputs', inputs) if len(inputs) else '',
        'targets': dataset.text('targets', targets),
      }
      yield Example(row, targets, texts)


def of_file(
  read: Sequence[Mapping[str, str]], dataset: Dataset, converter: str
) -> Iterator[Example]:
  """The examples of `read`, in the vocabulary and lengths of a dataset.

  A task without inputs, a language model's, continues them.
  """
  task = tasks.find(dataset.mixture_or_task_name, dataset.modules)
  lengths = dataset.feature_lengths
  asks = 'inputs' in task.output_features

  def tokenize(name: str, text: str, end: bool) -> tuple[np.ndarray, int]:
    """Token ids of a text, and how many more would not fit."""
    feature = task.output_features[name]
    ids = feature.vocabulary.encode(text)
    room = lengths[name] - end
    eos = [feature.vocabulary.eos_id] * end
    return np.array(ids[:room] + eos, np.int32), max(0, len(ids) - room)

  for texts in read:
    name = 'inputs' if asks else 'targets'
    end = asks and task.output_features[name].add_eos
    tokens, cut = tokenize(name, texts['inputs'], end)
    targets = np.zeros(0, np.int32)
    if 'targets' in texts:
      targets, _ = tokenize('targets', texts['targets'], end=True)
    yield Example(
      features(converter, tokens, lengths[name]),
      targets,
      {**texts, **({'inputs_cut': cut} if cut else {})},
    )


def features(
  converter: str, tokens: np.ndarray, length: int
) -> dict[str, np.ndarray]:
  """The features of one prompt of at most `length` tokens, padded to it.

  >>> features('decoder', np.array([7, 8]), 3)['decoder_input_tokens'].tolist()
  [0, 7, 8, 0]
  """
  padded = np.pad(tokens.astype(np.int32), (0, length - len(tokens)))
  if converter == 'encoder_decoder':
    return {'encoder_input_tokens': padded}
  is_prompt = np.arange(length + 1) <= len(tokens)
  return {
    'decoder_input_tokens': np.pad(padded, (1, 0)),
    'decoder_causal_attention': is_prompt.astype(np.int32),
  }
