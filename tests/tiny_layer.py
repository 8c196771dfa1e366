"""A sparse layer of four experts that are all different, and its tokens."""

import functools

import jax.numpy as jnp
import numpy as np

from sparse_experts.layers.mlp import Mlp
from sparse_experts.moe import CapacityRule, MoE, TopK, gather

B, L, D, E, F = 2, 6, 4, 4, 3
RULE = CapacityRule(minimum=1)


def make_layer(
  *, activation='gelu', gated=False, group_size=None, dispatch=gather, **router
):
  return MoE(
    make_router=functools.partial(TopK, num_experts=E, **router),
    make_expert=functools.partial(
      Mlp, hidden_width=F, activation=activation, gated=gated
    ),
    group_size=group_size,
    capacity_rule=RULE,
    dispatch=dispatch,
  )


def arrays(gated=False, seed=0):
  """Tokens, and weights of experts that are all different."""
  rng = np.random.default_rng(seed)
  shapes = {'x': (B, L, D), 'router': (D, E), 'wo': (E, F, D)}
  for name in ('wi_0', 'wi_1') if gated else ('wi',):
    shapes[name] = (E, D, F)
  return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def variables(arrays):
  """The layer's variables of float32 arrays."""
  kernels = {
    name: {'kernel': jnp.asarray(array, jnp.float32)}
    for name, array in arrays.items()
    if name != 'x'
  }
  return {'params': {'router': kernels.pop('router'), 'expert': kernels}}


def tokens(arrays):
  return jnp.asarray(arrays['x'], jnp.float32)


def mask_of(seed=3):
  mask = np.random.default_rng(seed).random((B, L)) < 0.7
  assert not mask.all()
  return mask
