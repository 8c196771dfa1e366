"""One training step and one evaluation step: the functions that compile."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh

from sparse_experts import moe, sharding
from sparse_experts.letters import Array
from sparse_experts.models import sums as sums_module
from sparse_experts.models.auxiliary import Totals
from sparse_experts.models.balance_bias import update_biases
from sparse_experts.models.objective import Batch, Objective
from sparse_experts.models.sums import Sums
from sparse_experts.sharding import constrain
from sparse_experts.training import subsets
from sparse_experts.training.state import TrainState


def train_step(
  state: TrainState,
  batch: Batch,
  key: Array,
  frozen: Mapping[str, Any] | None = None,
  *,
  model: Objective,
  optimizer: optax.GradientTransformation,
  microbatches: int = 1,
  data_shards: int = 1,
) -> tuple[TrainState, Sums]:
  """Gradients of a batch, and the optimizer's update unless not finite.

  The rng of step n is a function of key and n alone. Biases of routers move by
  `model.bias_rate` before the optimizer, which leaves them alone, so that the
  parameters it returns are those after the step. What `subsets.only` does not
  train stays, and has no part in the gradient's norm.

  Args:
    state: before the step.
    batch: global batch.
    key: `jax.random.key(seed)` of dropout and jitter. An argument, not a
      constant: another seed is the same program.
    frozen: parameters beside those of the state, see `training.frozen`.
    model: the model. optimizer: its optimizer.
    microbatches: parts the batch is run in, one after the other, to save
      memory; each takes an equal share of every data shard's rows, so no row
      changes device and groups stay whole.
    data_shards: see `sharding.data_shards`.

  Returns:
    The state after, and the model's sums plus `objective` (sum over
    microbatches) and `gradient_norm`; of a skipped step zeros, so that sums
    over steps are of those that were taken. And, of any step, `skipped` and
    `tokens`, those of all stacks that are no padding.
  """
  grads, sums = gradients(
    state,
    batch,
    key,
    frozen,
    model=model,
    microbatches=microbatches,
    data_shards=data_shards,
  )
  balance = sums.pop('balance')
  with jax.named_scope('optimizer'):
    masks = subsets.masks(optimizer, state.params)
    norm = optax.tree.norm(subsets.keep(masks, grads))
    params = state.params
    if model.bias_rate:
      params = update_biases(params, sums['layers'], model.bias_rate, masks)
    updates, opt_state = optimizer.update(grads, state.opt_state, params)
    params = optax.apply_updates(params, updates)
    finite = (
      jnp.isfinite(sums['objective'])
      & jnp.isfinite(norm)
      & jnp.isfinite(optax.tree.norm(updates))
    )

    def keep(new, old):
      return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

    sums |= {'gradient_norm': norm}
    taken = keep(sums, jax.tree.map(jnp.zeros_like, sums))
    skipped = (~finite).astype(jnp.int32)
    new_state = TrainState(
      step=state.step + 1,
      params=keep(params, state.params),
      opt_state=keep(opt_state, state.opt_state),
      skipped=state.skipped + skipped,
      balance=keep(balance, state.balance) if state.balance else (),
    )
  tokens = sum(model.totals(batch).tokens.values())
  return new_state, {**taken, 'skipped': skipped, 'tokens': tokens}


def gradients(
  state: TrainState,
  batch: Batch,
  key: Array,
  frozen: Mapping[str, Any] | None = None,
  *,
  model: Objective,
  microbatches: int = 1,
  data_shards: int = 1,
) -> tuple[Any, Sums]:
  """Gradients of a batch and the model's sums; arguments as of `train_step`."""
  frozen = frozen or {}
  rng = jax.random.fold_in(key, state.step)
  totals = jax.tree.map(lambda x: x / microbatches, model.totals(batch))
  if state.balance:
    totals = dataclasses.replace(totals, balance=state.balance)

  def of_part(i: Array, batch: Batch, totals: Totals) -> tuple[Any, Sums]:
    def loss(params):
      return model.loss(
        {**params, **frozen},
        batch,
        jax.random.fold_in(rng, i),
        train=True,
        step=state.step,
        totals=totals,
      )

    (objective, sums), grads = jax.value_and_grad(loss, has_aux=True)(
      state.params
    )
    return grads, {**sums, 'objective': objective}

  if microbatches == 1:
    return of_part(jnp.int32(0), batch, totals)
  parts = split_microbatches(batch, microbatches, data_shards)
  items = (jnp.arange(microbatches), parts)
  if model.needs_statistics:

    def look(_, i: Array, batch: Batch):
      rng_i = jax.random.fold_in(rng, i)
      params = {**state.params, **frozen}
      found = model.statistics(params, batch, rng_i, step=state.step)
      return found.balance, found.rows

    balance, rows = _add_up(look, items)
    totals = dataclasses.replace(totals, rows=rows)
    if model.balance_over == 'batch':
      totals = dataclasses.replace(totals, balance=balance)

  def of_next(so_far, i: Array, batch: Batch):
    known = dataclasses.replace(totals, part=i)
    if so_far is not None and model.balance_over == 'batch_so_far':
      _, sums = so_far
      known = dataclasses.replace(known, balance=sums['balance'])
    return of_part(i, batch, known), None

  (grads, sums), _ = _add_up(of_next, items)
  return jax.tree.map(lambda g: g / microbatches, grads), sums


