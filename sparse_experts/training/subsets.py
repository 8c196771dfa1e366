"""Training some parameters and leaving the others as they are."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

# Of ST-MoE's figure 5, as patterns of parameters' paths. FFN are the dense
# ones: those between sparse layers, and ST-MoE's extra ones.
SUBSETS = {
  'all': r'.*',
  'moe': r'.*/moe/.*',
  'non_moe': r'(?!.*/moe/).*',
  'attention': r'.*attention/.*',
  'ffn': r'(?!.*/moe/).*mlp/.*',
}


class Subset(NamedTuple):
  """An optax transformation, and the paths of what it updates."""

  init: Callable[..., Any]
  update: Callable[..., Any]
  trained: frozenset[str]


def only(
  names: Any,
  *,
  learning_rate: float | optax.Schedule,
  optimizer: Callable[..., optax.GradientTransformation],
  trained: str,
) -> Subset:
  """An optimizer that updates a subset of the parameters.

  The others stay as they are, bit for bit, and have no optimizer state; a
  global norm that `optimizer` clips to is that of the trained ones. Balance
  biases of routers, which `Model.bias_rate` moves and no optimizer, are trained
  or stay as all others.

  Args:
    names, learning_rate: as of any optimizer, see `optimizers`.
    optimizer: of the subset.
    trained: one of SUBSETS, or a regular expression that the whole path of a
      parameter matches, such as 'decoder/.*'.

  Raises:
    ValueError: no parameter matches, or `trained` is no expression.

  Example:
    >>> from sparse_experts.training import optimizers
    >>> names = {'layers_1': {'moe': ('embed', 'mlp'), 'norm': ('embed',)}}
    >>> tx = only(names, learning_rate=0.1, trained='.*/moe',
    ...           optimizer=optimizers.adafactor)
    >>> ones = {'layers_1': {'moe': jnp.ones((2, 3)), 'norm': jnp.ones(2)}}
    >>> updates, _ = tx.update(ones, tx.init(ones), ones)
    >>> jax.tree.map(lambda u: round(float(u.ravel()[0]), 3), updates)
    {'layers_1': {'moe': -0.1, 'norm': -0.0}}
  """
  try:
    pattern = re.compile(SUBSETS.get(trained, trained))
  except re.error as error:
    raise ValueError(
      f'trained must be one of {", ".join(SUBSETS)} or a regular expression '
      f'of paths, not {trained!r} ({error}).'
    ) from error
  paths = ['/'.join(path) for path in traverse_util.flatten_dict(names)]
  chosen = {path for path in paths if pattern.fullmatch(path)}
  if not chosen:
    raise ValueError(
      f'trained={trained!r} matches no parameter; paths are such as '
      f'{", ".join(sorted(paths)[:3])}, and {", ".join(SUBSETS)} are known.'
    )

  def part(tree):
    flat = traverse_util.flatten_dict(tree, sep='/')
    return traverse_util.unflatten_dict(
      {path: leaf for path, leaf in flat.items() if path in chosen}, sep='/'
    )

  inner = optimizer(part(names), learning_rate=learning_rate)

  def update(grads, state, params=None):
    updates, state = inner.update(part(grads), state, part(params))
    # x + -0.0 is x for every x; -0.0 + 0.0 would be 0.0.
    none = jax.tree.map(lambda g: jnp.full(g.shape, -0.0, jnp.float32), grads)
    flat = traverse_util.flatten_dict(none)
    flat |= traverse_util.flatten_dict(updates)
    return traverse_util.unflatten_dict(flat), state

  return Subset(
    lambda params: inner.init(part(params)), update, frozenset(chosen)
  )
