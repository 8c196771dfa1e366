"""Writing the N best answers of each row."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from sparse_experts.data.special_tokens import NO_TOKEN, T5, SpecialTokens
from sparse_experts.letters import Array
from sparse_experts.models.sampling import GREEDY
from sparse_experts.models.token_loop import MapRows, Step, write
from sparse_experts.moe.assignment import largest


@struct.dataclass
class Beams:
  """The hypotheses of a beam search, the best first.

  Attributes:
    live_BxWxT: int32, those that go on.
    log_prob_BxW: float32, theirs; -inf where there is none.
    ended_BxWxT: int32, the best of those that wrote EOS, padded after it.
    score_BxW: float32, theirs; -inf where there is none.
    done_B: no live one can still become one of the W best.
  """

  live_BxWxT: Array
  log_prob_BxW: Array
  ended_BxWxT: Array
  score_BxW: Array
  done_B: Array


@dataclasses.dataclass(frozen=True)
class BeamSearch:
  """Finds the W best answers of each sequence, as T5's beam search does.

      score = log p(answer) / ((5 + length) / 6)^alpha

  with EOS in the length (Wu et al. 2016, https://arxiv.org/abs/1609.08144,
  equation 14, without coverage). At each step the W most probable continuations
  that do not end go on, and an end counts if fewer than 2W continuations are
  more probable, (1 + e) W where e > 1 tokens end an answer, as in transformers:
  the W best ends of all steps are kept, apart from those that go
  on, which they do until none can still score as much as the worst of W ends.
  The answers are the ends; where a sequence has none after T tokens, those that
  went on. Width 1 is greedy.

  Attributes:
    width: W.
    alpha: 0 ranks by log-probability; the larger, the longer the answers. 0.6
      in T5.
  """

  width: int = 4
  alpha: float = 0.6

  def __post_init__(self):
    if not self.width >= 1:
      raise ValueError(
        f'the width of a beam must be at least 1, not {self.width}.'
      )
    if not 0 <= self.alpha < float('inf'):
      raise ValueError(
        f'alpha must be at least 0 and finite, not {self.alpha}.'
      )

  def __call__(
    self,
    logits_BxV: Array,
    step: Step,
    cache: Any,
    keys_B: Array | None = None,
    *,
    max_tokens: int,
    map_rows: MapRows = jax.tree.map,
    special_tokens: SpecialTokens = T5,
  ) -> tuple[Array, Array]:
    """The W best answers of every row found.

    Args:
      logits_BxV, step, cache, max_tokens, special_tokens: as in `Sampling`;
        `step` is called with B * W rows.
      keys_B: not needed, as nothing is drawn.
      map_rows: (function, cache) -> cache, applies a function of arrays
        [rows, ...] to every array of a cache.

    Returns:
      tokens [B, W, T], the best first, padded after EOS; their scores, float32
      [B, W]. Where fewer than W were found, the rest are padding, of score
      -inf.
    """
    del keys_B
    if self.width == 1:
      return self._greedy(logits_BxV, step, cache, max_tokens, special_tokens)
    B, W = logits_BxV.shape[0], self.width

    def repeat(x_Bx___):
      return jnp.repeat(x_Bx___, W, axis=0)

    none_BxW = jnp.full((B, W), -jnp.inf, jnp.float32)
    empty_BxWxT = jnp.full((B, W, max_tokens), special_tokens.pad, jnp.int32)
    start = Beams(
      live_BxWxT=empty_BxWxT,
      log_prob_BxW=none_BxW.at[:, 0].set(0),  # All W would be the same.
      ended_BxWxT=empty_BxWxT,
      score_BxW=none_BxW,
      done_B=jnp.zeros(B, bool),
    )
    end = write(
      functools.partial(self._advance, max_tokens, special_tokens),
      start,
      repeat(logits_BxV),
      step,
      map_rows(repeat, cache),
      max_tokens,
      special_tokens,
      map_rows,
    )
    return self._found(end, max_tokens, special_tokens)

  def _greedy(
    self, logits_BxV, step, cache, max_tokens, special_tokens
  ) -> tuple[Array, Array]:
    """The only hypothesis of each row, as `__call__` returns it."""
    tokens_BxT, log_prob_B = GREEDY(
      logits_BxV,
      step,
      cache,
      None,
      max_tokens=max_tokens,
      special_tokens=special_tokens,
    )
    ends_BxT = special_tokens.is_eos(tokens_BxT)
    before_BxT = jnp.cumsum(ends_BxT, 1) - ends_BxT  # Ends before each token.
    score_B = self.score(log_prob_B, (before_BxT == 0).sum(1))
    return tokens_BxT[:, None], score_B[:, None]

  def _found(
    self, end: Beams, max_tokens: int, special_tokens: SpecialTokens
  ) -> tuple[Array, Array]:
    """The ends; where there is none, what went on."""
    endless_Bx1 = jnp.isneginf(end.score_BxW).all(1, keepdims=True)
    score_BxW = jnp.where(
      endless_Bx1, self.score(end.log_prob_BxW, max_tokens), end.score_BxW
    )
    tokens_BxWxT = jnp.where(
      endless_Bx1[..., None], end.live_BxWxT, end.ended_BxWxT
    )
    exists_BxW = score_BxW > -jnp.inf
    tokens_BxWxT = jnp.where(
      exists_BxW[..., None], tokens_BxWxT, special_tokens.pad
    )
    return tokens_BxWxT, score_BxW

  def score(self, log_prob: Array, length: Array | int) -> Array:
    """Log-probabilities over the length penalty."""
    return log_prob / ((5 + length) / 6) ** self.alpha

  def _advance(self, max_tokens, special_tokens, t, beams, log_probs_BWxV):
    """The hypotheses with token t; see `token_loop.write`."""
    (B, W), V = beams.log_prob_BxW.shape, log_probs_BWxV.shape[-1]
    total_BxWxV = beams.log_prob_BxW[..., None] + jnp.where(
      beams.done_B[:, None, None], -jnp.inf, log_probs_BWxV.reshape(B, W, V)
    )
    # Of K of them at least W do not end, as a hypothesis has so many ends.
    K = (1 + max(1, len(special_tokens.eos))) * W
    total_BxK, best_BxK = _best(total_BxWxV.reshape(B, W * V), K)
    from_BxK, token_BxK = best_BxK // V, best_BxK % V
    tokens_BxKxT = _take(beams.live_BxWxT, from_BxK)
    tokens_BxKxT = tokens_BxKxT.at[..., t].set(token_BxK)
    ends_BxK = special_tokens.is_eos(token_BxK)
    log_prob_BxW, live_BxW = _best(jnp.where(ends_BxK, -jnp.inf, total_BxK), W)
    score_BxK = jnp.where(ends_BxK, self.score(total_BxK, t + 1), -jnp.inf)
    score_BxW, ended_BxW = _best(
      jnp.concatenate([beams.score_BxW, score_BxK], 1), W
    )
    ended_BxIxT = jnp.concatenate([beams.ended_BxWxT, tokens_BxKxT], 1)
    # What goes on becomes less probable, and no longer than this.
    possible_B = self.score(log_prob_BxW[:, 0], max_tokens)
    done_B = score_BxW[:, -1] >= possible_B
    from_BxW = _take(from_BxK, live_BxW)
    token_BxW = _take(token_BxK, live_BxW)

    def rows(x_BWx___):
      x_BxWx___ = x_BWx___.reshape(B, W, *x_BWx___.shape[1:])
      return _take(x_BxWx___, from_BxW).reshape(x_BWx___.shape)

    beams = Beams(
      live_BxWxT=_take(tokens_BxKxT, live_BxW),
      log_prob_BxW=log_prob_BxW,
      ended_BxWxT=_take(ended_BxIxT, ended_BxW),
      score_BxW=score_BxW,
      done_B=done_B,
    )
    token_BxW = jnp.where(done_B[:, None], NO_TOKEN, token_BxW)
    return beams, token_BxW.reshape(-1), rows


def _take(x_BxIx___: Array, index_BxO: Array) -> Array:
  """For each b, the O of the I that have these indices."""
  return jax.vmap(lambda x, o: x[o])(x_BxIx___, index_BxO)


def _best(x_BxI: Array, k: int, chunk: int = 128) -> tuple[Array, Array]:
  """The k largest of each sequence, the largest first, and their indices.

  They are in the k chunks of the largest maxima, so all are read only once.
  """
  B, I = x_BxI.shape
  x_BxI = jnp.pad(x_BxI, ((0, 0), (0, -I % chunk)), constant_values=-jnp.inf)
  chunks_BxRxI = x_BxI.reshape(B, -1, chunk)
  R = chunks_BxRxI.shape[1]
  chunk_BxK = largest(chunks_BxRxI.max(2)[None], min(k, R))[0]
  near_BxKI = _take(chunks_BxRxI, chunk_BxK).reshape(B, -1)
  index_BxK = largest(near_BxKI[None], k)[0]
  chunk_BxK = _take(chunk_BxK, index_BxK // chunk)
  return _take(near_BxKI, index_BxK), chunk_BxK * chunk + index_BxK % chunk
