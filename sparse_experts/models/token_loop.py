"""The loop that writes tokens one by one, whatever chooses them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sparse_experts.data.special_tokens import SpecialTokens
from sparse_experts.letters import Array

Step = Callable[[Any, Array], tuple[Any, Array]]
MapRows = Callable[[Callable[[Array], Array], Any], Any]


def write(
  advance: Callable[[Array, Any, Array], tuple],
  state: Any,
  logits_BxV: Array,
  step: Step,
  cache: Any,
  max_tokens: int,
  special_tokens: SpecialTokens,
  map_rows: MapRows = jax.tree.map,
) -> Any:
  """The state when all rows are done or `max_tokens` tokens are written.

  Args:
    advance: (t, state, log_probs_BxV) -> (the state with token t, the token_B
      that each row wrote, how rows were taken from the rows before or None).
      What is suppressed has log-probability -inf; a row that is done writes
      NO_TOKEN.
    state: at the start; its done_B says which rows are done.
  """
  if max_tokens < 1:
    raise ValueError(f'max_tokens must be at least 1, not {max_tokens}.')

  def extend(t, state, logits_BxV):
    log_probs_BxV = jax.nn.log_softmax(logits_BxV.astype(jnp.float32))
    allowed_V = special_tokens.may_be_written(
      jnp.arange(log_probs_BxV.shape[1])
    )
    return advance(t, state, jnp.where(allowed_V, log_probs_BxV, -jnp.inf))

  def proceed(carry):
    t, state, *_ = carry
    return (t < max_tokens) & ~state.done_B.all()

  def turn(carry):
    t, state, token_B, cache = carry
    cache, logits_BxV = step(cache, token_B)
    state, token_B, rows = extend(t, state, logits_BxV)
    if rows is not None:
      cache = map_rows(rows, cache)
    return t + 1, state, token_B, cache

  # Rows that go on from the start all have the cache of the start.
  state, token_B, _ = extend(jnp.int32(0), state, logits_BxV)
  carry = jnp.int32(1), state, token_B, cache
  return jax.lax.while_loop(proceed, turn, carry)[1]
