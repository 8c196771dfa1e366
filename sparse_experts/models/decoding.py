"""Writing tokens one by one: greedy or sampled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sparse_experts.arrays import Array

EOS = 1


def sample(
  logits_BxV: Array,
  step: Callable[[Any, Array], tuple[Any, Array]],
  cache: Any,
  keys_B: Array,
  *,
  max_tokens: int,
  temperature: float = 0.0,
) -> tuple[Array, Array]:
  """Continues every row until it writes EOS (1) or `max_tokens` tokens.

  Args:
    logits_BxV: of each row's first token.
    step: (cache, tokens_B) -> (cache, logits_BxV of the next token).
    cache: what `step` carries.
    keys_B: a key per row; the draw at position t uses fold_in(key, t), so a
      row's answer depends on its key and not on its neighbours.
    max_tokens: T, tokens at most.
    temperature: 0 takes the most probable token; otherwise tokens are drawn
      from softmax(logits / temperature).

  Returns:
    tokens [B, T], 0 after EOS, and each row's log-probability under the model
    (temperature 1), float32 [B].
  """
  if not temperature >= 0:
    raise ValueError(f'temperature must be at least 0, got {temperature}.')
  B = logits_BxV.shape[0]

  def choose(logits_BxV, t):
    if temperature == 0:
      return jnp.argmax(logits_BxV, -1).astype(jnp.int32)
    keys = jax.vmap(lambda key: jax.random.fold_in(key, t))(keys_B)
    draw = jax.vmap(jax.random.categorical)
    return draw(keys, logits_BxV / temperature).astype(jnp.int32)

  def proceed(carry):
    t, done_B, _, _, _, _ = carry
    return (t < max_tokens) & ~done_B.all()

  def write(carry):
    t, done_B, tokens_BxT, score_B, cache, logits_BxV = carry
    logits_BxV = logits_BxV.astype(jnp.float32)
    token_B = jnp.where(done_B, 0, choose(logits_BxV, t))
    log_probs_BxV = jax.nn.log_softmax(logits_BxV)
    log_prob_B = jnp.take_along_axis(log_probs_BxV, token_B[:, None], 1)[:, 0]
    score_B += jnp.where(done_B, 0, log_prob_B)
    tokens_BxT = tokens_BxT.at[:, t].set(token_B)
    done_B |= token_B == EOS
    cache, logits_BxV = step(cache, token_B)
    return t + 1, done_B, tokens_BxT, score_B, cache, logits_BxV

  start = (
    jnp.int32(0),
    jnp.zeros(B, bool),
    jnp.zeros((B, max_tokens), jnp.int32),
    jnp.zeros(B, jnp.float32),
    cache,
    logits_BxV,
  )
  _, _, tokens_BxT, score_B, _, _ = jax.lax.while_loop(proceed, write, start)
  return tokens_BxT, score_B
