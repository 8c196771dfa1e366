"""Writing the N best answers of each row."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax
import jax
import jax.numpy as jnp

from sparse_experts.data.special_tokens import NO_TOKEN, T5, SpecialTokens
from sparse_experts.letters import Array
from sparse_experts.models.sampling import GREEDY
from sparse_experts.models.token_loop import MapRows, Step, write
from sparse_experts.moe.assignment import largest


@flax.struct.dataclass
class Beams:
  """The hypotheses of a beam search, the best first.

  Attributes:
    live_BxNxT: int32, those that go on.
    log_prob_BxN: float32, theirs; -inf where there is none.
    ended_BxNxT: int32, the best of those that wrote EOS, padded after it.
    score_BxN: float32, theirs; -inf where there is none.
    done_B: no live one can still become one of the N best.
  """

  live_BxNxT: Array
  log_prob_BxN: Array
  ended_BxNxT: Array
  score_BxN: Array
  done_B: Array


@dataclasses.dataclass(frozen=True)
class BeamSearch:
  """Finds the N best answers of each sequence, as T5's beam search does.

      score = log p(answer) / ((5 + length) / 6)^alpha

  with EOS in the length (Wu et al. 2016, https://arxiv.org/abs/1609.08144,
  equation 14, without coverage). At each step the N most probable continuations
  that do not end go on, and an end counts if fewer than 2N continuations are
  more probable, (1 + e) N where e > 1 tokens end an answer, as in transformers:
  the N best ends of all steps are kept, apart from those that go
  on, which they do until none can still score as much as the worst of N ends.
  The answers are the ends; where a sequence has none after T tokens, those that
  went on. Width 1 is greedy.

  Attributes:
    width: N.
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
    """The N best answers of every row found.

    Args:
      logits_BxV, step, cache, max_tokens, special_tokens: as in `Sampling`;
        `step` is called with B * N rows.
      keys_B: not needed, as nothing is drawn.
      map_rows: (function, cache) -> cache, applies a function of arrays
        [rows, ...] to every array of a cache.

    Returns:
      tokens [B, N, T], the best first, padded after EOS; their scores, float32
      [B, N]. Where fewer than N were found, the rest are padding, of score
      -inf.
    """
    del keys_B
    if self.width == 1:
      return self._greedy(logits_BxV, step, cache, max_tokens, special_tokens)
    B, N = logits_BxV.shape[0], self.width

    def repeat(x_Bx___):
      return jnp.repeat(x_Bx___, N, axis=0)

    none_BxN = jnp.full((B, N), -jnp.inf, jnp.float32)
    empty_BxNxT = jnp.full((B, N, max_tokens), special_tokens.pad, jnp.int32)
    start = Beams(
      live_BxNxT=empty_BxNxT,
      log_prob_BxN=none_BxN.at[:, 0].set(0),  # All N would be the same.
      ended_BxNxT=empty_BxNxT,
      score_BxN=none_BxN,
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
    endless_Bx1 = jnp.isneginf(end.score_BxN).all(1, keepdims=True)
    score_BxN = jnp.where(
      endless_Bx1, self.score(end.log_prob_BxN, max_tokens), end.score_BxN
    )
    tokens_BxNxT = jnp.where(
      endless_Bx1[..., None], end.live_BxNxT, end.ended_BxNxT
    )
    exists_BxN = score_BxN > -jnp.inf
    tokens_BxNxT = jnp.where(
      exists_BxN[..., None], tokens_BxNxT, special_tokens.pad
    )
    return tokens_BxNxT, score_BxN

  def score(self, log_prob: Array, length: Array | int) -> Array:
    """Log-probabilities over the length penalty."""
    return log_prob / ((5 + length) / 6) ** self.alpha

  def _advance(self, max_tokens, special_tokens, t, beams, log_probs_BNxV):
    """The hypotheses with token t; see `token_loop.write`."""
    (B, N), V = beams.log_prob_BxN.shape, log_probs_BNxV.shape[-1]
    total_BxNxV = beams.log_prob_BxN[..., None] + jnp.where(
      beams.done_B[:, None, None], -jnp.inf, log_probs_BNxV.reshape(B, N, V)
    )
    # Of these M at least N do not end, as a hypothesis has so many ends.
    M = (1 + max(1, len(special_tokens.eos))) * N
    total_BxM, best_BxM = _best(total_BxNxV.reshape(B, N * V), M)
    from_BxM, token_BxM = best_BxM // V, best_BxM % V
    tokens_BxMxT = _take(beams.live_BxNxT, from_BxM)
    tokens_BxMxT = tokens_BxMxT.at[..., t].set(token_BxM)
    ends_BxM = special_tokens.is_eos(token_BxM)
    log_prob_BxN, live_BxN = _best(jnp.where(ends_BxM, -jnp.inf, total_BxM), N)
    score_BxM = jnp.where(ends_BxM, self.score(total_BxM, t + 1), -jnp.inf)
    score_BxN, ended_BxN = _best(
      jnp.concatenate([beams.score_BxN, score_BxM], 1), N
    )
    ended_BxNMxT = jnp.concatenate([beams.ended_BxNxT, tokens_BxMxT], 1)
    # What goes on becomes less probable, and no longer than this.
    possible_B = self.score(log_prob_BxN[:, 0], max_tokens)
    done_B = score_BxN[:, -1] >= possible_B
    from_BxN = _take(from_BxM, live_BxN)
    token_BxN = _take(token_BxM, live_BxN)

    def rows(x_BNx___):
      x_BxNx___ = x_BNx___.reshape(B, N, *x_BNx___.shape[1:])
      return _take(x_BxNx___, from_BxN).reshape(x_BNx___.shape)

    beams = Beams(
      live_BxNxT=_take(tokens_BxMxT, live_BxN),
      log_prob_BxN=log_prob_BxN,
      ended_BxNxT=_take(ended_BxNMxT, ended_BxN),
      score_BxN=score_BxN,
      done_B=done_B,
    )
    token_BxN = jnp.where(done_B[:, None], NO_TOKEN, token_BxN)
    return beams, token_BxN.reshape(-1), rows


def _take(x_BxMx___: Array, index_BxN: Array) -> Array:
  """For each b, those of the M at N indices."""
  return jax.vmap(lambda x, n: x[n])(x_BxMx___, index_BxN)


def _best(x_BxM: Array, k: int, chunk: int = 128) -> tuple[Array, Array]:
  """The k largest of each row, the largest first, and their indices.

  They are in the k chunks of the largest maxima, so all are read only once.
  """
  B, M = x_BxM.shape
  x_BxM = jnp.pad(x_BxM, ((0, 0), (0, -M % chunk)), constant_values=-jnp.inf)
  x_BxCxW = x_BxM.reshape(B, -1, chunk)
  C = x_BxCxW.shape[1]
  chunk_BxK = largest(x_BxCxW.max(2)[None], min(k, C))[0]
  near_BxKW = _take(x_BxCxW, chunk_BxK).reshape(B, -1)
  index_BxK = largest(near_BxKW[None], k)[0]
  chunk_BxK = _take(chunk_BxK, index_BxK // chunk)
  return _take(near_BxKW, index_BxK), chunk_BxK * chunk + index_BxK % chunk