def _add_up(
  function: Callable[..., tuple[Any, Any]], items: tuple[Any, ...]
) -> tuple[Any, Any]:
  """Goes through items: what adds up over them, and what is kept of each.

  Args:
    function: (sum so far, *item) -> (what adds, what is kept); the sum is None
      when only its shape is asked for.
  """
  first = jax.tree.map(lambda x: x[0], items)
  shapes, _ = jax.eval_shape(functools.partial(function, None), *first)
  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

  def accumulate(so_far, item):
    more, kept = function(so_far, *item)
    return jax.tree.map(jnp.add, so_far, more), kept

  return jax.lax.scan(accumulate, zeros, items)


def jit_train_step(
  model: Objective,
  optimizer: optax.GradientTransformation,
  mesh: Mesh | AbstractMesh,
  placed: TrainState,
  *,
  batch_size: int,
  microbatches: int = 1,
):
  """`train_step` on a mesh: (state, batch, key, frozen) -> (state, sums).

  The state's memory becomes that of the state after.

  Args:
    placed: where the state lives, see `state.shardings`.
    batch_size: global. For the rest see `train_step`.

  Raises:
    ValueError: the batch does not divide over data shards and microbatches.
  """
  shards = sharding.data_shards(mesh)
  if batch_size % (shards * microbatches):
    raise ValueError(
      f'batch_size={batch_size} does not divide over {shards} data '
      f'shards (data x expert) x {microbatches} microbatches; make it a '
      f'multiple of {shards * microbatches}, or change the mesh.'
    )
  return jax.jit(
    functools.partial(
      train_step,
      model=model,
      optimizer=optimizer,
      microbatches=microbatches,
      data_shards=shards,
    ),
    out_shardings=(placed, sharding.replicated(mesh)),
    donate_argnums=0,
  )


def eval_step(params, batch: Batch, *, model: Objective) -> Sums:
  """The model's sums on a batch at evaluation's capacity, without dropout.

  Args:
    params: unboxed.
    batch: of `model.features`.
    model: whose sums they are.
  """
  _, sums = model.loss(params, batch, train=False)
  del sums['balance']
  return sums


def record_step(
  params,
  batch: Batch,
  *,
  model: Objective,
  microbatches: int = 1,
  data_shards: int = 1,
) -> dict[str, moe.Record]:
  """Records of a batch in parts, to save memory; arguments as of `train_step`.

  Returns:
    A record for each sparse layer by its name.
  """
  return _record_parts(
    lambda _, part: model.record(params, part),
    batch,
    microbatches,
    data_shards,
  )


def record_train_step(
  state: TrainState,
  batch: Batch,
  key: Array,
  *,
  model: Objective,
  microbatches: int = 1,
  data_shards: int = 1,
) -> dict[str, moe.Record]:
  """Records of a step in training, as drawn; arguments as of `train_step`."""
  rng = jax.random.fold_in(key, state.step)

  def of_part(i: Array, part: Batch) -> dict[str, moe.Record]:
    rng_i = jax.random.fold_in(rng, i)
    return model.record(state.params, part, rng_i, train=True, step=state.step)

  return _record_parts(of_part, batch, microbatches, data_shards)


def _record_parts(
  of_part: Callable[[Array, Batch], dict[str, moe.Record]],
  batch: Batch,
  microbatches: int,
  data_shards: int,
) -> dict[str, moe.Record]:
  """Records of microbatches (number, part), in the order of the batch."""
  if microbatches == 1:
    return of_part(jnp.int32(0), batch)
  parts = split_microbatches(batch, microbatches, data_shards)
  items = (jnp.arange(microbatches), parts)
  records = jax.lax.map(lambda item: of_part(*item), items)
  return jax.tree.map(lambda x: join_microbatches(x, data_shards), records)


def summary(sums: Sums, microbatches: int) -> dict[str, Any]:
  """Metrics from the sums of `train_step`, added over any number of steps.

  Returns:
    `skipped` (steps) and, of the others, what `sums.summary` has and
    `gradient_norm` (mean over steps).
  """
  metrics: dict[str, Any] = {'skipped': int(sums['skipped'])}
  steps = float(sums['batches']) / microbatches
  if steps:
    metrics |= sums_module.summary(sums)
    metrics['gradient_norm'] = float(sums['gradient_norm']) / steps
  return metrics


def split_microbatches(batch: Batch, microbatches: int, data_shards: int):
  """[B, ...] to [n, B / n, ...], every data shard's rows split in n runs.

  Args:
    batch: arrays [B, ...].
    microbatches: n.
    data_shards: over which B is split before and B / n after.
  """

  def split(x):
    rows = x.shape[0] // (microbatches * data_shards)
    x = x.reshape(data_shards, microbatches, rows, *x.shape[1:])
    x = x.swapaxes(0, 1).reshape(microbatches, -1, *x.shape[3:])
    return constrain(x, None, 'batch', *[None] * (x.ndim - 2))

  return jax.tree.map(split, dict(batch))


def join_microbatches(x: Array, data_shards: int) -> Array:
  """The inverse of `split_microbatches`, of one array."""
  rows = x.shape[1] // data_shards
  x = x.reshape(x.shape[0], data_shards, rows, *x.shape[2:])
  x = x.swapaxes(0, 1).reshape(-1, *x.shape[3:])
  return constrain(x, 'batch', *[None] * (x.ndim - 1))
