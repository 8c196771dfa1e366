"""A model's arguments by path, and which of two models' change what it says."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

from sparse_experts.models.language import Language
from sparse_experts.models.layout import kinds

# They change how a model is trained, not what it computes exactly.
_TRAINING = {
  *('balance_counts', 'capacity_rule', 'dropout_rate', 'jitter'),
  *('losses_over', 'max_length', 'noise', 'policy_train', 'priority'),
}
# Nor do these, by which it was begun or is run, or `choose_by` but for logits
# so close that their probabilities are one number.
_SILENT = _TRAINING | {
  *('allow_no_gradient', 'allow_non_causal_routing', 'choose_by', 'dispatch'),
  *('dtype', 'exact_dispatch'),
  *('group_size', 'init_scale', 'kernel_init', 'remat', 'scan', 'unroll'),
}


def arguments(model: Language) -> dict[str, Any]:
  """Every argument of a model's module by path, defaults too.

  Example: 'decoder.make_block.make_attention.num_heads' -> 12.
  """
  return dict(_flat(model.module, ''))


def training(model: Language) -> dict[str, Any]:
  """What a model says of its training: its own arguments, and by path."""
  found = {
    field.name: getattr(model, field.name)
    for field in dataclasses.fields(model)
    if field.name not in ('module', 'capacity_factor_eval')
  }
  return found | {
    path: value
    for path, value in _found(model).items()
    if _TRAINING & set(path.split('.'))
  }


def differences(ours: Language, theirs: Language) -> dict[str, tuple[Any, Any]]:
  """Arguments that differ and change exact logits, with both values."""
  mine, other = _speaking(ours), _speaking(theirs)
  return {
    path: (mine.get(path), other.get(path))
    for path in sorted(mine.keys() | other.keys())
    if mine.get(path) != other.get(path)
  }


def _speaking(model: Language) -> dict[str, Any]:
  return {
    path: value
    for path, value in _found(model).items()
    if not _SILENT & set(path.split('.'))
  }


def _found(model: Language) -> dict[str, Any]:
  """Its arguments in one form of several, without those that change nothing."""
  found = arguments(model)
  if not found['tied_logits']:
    del found['embed.scaled_logits']
  never = []  # Parts that no block of a stack has.
  for path, value in found.items():
    stem = path.rpartition('.')[0]
    if path.endswith('.sparse_layers'):
      found[path] = kinds(found[f'{stem}.num_layers'], value)
      if all(found[path]):
        never.append(f'{stem}.make_block.make_mlp')
      if not any(found[path]):
        never.append(f'{stem}.make_block.make_moe')
    elif path.endswith('.num_kv_heads') and value is None:
      found[path] = found[f'{stem}.num_heads']
    elif path.endswith('.k') and value == 1 and f'{stem}.policy_eval' in found:
      # Without a second choice there is none to take.
      found[f'{stem}.policy_eval'] = found[f'{stem}.threshold'] = None
    elif path.endswith('.policy_eval') and value == 'all':
      found[f'{stem}.threshold'] = None
  return {
    path: value
    for path, value in found.items()
    if not path.startswith(tuple(never))
  }


def _flat(thing: Any, path: str):
  """(path, value) of `thing`, a value, a module, or what builds one."""
  made, given = thing, {}
  if isinstance(thing, functools.partial):
    made, given = thing.func, thing.keywords
  elif dataclasses.is_dataclass(thing) and not isinstance(thing, type):
    made = type(thing)
    given = {
      field.name: getattr(thing, field.name)
      for field in dataclasses.fields(thing)
      if field.init
    }
  if isinstance(made, type) and dataclasses.is_dataclass(made):
    yield path, made.__name__
    for name, parameter in inspect.signature(made).parameters.items():
      if name not in ('parent', 'name'):
        value = given.get(name, parameter.default)
        yield from _flat(value, f'{path}.{name}' if path else name)
  elif given:
    yield path, (made.__name__, str(given))
  else:
    yield path, getattr(made, '__name__', made)
