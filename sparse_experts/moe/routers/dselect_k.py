"""DSelect-k: a differentiable choice of k experts by binary codes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.scipy.special import entr

from sparse_experts import sharding
from sparse_experts.letters import Array
from sparse_experts.moe.assignment import Assignment, positions
from sparse_experts.moe.losses import masked_mean
from sparse_experts.moe.outputs import Aux
from sparse_experts.moe.router import Router
from sparse_experts.numbers import Positive

# Their code's EPSILON: no logarithm of, and no division by, less.
_LEAST = 1e-6


class DSelectK(Router):
  """k selectors, each a product of smooth steps over the bits of an expert.

      q(x) = sum_i softmax(x G)_i r(x W_i),
      r(z)_e = product over bits j of S(z_j) if e has bit j else 1 - S(z_j)

  with S the smooth step, exactly 0 below -gamma / 2 and 1 above gamma / 2. All
  experts with a weight above 0 are chosen: at first nearly all E, in the end,
  as `selector_entropy` draws every selector to one expert, k at most. Until
  then a capacity made for k choices drops most of them, so train with
  capacity_factor_train=None.

  Attributes:
    k: selectors.
    static: weights are the same for all tokens, parameters of their own
      (section 3.1); otherwise each token has its own (section 3.2).
    gamma: width of the smooth step.

  Losses, means over tokens of sums over selectors: selector_entropy, and
  unassigned_codes, 1 / (sum over experts of r), which keeps selectors from
  codes that are no expert's; 0 where E is a power of two and all codes are.
  Their code adds the second with weight 1 whatever the first's.

  Example:
    >>> router = DSelectK(num_experts=4, k=2)
    >>> x_GxSxD = jax.random.normal(jax.random.key(0), (2, 16, 8))
    >>> variables = router.init(jax.random.key(1), x_GxSxD)
    >>> assignment, aux = router.apply(variables, x_GxSxD)
    >>> assignment.expert_GxSxK[0, 0].tolist()
    [0, 1, 2, 3]

  References:
    Hazimeh et al. 2021, https://arxiv.org/abs/2106.03760, section 3; constants
    and initialisation as in its code, google-research/dselect_k_moe.
  """

  k: int = 2
  static: bool = False
  gamma: Positive = 1.0

  exchangeable = False  # A code is an expert's index.

  @nn.compact
  def __call__(
    self,
    x_GxSxD: Array,
    *,
    mask_GxS: Array | None = None,
    deterministic: bool = True,
  ) -> tuple[Assignment, Aux]:
    """Routes tokens x [G, S, D]; masked tokens get no expert."""
    del deterministic  # Nothing is drawn.
    self.check_k()
    if self.num_experts < 2:
      raise ValueError(
        f'DSelectK selects among two experts or more, got {self.num_experts}.'
      )
    G, S, _ = x_GxSxD.shape
    bits = (self.num_experts - 1).bit_length()
    code_init, weight_init = _uniform(self.gamma / 100), _uniform(0.05)

    def values(name, width, init):
      """Of every token, [G, S, width]."""
      bias = self.param(
        f'{name}_bias',
        sharding.named(init, 'router_width'),
        (width,),
        jnp.float32,
      )
      if self.static:
        return jnp.broadcast_to(bias, (G, S, width))
      return bias[None, None] + self.logits(
        x_GxSxD, width=width, kernel_init=init, name=f'{name}_kernel'
      )

    return select(
      values('code', self.k * bits, code_init).reshape(G, S, self.k, bits),
      values('weight', self.k, weight_init),
      num_experts=self.num_experts,
      gamma=self.gamma,
      mask_GxS=mask_GxS,
    )


def select(
  code_GxSxKxI: Array,
  weight_GxSxK: Array,
  *,
  num_experts: int,
  gamma: Positive = 1.0,
  mask_GxS: Array | None = None,
) -> tuple[Assignment, Aux]:
  """The mixture of given codes and weights; see `DSelectK`.

  Args:
    code_GxSxKxI: float32, z of each selector, I = ceil(log2 E) bits, the
      highest first.
    weight_GxSxK: float32 logits of the selectors' weights.
    num_experts: E >= 2.
    gamma: width of the smooth step.
    mask_GxS: boolean, False for padding, which gets no expert and no position.

  Returns:
    Assignment with E choices, of experts 0 to E - 1 where their weight is above
    0; Aux with the losses above and metrics `entropy` and `confidence` (of q).

  Example:
    >>> code_GxSxKxI = jnp.array([[[[1., -1.]]]])  # Bits 1 and 0: expert 2.
    >>> assignment, _ = select(
    ...   code_GxSxKxI, jnp.zeros((1, 1, 1)), num_experts=4)
    >>> assignment.gate_GxSxK.tolist()
    [[[0.0, 0.0, 1.0, 0.0]]]
  """
  E = num_experts
  G, S, _, I = code_GxSxKxI.shape
  if mask_GxS is None:
    mask_GxS = jnp.ones((G, S), bool)
  # Whatever padding holds, NaN too, stays there.
  code_GxSxKxI = jnp.where(mask_GxS[..., None, None], code_GxSxKxI, 0)
  weight_GxSxK = jnp.where(mask_GxS[..., None], weight_GxSxK, 0)

  step_GxSxKx1xI = smooth_step(code_GxSxKxI, gamma)[..., None, :]
  has_bit_ExI = (np.arange(E)[:, None] >> np.arange(I)[::-1]) & 1 == 1
  selector_GxSxKxE = jnp.where(
    has_bit_ExI[None, None, None], step_GxSxKx1xI, 1 - step_GxSxKx1xI
  ).prod(-1)
  gate_GxSxE = jnp.einsum(
    'GSK,GSKE->GSE', jax.nn.softmax(weight_GxSxK), selector_GxSxKxE
  )
  taken_GxSxE = (gate_GxSxE > 0) & mask_GxS[..., None]
  expert_GxSxE = jnp.where(
    taken_GxSxE, jnp.arange(E, dtype=jnp.int32)[None, None], E
  )

  def mean(x_GxSxK):
    return masked_mean(x_GxSxK.sum(-1), mask_GxS, axis=(0, 1))

  found = {
    'selector_entropy': mean(_entropy(selector_GxSxKxE)),
    'unassigned_codes': jnp.float32(0),
  }
  if E != 2**I:  # In their code; the paper has no name for it.
    reached_GxSxK = jnp.maximum(selector_GxSxKxE.sum(-1), _LEAST)
    found['unassigned_codes'] = mean(1 / reached_GxSxK)
  fixed_GxSxE = jax.lax.stop_gradient(gate_GxSxE)
  return Assignment(
    expert_GxSxK=expert_GxSxE,
    gate_GxSxK=jnp.where(taken_GxSxE, gate_GxSxE, 0),
    # A token comes to an expert once at most, so all its choices are first.
    position_GxSxK=positions(expert_GxSxE, E, priority='token'),
    num_experts=E,
  ), Aux(
    losses=found,
    metrics={
      'entropy': (entr(fixed_GxSxE).sum(-1) * mask_GxS).sum(),
      'confidence': (fixed_GxSxE.max(-1) * mask_GxS).sum(),
    },
    logits=jnp.log(jnp.maximum(fixed_GxSxE, 1e-30)),  # Finite.
    tokens=mask_GxS.sum().astype(jnp.float32),
  )


def smooth_step(x: Array, gamma: float = 1.0) -> Array:
  """0 up to -gamma / 2, 1 from gamma / 2, a cubic between (equation 2).

  Example:
    >>> smooth_step(jnp.array([-0.5, 0.0, 0.25, 1.0])).tolist()
    [0.0, 0.5, 0.84375, 1.0]
  """
  inner = jnp.clip(x, -gamma / 2, gamma / 2)
  cubic = -2 / gamma**3 * inner**3 + 3 / (2 * gamma) * inner + 0.5
  # Exactly, or no expert is ever without weight.
  return jnp.where(x <= -gamma / 2, 0.0, jnp.where(x >= gamma / 2, 1.0, cubic))


def _entropy(selector_GxSxKxE: Array) -> Array:
  return -(selector_GxSxKxE * jnp.log(selector_GxSxKxE + _LEAST)).sum(-1)


def _uniform(bound: float) -> nn.initializers.Initializer:
  """U(-bound, bound)."""

  def init(key, shape, dtype):
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init
