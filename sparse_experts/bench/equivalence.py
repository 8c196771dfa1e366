"""One sparse layer under every dispatcher and mesh, against a numpy oracle.

The layer's objective is a fixed random functional of its outputs plus all of
its router's losses. Its value is nothing; its gradient passes through
everything. The oracle runs the experts token by token in float64 and takes
their gradients by hand; only the router's own gates, losses and pull-back come
from the router, run on one device (routers have oracles of their own in
tests/). So what a row shows is what dispatcher and mesh change: nothing.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from sparse_experts import sharding
from sparse_experts.layers.mlp import Mlp
from sparse_experts.letters import Array
from sparse_experts.moe import dispatchers
from sparse_experts.moe.assignment import Assignment
from sparse_experts.moe.capacity import CapacityRule
from sparse_experts.moe.layer import MoE
from sparse_experts.numbers import Count


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Of the layer compared: B rows, L tokens of one, widths D and F."""

  batch: int = 8
  length: int = 16
  width: int = 8
  hidden_width: int = 8
  num_tasks: int = 4
  vocab_size: int = 32
  capacity_factor: float = 1.0


@dataclasses.dataclass(frozen=True)
class Table:
  """What is compared.

  Attributes:
    routers: names of files of gin/routers/; None: all.
    dispatchers: names of files of moe/dispatchers.
    meshes: sizes of their axes.
    on_all_meshes: routers that are compared on all of them, not on the first.
  """

  routers: Sequence[str] | None
  dispatchers: Sequence[str]
  meshes: Sequence[Mapping[str, Count]]
  on_all_meshes: Sequence[str] = ()

  def __post_init__(self):
    for name in self.dispatchers:
      dispatchers.load(name)
    for sizes in self.meshes:
      sharding.Placement(sizes)


