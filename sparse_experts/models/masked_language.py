"""Masked language: tokens that are not shown, and what other heads predict."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from sparse_experts.data.dataset import Dataset
from sparse_experts.data.features.masked_text import Label, MaskedText
from sparse_experts.data.special_tokens import SpecialTokens
from sparse_experts.letters import Array
from sparse_experts.models import auxiliary
from sparse_experts.models.auxiliary import Totals
from sparse_experts.models.classification import judge_labels
from sparse_experts.models.objective import Batch, Judged, Objective
from sparse_experts.models.sums import Mean
from sparse_experts.models.text_heads import MASKED, Head

Outputs = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class MaskedLanguage(Objective):
  """Several losses of one text encoder: the objective of a `TextHeads`.

      loss = sum over heads h of weight_h * loss_h + auxiliary losses
      loss_h = mean over what counts for h of its loss, see `Classification`

  For a head of kind 'masked' the places of tokens that were masked count, as
  the batch's 'weights' say; for one of 'tokens' every token, and for others
  every row that has a token. Each is divided by its own weight, so that
  microbatches with different numbers of each give the whole batch's gradient.

  Wrappers, and routers that learn by reward, look at one head alone: the masked
  one, or where there is none the first by name.

  Means are 'loss', the sum over heads, and by head '<name>/loss' and
  '<name>/accuracy', of numbers '<name>/absolute_error'.

  References:
    Devlin et al. 2018, https://arxiv.org/abs/1810.04805, section 3.1: of BERT
    the heads are masked tokens, and the next sentence by the first token.

  Example:
    >>> import functools
    >>> from flax import linen as nn
    >>> from sparse_experts.layers.attention import Attention
    >>> from sparse_experts.layers.embed import TokenEmbed
    >>> from sparse_experts.layers.mlp import Mlp
    >>> from sparse_experts.models.text_heads import TextHeads
    >>> from sparse_experts.models.transformer import Block, Stack
    >>> partial = functools.partial
    >>> block = partial(
    ...   Block,
    ...   make_attention=partial(Attention, num_heads=2, head_width=4),
    ...   make_mlp=partial(Mlp, hidden_width=16),
    ... )
    >>> heads = {
    ...   'masked': Head('masked'),
    ...   'next_sentence': Head('softmax', 2, reads='first'),
    ... }
    >>> stack = Stack(num_layers=1, make_block=block)
    >>> model = MaskedLanguage(
    ...   TextHeads(TokenEmbed(20, 8), stack, heads=heads))
    >>> batch = {
    ...   'tokens': jnp.array([[19, 7, 9, 1, 0]]),
    ...   'targets': jnp.array([[8, 7, 9, 1, 0]]),
    ...   'weights': jnp.array([[1.0, 0.0, 0.0, 0.0, 0.0]]),
    ...   'next_sentence': jnp.array([1]),
    ... }
    >>> params = nn.unbox(model.init(jax.random.key(0), batch))
    >>> loss, sums = model.loss(params, batch, train=False)
    >>> sorted(sums['means'])  # doctest: +NORMALIZE_WHITESPACE
    ['loss', 'masked/accuracy', 'masked/loss', 'next_sentence/accuracy',
     'next_sentence/loss']
  """

  def __post_init__(self):
    super().__post_init__()
    masked = [name for name, h in self._heads.items() if h.kind == MASKED]
    if len(masked) > 1 or not self._heads:
      raise ValueError(
        f'there must be a head, and one of kind {MASKED!r} at most, but they '
        f'are {sorted(self._heads)}, of which {masked} are.'
      )

  @property
  def features(self) -> MaskedText:
    """Tokens, and the labels of all heads."""
    labels = {
      name: _label(head)
      for name, head in self._heads.items()
      if head.kind != MASKED
    }
    has_masks = len(labels) < len(self._heads)
    return MaskedText(labels, has_masks, self.special_tokens)

  @property
  def special_tokens(self) -> SpecialTokens:
    """Which token ids are padding, or an end."""
    return self.module.special_tokens

  def weight(self, batch: Batch) -> Array:
    """What counts for the main head, float32."""
    return self._weights(self._main, batch).sum()

  def totals(self, batch: Batch) -> Totals:
    """As `Objective.totals`, and the weight of each head."""
    weights = {name: self._weights(name, batch).sum() for name in self._heads}
    return dataclasses.replace(super().totals(batch), weights=weights)

  def measure(self, outputs: Outputs, batch: Batch, totals: Totals) -> Judged:
    """The heads' losses, and how often they are right."""
    loss, means, counts = jnp.float32(0), {}, {}
    for name, head in self._heads.items():
      weights = self._weights(name, batch)
      losses, right = self._judge(name, outputs, batch)
      total, weight = (losses * weights).sum(), weights.sum()
      loss += head.weight * total / auxiliary.or_one(totals.weights[name])
      other = 'absolute_error' if head.kind == 'squared' else 'accuracy'
      means[f'{name}/loss'] = Mean(total, weight)
      means[f'{name}/{other}'] = Mean((right * weights).sum(), weight)
      counts[f'{name}/targets'] = weight
    parts = [means[f'{name}/loss'] for name in self._heads]
    factors_I = jnp.array([head.weight for head in self._heads.values()])
    means['loss'] = Mean(
      factors_I * jnp.stack([part.total for part in parts]),
      jnp.stack([part.weight for part in parts]),
    )
    return Judged(loss, means, counts)

  def rewards(
    self, outputs: Outputs, batch: Batch
  ) -> dict[str, tuple[Array, Array]]:
    """Minus the main head's loss, a constant, and its weight.

    A masked token has the log-probability of what it was; other tokens earn
    nothing. Of a head of rows, the tokens of a row share its weight.
    """
    losses, _ = self._judge(self._main, outputs, batch)
    # The reward is no function of the parameters: it is what the world answers.
    reward = -jax.lax.stop_gradient(losses)
    weights = self._weights(self._main, batch)
    if not self._heads[self._main].of_tokens:
      mask_BxL = self.module.masks(batch)['encoder']
      tokens_Bx1 = jnp.maximum(mask_BxL.sum(-1, keepdims=True), 1)
      reward = jnp.broadcast_to(reward[:, None], mask_BxL.shape)
      weights = mask_BxL * weights[:, None] / tokens_Bx1
    return {'encoder': (reward, weights)}

  def predictions(self, outputs: Outputs, batch: Batch) -> tuple[Array, Array]:
    """Logits of the main head, [B, L, V] or [B, V], and weights."""
    if self._heads[self._main].kind in (MASKED, 'softmax'):
      return outputs[self._main], self._weights(self._main, batch)
    return super().predictions(outputs, batch)

  def check_data(self, dataset: Dataset) -> None:
    """Raises ValueError where the task's ids or classes are not the model's."""
    dataset.check_vocabulary(self.module.embed.vocab_size, self.special_tokens)
    for name, head in self._heads.items():
      if head.kind not in ('softmax', 'sigmoid'):
        continue
      V, classes = head.num_outputs, dataset.vocabulary_size(name)
      if classes > V:
        raise ValueError(
          f'task {dataset.mixture_or_task_name!r} has {classes} classes of '
          f'{name!r}, but that head has {V} outputs: give it at least '
          f'{classes}.'
        )

  @property
  def _heads(self) -> dict[str, Head]:
    # Sorted as in config.gin, so that a run goes on with the same sums.
    return dict(sorted(self.module.heads.items()))

  @property
  def _main(self) -> str:
    return min(
      self._heads, key=lambda name: (self._heads[name].kind != MASKED, name)
    )

  def _judge(
    self, name: str, outputs: Outputs, batch: Batch
  ) -> tuple[Array, Array]:
    """Losses of a head, and whether it is right or its absolute error."""
    kind, label = self._heads[name].kind, name
    if kind == MASKED:
      kind, label = 'softmax', 'targets'
    return judge_labels(kind, outputs[name], batch[label])

  def _weights(self, name: str, batch: Batch) -> Array:
    """How much each label of a head counts, float32 [B, L] or [B]."""
    head = self._heads[name]
    if head.kind == MASKED:
      return batch['weights'].astype(jnp.float32)
    mask_BxL = self.module.masks(batch)['encoder']
    counts = mask_BxL if head.of_tokens else mask_BxL.any(-1)
    return counts.astype(jnp.float32)


def _label(head: Head) -> Label:
  """What labels of a head look like."""
  V, is_number = head.num_outputs, head.kind == 'squared'
  one = head.kind == 'softmax' or (is_number and V == 1)
  return Label(
    shape=() if one else (V,),
    dtype='float32' if is_number else 'int32',
    of_tokens=head.of_tokens,
  )
