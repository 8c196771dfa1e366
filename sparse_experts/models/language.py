"""Language: the next token, or the spans that are missing."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from sparse_experts.data.dataset import Dataset
from sparse_experts.data.features.text import Text, TextToText
from sparse_experts.data.special_tokens import SpecialTokens
from sparse_experts.letters import Array
from sparse_experts.models import auxiliary
from sparse_experts.models.auxiliary import Totals
from sparse_experts.models.decoding import GREEDY, BeamSearch, Sampling
from sparse_experts.models.likelihood import likelihood
from sparse_experts.models.objective import Batch, Judged, Objective
from sparse_experts.models.sums import Mean
from sparse_experts.models.transformer import map_rows
from sparse_experts.numbers import NotNegative


@dataclasses.dataclass(frozen=True)
class Language(Objective):
  """Writes targets, token by token: the objective of a `LanguageModel`.

      loss = CE + z_loss * mean log(Z)^2 + auxiliary losses

  CE is a mean over target tokens, in nats; `decoder_loss_weights` says which
  targets count. Routers that learn from reward have further auxiliary losses,
  'policy' and 'value', see `policy_gradient.losses`; a token's reward is its
  target's log-probability. `decode` drops nothing.

  Attributes:
    z_loss: weight of log(Z)^2 of the output softmax (1e-4 in T5X).

  Example: docs/architecture.md builds and runs one; tests run that.
  """

  z_loss: NotNegative = 0.0

  @property
  def features(self) -> TextToText | Text:
    """Of an encoder-decoder, or of a decoder alone."""
    alone = self.module.encoder is None
    return (Text if alone else TextToText)(self.special_tokens)

  @property
  def special_tokens(self) -> SpecialTokens:
    """Which token ids are padding, an end, a decoder's first input."""
    return self.module.special_tokens

  def target_weights(self, batch: Batch) -> Array:
    """How much each target counts, float32 [B, L]."""
    weights_BxL = batch.get('decoder_loss_weights')
    if weights_BxL is None:
      weights_BxL = self.special_tokens.is_token(batch['decoder_target_tokens'])
    return weights_BxL.astype(jnp.float32)

  def weight(self, batch: Batch) -> Array:
    """Targets that count, float32."""
    return self.target_weights(batch).sum()

  def measure(
    self, logits_BxLxV: Array, batch: Batch, totals: Totals
  ) -> Judged:
    """Cross-entropy and z-loss."""
    weights_BxL = self.target_weights(batch)
    log_prob_BxL, log_z_BxL, correct_BxL = likelihood(
      logits_BxLxV, batch['decoder_target_tokens']
    )
    cross_entropy = -(log_prob_BxL * weights_BxL).sum()
    square_z = (jnp.square(log_z_BxL) * weights_BxL).sum()
    targets = weights_BxL.sum()
    return Judged(
      loss=(cross_entropy + self.z_loss * square_z)
      / auxiliary.or_one(totals.weight),
      means={
        'loss': Mean(cross_entropy, targets),
        'accuracy': Mean((correct_BxL * weights_BxL).sum(), targets),
      },
      counts={'targets': targets},
    )

  def rewards(
    self, logits_BxLxV: Array, batch: Batch
  ) -> dict[str, tuple[Array, Array]]:
    """The log-probability of each target, a constant, and its weight.

    A decoder's token has its own target's. A token of an encoder has the mean
    over the targets of its example, and all tokens of an example share the
    weight of its targets; so tokens of examples without targets count for
    nothing, and microbatches are averaged as cross-entropy is.
    """
    log_prob_BxL, _, _ = likelihood(
      logits_BxLxV, batch['decoder_target_tokens']
    )
    # The reward is no function of the parameters: it is what the world answers.
    reward_BxL = jax.lax.stop_gradient(log_prob_BxL)
    weights_BxL = self.target_weights(batch)
    rewards = {'decoder': (reward_BxL, weights_BxL)}
    if self.module.encoder is not None:
      is_token_BxM = self.special_tokens.is_token(batch['encoder_input_tokens'])
      rewards['encoder'] = _of_inputs(
        batch, is_token_BxM, reward_BxL, weights_BxL
      )
    return rewards

  def predictions(
    self, logits_BxLxV: Array, batch: Batch
  ) -> tuple[Array, Array]:
    """Logits [B, L, V] of the targets, and their weights [B, L]."""
    return logits_BxLxV, self.target_weights(batch)

  def check_data(self, dataset: Dataset) -> None:
    """Raises ValueError where the task's ids are not those of the model."""
    dataset.check_vocabulary(self.module.embed.vocab_size, self.special_tokens)

  def score(
    self, params, batch: Batch, *, capacity_factor: float | None = None
  ) -> Array:
    """Log-probability of each row's targets, float32 [B].

    Exact by default: nothing is dropped, so a row's score does not depend on
    its neighbours. A capacity_factor scores as the papers evaluate.

    Args:
      params: unboxed.
      batch: of `features`, B rows.
      capacity_factor: of all sparse layers; None drops nothing.
    """
    logits_BxLxV, _ = self.apply(params, batch, capacity_factor=capacity_factor)
    log_prob_BxL, _, _ = likelihood(
      logits_BxLxV, batch['decoder_target_tokens']
    )
    return (log_prob_BxL * self.target_weights(batch)).sum(-1)

  def logits(self, params, batch: Batch) -> Array:
    """Exact logits [B, L, V]: nothing is dropped; zeros where no target is.

    Args:
      params: unboxed parameters.
      batch: features. Without `decoder_target_tokens` every position counts.
        Tokens of a decoder alone may be called `tokens`; `encoder_mask` may be
        added, 0 where an input is to be ignored.
    """
    batch = {name: jnp.asarray(value) for name, value in batch.items()}
    if 'tokens' in batch:
      batch['decoder_input_tokens'] = batch.pop('tokens')
    pad = self.special_tokens.pad
    if 'encoder_mask' in batch:
      batch['encoder_input_tokens'] = jnp.where(
        batch.pop('encoder_mask') > 0, batch['encoder_input_tokens'], pad
      )
    any_token_BxL = jnp.full_like(batch['decoder_input_tokens'], pad + 1)
    targets_BxL = batch.setdefault('decoder_target_tokens', any_token_BxL)
    logits_BxLxV, _ = self.apply(params, batch)
    return logits_BxLxV * self.special_tokens.is_token(targets_BxL)[..., None]

  def decode(
    self,
    params,
    batch: Batch,
    keys_B: Array | None = None,
    *,
    max_tokens: int,
    strategy: Sampling | BeamSearch = GREEDY,
  ) -> tuple[Array, Array]:
    """Answers to inputs or prompts, with a cache and without capacity.

    Args:
      params: unboxed parameters.
      batch: `encoder_input_tokens`; for a decoder alone `decoder_input_tokens`
        with `decoder_causal_attention` marking the prompt.
      keys_B: a key per row, for sampling above temperature 0.
      max_tokens: T, tokens written at most.
      strategy: how tokens are chosen; greedy by default.

    Returns:
      tokens [B, T], padded after EOS, and their log-probabilities [B]; of a
      beam search of width N, tokens [B, N, T], the best first, and scores
      [B, N].
    """
    prompt = 1
    if self.module.encoder is None:
      prompt = batch['decoder_input_tokens'].shape[1]
    logits_BxV, variables = self.module.apply(
      {'params': params},
      batch,
      prompt + max_tokens,
      method='start',
      mutable=['cache'],
    )

    def step(cache, tokens_B):
      logits_BxV, variables = self.module.apply(
        {'params': params, 'cache': cache},
        tokens_B,
        method='step',
        mutable=['cache'],
      )
      return variables['cache'], logits_BxV

    return strategy(
      logits_BxV,
      step,
      variables['cache'],
      keys_B,
      max_tokens=max_tokens,
      map_rows=map_rows,
      special_tokens=self.special_tokens,
    )


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
