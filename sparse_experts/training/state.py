"""What a training run carries from step to step, created where it lives."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct
from jax.sharding import AbstractMesh, Mesh

from sparse_experts import sharding
from sparse_experts.letters import Array
from sparse_experts.models.objective import Objective


@struct.dataclass
class TrainState:
  """Parameters, optimizer state and counters.

  Attributes:
    step: int32, steps taken, skipped ones too: the index of the next batch.
    params: float32 parameters.
    opt_state: the optimizer's.
    skipped: int32, steps not applied because something was not finite.
    balance: `Balance` of each sparse layer in the step before, where
      `Objective.balance_over` is 'last_step'; else ().
  """

  step: Array
  params: Any
  opt_state: Any
  skipped: Array
  balance: Any = ()


def abstract(
  model: Objective,
  shapes: Mapping[str, jax.ShapeDtypeStruct],
  make_optimizer: Callable[..., optax.GradientTransformation],
) -> tuple[TrainState, optax.GradientTransformation]:
  """Shapes and axis names of the state, and the optimizer. Costs no memory.

  Args:
    model: the model.
    shapes: of a batch.
    make_optimizer: (names) -> optimizer.

  Returns:
    A TrainState of `jax.ShapeDtypeStruct`, boxed where axes have names, and
    the optimizer for these parameters.
  """
  params = jax.eval_shape(lambda key: model.init(key, shapes), _abstract_key())
  optimizer = make_optimizer(sharding.names_of(params))
  counter = jax.ShapeDtypeStruct((), jnp.int32)
  state = TrainState(
    step=counter,
    params=params,
    opt_state=jax.eval_shape(optimizer.init, params),
    skipped=counter,
    balance=_balance(model, nn.unbox(params), shapes),
  )
  return state, optimizer


def shardings(boxed: TrainState, mesh: Mesh | AbstractMesh) -> TrainState:
  """Where each array of the state lives under the current placement.

  Args:
    boxed: from `abstract`.
    mesh: the mesh.
  """
  placed = sharding.shardings(dataclasses.replace(boxed, opt_state=()), mesh)
  with sharding.use_rules(sharding.current().optimizer_rules):
    opt_state = sharding.shardings(boxed.opt_state, mesh)
  return dataclasses.replace(placed, opt_state=opt_state)


def create(
  model: Objective,
  shapes: Mapping[str, jax.ShapeDtypeStruct],
  optimizer: optax.GradientTransformation,
  placed: TrainState,
  seed: int,
) -> TrainState:
  """The state at step 0, each array initialised on its own devices.

  Args:
    model: whose parameters they are.
    shapes: of a batch.
    optimizer: of `abstract`.
    placed: of `shardings`, where each array will lie.
    seed: of the parameters.
  """

  def init(key):
    params = nn.unbox(model.init(key, shapes))
    return TrainState(
      step=jnp.int32(0),
      params=params,
      opt_state=optimizer.init(params),
      skipped=jnp.int32(0),
      balance=_zeros(_balance(model, params, shapes)),
    )

  return jax.jit(init, out_shardings=placed)(jax.random.key(seed))


def begin(
  params: Any,
  optimizer: optax.GradientTransformation,
  placed: TrainState,
  boxed: TrainState,
) -> TrainState:
  """The state at step 0 of given parameters, which stay where they are.

  Args:
    params: placed, unboxed.
    optimizer: of `abstract`.
    placed: of `shardings`.
    boxed: of `abstract`.
  """

  def init(params):
    return TrainState(
      step=jnp.int32(0),
      params=(),
      opt_state=optimizer.init(params),
      skipped=jnp.int32(0),
      balance=_zeros(boxed.balance),
    )

  without_params = dataclasses.replace(placed, params=())
  rest = jax.jit(init, out_shardings=without_params)(params)
  return dataclasses.replace(rest, params=params)


def _balance(model: Objective, params: Any, shapes: Mapping[str, Any]) -> Any:
  """Shapes of `TrainState.balance`."""
  if model.balance_over != 'last_step':
    return ()
  params, batch = (
    jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    for tree in (params, dict(shapes))
  )
  loss = functools.partial(model.loss, train=False)
  return jax.eval_shape(loss, params, batch)[1]['balance']


def _zeros(shapes: Any) -> Any:
  return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def _abstract_key():
  return jax.eval_shape(lambda: jax.random.key(0))
