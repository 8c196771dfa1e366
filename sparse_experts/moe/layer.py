"""The sparse layer: group, route, dispatch, run experts, combine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparse_experts.layers.cost import Cost, cost_of
from sparse_experts.letters import Array
from sparse_experts.moe import groups, losses, metrics
from sparse_experts.moe.assignment import SoftAssignment
from sparse_experts.moe.capacity import CapacityRule
from sparse_experts.moe.dispatchers import Dispatched
from sparse_experts.moe.dispatchers.gather import gather
from sparse_experts.moe.dispatchers.grouped import grouped
from sparse_experts.moe.experts import Experts, init
from sparse_experts.moe.outputs import Aux
from sparse_experts.moe.record import record as record_of
from sparse_experts.moe.router import Router
from sparse_experts.numbers import Count
from sparse_experts.sharding import constrain


class MoE(nn.Module):
  """A mixture of experts in the place of an FFN.

      y_s = sum_k gate_sk * expert_{e(s, k)}(x_s)

  over the choices k of token s that find a slot; a token without any gets 0,
  so the residual connection around the layer passes it on.

  Attributes:
    make_router: builds the router, see `router.Router`.
    make_expert: builds one expert, any module x_...xD -> y_...xD that takes
      `deterministic`, has parameters only, and computes each row from itself
      alone (`expert_check.check_expert` tries that); the classes of the dense
      blocks serve. `experts.init` stacks it.
    group_size: tokens S of a group, which share the experts' slots; None: one
      sequence, as it always is without capacity and draws.
    capacity_rule: from capacity factor to slots.
    dispatch: executes the assignment under a capacity: `dispatchers.gather`,
      `dispatchers.einsum` or `dispatchers.grouped`. It returns the output, or
      also which choices it dropped for lack of room, see `metrics.counts`.
    exact_dispatch: executes it without: `grouped`, `gather_dropless`, or
      `all_experts` for experts that cannot be grouped.
    make_shared_expert: builds a dense FFN that every token meets beside the
      routed ones, added once to their sum (DeepSeekMoE's shared experts, Dai et
      al. 2024, equation 9, K_s of them as one of K_s times the width); None: no
      such.
    num_experts: E of the router, where layers differ in it; None: its own.

  Example:
    >>> import functools, jax
    >>> from sparse_experts.layers.mlp import Mlp
    >>> from sparse_experts.moe import MoE, TopK
    >>> layer = MoE(
    ...   make_router=functools.partial(TopK, num_experts=4, k=1),
    ...   make_expert=functools.partial(Mlp, hidden_width=32),
    ... )
    >>> x_BxLxD = jax.random.normal(jax.random.key(0), (2, 16, 8))
    >>> variables = layer.init(jax.random.key(1), x_BxLxD)
    >>> y_BxLxD, aux = layer.apply(variables, x_BxLxD, capacity_factor=1.25)
  """

  make_router: Callable[..., nn.Module]
  make_expert: Callable[..., nn.Module]
  group_size: Count | None = None
  capacity_rule: CapacityRule = CapacityRule()
  dispatch: Callable[..., Dispatched] = gather
  exact_dispatch: Callable[..., Dispatched] = grouped
  make_shared_expert: Callable[..., nn.Module] | None = None
  num_experts: int | None = None

  @nn.compact
  def __call__(
    self,
    x_BxLxD: Array,
    *,
    mask_BxL: Array | None = None,
    token_ids_BxL: Array | None = None,
    task_ids_BxL: Array | None = None,
    step: Array | None = None,
    capacity_factor: float | None = None,
    deterministic: bool = True,
    require_causal: bool = False,
    record: bool = False,
  ) -> tuple[Array, Aux]:
    """Applies the layer.

    Args:
      x_BxLxD: tokens.
      mask_BxL: boolean, False for padding: it takes no slot and gets 0.
      token_ids_BxL: int32 ids of the tokens, for routers that need them.
      task_ids_BxL: int32 task (skill, domain) of each token, likewise.
      step: int32 training step, for routers with a schedule; None elsewhere.
      capacity_factor: slots of an expert relative to a balanced load. None
        drops nothing and makes a token's output independent of its neighbours.
      deterministic: no dropout, jitter or noise; evaluation policies.
      require_causal: refuse a router under which a later token can decide the
        fate of an earlier one.
      record: return `Aux.record` too, what happened to every token.

    Returns:
      y_BxLxD and Aux: the router's, with the counts of `metrics.counts` added,
      and the loss `router_z` of every router that has logits.
    """
    router = self._router(name='router')
    if require_causal and not router.is_causal:
      raise ValueError(
        f'{type(router).__name__} lets later tokens decide the fate of earlier '
        'ones, which a decoder must not: take a causal one (of top-k, k=1 or '
        "priority='token'), or say allow_non_causal_routing=True."
      )
    if mask_BxL is not None:  # Not even NaN leaks out of padding.
      x_BxLxD = jnp.where(mask_BxL[..., None], x_BxLxD, 0)

    # Results that depend on no neighbour: every sequence is a group.
    if router.num_experts < 1:
      raise ValueError(
        f'num_experts={router.num_experts} must be at least 1; without experts '
        'make no layer sparse: SPARSE_LAYERS = 0.'
      )
    alone = capacity_factor is None and deterministic
    group_size = None if alone else self.group_size

    def split(x_BxLx___):
      if x_BxLx___ is not None:
        return groups.split(x_BxLx___, group_size)

    x_GxSxD = constrain(split(x_BxLxD), 'group', None, 'act_embed')
    mask_GxS = split(mask_BxL)
    capacity = None
    if capacity_factor is not None:
      capacity = self.capacity_rule(
        capacity_factor,
        tokens=x_GxSxD.shape[1],
        num_experts=router.num_experts,
        k=router.k,
      )
    assignment, aux = router(
      x_GxSxD,
      mask_GxS=mask_GxS,
      deterministic=deterministic,
      **self._given(
        router,
        whole=x_GxSxD.shape[:2] == x_BxLxD.shape[:2],
        capacity=capacity,
        step=step,
        token_ids_GxS=split(token_ids_BxL),
        task_ids_GxS=split(task_ids_BxL),
      ),
    )

    expert = self.make_expert(parent=None)
    experts = Experts(
      params=self.param(
        'expert', init(expert, router.num_experts, x_BxLxD.shape[-1])
      ),
      key=self.make_rng('dropout') if self.has_rng('dropout') else None,
      module=expert,
      deterministic=deterministic,
    )
    hard = not isinstance(assignment, SoftAssignment)
    exact = capacity is None and hard
    dispatch = self.exact_dispatch if exact else self.dispatch
    y_GxSxD, lost = dispatch(experts, x_GxSxD, assignment, capacity), None
    if isinstance(y_GxSxD, tuple):
      y_GxSxD, lost = y_GxSxD
    y_GxSxD = constrain(y_GxSxD, 'group', None, 'act_embed')
    y_BxLxD = y_GxSxD.reshape(x_BxLxD.shape)
    if self.make_shared_expert is not None:
      shared_BxLxD = self.make_shared_expert(name='shared_expert')(
        x_BxLxD, deterministic=deterministic
      )
      if mask_BxL is not None:
        shared_BxLxD = jnp.where(mask_BxL[..., None], shared_BxLxD, 0)
      y_BxLxD += shared_BxLxD
    counts = metrics.counts(assignment, capacity, mask_GxS, lost)
    recorded = None
    if record:
      recorded = record_of(
        assignment,
        shape=x_BxLxD.shape[:2],
        capacity=capacity,
        mask_GxS=mask_GxS,
        lost=lost,
        logits_GxSxE=aux.logits,
        log_z_GxS=aux.log_z,
      )
    tokens = aux.tokens
    if not aux.losses and mask_GxS is not None:
      tokens = mask_GxS.sum().astype(jnp.float32)
    of_logits = {}
    if aux.log_z is not None:
      of_logits['router_z'] = losses.router_z(aux.log_z, mask_GxS)
    aux = dataclasses.replace(
      aux,
      losses={**of_logits, **aux.losses},
      metrics={**aux.metrics, **counts},
      decisions={
        name: decision_GxS.reshape(x_BxLxD.shape[:2])
        for name, decision_GxS in aux.decisions.items()
      },
      logits=None,
      log_z=None,
      tokens=tokens,
      record=recorded,
    )
    return y_BxLxD, aux

  def cost(
    self, x_BxLxD: Array, *, capacity_factor: float | None = None, **_
  ) -> Cost:
    """Of the experts, in every slot of each, full or empty."""
    (B, L, D), S = x_BxLxD.shape, self.group_size or x_BxLxD.shape[1]
    router = self._router(parent=None)
    slots = router.slots_of_expert(self.capacity_rule, capacity_factor, S)
    rows = B * L / S * router.num_experts * slots
    own = Cost(choices=B * L * router.k, rows=rows, group=(S, L))
    try:
      each = cost_of(
        self.make_expert(parent=None),
        jax.ShapeDtypeStruct((1, D), x_BxLxD.dtype),
      )
    except (
      ValueError
    ) as error:  # The ledger counts its parameters all the same.
      return dataclasses.replace(own, untold=str(error))
    return dataclasses.replace(
      own,
      expert_flops=rows * each.flops,
      float32_inputs=rows * each.float32_inputs / (B * L),
      slots=rows * each.width,
      hidden=rows * (each.heads + each.mlp),
      activated=rows * each.activated,
      relu=rows * each.relu,
    )

  def _router(self, **arguments) -> Router:
    if self.num_experts is not None:
      arguments['num_experts'] = self.num_experts
    return self.make_router(**arguments)

  @staticmethod
  def _given(router: Router, *, whole: bool, capacity, step, **ids):
    """The arguments that the router needs, and no others."""
    name = type(router).__name__
    if 'sequences' in router.needs and not whole:
      raise ValueError(
        f'{name} decides for whole sequences: set group_size=None, so that a '
        'group is one.'
      )
    given = {'capacity': capacity, 'step': step}
    given = {need: given[need] for need in given if need in router.needs}
    for argument, value in ids.items():
      need = argument.removesuffix('_GxS')
      if need not in router.needs:
        continue
      if value is None:
        raise ValueError(
          f'{name} needs {need}: pass {need}_BxL to the layer, or choose '
          'another router.'
        )
      given[argument] = value
    return given
