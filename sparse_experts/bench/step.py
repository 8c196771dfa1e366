"""What a training step takes beside its useful arithmetic."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_experts.bench import profile
from sparse_experts.models.language import Language
from sparse_experts.numbers import Count
from sparse_experts.planning import chips, precompile
from sparse_experts.planning.precompile import Run
from sparse_experts.training import state, step

PRODUCT = (4096, 1024, 4096)  # Rows, terms of a sum, columns.
_LEAST = 0.05  # Seconds of products in a round, so that starting them is none.


def measure(
  runs: Iterable[tuple[int | None, Run]],
  rounds: Count = 11,
  with_parts: bool = False,
  on_row: Callable[[dict[str, Any]], None] = lambda row: None,
  dry_run: bool = False,
) -> list[dict[str, Any]]:
  """Times training steps on this machine's first device.

  A step is the forward and the backward pass and the optimizer's update, as
  `train` takes it. Each round runs a large product and every step once; rates
  are of one round, and the median over rounds is given, so a machine that is
  slow for a while slows both.

  Args:
    runs: experts (None: the dense twin) and what is run of them, of which each
      is compiled before the next is asked for; all are in memory together.
    rounds: at least 1; 11 for a figure to publish.
    with_parts: say where the time goes, too.
    on_row: called with every row as it is ready.
    dry_run: check, and time nothing.

  Returns:
    A row for each run: `model`; `experts`; `seconds` (median); `useful_flops`
    of a step, see `planning.ledger`; `machine_flops_per_second`, of the product
    of PRODUCT in the model's dtype (median); `rate`, useful FLOPs a second over
    the machine's, and `rate_iqr`, its first and third quartile; with_parts also
    `parts`, see `profile.parts`.

  Raises:
    ValueError: a model is not of language, or its batch does not divide.
  """
  steps: dict[int | None, _Step] = {}
  named: dict[int | None, dict[str, Any]] = {}
  product = None
  for experts, run in runs:
    _check(run, 1)
    if dry_run:
      continue
    product = product or _Product(run.model.module.dtype)
    named[experts] = _named(experts, run)
    steps[experts] = _Step(run)
  if product is None:
    return []
  products: list[float] = []
  seconds: dict[int | None, list[float]] = {experts: [] for experts in steps}
  for _ in range(rounds):
    products.append(_timed(product) / product.times)
    for experts, take in steps.items():
      seconds[experts].append(_timed(take))
  rows = []
  for experts, taken in seconds.items():
    found = row(named[experts], taken, products)
    if with_parts:
      found['parts'] = profile.parts(steps[experts], steps[experts].text)
    on_row(found)
    rows.append(found)
  return rows


def row(
  named: dict[str, Any], seconds: Sequence[float], products: Sequence[float]
) -> dict[str, Any]:
  """A row of `measure`.

  Args:
    named: `model`, `experts` and `useful_flops`.
    seconds: of a step, by round.
    products: seconds of the product of PRODUCT, by round.
  """
  machine = 2.0 * np.prod(PRODUCT) / np.array(products)
  rates = named['useful_flops'] / np.array(seconds) / machine
  return {
    **named,
    'seconds': float(np.median(seconds)),
    'machine_flops_per_second': float(np.median(machine)),
    'rate': float(np.median(rates)),
    'rate_iqr': np.quantile(rates, (0.25, 0.75)).tolist(),
  }


def compiled(
  runs: Iterable[tuple[int | None, Run]],
  topology: str,
  on_row: Callable[[dict[str, Any]], None] = lambda row: None,
  dry_run: bool = False,
) -> list[dict[str, Any]]:
  """Compiles training steps for TPU chips that are not here.

  Args:
    runs, on_row, dry_run: as of `measure`.
    topology: such as 'v5e:2x2', see `chips.parse_topology`.

  Returns:
    A row for each run: `model`, `experts`, `useful_flops` of a step, and what
    `precompile.precompile` says, `optimal_seconds` among it.
  """
  rows = []
  _, num_devices = chips.parse_topology(topology)
  for experts, run in runs:
    if dry_run:
      _check(run, num_devices)
      continue
    found = {**_named(experts, run), **precompile.precompile(run, topology)}
    on_row(found)
    rows.append(found)
  return rows


def _named(experts: int | None, run: Run) -> dict[str, Any]:
  return {
    'model': 'dense' if experts is None else f'{experts} experts',
    'experts': experts,
    'useful_flops': run.useful_flops('train'),
  }


class _Step:
  """A training step of random tokens, compiled; each call takes one.

  Attributes:
    text: the program, optimised HLO.
  """

  def __init__(self, run: Run):
    shapes = run.shapes()
    boxed, optimizer = state.abstract(
      run.model,
      shapes,
      functools.partial(run.optimizer, learning_rate=run.learning_rate),
    )
    placement = dataclasses.replace(run.placement, devices=jax.devices()[:1])
    with placement.use() as mesh:
      placed = state.shardings(boxed, mesh)
      self._state = state.create(run.model, shapes, optimizer, placed, 0)
      batch = _batch(run, shapes)
      jitted = step.jit_train_step(
        run.model,
        optimizer,
        mesh,
        placed,
        batch_size=len(next(iter(batch.values()))),
        microbatches=run.microbatches,
      )
      self._rest = batch, jax.random.key(0)
      self._take = jitted.lower(self._state, *self._rest).compile()
    self.text = self._take.as_text() or ''
    jax.block_until_ready(self())

  def __call__(self):
    self._state, sums = self._take(self._state, *self._rest)
    return self._state, sums


def _check(run: Run, num_devices: int) -> None:
  if not isinstance(run.model, Language):
    raise ValueError(
      f'bench step times models of language, not {type(run.model).__name__}.'
    )
  precompile.check(run, num_devices)


def _batch(run: Run, shapes) -> dict[str, jax.Array]:
  """Rows without padding."""
  random = np.random.default_rng(0)
  vocab_size = run.model.module.embed.vocab_size
  return {
    name: jnp.asarray(
      random.integers(2, vocab_size, x.shape)
      if name.endswith('_tokens')
      else np.ones(x.shape),
      x.dtype,
    )
    for name, x in shapes.items()
  }


class _Product:
  """The product of PRODUCT, compiled; a call computes it so many `times`.

  The result goes where the one before it was, as parameters of a step do, so
  that no call pays for new pages of memory.
  """

  times = 1

  def __init__(self, dtype):
    rows, terms, columns = PRODUCT
    keys = jax.random.split(jax.random.key(0))
    self._given = (
      jax.random.normal(keys[0], (rows, terms), dtype),
      jax.random.normal(keys[1], (terms, columns), dtype),
    )
    self._result = jnp.zeros((rows, columns), dtype)

    def product(x_RxI, w_IxO, old):
      del old
      return x_RxI @ w_IxO

    jitted = jax.jit(product, donate_argnums=2, keep_unused=True)
    self._run = jitted.lower(*self._given, self._result).compile()
    jax.block_until_ready(self())
    self.times = math.ceil(_LEAST / _timed(self))

  def __call__(self) -> jax.Array:
    for _ in range(self.times):
      self._result = self._run(*self._given, self._result)
    return self._result


def _timed(function: Callable[[], Any]) -> float:
  start = time.perf_counter()
  jax.block_until_ready(function())
  return time.perf_counter() - start
