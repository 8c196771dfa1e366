"""Answers as T5X wants them: W of each row, the best last."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from t5x import decoding
from t5x import models as t5x_models

from sparse_experts.data.special_tokens import NO_TOKEN
from sparse_experts.letters import Array
from sparse_experts.models.decoding import BeamSearch, Sampling
from sparse_experts.models.language import Language
from sparse_experts.t5x_adapter import variables


def by_strategy(
  model: Language,
  params,
  batch: Mapping[str, Array],
  rng: Array | None,
  num_decodes: int | None,
  *,
  strategy: Sampling | BeamSearch,
  max_tokens: int | None,
) -> tuple[Array, Array]:
  """By `Objective.decode`, with a key for each row and sample.

  Args:
    model, params, batch, strategy: as there.
    rng: a key, for sampling; None: that of seed 0, as in T5X.
    num_decodes: W, the width of a beam; None: the strategy's own.
    max_tokens: T; None: as many as decoder features have.

  Returns:
    Tokens [B, W, T] and their scores [B, W].
  """
  (B, L), samples = batch['decoder_input_tokens'].shape, num_decodes or 1
  if isinstance(strategy, BeamSearch):
    samples = 1
    if num_decodes:
      strategy = dataclasses.replace(strategy, width=num_decodes)
  rng = jax.random.key(0) if rng is None else rng
  keys = jax.vmap(functools.partial(jax.random.fold_in, rng))(
    jnp.arange(B * samples)
  )
  tokens, scores = model.decode(
    params,
    {name: jnp.repeat(x, samples, axis=0) for name, x in batch.items()},
    keys,
    max_tokens=max_tokens or L,
    strategy=strategy,
  )
  score_BxW = scores.reshape(B, -1)
  tokens_BxWxT = tokens.reshape(*score_BxW.shape, -1)
  order_BxW = jnp.argsort(score_BxW, axis=1)
  return (
    jnp.take_along_axis(tokens_BxWxT, order_BxW[..., None], axis=1),
    jnp.take_along_axis(score_BxW, order_BxW, axis=1),
  )


def by_t5x(
  model: Language,
  params,
  batch: Mapping[str, Array],
  num_decodes: int,
  *,
  decode_fn: Callable[..., tuple[Array, Array]],
  **decoder_params,
) -> tuple[Array, Array]:
  """By one of T5X's functions, which moves the rows of our cache.

  As by `by_strategy`, prompts are filled in and what is suppressed is never
  written.
  Prompt, without its start token, and answer have the length L of decoder
  features together.

  Args:
    model: the model.
    params: its parameters.
    batch: features, int32 [B, L]; prompts of a decoder alone are where
      'decoder_causal_attention' is 1.
    num_decodes: W.
    decode_fn: T5X's, such as `t5x.decoding.temperature_sample`.
    **decoder_params: further arguments of it.

  Returns:
    Tokens [B, W, L] and their scores [B, W].

  Raises:
    ValueError: the model's special tokens are none that T5X's functions know.
  """
  special_tokens = model.special_tokens
  pad, start, eos = special_tokens.pad, special_tokens.start, special_tokens.eos
  if (pad, start, len(eos)) != (0, 0, 1):
    raise ValueError(
      "T5X's functions pad and begin with 0 and know one end of an answer, but "
      f'the model pads with {pad}, begins with {start} and ends with {eos}: '
      'set strategy, and no decode_fn.'
    )
  decoder_params.setdefault('eos_id', eos[0])
  tokens_BxL = batch['decoder_input_tokens']
  prompt_BxL, length_B = jnp.zeros_like(tokens_BxL), None
  if model.module.encoder is None:
    if 'decoder_causal_attention' in batch:
      prompt_BxL = tokens_BxL * batch['decoder_causal_attention']
    length_B = (prompt_BxL[:, 1:] != 0).sum(1)
    decoder_params['initial_index'] = length_B
  _, started = model.module.apply(
    {'params': params},
    batch,
    tokens_BxL.shape[1],
    method='start',
    mutable=['cache'],
  )

  def tokens_to_logits(state):
    cache, token_BW = variables.batch_major(state.cache), state.cur_token[:, 0]
    # 0 is what T5X goes on with after an end, and at first the start token.
    ended_BW = (token_BW == 0) & (cache['position'] > 0)
    logits_BWxV, written = model.module.apply(
      {'params': params, 'cache': cache},
      jnp.where(ended_BW, NO_TOKEN, token_BW),
      method='step',
      mutable=['cache'],
    )
    allowed_V = special_tokens.may_be_written(jnp.arange(logits_BWxV.shape[1]))
    logits_BWxV = jnp.where(allowed_V, logits_BWxV, decoding.NEG_INF_VALUE)
    return logits_BWxV, variables.batch_major(written['cache'])

  # T5X begins by giving the last token of the prompt once more.
  cache = {**started['cache'], 'position': started['cache']['position'] - 1}
  tokens_BxWxL, score_BxW = decode_fn(
    inputs=prompt_BxL,
    cache=variables.batch_major(cache),
    tokens_to_logits=tokens_to_logits,
    num_decodes=num_decodes,
    **decoder_params,
  )
  if length_B is not None:
    remove = jax.vmap(t5x_models.remove_prefix, (1, None), 1)
    tokens_BxWxL = remove(tokens_BxWxL, length_B)
  return tokens_BxWxL, score_BxW
