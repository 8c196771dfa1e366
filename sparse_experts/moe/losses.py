"""Losses that keep a router balanced and its logits small.

A loss of a group is one number of its tokens; the loss of a batch is the mean
over groups, each weighed by its tokens, so that padding dilutes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import struct

from sparse_experts.letters import Array
from sparse_experts.moe.assignment import largest


@struct.dataclass
class Balance:
  """The balance loss scale * sum_e f_e P_e, kept as what f and P are means of.

  f_e is the fraction of tokens with a counted choice of expert e (before any
  capacity), P_e the mean of its scores. With scale E it is 1 at perfect balance
  where one choice of each token counts, k where k do. The gradient flows
  through P. Sums add: over groups, layers, microbatches, whatever set of tokens
  a source balances.

  Attributes:
    counted_GxE: float32, tokens with a counted choice of each expert.
    score_GxE: float32, sums of the scores.
    tokens_G: float32, what both are divided by.
    scale: usually E.

  References:
    Fedus et al. 2021, https://arxiv.org/abs/2101.03961, equations 4 to 6,
    without alpha; per group as in their code.
  """

  counted_GxE: Array
  score_GxE: Array
  tokens_G: Array
  scale: float = struct.field(pytree_node=False)

  @classmethod
  def of(
    cls,
    scores_GxSxE: Array,
    counted_GxSxE: Array,
    mask_GxS: Array | None = None,
    scale: float | None = None,
  ) -> Balance:
    """That of tokens.

    Args:
      scores_GxSxE: float32 router probabilities.
      counted_GxSxE: 1 where a choice counts.
      mask_GxS: tokens to average over; None averages over all S positions.
      scale: None: E.
    """
    G, S, E = scores_GxSxE.shape
    tokens_G = jnp.full(G, S, jnp.float32)
    if mask_GxS is not None:
      tokens_G = mask_GxS.sum(1).astype(jnp.float32)
    return cls(
      counted_GxE=jax.lax.stop_gradient(
        _sum_over_tokens(counted_GxSxE, mask_GxS)
      ),
      score_GxE=_sum_over_tokens(scores_GxSxE, mask_GxS),
      tokens_G=tokens_G,
      scale=E if scale is None else scale,
    )

  def __add__(self, other: Balance) -> Balance:
    """Of the tokens of both, group by group."""
    if (self.score_GxE.shape, self.scale) != (
      other.score_GxE.shape,
      other.scale,
    ):
      raise ValueError(
        'balance is taken together of layers with equal groups and experts, '
        f'but [G, E] are {self.score_GxE.shape} and {other.score_GxE.shape} '
        f'and scales {self.scale:g} and {other.scale:g}: set another '
        "layer_reduction than 'joint'."
      )
    return jax.tree.map(jnp.add, self, other)

  def over_groups(self) -> Balance:
    """Of all tokens as one group."""
    return jax.tree.map(lambda sums: sums.sum(0, keepdims=True), self)

  def loss(self, counted: Balance | None = None) -> Array:
    """The mean over groups, each weighed by its tokens.

    Args:
      counted: whose f it is, if not its own.
    """
    f_GxE = (counted or self).f_GxE
    p_GxE = self.score_GxE / jnp.maximum(self.tokens_G, 1)[:, None]
    loss_G = self.scale * (f_GxE * p_GxE).sum(-1)
    return mean_over_groups(loss_G, self.tokens_G)

  @property
  def f_GxE(self) -> Array:
    """Fractions of tokens."""
    return self.counted_GxE / jnp.maximum(self.tokens_G, 1)[:, None]


def mean_over_groups(loss_G: Array, tokens_G: Array | None) -> Array:
  """The mean, each group weighed by its tokens; 0 where there are none."""
  if tokens_G is None:
    return loss_G.mean()
  return (loss_G * tokens_G).sum() / jnp.maximum(tokens_G.sum(), 1)


def router_z(log_z_GxS: Array, mask_GxS: Array | None = None) -> Array:
  """Mean over tokens of log_z^2, which keeps router logits small.

  Args:
    log_z_GxS: float32, logsumexp of the router's logits.
    mask_GxS: tokens to average over; None averages over all positions.

  References:
    Zoph et al. 2022, https://arxiv.org/abs/2202.08906, equation 5.
  """
  return masked_mean(jnp.square(log_z_GxS), mask_GxS, axis=(0, 1))


def per_choice(weights: Mapping[str, float], k: int) -> dict[str, float]:
  """Weights of losses whose source divides by a token's k choices, too.

  MegaBlocks does (and so OLMoE): its f is a share of all choices, and its
  z-loss a mean over tokens and choices.

  Example:
    >>> per_choice({'load_balance': 1e-2}, k=8)
    {'load_balance': 0.00125}
  """
  return {name: weight / k for name, weight in weights.items()}


def importance(gates_GxSxE: Array, mask_GxS: Array | None = None) -> Array:
  """CV^2 over experts of the sums of their gates, the mean over groups.

  0 where all experts weigh the same.

  Args:
    gates_GxSxE: float32, the gate of every expert, 0 where it is not chosen
      (Shazeer et al. 2017); noise-free softmax over all (Riquelme et al. 2021).
    mask_GxS: tokens that count, and that groups weigh by; None: all.

  References:
    Shazeer et al. 2017, https://arxiv.org/abs/1701.06538, equations 6 and 7.
    Riquelme et al. 2021, https://arxiv.org/abs/2106.05974, appendix A.2.
  """
  return square_variation(
    _sum_over_tokens(gates_GxSxE, mask_GxS),
    None if mask_GxS is None else mask_GxS.sum(1).astype(jnp.float32),
  )


def load(probs_GxSxE: Array, mask_GxS: Array | None = None) -> Array:
  """CV^2 over experts of the tokens expected in each, the mean over groups.

  Args:
    probs_GxSxE: from `selection_probability`.
    mask_GxS: as of `importance`.

  References:
    Shazeer et al. 2017, appendix A, equations 10 and 11; Riquelme et al. 2021,
    appendix A.2.
  """
  return importance(probs_GxSxE, mask_GxS)


def selection_probability(
  logits_GxSxE: Array, threshold: Array, deviation: Array | float
) -> Array:
  """P(x, e) that an expert is chosen if its own noise were drawn again.

  Float32 [G, S, E]; the gradient flows through all three arguments.

  Args:
    logits_GxSxE: without noise.
    threshold: the noisy logit it has to beat, shape [G, S, E] or [G, S, 1]; see
      `others_threshold`.
    deviation: standard deviation of the noise, a number or shape [G, S, E].

  References:
    Shazeer et al. 2017, appendix A, equations 8 and 9.
  """
  return jax.scipy.stats.norm.cdf((logits_GxSxE - threshold) / deviation)


def others_threshold(noisy_GxSxE: Array, k: int) -> Array:
  """The k-th largest noisy logit among the other experts, shape [G, S, E].

  kth_excluding(H(x), k, i) of Shazeer et al. 2017, appendix A, for every i: the
  (k + 1)-th largest of all for those in the top k, the k-th for the others.

  Raises:
    ValueError: k is not below E.
  """
  E = noisy_GxSxE.shape[-1]
  if not 1 <= k < E:
    raise ValueError(
      f'a k-th of the {E - 1} other experts needs k from 1 to {E - 1}, got {k}.'
    )
  expert_GxSxK = largest(noisy_GxSxE, k + 1)
  onehot_GxSxKxE = jax.nn.one_hot(expert_GxSxK[:, :, -2:], E)
  value_GxSx2 = jnp.where(onehot_GxSxKxE > 0, noisy_GxSxE[:, :, None], 0).sum(
    -1
  )
  chosen_GxSxE = jax.nn.one_hot(expert_GxSxK[:, :, :k], E).sum(2) > 0
  return jnp.where(chosen_GxSxE, value_GxSx2[..., 1:], value_GxSx2[..., :1])


def _sum_over_tokens(x_GxSxE: Array, mask_GxS: Array | None) -> Array:
  if mask_GxS is not None:
    x_GxSxE = jnp.where(mask_GxS[..., None], x_GxSxE, 0)
  return x_GxSxE.sum(1)


def square_variation(sum_GxE: Array, tokens_G: Array | None = None) -> Array:
  """(deviation / mean)^2 over experts, the mean over groups by their tokens.

  0 for zeros. Without the root: its slope at perfect balance is infinite.
  """
  mean_Gx1 = sum_GxE.mean(-1, keepdims=True)
  variance_G = jnp.square(sum_GxE - mean_Gx1).mean(-1)
  return mean_over_groups(
    variance_G / (jnp.square(mean_Gx1[:, 0]) + 1e-10), tokens_G
  )


def masked_mean(
  x: Array, mask: Array | None, axis: int | tuple[int, ...] = -1
) -> Array:
  """Mean of `x` over `axis` where `mask` holds; 0 where it holds nowhere.

  Args:
    x: float, of any shape.
    mask: boolean, of a shape that broadcasts to that of `x`; None: all hold.
    axis: of `x`, one or several.
  """
  if mask is None:
    return x.mean(axis)
  weights = jnp.broadcast_to(mask, x.shape).astype(x.dtype)
  return (x * weights).sum(axis) / jnp.maximum(weights.sum(axis), 1)