class Comparison:
  """A router in a layer: its oracle, and how far any program is from it."""

  def __init__(
    self,
    make_router: Callable[..., nn.Module],
    sizes: Sizes = Sizes(),
    seed: int = 0,
  ):
    """Draws parameters and tokens, and runs the oracle.

    Args:
      make_router: a factory, as `MoE` takes it.
      sizes: of the layer.
      seed: of parameters, tokens, and the router's draws.
    """
    self._make_router, self._sizes = make_router, sizes
    rng = np.random.default_rng(seed)
    shape_BxLxD = (sizes.batch, sizes.length, sizes.width)
    shape_BxL = shape_BxLxD[:2]
    self._inputs = {
      'x': rng.normal(size=shape_BxLxD).astype(np.float32),
      'mask': rng.random(shape_BxL) < 0.9,
      'token_ids': rng.integers(0, sizes.vocab_size, shape_BxL, np.int32),
      'task_ids': rng.integers(0, sizes.num_tasks, shape_BxL, np.int32),
    }
    self._cotangent_BxLxD = rng.normal(size=shape_BxLxD).astype(np.float32)
    self._key = jax.random.key(seed)

    self._assignment: Assignment | None = None
    layer = self._layer(self._remember)
    self._boxed = jax.eval_shape(lambda: self._init(layer))
    # All different, those too that start at zero.
    self.params = jax.tree.map(
      lambda leaf: rng.normal(size=leaf.shape, scale=0.5).astype(np.float32),
      nn.unbox(self._boxed),
    )
    self.expected = self._oracle(layer)

  def difference(
    self,
    dispatch: Callable[..., dispatchers.Dispatched],
    mesh: jax.sharding.Mesh,
  ) -> tuple[float, float]:
    """max |a - b| / max |b| of outputs, and the largest such of gradients.

    Gradients are those by tokens, router and every weight of the experts; what
    is not finite counts as infinitely far.

    Raises:
      ValueError: the combination is illegal; the message says why.
    """
    layer = self._layer(dispatch)
    with sharding.use_mesh(mesh):
      placed = jax.device_put(
        (self.params, self._inputs),
        (
          sharding.shardings(self._boxed, mesh),
          {
            name: sharding.batch_sharding(mesh, value.shape)
            for name, value in self._inputs.items()
          },
        ),
      )
      gradient = jax.jit(
        jax.grad(
          functools.partial(self._objective, layer),
          argnums=(0, 1),
          has_aux=True,
        )
      )
      params, inputs = placed
      grads, y_BxLxD = gradient(params, inputs.pop('x'), inputs)
    found = jax.tree.map(np.asarray, {'y': y_BxLxD, 'gradients': grads})
    ratios = jax.tree.map(_ratio, found, self.expected)
    return ratios['y'], max(jax.tree.leaves(ratios['gradients']))

  def _layer(self, dispatch) -> MoE:
    return MoE(
      make_router=self._make_router,
      make_expert=functools.partial(
        Mlp, hidden_width=self._sizes.hidden_width, activation='relu'
      ),
      capacity_rule=CapacityRule(minimum=1),
      dispatch=dispatch,
    )

  def _apply(self, layer, params, x_BxLxD, inputs):
    return layer.apply(
      {'params': params},
      x_BxLxD,
      **{f'{name}_BxL': value for name, value in inputs.items()},
      step=jnp.int32(0),
      capacity_factor=self._sizes.capacity_factor,
      deterministic=False,
      rngs={'dropout': self._key},
    )

  def _init(self, layer):
    inputs = dict(self._inputs)
    return layer.init(
      {'params': self._key, 'dropout': self._key},
      inputs.pop('x'),
      **{f'{name}_BxL': value for name, value in inputs.items()},
      capacity_factor=self._sizes.capacity_factor,
    )['params']

  def _objective(self, layer, params, x_BxLxD, inputs) -> tuple[Array, Array]:
    y_BxLxD, aux = self._apply(layer, params, x_BxLxD, inputs)
    return (y_BxLxD * self._cotangent_BxLxD).sum() + _total(aux), y_BxLxD

  def _remember(self, experts, x_GxSxD, assignment, capacity):
    """A dispatcher that only remembers what it was to do."""
    del experts
    self._assignment, self._capacity = assignment, capacity
    return jnp.zeros_like(x_GxSxD)

  def _oracle(self, layer) -> dict[str, Any]:
    """Outputs and gradients by numpy; the router's part on one device."""
    inputs = dict(self._inputs)
    x_BxLxD = inputs.pop('x')

    def decide(router, x_BxLxD):
      params = {**self.params, 'router': router} if router else self.params
      _, aux = self._apply(layer, params, x_BxLxD, inputs)
      weights, rest = _weights(self._assignment)
      return (weights, _total(aux)), rest

    @jax.jit
    def pull_back(router, x_BxLxD, cotangents):
      return jax.vjp(decide, router, x_BxLxD, has_aux=True)[1](cotangents)

    primals = (self.params.get('router', {}), x_BxLxD)
    (weights, _), rest = jax.jit(decide)(*primals)
    weights = jax.tree.map(lambda w: np.asarray(w, np.float64), weights)
    rest = jax.tree.map(np.asarray, rest)
    # The layer gives zeros in the place of masked tokens to all it does.
    x_GxSxD = np.where(inputs['mask'][..., None], x_BxLxD, 0)
    y, dweights, dx, dexperts = _experts_by_hand(
      x_GxSxD,
      weights,
      rest,
      self._capacity,
      self.params['expert'],
      self._cotangent_BxLxD,
    )
    drouter, dx_by_router = pull_back(
      *primals, (jax.tree.map(np.float32, dweights), np.float32(1))
    )
    dx = np.where(inputs['mask'][..., None], dx, 0) + dx_by_router
    dparams = {'expert': dexperts}
    if 'router' in self.params:
      dparams['router'] = jax.tree.map(np.asarray, drouter)
    return {'y': y, 'gradients': (dparams, dx)}


def rows(
  router: str,
  make_router: Callable[..., nn.Module],
  combinations: Sequence[tuple[str, Mapping[str, int]]],
  sizes: Sizes = Sizes(),
) -> list[dict[str, Any]]:
  """A row of the table for each (dispatcher, mesh axes) of one router.

  Args:
    router: its name in the table.
    make_router: a factory, as `MoE` takes it.
    combinations: names of dispatchers, with sizes of mesh axes.
    sizes: of the layer and its batch.

  Returns:
    `router`, `dispatcher`, `mesh` (axis sizes), `legal`, and where legal
    `output_difference` and `gradient_difference`, otherwise `reason`.
  """
  comparison = Comparison(make_router, sizes)
  table = []
  for dispatcher, axes in combinations:
    row = {'router': router, 'dispatcher': dispatcher, 'mesh': dict(axes)}
    count = int(np.prod(list(axes.values())))
    try:
      mesh = sharding.make_mesh(**axes, devices=jax.devices()[:count])
      dispatch = dispatchers.load(dispatcher)
      output, gradient = comparison.difference(dispatch, mesh)
      row |= {
        'legal': True,
        'output_difference': output,
        'gradient_difference': gradient,
      }
    except ValueError as error:
      row |= {
        'legal': False,
        'output_difference': None,
        'gradient_difference': None,
        'reason': ' '.join(str(error).split()),
      }
    table.append(row)
  return table


