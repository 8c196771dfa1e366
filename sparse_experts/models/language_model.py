"""Encoder-decoder and decoder-only Transformers over token ids."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
from flax import linen as nn

from sparse_experts.data.special_tokens import T5, SpecialTokens
from sparse_experts.layers.embed import TokenEmbed
from sparse_experts.layers.linear import Linear
from sparse_experts.letters import Array, Dtype
from sparse_experts.models.context import Context
from sparse_experts.moe.outputs import Aux
from sparse_experts.numbers import Count, Positive
from sparse_experts.sharding import constrain


class LanguageModel(nn.Module):
  """A decoder that writes targets, after an encoder that reads inputs if any.

  Batches are dictionaries with the feature names of seqio's converters:
  `encoder_input_tokens`, `decoder_input_tokens`, `decoder_target_tokens`, and
  where examples are packed `*_segment_ids`; for routers that need them,
  `encoder_task_ids` and `decoder_task_ids`, int32 [B, L].

  Attributes:
    embed: the token table, of both stacks.
    decoder: a causal `transformer.Stack`.
    encoder: a `transformer.Stack`, whose output the decoder's blocks look at by
      cross-attention; None: decoder only.
    tied_logits: output logits come from the token table (T5 1.0, Switch);
      otherwise from a matrix of their own (T5 1.1).
    bidirectional_prefix: a decoder's inputs (`decoder_causal_attention`) see
      one another (prefix LM, Raffel et al. 2020, section 3.2.1).
    init_scale: of the logits' matrix, see `linear.Linear`.
    special_tokens: which ids are padding, an end, the decoder's first input.
    max_length: the longest sequence it is made for, which other programs are
      told; None: it is not said.
  """

  embed: TokenEmbed
  decoder: nn.Module
  encoder: nn.Module | None = None
  tied_logits: bool = False
  bidirectional_prefix: bool = False
  init_scale: Positive = 1.0
  special_tokens: SpecialTokens = T5
  max_length: Count | None = None

  def setup(self):
    if not self.tied_logits:
      self.logits = Linear(
        (self.embed.vocab_size,), ('embed', 'vocab'), 1, self.init_scale
      )

  def __call__(
    self,
    batch: Mapping[str, Array],
    *,
    step: Array | None = None,
    capacity_factor: float | None = None,
    deterministic: bool = True,
    record: bool = False,
  ) -> tuple[Array, dict[str, Aux]]:
    """Logits [B, L, V] of the targets, and the Aux of every sparse layer.

    Logits are float32 whatever the dtype of the activations.

    Args:
      batch: features.
      step: int32 training step, for routers with a schedule.
      capacity_factor: of sparse layers; None drops nothing.
      deterministic: no dropout, jitter or noise.
      record: sparse layers return `Aux.record`.
    """
    memory_BxMxD, auxes = self._encode(
      batch, step, capacity_factor, deterministic, record
    )
    tokens_BxL = batch['decoder_input_tokens']
    y_BxLxD, decoder_auxes = self.decoder(
      self._embed(tokens_BxL),
      _context(
        tokens_BxL.shape[1],
        mask_BxL=self.masks(batch)['decoder'],
        token_ids_BxL=tokens_BxL,
        task_ids_BxL=batch.get('decoder_task_ids'),
        attend_BxLxM=self._attend(batch),
        memory_BxMxD=memory_BxMxD,
        attend_memory_BxLxM=self._attend_memory(batch),
        step=step,
        capacity_factor=capacity_factor,
        deterministic=deterministic,
        record=record,
      ),
    )
    auxes |= {f'decoder/{name}': aux for name, aux in decoder_auxes.items()}
    return self._logits(y_BxLxD), auxes

  @property
  def stacks(self) -> dict[str, nn.Module]:
    """By name, in the order that they run in."""
    stacks = {'encoder': self.encoder, 'decoder': self.decoder}
    return {name: stack for name, stack in stacks.items() if stack is not None}

  @property
  def dtype(self) -> Dtype:
    """Of the activations."""
    return self.embed.dtype

  def masks(self, batch: Mapping[str, Array]) -> dict[str, Array]:
    """By stack, the tokens that its layers route, boolean [B, L]."""
    is_token = self.special_tokens.is_token
    masks = {}
    if 'decoder_target_tokens' in batch:
      masks['decoder'] = is_token(batch['decoder_target_tokens'])
    if self.encoder is not None:
      masks['encoder'] = is_token(batch['encoder_input_tokens'])
    return masks

  def start(self, batch: Mapping[str, Array], max_length: int) -> Array:
    """Begins to decode: fills the collection 'cache', without any capacity.

    Args:
      batch: an encoder's inputs; for a decoder alone its prompt, the positions
        of `decoder_input_tokens` where `decoder_causal_attention` is 1 (only
        the first, if there is no such feature).
      max_length: positions the cache has, prompt and answer together.

    Returns:
      Logits [B, V] of each answer's first token.
    """
    memory_BxMxD, _ = self._encode(batch)
    if memory_BxMxD is None:
      tokens_BxL = batch['decoder_input_tokens']
      prompt_BxL = batch.get('decoder_causal_attention')
      attend_BxLxL = self._attend(batch)
    else:
      start = self.special_tokens.first()
      tokens_BxL = jnp.full((memory_BxMxD.shape[0], 1), start, jnp.int32)
      prompt_BxL = None
      attend_BxLxL = jnp.ones((1, 1, 1), bool)
      self.put_variable(
        'cache',
        'attend_memory',
        self.masks(batch)['encoder'],
      )
    B, L = tokens_BxL.shape
    lengths_B = jnp.ones(B, int) if prompt_BxL is None else prompt_BxL.sum(1)
    mask_BxM = jnp.arange(max_length)[None] < lengths_B[:, None]
    self.put_variable('cache', 'position', lengths_B.astype(jnp.int32))
    self.put_variable('cache', 'written', mask_BxM)
    task_ids_BxL = batch.get('decoder_task_ids')
    if task_ids_BxL is not None:  # The whole answer has its prompt's task.
      task_ids_BxL = task_ids_BxL[:, :L]
      self.put_variable('cache', 'task_ids', task_ids_BxL[:, :1])
    y_BxLxD, _ = self.decoder(
      self._embed(tokens_BxL),
      _context(
        L,
        mask_BxL=mask_BxM[:, :L],
        token_ids_BxL=tokens_BxL,
        task_ids_BxL=task_ids_BxL,
        attend_BxLxM=attend_BxLxL,
        memory_BxMxD=memory_BxMxD,
        attend_memory_BxLxM=self._attend_memory(batch),
        cache='fill',
        cache_length=max_length,
      ),
    )
    last_Bx1x1 = (lengths_B - 1)[:, None, None]
    return self._logits(jnp.take_along_axis(y_BxLxD, last_Bx1x1, axis=1))[:, 0]

  def step(self, tokens_B: Array) -> Array:
    """Takes one more token of each answer; logits [B, V] of the next.

    Args:
      tokens_B: int32; below 0 where an answer has ended, which is padding.
    """
    position_B = self.get_variable('cache', 'position')
    written_BxM = self.get_variable('cache', 'written')
    keys_1xM = jnp.arange(written_BxM.shape[1])[None]
    written_BxM |= keys_1xM == position_B[:, None]
    self.put_variable('cache', 'written', written_BxM)
    self.put_variable('cache', 'position', position_B + 1)
    attend_memory_BxLxM = None
    if self.encoder is not None:
      attend_memory_BxLxM = self.get_variable('cache', 'attend_memory')[:, None]
    y_Bx1xD, _ = self.decoder(
      self._embed(tokens_B[:, None]),
      Context(
        mask_BxL=(tokens_B >= 0)[:, None],
        attend_BxLxM=written_BxM[:, None],
        queries_BxL=position_B[:, None],
        keys_BxM=keys_1xM,
        token_ids_BxL=tokens_B[:, None],
        task_ids_BxL=self.get_variable('cache', 'task_ids'),
        attend_memory_BxLxM=attend_memory_BxLxM,
        positions_B=position_B,
        cache='step',
      ),
    )
    return self._logits(y_Bx1xD)[:, 0]

  def _encode(
    self,
    batch: Mapping[str, Array],
    step: Array | None = None,
    capacity_factor: float | None = None,
    deterministic: bool = True,
    record: bool = False,
  ) -> tuple[Array | None, dict[str, Aux]]:
    """The encoder's output [B, M, D] and Aux; None without an encoder."""
    if self.encoder is None:
      return None, {}
    tokens_BxM = batch['encoder_input_tokens']
    mask_BxM = self.masks(batch)['encoder']
    segments_BxM = batch.get('encoder_segment_ids', mask_BxM)
    y_BxMxD, auxes = self.encoder(
      self._embed(tokens_BxM),
      _context(
        tokens_BxM.shape[1],
        mask_BxL=mask_BxM,
        token_ids_BxL=tokens_BxM,
        task_ids_BxL=batch.get('encoder_task_ids'),
        attend_BxLxM=segments_BxM[:, :, None] == segments_BxM[:, None, :],
        step=step,
        capacity_factor=capacity_factor,
        deterministic=deterministic,
        record=record,
      ),
    )
    return y_BxMxD, {f'encoder/{name}': aux for name, aux in auxes.items()}

  def _attend(self, batch: Mapping[str, Array]) -> Array:
    """Which targets may look at which, boolean [B or 1, L, L]."""
    L = batch['decoder_input_tokens'].shape[1]
    attend_BxLxL = jnp.tril(jnp.ones((1, L, L), bool))
    prefix_BxL = batch.get('decoder_causal_attention')
    if self.bidirectional_prefix and prefix_BxL is not None:
      prefix_BxL = prefix_BxL > 0
      attend_BxLxL |= prefix_BxL[:, :, None] & prefix_BxL[:, None, :]
    segments_BxL = batch.get('decoder_segment_ids')
    if segments_BxL is not None:
      attend_BxLxL &= segments_BxL[:, :, None] == segments_BxL[:, None, :]
    return attend_BxLxL

  def _attend_memory(self, batch: Mapping[str, Array]) -> Array | None:
    """Which targets may look at which inputs, boolean [B, L or 1, M]."""
    if 'encoder_segment_ids' in batch:
      return (
        batch['decoder_segment_ids'][:, :, None]
        == batch['encoder_segment_ids'][:, None, :]
      )
    if self.encoder is not None:
      return self.masks(batch)['encoder'][:, None, :]
    return None

  def _embed(self, tokens_BxL: Array) -> Array:
    # Padding may be -1, the table's last line here: nothing looks at it.
    return constrain(self.embed(tokens_BxL), 'batch', 'length', 'act_embed')

  def _logits(self, y_BxLxD: Array) -> Array:
    # In float32 as T5X: rounded to bfloat16, a logit of 30 is off by up to 0.1.
    y_BxLxD = y_BxLxD.astype(jnp.float32)
    if self.tied_logits:
      logits_BxLxV = self.embed.attend(y_BxLxD)
    else:
      logits_BxLxV = self.logits(y_BxLxD)
    return constrain(logits_BxLxV, 'batch', 'length', 'vocab')


