"""Writing tokens one by one: greedy, sampled, or by beam search.

A strategy is a value, `Sampling` or `BeamSearch`, that says which tokens the
answers go on with; the loop is the same for both. Which tokens end an answer
and which fill it up is the model's to say, by its `SpecialTokens`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp

from sparse_experts.data.special_tokens import NO_TOKEN, T5, SpecialTokens
from sparse_experts.letters import Array
from sparse_experts.moe.assignment import largest

Step = Callable[[Any, Array], tuple[Any, Array]]
MapRows = Callable[[Callable[[Array], Array], Any], Any]


@flax.struct.dataclass
class Answers:
  """What sampling has written, one answer a row.

  Attributes:
    tokens_BxT: int32, padding where nothing is written.
    log_prob_B: float32, of the tokens written, under the model.
    done_B: EOS is written.
  """

  tokens_BxT: Array
  log_prob_B: Array
  done_B: Array


@flax.struct.dataclass
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
class Sampling:
  """Draws every token from softmax(logits / temperature), or the best.

  Attributes:
    temperature: 0 takes the most probable token (greedy).
    top_k: draw among the k most probable tokens only (Fan et al. 2018,
      https://arxiv.org/abs/1805.04833); None: among all.
    top_p: draw among the fewest most probable tokens whose probabilities, at
      this temperature and among the top k, add up to p (Holtzman et al. 2019,
      https://arxiv.org/abs/1904.09751); None: no such limit. Tokens as probable
      as the last of those are kept too, by both.

  Example:
    >>> sampling = Sampling(temperature=1.0, top_k=2)
    >>> sampling.restrict(jnp.array([[1.0, 3.0, 2.0]])).tolist()
    [[-inf, 3.0, 2.0]]
  """

  temperature: float = 0.0
  top_k: int | None = None
  top_p: float | None = None

  def __post_init__(self):
    if not 0 <= self.temperature < float('inf'):
      raise ValueError(
        f'temperature must be at least 0 and finite, not {self.temperature}.'
      )
    if self.top_k is not None and not self.top_k >= 1:
      raise ValueError(f'top_k must be at least 1, not {self.top_k}.')
    if self.top_p is not None and not 0 < self.top_p <= 1:
      raise ValueError(f'top_p must be in (0, 1], not {self.top_p}.')
    if self.temperature == 0 and (self.top_k or self.top_p):
      raise ValueError(
        'top_k and top_p are for sampling, but temperature 0 is greedy: give a '
        'temperature above 0.'
      )

  def __call__(
    self,
    logits_BxV: Array,
    step: Step,
    cache: Any,
    keys_B: Array | None,
    *,
    max_tokens: int,
    map_rows: MapRows = jax.tree.map,
    special_tokens: SpecialTokens = T5,
  ) -> tuple[Array, Array]:
    """Continues every row until it writes EOS or `max_tokens` tokens.

    Args:
      logits_BxV: of each row's first token.
      step: (cache, tokens_B) -> (cache, logits_BxV of the next token); a row
        that is done has NO_TOKEN.
      cache: what `step` carries.
      keys_B: a key per row; the draw at position t uses fold_in(key, t), so a
        row's answer depends on its key and not on its neighbours. Greedy needs
        none.
      max_tokens: T, tokens at most.
      map_rows: not needed, as no row changes its place.
      special_tokens: the model's.

    Returns:
      tokens [B, T], padded after EOS, and each row's log-probability under the
      model (temperature 1), float32 [B].
    """
    del map_rows

    def advance(t, answers, log_probs_BxV):
      token_B, done_B = self.draw(keys_B, t, log_probs_BxV), answers.done_B
      log_prob_B = jnp.take_along_axis(log_probs_BxV, token_B[:, None], 1)[:, 0]
      answers = Answers(
        answers.tokens_BxT.at[:, t].set(
          jnp.where(done_B, special_tokens.pad, token_B)
        ),
        answers.log_prob_B + jnp.where(done_B, 0, log_prob_B),
        done_B | special_tokens.is_eos(token_B),
      )
      return answers, jnp.where(done_B, NO_TOKEN, token_B), None

    B = logits_BxV.shape[0]
    start = Answers(
      jnp.full((B, max_tokens), special_tokens.pad, jnp.int32),
      jnp.zeros(B, jnp.float32),
      jnp.zeros(B, bool),
    )
    end = _write(
      advance, start, logits_BxV, step, cache, max_tokens, special_tokens
    )
    return end.tokens_BxT, end.log_prob_B

  def draw(
    self, keys_B: Array | None, position: Array, logits_BxV: Array
  ) -> Array:
    """A token for each row, int32 [B]."""
    if self.temperature == 0:
      return jnp.argmax(logits_BxV, -1).astype(jnp.int32)
    if keys_B is None:
      raise ValueError('sampling above temperature 0 needs keys_B, one a row.')
    logits_BxV = self.restrict(logits_BxV / self.temperature)
    keys_B = jax.vmap(lambda key: jax.random.fold_in(key, position))(keys_B)
    draw = jax.vmap(jax.random.categorical)
    return draw(keys_B, logits_BxV).astype(jnp.int32)

  def restrict(self, logits_BxV: Array) -> Array:
    """Logits with -inf for tokens that top_k or top_p rule out."""
    if self.top_k is None and self.top_p is None:
      return logits_BxV
    sorted_BxV = jnp.sort(logits_BxV, descending=True)
    least_Bx1 = sorted_BxV[:, -1:]
    if self.top_k is not None:
      last = min(self.top_k, sorted_BxV.shape[1]) - 1
      least_Bx1 = sorted_BxV[:, last : last + 1]
    if self.top_p is not None:
      sorted_BxV = jnp.where(sorted_BxV >= least_Bx1, sorted_BxV, -jnp.inf)
      probs_BxV = jax.nn.softmax(sorted_BxV)
      before_BxV = jnp.cumsum(probs_BxV, -1) - probs_BxV
      least_Bx1 = jnp.where(before_BxV < self.top_p, sorted_BxV, jnp.inf).min(
        -1, keepdims=True
      )
    return jnp.where(logits_BxV >= least_Bx1, logits_BxV, -jnp.inf)


GREEDY = Sampling()


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
    end = _write(
      functools.partial(self._advance, max_tokens, special_tokens),
      start,
      repeat(logits_BxV),
      step,
      map_rows(repeat, cache),
      max_tokens,
      special_tokens,
      map_rows,
    )
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
    """The hypotheses with token t; see `_write`."""
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


def _write(
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
