"""Sentence-level gating: all tokens of a sequence choose the same experts."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import linen as nn

from sparse_experts.letters import Array
from sparse_experts.moe.assignment import Assignment
from sparse_experts.moe.losses import masked_mean
from sparse_experts.moe.outputs import Aux
from sparse_experts.moe.router import KERNEL_INIT, Router
from sparse_experts.moe.routers.top_k import route


class Sentence(Router):
  """TOP_k(softmax(mean of the sequence's tokens W)), the same for all of them.

  Padding is left out of the mean. The mean sees later tokens, so it is no
  router for a decoder. A sequence is a row of the batch: pack no other into it.
  Its tokens fill the lines of k experts, so only a capacity factor of None (or
  E / k) drops nothing.

  Losses: load_balance, with fractions of *sequences* in f and P, over all
  sequences of the batch or microbatch; a sequence by itself has no balance.
  router_z, a mean over sequences. Sequences of padding alone do not count.

  Attributes:
    gates: softmax over 'all' experts or the 'chosen' ones, see `top_k.route`.
    kernel_init: initialiser of W, [D, E].

  Example:
    >>> router = Sentence(num_experts=2)
    >>> variables = {'params': {'kernel': jnp.eye(2)}}
    >>> x_GxSxD = jnp.array([[[3., 0.], [0., 1.]], [[0., 1.], [0., 1.]]])
    >>> assignment, _ = router.apply(variables, x_GxSxD)
    >>> assignment.expert_GxSxK[..., 0].tolist()
    [[0, 0], [1, 1]]

  References:
    Kudugunta et al. 2021, https://arxiv.org/abs/2110.03742, section 3,
    "sentence-level".
  """

  gates: str = 'all'
  kernel_init: nn.initializers.Initializer = KERNEL_INIT

  needs = ('sequences',)
  is_causal = False

  @nn.compact
  def __call__(
    self,
    x_GxSxD: Array,
    *,
    mask_GxS: Array | None = None,
    deterministic: bool = True,
  ) -> tuple[Assignment, Aux]:
    """Routes sequences x [G, S, D]; masked tokens get no expert."""
    self.check_gradient(
      self.gates == 'chosen' and self.k == 1, "gates='chosen' of k=1 choice"
    )
    G, S, D = x_GxSxD.shape
    x_GxSxD = x_GxSxD.astype(jnp.float32)
    mask_GxSx1 = None
    if mask_GxS is not None:
      mask_GxSx1 = mask_GxS[..., None]
      x_GxSxD = jnp.where(mask_GxSx1, x_GxSxD, 0)
    mean_GxD = masked_mean(x_GxSxD, mask_GxSx1, axis=1)
    logits_Gx1xE = self.logits(mean_GxD[:, None], kernel_init=self.kernel_init)
    logits_GxSxE = jnp.broadcast_to(logits_Gx1xE, (G, S, self.num_experts))
    assignment, aux = route(
      logits_GxSxE,
      k=self.k,
      mask_GxS=mask_GxS,
      gates=self.gates,
      priority='token',
    )
    # All sequences side by side, as the tokens of one group.
    real_1xG = None if mask_GxS is None else mask_GxS.any(1)[None]
    _, by_sequence = route(
      logits_Gx1xE.swapaxes(0, 1), k=self.k, mask_GxS=real_1xG
    )
    return assignment, dataclasses.replace(
      aux, losses=by_sequence.losses, balance=by_sequence.balance, tokens=None
    )
