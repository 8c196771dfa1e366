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
from sparse_experts.moe.dispatchers.gather_dropless import gather_dropless
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
    >>> try:
    ...   check_expert(Centred(), 8, is_grouped=False)
    ... except ValueError as error:
    ...   print(str(error).partition(':')[0])
    Centred mixes rows
  """
  width = _narrow(expert, width)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    functools.partial(_draw, rng), _shapes(expert, width)['params']
  )
  rows = (_E, _G, _C)
  x, other = rng.normal(size=(2, *rows, width)).astype(np.float32)
  run = jax.jit(functools.partial(_one_by_one, expert))
  base = jax.device_get(run(params, x))
  # One program, so rows that do not meet are the same to the last bit.
  for at in np.ndindex(_G, _C):
    here = np.zeros(rows, bool)
    here[(slice(None), *at)] = True
    found = jax.device_get(run(params, np.where(here[..., None], other, x)))
    _check_rows(type(expert).__name__, base, found, here)
  if is_grouped:
    by_group = jax.jit(functools.partial(_by_group, expert))(params, x)
    _check_grouped(type(expert).__name__, base[0], by_group)


def _check_rows(name, base, found, here) -> None:
  """Outputs of the rows that are not `here` are as they were."""
  for before, after in zip(base, found):
    same = ((before == after) | np.isnan(before)).all(-1)
    moved = np.argwhere(~same & ~here)
    if len(moved):
      at, slot = np.argwhere(here)[0], moved[0]
      raise ValueError(
        f'{name} mixes rows: when slot {at[2]} of group {at[1]} changes, so '
        f'does slot {slot[2]} of group {slot[1]}. Rows of an expert are tokens '
        'of different sequences under every dispatcher (all_experts keeps '
        'sequences in training, not in decoding): compute each row from itself '
        'alone, and mix tokens outside the experts.'
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


def _one_by_one(
  expert: nn.Module, params: Any, x_ExGxCxD: Array
) -> tuple[Array, Array]:
  """Of all experts on their rows, without dropout and with it."""
  still = Experts(params, None, expert)
  drawing = Experts(params, jax.random.key(0), expert, deterministic=False)
  return still(x_ExGxCxD), drawing(x_ExGxCxD)


def _by_group(expert: nn.Module, params: Any, x_ExGxCxD: Array) -> Array:
  """The same without dropout, as `grouped` runs them."""
  E, G, C, D = x_ExGxCxD.shape
  y_RxD = Experts(params, None, expert).grouped(
    x_ExGxCxD.reshape(-1, D), jnp.full(E, G * C, jnp.int32), grouped_matmul
  )
  return y_RxD.reshape(x_ExGxCxD.shape)


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
  # gather_dropless is `grouped` of small groups.
  return inspect.unwrap(dispatch) in (grouped, gather_dropless)