def _total(aux) -> Array:
  """All that a router wants minimised, each with weight one."""
  return sum((jnp.sum(loss) for loss in aux.losses.values()), jnp.float32(0))


def _weights(assignment):
  """What of an assignment has a gradient, and the rest."""
  if isinstance(assignment, Assignment):
    return assignment.gate_GxSxK, assignment
  return (assignment.dispatch_GxSxExC, assignment.combine_GxSxExC), None


def _experts_by_hand(x_GxSxD, weights, assignment, capacity, expert, dy_GxSxD):
  """Outputs, and gradients by weights, tokens and experts, in float64."""
  wi_ExDxF = np.asarray(expert['wi']['kernel'], np.float64)
  wo_ExFxD = np.asarray(expert['wo']['kernel'], np.float64)
  dwi_ExDxF, dwo_ExFxD = np.zeros_like(wi_ExDxF), np.zeros_like(wo_ExFxD)
  x_GxSxD = x_GxSxD.astype(np.float64)
  y_GxSxD, dx_GxSxD = np.zeros_like(x_GxSxD), np.zeros_like(x_GxSxD)

  def run(e, x_D):
    """An expert's output, and its pull-back to x, adding up weights'."""
    a_F = x_D @ wi_ExDxF[e]
    h_F = np.maximum(a_F, 0)

    def pull_back(dy_D):
      da_F = (wo_ExFxD[e] @ dy_D) * (a_F > 0)
      dwo_ExFxD[e] += np.outer(h_F, dy_D)
      dwi_ExDxF[e] += np.outer(x_D, da_F)
      return wi_ExDxF[e] @ da_F

    return h_F @ wo_ExFxD[e], pull_back

  if assignment is not None:
    kept_GxSxK = np.asarray(assignment.kept(capacity))
    dweights = np.zeros_like(weights)
    for g, s, k in np.argwhere(kept_GxSxK):
      output_D, pull_back = run(assignment.expert_GxSxK[g, s, k], x_GxSxD[g, s])
      y_GxSxD[g, s] += weights[g, s, k] * output_D
      dweights[g, s, k] = output_D @ dy_GxSxD[g, s]
      dx_GxSxD[g, s] += pull_back(weights[g, s, k] * dy_GxSxD[g, s])
  else:
    dispatch_GxSxExC, combine_GxSxExC = weights
    dweights = tuple(np.zeros_like(weight) for weight in weights)
    G, _, E, C = dispatch_GxSxExC.shape
    for g, e, c in np.ndindex(G, E, C):
      into_S, out_of_S = (
        dispatch_GxSxExC[g, :, e, c],
        combine_GxSxExC[g, :, e, c],
      )
      output_D, pull_back = run(e, into_S @ x_GxSxD[g])
      y_GxSxD[g] += np.outer(out_of_S, output_D)
      dslot_D = pull_back(out_of_S @ dy_GxSxD[g])
      dweights[0][g, :, e, c] = x_GxSxD[g] @ dslot_D
      dweights[1][g, :, e, c] = dy_GxSxD[g] @ output_D
      dx_GxSxD[g] += np.outer(into_S, dslot_D)
  dexpert = {'wi': {'kernel': dwi_ExDxF}, 'wo': {'kernel': dwo_ExFxD}}
  return y_GxSxD, dweights, dx_GxSxD, dexpert


def _ratio(found: np.ndarray, expected: np.ndarray) -> float:
  """max |a - b| / max |b|; infinite where anything is not finite."""
  if not (np.isfinite(found).all() and np.isfinite(expected).all()):
    return float('inf')
  largest = np.abs(expected).max(initial=0)
  difference = np.abs(found - expected).max(initial=0)
  return float(difference / largest) if largest else float(difference)