def answered(
  batch: Mapping[str, Array],
  answers_BxT: Array,
  special_tokens: SpecialTokens = T5,
) -> dict[str, Array]:
  """The batch whose targets are these answers, as `Language.score` takes it.

  Args:
    batch: inputs or prompts, as `LanguageModel.start` takes them. Targets that
      it has are replaced.
    answers_BxT: int32, padded after their end.
    special_tokens: the model's.

  Returns:
    The batch with decoder features of the answers, which follow the prompts.

  Example:
    >>> answered({'encoder_input_tokens': jnp.array([[7, 1]])},
    ...          jnp.array([[5, 1, 0]]))['decoder_input_tokens'].tolist()
    [[0, 5, 1]]
  """
  features = {
    name: x for name, x in batch.items() if name.startswith('encoder_')
  }
  (B, T), pad = answers_BxT.shape, special_tokens.pad
  lengths_B = jnp.ones(B, int)
  if features:
    prompts_BxL = jnp.full((B, 1), special_tokens.first(), int)
  else:
    prompts_BxL = batch['decoder_input_tokens']
    if 'decoder_causal_attention' in batch:
      lengths_B = batch['decoder_causal_attention'].sum(1)
  # The last token of a prompt, or the start token, writes the first of answers.
  length = prompts_BxL.shape[1] + T - 1
  position_1xL = jnp.arange(length)[None]
  index_BxL = position_1xL - (lengths_B - 1)[:, None]
  answer_BxL = jnp.take_along_axis(
    jnp.pad(answers_BxT, ((0, 0), (0, 1)), constant_values=pad),
    jnp.clip(index_BxL, 0, T),
    axis=1,
  )
  prompt_BxL = jnp.pad(prompts_BxL[:, 1:], ((0, 0), (0, T)))
  targets_BxL = jnp.where(index_BxL >= 0, answer_BxL, prompt_BxL)
  features |= {
    'decoder_target_tokens': targets_BxL,
    'decoder_input_tokens': jnp.concatenate(
      [prompts_BxL[:, :1], targets_BxL[:, :-1]], axis=1
    ),
    'decoder_loss_weights': (
      (index_BxL >= 0) & special_tokens.is_token(targets_BxL)
    ),
  }
  if 'decoder_causal_attention' in batch:
    prompt_BxL = position_1xL < lengths_B[:, None]
    features['decoder_causal_attention'] = prompt_BxL.astype(jnp.int32)
  if 'decoder_task_ids' in batch:  # An answer has its prompt's task.
    features['decoder_task_ids'] = jnp.broadcast_to(
      batch['decoder_task_ids'][:, :1], targets_BxL.shape
    )
  return features


def _context(length: int, **fields) -> Context:
  """The context of whole sequences: positions 0 to length - 1."""
  positions_1xL = jnp.arange(length)[None]
  return Context(queries_BxL=positions_1xL, keys_BxM=positions_1xL, **fields)
