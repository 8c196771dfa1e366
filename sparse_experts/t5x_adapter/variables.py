"""Our parameters and our cache as T5X wants them.

T5X takes plain arrays in 'params', the names of their axes beside them in
'params_axes', and whatever a step changes without a gradient in a collection of
its own, one of its `flax_mutables`. Ours is 'router_state', of

    biases     balance biases of routers, see `models.balance_bias`,
    chosen     load of the experts they balance, since they last moved,
    calls      calls of the loss in training: steps times microbatches,

where the model has such biases, moves them, needs the training step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util
from flax.linen import partitioning

from sparse_experts import sharding
from sparse_experts.letters import Array
from sparse_experts.models import layout
from sparse_experts.models.balance_bias import update_biases
from sparse_experts.moe.routers.deepseek import BIAS

STATE = 'router_state'

Tree = Mapping[str, Any]


def collections(
  boxed: Tree, loads: Mapping[str, Any] | None, needs_step: bool
) -> dict[str, Any]:
  """T5X's collections of boxed parameters.

  Args:
    boxed: from `Objective.init`.
    loads: shapes of each layer's load, where biases move; None: they do not.
    needs_step: a router needs the training step.

  Returns:
    'params' and 'params_axes', and if the model has any, 'router_state' and
    'router_state_axes'.
  """
  names, biases_names = _split(sharding.names_of(boxed))
  params, biases = _split(nn.unbox(boxed))
  state, state_names = {}, {}
  if biases:
    state['biases'], state_names['biases'] = biases, biases_names
  if loads is not None:
    state['chosen'] = _nested(
      {name: jnp.zeros(load.shape) for name, load in loads.items()}
    )
    state_names['chosen'] = jax.tree.map(lambda _: ('router',), state['chosen'])
  if loads is not None or needs_step:
    state['calls'], state_names['calls'] = jnp.int32(0), ()
  made = {'params': params, 'params_axes': _metadata(names)}
  if state:
    made |= {STATE: state, f'{STATE}_axes': _metadata(state_names)}
  return made


def join(params: Tree, mutables: Tree | None) -> dict[str, Any]:
  """The model's parameters from T5X's."""
  flat = traverse_util.flatten_dict(flax.core.unfreeze(params))
  state = flax.core.unfreeze(mutables or {}).get(STATE, {})
  flat |= traverse_util.flatten_dict(state.get('biases', {}))
  return traverse_util.unflatten_dict(flat)


def advance(
  params: Tree,
  mutables: Tree,
  layer_sums: Mapping[str, Mapping[str, Array]],
  rate: float,
  microbatches: int,
) -> flax.core.FrozenDict:
  """T5X's mutables after one call of the loss in training.

  Biases move once a step, after its last microbatch, by the whole step's load.

  Args:
    params: of the model, see `join`.
    mutables: before.
    layer_sums: metrics of each layer.
    rate: of the biases.
    microbatches: calls in a step.
  """
  mutables = flax.core.unfreeze(mutables)
  state = dict(mutables[STATE])
  if 'calls' in state:
    state['calls'] += 1
  if 'chosen' in state:
    sums = {
      name: layer_sums[name]['chosen_E'] for name in _flat(state['chosen'])
    }
    chosen = jax.tree.map(jnp.add, state['chosen'], _nested(sums))
    loads = {name: {'chosen_E': load} for name, load in _flat(chosen).items()}
    _, moved = _split(update_biases(params, loads, rate))
    ends = state['calls'] % microbatches == 0
    state['biases'] = jax.tree.map(
      lambda new, old: jnp.where(ends, new, old), moved, state['biases']
    )
    state['chosen'] = jax.tree.map(lambda x: jnp.where(ends, 0, x), chosen)
  return flax.core.freeze({**mutables, STATE: state})


def batch_major(cache: Tree) -> dict[str, Any]:
  """Our cache with rows as the first axis of every leaf, or back again.

  T5X's decoding repeats and reorders rows of every leaf but those it knows by
  name ('cache_index', 'cached_bias', 'position_embedder_index'). Ours are all
  of rows, but a scanned stack's have its repeats before them.
  """
  flat = traverse_util.flatten_dict(flax.core.unfreeze(cache))
  return traverse_util.unflatten_dict(
    {
      path: leaf.swapaxes(0, 1) if layout.is_scanned(path) else leaf
      for path, leaf in flat.items()
    }
  )


def _split(tree: Tree) -> tuple[dict[str, Any], dict[str, Any]]:
  """All but the routers' biases, and these."""
  flat = traverse_util.flatten_dict(flax.core.unfreeze(tree))
  biases = {path: leaf for path, leaf in flat.items() if path[-1] == BIAS}
  rest = {path: leaf for path, leaf in flat.items() if path not in biases}
  return traverse_util.unflatten_dict(rest), traverse_util.unflatten_dict(
    biases
  )


def _metadata(names: Tree) -> dict[str, Any]:
  """Names of axes as flax's `param_with_axes` leaves them."""
  return traverse_util.unflatten_dict(
    {
      (*path[:-1], f'{path[-1]}_axes'): partitioning.AxisMetadata(names=leaf)
      for path, leaf in traverse_util.flatten_dict(names).items()
    }
  )


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
  return traverse_util.unflatten_dict(dict(flat), sep='/')


def _flat(nested: Tree) -> dict[str, Any]:
  return traverse_util.flatten_dict(nested, sep='/')
