"""What earlier versions wrote, such as a run's gin file, read as today's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# Modules, below `sparse_experts`, and classes of theirs by the names that files
# give them. A module keeps its old name there, unless a class of it is renamed.
MODULES = {
  'analysis.bench': 'bench.layer',
  'analysis.decode_speed': 'bench.decode',
  'analysis.precompile': 'planning.precompile',
  'analysis.records': 'insight.records',
  'models.model': 'models.language',
  'models.special_tokens': 'data.special_tokens',
  'training.evaluate': 'evaluation.evaluate',
  'training.infer': 'inference.infer',
}
NAMES = {'model.Model': 'language.Language'}
# What had three arguments that are one `sharding.Placement` now.
PLACED = (
  'train.train',
  'evaluate.Evaluation',
  'infer.infer',
  'records.record',
  'precompile.Run',
)
# Arguments that are gone, with the value that changes nothing.
GONE = {'model.Model.consistency': '0.0'}


def translate(text: str) -> str:
  """The text of a gin file, with today's names.

  Example:
    >>> print(translate('from sparse_experts.models import model\\n'
    ...                 'MODEL = @model.Model()\\n'))
    from sparse_experts.models import language
    MODEL = @language.Language()
    <BLANKLINE>
  """
  for argument, value in GONE.items():
    text = re.sub(
      rf'^(\w+/)*{re.escape(argument)} = {re.escape(value)}\n',
      '',
      text,
      flags=re.MULTILINE,
    )
  for old, new in MODULES.items():
    (room, name), (new_room, new_name) = (m.split('.') for m in (old, new))
    line = f'from sparse_experts.{room} import {name}\n'
    if line not in text:
      continue
    renamed = [of for of in NAMES if of.startswith(f'{name}.')]
    alias = f' as {name}' if new_name != name and not renamed else ''
    text = text.replace(
      line, f'from sparse_experts.{new_room} import {new_name}{alias}\n'
    )
    for of in renamed:
      text = re.sub(rf'\b{re.escape(of)}\b', NAMES[of], text)
  return _placed(text)


def installed(task_name: str) -> str:
  """Today's name of a task on the documentation of the installed packages.

  Example:
    >>> installed('docs_lm')
    'docs_installed_lm'
  """
  return re.sub('^docs_', 'docs_installed_', task_name)


def batches(
  saved: Mapping[str, Any], today: Mapping[str, Any]
) -> dict[str, Any]:
  """What batches were saved of, with today's names where it is the same data.

  Args:
    saved: an identity of `streams.Batches`, written by some version.
    today: that of the batches which are to continue.
  """
  names = {
    name: installed(name)
    for name, digest in saved['corpus'].items()
    if today['corpus'].get(installed(name)) == digest
  }
  renamed = {
    'task': names.get(saved['task'], saved['task']),
    'corpus': {names.get(k, k): v for k, v in saved['corpus'].items()},
    'task_names': [names.get(k, k) for k in saved.get('task_names', [])],
  }
  # Once there were none of these.
  return {'task_ids': 0, 'pad': 0, 'start': 0, **saved, **renamed}


def _placed(text: str) -> str:
  """`text` where what has a mesh and rules of its own has a placement.

  Its values are bound in a scope, so that they are of no other function.
  """
  translated = False
  for function in PLACED:
    scope = function.partition('.')[0]
    placement = f'{scope}_placement/sharding.Placement'
    text, count = re.subn(
      rf'^{re.escape(function)}\.(mesh|(?:optimizer_)?rules)\b',
      lambda match, to=placement: f'{to}.{match[1].replace("mesh", "sizes")}',
      text,
      flags=re.MULTILINE,
    )
    if count:
      translated = True
      text += f'\n{function}.placement = @{placement}()\n'
  if translated:
    text = re.sub(
      r'^from __gin__ import dynamic_registration$',
      r'\g<0>\nfrom sparse_experts import sharding',
      text,
      count=1,
      flags=re.MULTILINE,
    )
  return text
