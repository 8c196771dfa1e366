"""Balance without a loss: biases of routers, moved after each step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import traverse_util

from sparse_experts.letters import Array
from sparse_experts.models import layout
from sparse_experts.moe.routers.deepseek import BIAS


def update_biases(
  params: Mapping[str, Any],
  layer_sums: Mapping[str, Mapping[str, Array]],
  rate: float,
  trained: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """Raises the bias of experts chosen too rarely and lowers that of others.

      b_e += rate * sign(mean load - load_e)

  where an expert's load is how often it was chosen in the step just taken, over
  the whole batch and before any capacity. All other parameters are unchanged.

  Args:
    params: parameters, of stacks with or without scan.
    layer_sums: name of the layer ('decoder/layers_3') -> its metrics, of which
      `chosen_E` is the load.
    rate: u, how far a bias moves in one step; 1e-3 in both papers.
    trained: a tree like `params` of bool arrays that broadcast to them; where
      one is false, a bias stays. None: all move.

  Raises:
    ValueError: no router has a bias.

  Example:
    >>> params = {'layers_0': {'router': {'balance_bias': jnp.zeros(2)}}}
    >>> sums = {'layers_0': {'chosen_E': jnp.array([3., 1.])}}
    >>> update_biases(params, sums, 0.5)['layers_0']['router'][BIAS].tolist()
    [-0.5, 0.5]

  References:
    Wang et al. 2024, https://arxiv.org/abs/2408.15664, Algorithm 1.
    DeepSeek-AI 2024 (V3), https://arxiv.org/abs/2412.19437, section 2.1.2.
  """
  flat: dict[Any, Any] = traverse_util.flatten_dict(
    params, keep_empty_nodes=True
  )
  biases = [path for path in flat if path[-1] == BIAS]
  if not biases:
    raise ValueError(
      f'bias_rate={rate} moves the biases of routers, but none has one: set '
      'DeepSeek.balance_bias=True, or bias_rate=0.'
    )
  masks: dict[Any, Any] = traverse_util.flatten_dict(trained or {})
  for path in biases:
    loads = [
      layer_sums[str(layer)]['chosen_E']
      for layer in layout.layers_at(params, path)
    ]
    load = jnp.stack(loads) if layout.is_scanned(path) else loads[0]
    direction = jnp.sign(load.mean(-1, keepdims=True) - load)
    moved = flat[path] + rate * direction
    flat[path] = jnp.where(masks.get(path, True), moved, flat[path])
  return traverse_util.unflatten_dict(flat)
