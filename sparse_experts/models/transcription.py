"""Transcription: labels in the order of the frames, at times nobody knows."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from sparse_experts.data.dataset import Dataset
from sparse_experts.data.features.speech import Speech
from sparse_experts.letters import Array
from sparse_experts.models import auxiliary, ctc
from sparse_experts.models.auxiliary import Totals
from sparse_experts.models.objective import Batch, Judged, Objective
from sparse_experts.models.sums import Mean


@dataclasses.dataclass(frozen=True)
class Transcription(Objective):
  """Writes what is said: CTC, the objective of a `speech.SpeechEncoder`.

      loss = sum over rows of -log P(labels | frames) / sum of their labels
             + auxiliary losses

  P is over all alignments, see `ctc.log_prob`; the loss is in nats per label.
  The blank is the last output. `weight` of a batch says how much each row
  counts. A row with fewer tokens than its labels need has no alignment and no
  loss: it counts for nothing there and is counted as 'infeasible'; its errors
  count.

  Means are 'loss'; 'symbol_error_rate', the edit distance of what the best path
  reads as, over labels; and 'exact', rows of which it is 0. 'rows', 'labels'
  and 'infeasible' rows are counted.

  Example:
    >>> import functools
    >>> from flax import linen as nn
    >>> from sparse_experts.layers.attention import Attention
    >>> from sparse_experts.layers.mlp import Mlp
    >>> from sparse_experts.models.speech import SpeechEncoder
    >>> from sparse_experts.models.transformer import Block, Stack
    >>> partial = functools.partial
    >>> block = partial(
    ...   Block,
    ...   make_attention=partial(Attention, num_heads=2, head_width=4),
    ...   make_mlp=partial(Mlp, hidden_width=16),
    ... )
    >>> model = Transcription(SpeechEncoder(
    ...   encoder=Stack(num_layers=1, make_block=block), bands=3,
    ...   frames_per_token=2, width=8, num_labels=5))
    >>> batch = {
    ...   'frames': jnp.ones((2, 8, 3)), 'frame_lengths': jnp.array([8, 3]),
    ...   'labels': jnp.array([[4, 4], [1, 1]]),
    ...   'label_lengths': jnp.array([2, 2]), 'weight': jnp.ones(2),
    ... }
    >>> params = nn.unbox(model.init(jax.random.key(0), batch))
    >>> loss, sums = model.loss(params, batch, train=False)
    >>> {name: float(count) for name, count in sums['counts'].items()}
    {'rows': 2.0, 'labels': 4.0, 'infeasible': 1.0}
  """

  @property
  def features(self) -> Speech:
    """Frames of the module's bands, and labels."""
    return self.module.inputs

  @property
  def headline(self) -> str:
    """Fewer errors are better."""
    return '-symbol_error_rate'

  def weight(self, batch: Batch) -> Array:
    """Labels that count, float32."""
    return self._labels(batch).sum()

  def measure(
    self, logits_BxLxV: Array, batch: Batch, totals: Totals
  ) -> Judged:
    """The loss, and errors of the best path."""
    weights_B, lengths_B = batch['weight'], batch['label_lengths']
    fits_B = self._fits(batch)
    loss_B = -self._log_prob(logits_BxLxV, batch)
    loss = (jnp.where(fits_B, loss_B, 0) * weights_B).sum()
    distance_B = ctc.edit_distance(
      *ctc.best_path(logits_BxLxV, self.module.is_token(batch)),
      batch['labels'],
      lengths_B,
    )
    rows, labels = weights_B.sum(), (weights_B * lengths_B).sum()
    return Judged(
      loss=loss / auxiliary.or_one(totals.weight),
      means={
        'loss': Mean(loss, self.weight(batch)),
        'symbol_error_rate': Mean((distance_B * weights_B).sum(), labels),
        'exact': Mean(((distance_B == 0) * weights_B).sum(), rows),
      },
      counts={
        'rows': rows,
        'labels': labels,
        'infeasible': (~fits_B * weights_B).sum(),
      },
    )

  def rewards(
    self, logits_BxLxV: Array, batch: Batch
  ) -> dict[str, tuple[Array, Array]]:
    """The row's log-probability per label, a constant, for each of its tokens.

    The tokens of a row share the weight of its labels.
    """
    # The reward is no function of the parameters: it is what the world answers.
    log_prob_B = jax.lax.stop_gradient(self._log_prob(logits_BxLxV, batch))
    reward_B = log_prob_B / jnp.maximum(batch['label_lengths'], 1)
    reward_B = jnp.where(self._fits(batch), reward_B, 0)
    mask_BxL = self.module.is_token(batch)
    reward_BxL = jnp.broadcast_to(reward_B[:, None], mask_BxL.shape)
    return {'encoder': (reward_BxL, self._token_weights(batch))}

  def predictions(
    self, logits_BxLxV: Array, batch: Batch
  ) -> tuple[Array, Array]:
    """Logits [B, L, V] of what each token writes, and weights [B, L].

    The tokens of a row share the weight of its labels.
    """
    return logits_BxLxV, self._token_weights(batch)

  def check_data(self, dataset: Dataset) -> None:
    """Raises ValueError where the task has more labels than the head."""
    most, labels = self.module.num_labels, dataset.vocabulary_size('labels')
    if labels > most:
      raise ValueError(
        f'task {dataset.mixture_or_task_name!r} has {labels} labels, but the '
        f'head writes {most} and the blank: give it num_labels={labels}, or '
        'more.'
      )

  def _fits(self, batch: Batch) -> Array:
    """Rows that have an alignment, boolean [B]."""
    needed_B = ctc.tokens_needed(batch['labels'], batch['label_lengths'])
    return self.module.is_token(batch).sum(-1) >= needed_B

  def _labels(self, batch: Batch) -> Array:
    """Labels of each row that count, float32 [B]."""
    return batch['label_lengths'] * batch['weight'] * self._fits(batch)

  def _log_prob(self, logits_BxLxV: Array, batch: Batch) -> Array:
    return ctc.log_prob(
      logits_BxLxV,
      self.module.is_token(batch),
      batch['labels'],
      batch['label_lengths'],
    )

  def _token_weights(self, batch: Batch) -> Array:
    """What each token weighs of its row's labels, float32 [B, L]."""
    mask_BxL = self.module.is_token(batch)
    tokens_Bx1 = jnp.maximum(mask_BxL.sum(-1, keepdims=True), 1)
    return mask_BxL * self._labels(batch)[:, None] / tokens_Bx1
