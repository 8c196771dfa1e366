"""What every router declares, and the float32 logits most start from."""

from __future__ import annotations

import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparse_experts import sharding
from sparse_experts.layers.cost import Cost
from sparse_experts.letters import Array
from sparse_experts.moe.capacity import CapacityRule

KERNEL_INIT = nn.initializers.normal(2e-2)  # That of Switch and ST-MoE.


class Router(nn.Module):
  """Decides which tokens meet which experts; moves none.

  A router is called as `router(x_GxSxD, mask_GxS=, deterministic=, **given)`,
  where `given` has what it `needs`, and returns an `Assignment` (or, if it is
  soft, a `SoftAssignment`) and `Aux`. Masked tokens (mask False) get no expert.
  Products with parameters of its own, but for those of `logits`, are in `cost`.

  Attributes:
    num_experts: E.
    k: choices of a token that capacity is made for, see `CapacityRule`.
    allow_no_gradient: gates that are the same whatever the logits (of one
      choice, renormalised over the choices) are meant: the router then learns
      nothing from the task. Upcycling with gate 1 is such a case.

  Declared by each class, as an attribute or a property:
    needs: what it needs beside the tokens, of
      'token_ids': their ids, int32 token_ids_GxS;
      'task_ids': the task (skill, domain, language) of each, task_ids_GxS;
      'capacity': the capacity C, None where nothing is dropped;
      'step': the training step, an int32 scalar; None outside training;
      'sequences': that a group is one sequence;
      'rng': the rng stream 'dropout', when not deterministic.
    is_causal: no token's fate depends on a later token of its group.
    drops: its lines can be longer than S * k / E, so that tokens are left out
      at a capacity factor of 1.
    exchangeable: an expert's index is only its name: renumbered experts, and
      the axes `router` of all parameters with them, are chosen as before. Then
      any of them can be taken out or copied.
  """

  num_experts: int
  k: int = 1
  allow_no_gradient: bool = False

  needs: ClassVar[tuple[str, ...]] = ()
  is_causal: ClassVar[bool] = True
  drops: ClassVar[bool] = True
  exchangeable: ClassVar[bool] = True

  def check_k(self) -> None:
    """Raises ValueError unless 1 <= k <= num_experts."""
    if not 1 <= self.k <= self.num_experts:
      raise ValueError(
        f'k must be from 1 to num_experts={self.num_experts}, got {self.k}.'
      )

  def check_gradient(self, constant_gates: bool, because: str) -> None:
    """Raises ValueError if gates are constant, unless that is meant."""
    if constant_gates and not self.allow_no_gradient:
      raise ValueError(
        f'{type(self).__name__} has no gradient from the task: with {because} '
        'every gate is the same. Change that, or say allow_no_gradient=True.'
      )

  def logits(
    self,
    x_GxSxD: Array,
    *,
    width: int | None = None,
    kernel_init: nn.initializers.Initializer = KERNEL_INIT,
    jitter: float = 0.0,
    name: str = 'kernel',
  ) -> Array:
    """Float32 x W of shape [G, S, width], by default one logit per expert.

    Called inside the compact method of a router.

    Args:
      x_GxSxD: tokens, of any float dtype.
      width: columns of W; None: E, one for each expert.
      kernel_init: initialiser of W, [D, width].
      jitter: x is multiplied by uniform(1 - jitter, 1 + jitter).
      name: of the parameter W.
    """
    kernel_DxE = self.param(
      name,
      sharding.named(
        kernel_init, 'embed', 'router' if width is None else 'router_width'
      ),
      (x_GxSxD.shape[-1], width or self.num_experts),
      jnp.float32,
    )
    # float32: rounding the logits to bfloat16 flips choices of experts and
    # makes training diverge (Fedus et al. 2021, section 2.4 and Table 2).
    x_GxSxD = x_GxSxD.astype(jnp.float32)
    if jitter:
      x_GxSxD *= jax.random.uniform(
        self.make_rng('dropout'),
        x_GxSxD.shape,
        minval=1 - jitter,
        maxval=1 + jitter,
      )
    return jnp.einsum(
      'GSD,DE->GSE',
      x_GxSxD,
      kernel_DxE,
      precision=jax.lax.Precision.HIGHEST,
    )

  def cost(self, x_GxSxD: Array, **_) -> Cost:
    """Of reading x in float32, and of logits; products are in `logits_cost`."""
    tokens = math.prod(x_GxSxD.shape[:2])
    return Cost(float32_inputs=1, routed=tokens * self.num_experts)

  def logits_cost(
    self, x_GxSxD: Array, *, width: int | None = None, **_
  ) -> Cost:
    """Of one product x W."""
    return Cost(
      flops=2 * math.prod(x_GxSxD.shape) * (width or self.num_experts)
    )

  def slots_of_expert(
    self, rule: CapacityRule, factor: float | None, group_size: int
  ) -> float:
    """Slots of an expert for a group; without capacity its share of choices.

    Args:
      rule: the layer's.
      factor: of capacity; None drops nothing.
      group_size: tokens S of the group.
    """
    E, k = self.num_experts, self.k
    if factor is None:
      return group_size * k / E
    return rule(factor, tokens=group_size, num_experts=E, k=k)
