"""What every expert must be, tried on a few rows of random numbers.

An expert is a function of single rows: dispatchers lay tokens of different
sequences beside each other, in any order. And where it runs under `grouped`,
once for all experts, it must give what they give one by one. Neither shows in
shapes, and a model with such an expert trains, wrongly.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from sparse_experts.letters import Array
from sparse_experts.moe.dispatchers.grouped import grouped
from sparse_experts.moe.experts import UNGROUPED, Experts, init
from sparse_experts.moe.grouped_matmul import grouped_matmul
from sparse_experts.moe.layer import MoE

_E, _G, _C = 3, 3, 4  # Experts, groups and slots of the trial.
_NARROW = 8


@contextlib.contextmanager
def checking() -> Iterator[None]:
  """Checks the experts of all sparse layers that a block runs or traces.

  Each different expert is checked once, when the block ends.

  Raises:
    ValueError: see `check_expert`.
  """
  found: list[tuple[nn.Module, int, bool]] = []

  def note(call, args, kwargs, context):
    layer = context.module
    if isinstance(layer, MoE) and context.method_name == '__call__':
      is_grouped = any(map(_is_grouped, (layer.dispatch, layer.exact_dispatch)))
      expert = layer.make_expert(parent=None)
      if (case := (expert, args[0].shape[-1], is_grouped)) not in found:
        found.append(case)
    return call(*args, **kwargs)

  with nn.intercept_methods(note):
    yield
  for expert, width, is_grouped in found:
    check_expert(expert, width, is_grouped=is_grouped)


def check_expert(
  expert: nn.Module, width: int, *, is_grouped: bool = True
) -> None:
  """Runs three experts that are all different on a few rows.

  Rows are as wide as 8 numbers where the expert takes such, which costs
  milliseconds for experts of any size.

  Args:
    expert: as `MoE.make_expert` makes it.
    width: D.
    is_grouped: it is to run under the dispatcher `grouped`.

  Raises:
    ValueError: a row moves when another one changes, with dropout or without;
      or the expert cannot be grouped, or is then another.

  Example:
    >>> class Centred(nn.Module):
    ...   @nn.compact
    ...   def __call__(self, x_xD, *, deterministic=True):
    ...     return nn.Dense(x_xD.shape[-1])(x_xD - x_xD.mean(-2, keepdims=True))
    >>> check_expert(Centred(), 8, is_grouped=False)
    Traceback (most recent call last):
    ValueError: Centred mixes rows: ...
  """
  width = _narrow(expert, width)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    functools.partial(_draw, rng), _shapes(expert, width)['params']
  )
  rows = (_E, _G, _C)
  x, other = rng.normal(size=(2, *rows, width)).astype(np.float32)
  run = jax.jit(functools.partial(_outputs, expert, is_grouped=is_grouped))
  name, base = type(expert).__name__, jax.device_get(run(params, x))
  if is_grouped:
    _check_grouped(name, base['one by one'], base['grouped'])
  # One program, so rows that do not meet are the same to the last bit.
  for at in np.ndindex(_G, _C):
    here = np.zeros(rows, bool)
    here[(slice(None), *at)] = True
    found = jax.device_get(run(params, np.where(here[..., None], other, x)))
    for how in base:
      same = (found[how] == base[how]) | np.isnan(base[how])
      moved = np.argwhere(~same.all(-1) & ~here)
      if len(moved):
        raise ValueError(
          f'{name} mixes rows: when slot {at[1]} of group {at[0]} changes, so '
          f'does slot {moved[0][2]} of group {moved[0][1]}. Rows of an expert '
          'are tokens of different sequences under every dispatcher '
          '(all_experts keeps sequences in training, not in decoding): compute '
          'each row from itself alone, and mix tokens outside the experts.'
        )


def _check_grouped(name: str, expected: Array, found: Array) -> None:
  largest = np.abs(expected).max()
  difference = np.abs(found - expected).max()
  if not difference <= 0.05 * largest:  # Products in bfloat16 pass.
    raise ValueError(
      f'{name} cannot be grouped: its outputs, up to {largest:.3g}, differ by '
      f'{difference:.3g} from those of the experts one by one; declare its '
      f'parameters by layers.parameters, or set {UNGROUPED}.'
    )


def _outputs(
  expert: nn.Module, params: Any, x_ExGxCxD: Array, *, is_grouped: bool
) -> dict[str, Array]:
  """Of all experts on their rows, in each way that they run."""
  still = Experts(params, None, expert)
  drawing = Experts(params, jax.random.key(0), expert, deterministic=False)
  outputs = {
    'one by one': still(x_ExGxCxD),
    'with dropout': drawing(x_ExGxCxD),
  }
  if is_grouped:
    E, G, C, D = x_ExGxCxD.shape
    sizes_E = jnp.full(E, G * C, jnp.int32)
    y_TxD = still.grouped(x_ExGxCxD.reshape(-1, D), sizes_E, grouped_matmul)
    outputs['grouped'] = y_TxD.reshape(x_ExGxCxD.shape)
  return outputs


def _narrow(expert: nn.Module, width: int) -> int:
  """A small width that the expert takes, or its own."""
  try:
    _shapes(expert, min(width, _NARROW))
  except Exception:  # It knows best which widths it takes.
    return width
  return min(width, _NARROW)


def _shapes(expert: nn.Module, width: int) -> dict[str, Any]:
  """Parameters of the experts, and an output that shows that they run."""

  def run(key):
    params = nn.unbox(init(expert, _E, width)(key))
    y_ExGxCxD = Experts(params, None, expert)(jnp.zeros((_E, _G, _C, width)))
    return {'params': params, 'y': y_ExGxCxD}

  return jax.eval_shape(run, jax.eval_shape(lambda: jax.random.key(0)))


def _draw(rng: np.random.Generator, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
  """Numbers all different, so that nothing hides behind a weight of zero."""
  scale = 1 / math.sqrt(math.prod(leaf.shape[1:-1]))
  return rng.normal(size=leaf.shape, scale=scale).astype(leaf.dtype)


def _is_grouped(dispatch: Callable[..., Any]) -> bool:
  while isinstance(dispatch, functools.partial):
    dispatch = dispatch.func
  return inspect.unwrap(dispatch) is grouped
