"""Losses of routers that learn from reward: how likely the targets became.

A router that takes part gives, for every token, numbers that its decision (the
choice of an expert) appears in, `Aux.decisions`:

    value   what reward it expected, differentiable
    gain    surrogates whose gradients are the directions of the policy when
    pain    the reward was higher, or lower, than expected; absent in routers
            that only learn values

REINFORCE has gain = pain = log pi(choice).
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from sparse_experts.data.special_tokens import T5, SpecialTokens
from sparse_experts.letters import Array
from sparse_experts.models.layout import LayerId
from sparse_experts.moe.outputs import Aux

Batch = Mapping[str, Array]


def losses(
  auxes: Mapping[str, Aux],
  batch: Batch,
  log_probs_BxL: Array,
  weights_BxL: Array,
  num_targets: Array,
  *,
  special_tokens: SpecialTokens = T5,
) -> dict[str, Aux]:
  """The same Aux, with losses 'policy' and 'value' where there are decisions.

      reward r    = log p(target), a constant
      advantage a = r - value, a constant
      policy      = -mean of max(a, 0) gain + min(a, 0) pain
      value       = mean of (value - r)^2

  Means over targets. In a decoder a target is its own token's reward. A token
  of an encoder has the mean over the targets of its example, and all tokens of
  an example share the weight of its targets; so tokens of examples without
  targets count for nothing, and microbatches are averaged as cross-entropy is.

  Args:
    auxes: of sparse layers, 'encoder/...' or 'decoder/...'.
    batch: features; segment ids say which tokens are one example.
    log_probs_BxL: float32 log-probability of each target.
    weights_BxL: float32, of each target in the loss.
    num_targets: what the sums are divided by.
    special_tokens: the model's.
  """
  if not any(aux.decisions for aux in auxes.values()):
    return dict(auxes)
  # The reward is no function of the parameters: it is what the world answers.
  reward_BxL = jax.lax.stop_gradient(log_probs_BxL)
  rewards = {'decoder': (reward_BxL, weights_BxL)}
  if 'encoder_input_tokens' in batch:
    is_token_BxM = special_tokens.is_token(batch['encoder_input_tokens'])
    rewards['encoder'] = _of_inputs(
      batch, is_token_BxM, reward_BxL, weights_BxL
    )

  def with_losses(name, aux):
    if not aux.decisions:
      return aux
    reward_BxL, weights_BxL = rewards[LayerId.parse(name).stack]
    more = {
      loss: (term_BxL * weights_BxL).sum() / num_targets
      for loss, term_BxL in terms(reward_BxL, **aux.decisions).items()
    }
    return aux.replace(losses={**aux.losses, **more})

  return {name: with_losses(name, aux) for name, aux in auxes.items()}


def terms(
  reward_BxL: Array,
  *,
  value: Array,
  gain: Array | None = None,
  pain: Array | None = None,
) -> dict[str, Array]:
  """What each token adds to the losses 'value' and 'policy'.

  Example:
    >>> half = jnp.log(jnp.array([0.5]))  # Of two experts, at even odds.
    >>> better = terms(jnp.array([3.]), value=jnp.array([1.]), gain=half,
    ...                pain=half)
    >>> [f'{better[name][0]:.3f}' for name in ('value', 'policy')]
    ['4.000', '1.386']
  """
  result = {'value': jnp.square(value - reward_BxL)}
  if gain is not None:
    advantage_BxL = reward_BxL - jax.lax.stop_gradient(value)
    result['policy'] = -(
      jnp.maximum(advantage_BxL, 0) * gain
      + jnp.minimum(advantage_BxL, 0) * pain
    )
  return result


def _of_inputs(
  batch: Batch, is_token_BxM: Array, reward_BxL: Array, weights_BxL: Array
) -> tuple[Array, Array]:
  """Rewards and weights of an encoder's tokens, [B, M]."""
  row_BxM = is_token_BxM.astype(jnp.int32)
  example_BxM = batch.get('encoder_segment_ids', row_BxM)
  row_BxL = jnp.ones(weights_BxL.shape, jnp.int32)
  example_BxL = batch.get('decoder_segment_ids', row_BxL)
  same_BxMxL = example_BxM[:, :, None] == example_BxL[:, None, :]
  same_BxMxL &= is_token_BxM[:, :, None]
  same_BxMxM = example_BxM[:, :, None] == example_BxM[:, None, :]
  same_BxMxM &= is_token_BxM[:, None, :]

  def total(same, x_BxL):
    return jnp.einsum('BML,BL->BM', same.astype(jnp.float32), x_BxL)

  targets_BxM = total(same_BxMxL, weights_BxL)
  reward_BxM = total(same_BxMxL, weights_BxL * reward_BxL)
  reward_BxM /= jnp.maximum(targets_BxM, 1)
  tokens_BxM = same_BxMxM.sum(-1)
  return reward_BxM, targets_BxM / jnp.maximum(tokens_BxM, 1)
