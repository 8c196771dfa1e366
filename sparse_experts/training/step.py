"""One training step and one evaluation step: the functions that compile."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from sparse_experts.arrays import Array
from sparse_experts.models import model as model_module
from sparse_experts.models.model import Batch, Model, Sums
from sparse_experts.moe.bias import update_biases
from sparse_experts.sharding import constrain
from sparse_experts.training.state import TrainState


def train_step(
  state: TrainState,
  batch: Batch,
  *,
  model: Model,
  optimizer: optax.GradientTransformation,
  seed: int,
  microbatches: int = 1,
  data_shards: int = 1,
) -> tuple[TrainState, Sums]:
  """Gradients of a batch, and the optimizer's update unless not finite.

  The rng of step n is a function of seed and n alone. Biases of routers move by
  `model.bias_rate` after the optimizer, which leaves them alone.

  Args:
    state: before the step.
    batch: global batch.
    model: the model. optimizer: its optimizer. seed: of dropout and jitter.
    microbatches: parts the batch is run in, one after the other, to save
      memory; each takes an equal share of every data shard's rows, so no row
      changes device and groups stay whole.
    data_shards: data x expert devices.

  Returns:
    The state after, and the model's sums plus `objective` (sum over
    microbatches), `gradient_norm` and `skipped`.
  """
  rng = jax.random.fold_in(jax.random.key(seed), state.step)
  weights = batch.get('decoder_loss_weights')
  if weights is None:
    weights = batch['decoder_target_tokens'] > 0
  num_targets = weights.sum().astype(jnp.float32) / microbatches

  def gradients(i: Array, batch: Batch) -> tuple[Any, Sums]:
    def loss(params):
      return model.loss(
        params,
        batch,
        jax.random.fold_in(rng, i),
        train=True,
        step=state.step,
        num_targets=num_targets,
      )

    (objective, sums), grads = jax.value_and_grad(loss, has_aux=True)(
      state.params
    )
    return grads, {**sums, 'objective': objective}

  if microbatches == 1:
    grads, sums = gradients(jnp.int32(0), batch)
  else:
    parts = split_microbatches(batch, microbatches, data_shards)
    items = (jnp.arange(microbatches), parts)
    shapes = jax.eval_shape(gradients, *jax.tree.map(lambda x: x[0], items))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def accumulate(total, item):
      return jax.tree.map(jnp.add, total, gradients(*item)), None

    (grads, sums), _ = jax.lax.scan(accumulate, zeros, items)
    grads = jax.tree.map(lambda g: g / microbatches, grads)

  norm = optax.tree.norm(grads)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  if model.bias_rate:
    params = update_biases(params, sums['layers'], model.bias_rate)
  finite = (
    jnp.isfinite(sums['objective'])
    & jnp.isfinite(norm)
    & jnp.isfinite(optax.tree.norm(updates))
  )

  def keep(new, old):
    return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

  skipped = (~finite).astype(jnp.int32)
  new_state = TrainState(
    step=state.step + 1,
    params=keep(params, state.params),
    opt_state=keep(opt_state, state.opt_state),
    skipped=state.skipped + skipped,
  )
  return new_state, {**sums, 'gradient_norm': norm, 'skipped': skipped}


def eval_step(params, batch: Batch, *, model: Model) -> Sums:
  """The model's sums on a batch at evaluation's capacity, without dropout."""
  _, sums = model.loss(params, batch, train=False)
  return sums


def summary(sums: Sums, microbatches: int) -> dict[str, Any]:
  """Metrics from the sums of `train_step`, added over any number of steps.

  Returns:
    What `models.model.summary` does, `gradient_norm` (mean over steps) and
    `skipped` (steps).
  """
  steps = float(sums['batches']) / microbatches
  return {
    **model_module.summary(sums),
    'gradient_norm': float(sums['gradient_norm']) / steps,
    'skipped': int(sums['skipped']),
  }


def split_microbatches(batch: Batch, microbatches: int, data_shards: int):
  """[B, ...] to [n, B / n, ...], every data shard's rows split in n runs."""

  def split(x):
    rows = x.shape[0] // (microbatches * data_shards)
    x = x.reshape(data_shards, microbatches, rows, *x.shape[1:])
    x = x.swapaxes(0, 1).reshape(microbatches, -1, *x.shape[3:])
    return constrain(x, None, 'batch', *[None] * (x.ndim - 2))

  return jax.tree.map(split, dict(batch))
