"""Writing tokens one by one: greedy, sampled, or by beam search.

A strategy is a value, `Sampling` or `BeamSearch`, that says which tokens the
hypotheses go on with; the loop is the same for both. Token 0 is padding, which
is never written, and 1 (EOS) ends an answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp

from sparse_experts.arrays import Array
from sparse_experts.moe.assignment import largest

PAD, EOS = 0, 1

Step = Callable[[Any, Array], tuple[Any, Array]]
MapRows = Callable[[Callable[[Array], Array], Any], Any]


@flax.struct.dataclass
class Hypotheses:
  """Answers so far, one a row.

  Attributes:
    tokens_BxT: int32, 0 where nothing is written.
    log_prob_B: float32, of the tokens written, under the model.
    length_B: int32, how many those are, EOS included.
    done_B: EOS is written.
  """

  tokens_BxT: Array
  log_prob_B: Array
  length_B: Array
  done_B: Array

  @classmethod
  def empty(cls, rows: int, max_tokens: int) -> Hypotheses:
    return cls(
      jnp.zeros((rows, max_tokens), jnp.int32),
      jnp.zeros(rows, jnp.float32),
      jnp.zeros(rows, jnp.int32),
      jnp.zeros(rows, bool),
    )

  def write(self, t: Array, token_B: Array, log_probs_BxV: Array) -> Hypotheses:
    """With one more token each, at position t; those that are done stay."""
    token_B = jnp.where(self.done_B, PAD, token_B)
    log_prob_B = jnp.take_along_axis(log_probs_BxV, token_B[:, None], 1)[:, 0]
    return Hypotheses(
      tokens_BxT=self.tokens_BxT.at[:, t].set(token_B),
      log_prob_B=self.log_prob_B + jnp.where(self.done_B, 0, log_prob_B),
      length_B=self.length_B + ~self.done_B,
      done_B=self.done_B | (token_B == EOS),
    )

  def without(self, dead_B: Array) -> Hypotheses:
    """With no hypothesis in some rows: done, with log-probability -inf."""
    return self.replace(
      log_prob_B=jnp.where(dead_B, -jnp.inf, self.log_prob_B),
      done_B=self.done_B | dead_B,
    )


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
  ) -> tuple[Array, Array]:
    """Continues every row until it writes EOS or `max_tokens` tokens.

    Args:
      logits_BxV: of each row's first token.
      step: (cache, tokens_B) -> (cache, logits_BxV of the next token).
      cache: what `step` carries.
      keys_B: a key per row; the draw at position t uses fold_in(key, t), so a
        row's answer depends on its key and not on its neighbours. Greedy needs
        none.
      max_tokens: T, tokens at most.
      map_rows: not needed, as no row changes its place.

    Returns:
      tokens [B, T], 0 after EOS, and each row's log-probability under the model
      (temperature 1), float32 [B].
    """
    del map_rows

    def choose(t, hypotheses, log_probs_BxV):
      return hypotheses, None, self.draw(keys_B, t, log_probs_BxV)

    start = Hypotheses.empty(logits_BxV.shape[0], max_tokens)
    end = _write(choose, start, logits_BxV, step, cache, max_tokens)
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
  """Keeps the N best hypotheses of each sequence, and returns them all.

      score = log p(answer) / ((5 + length) / 6)^alpha

  with EOS in the length (Wu et al. 2016, https://arxiv.org/abs/1609.08144,
  equation 14, without coverage; T5's beam search). Hypotheses that are done
  stay in the beam as long as fewer than N others score higher, a search ends
  when all of a beam are done (as Meister et al. 2020 define beam search,
  https://arxiv.org/abs/2010.02650, section 2). So width 1 is greedy. T5's code
  keeps done ones apart and lets N others go on.

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
  ) -> tuple[Array, Array]:
    """The N best answers of every row found.

    Args:
      logits_BxV, step, cache, max_tokens: as in `Sampling`; `step` is called
        with B * N rows.
      keys_B: not needed, as nothing is drawn.
      map_rows: (function, cache) -> cache, applies a function of arrays
        [rows, ...] to every array of a cache.

    Returns:
      tokens [B, N, T], the best first, 0 after EOS; their scores, float32
      [B, N]. Where there are fewer than N answers at all, the rest score -inf.
    """
    del keys_B
    (B, V), N = logits_BxV.shape, self.width

    def repeat(x_Bx___):
      return jnp.repeat(x_Bx___, N, axis=0)

    def choose(t, hypotheses, log_probs_BNxV):
      # Those that are done go on in one way, which changes nothing.
      nothing_1xV = jnp.where(jnp.arange(V)[None] == PAD, 0, -jnp.inf)
      total_BNxV = hypotheses.log_prob_B[:, None] + jnp.where(
        hypotheses.done_B[:, None], nothing_1xV, log_probs_BNxV
      )
      length_BN = hypotheses.length_B + ~hypotheses.done_B
      score_BNxV = self.score(total_BNxV, length_BN[:, None])
      score_BxNV = score_BNxV.reshape(B, N * V)
      best_BxN = largest(score_BxNV[None], N)[0]  # The best first.

      def rows(x_BNx___):
        x_BxNx___ = x_BNx___.reshape(B, N, *x_BNx___.shape[1:])
        picked = jax.vmap(lambda x, n: x[n])(x_BxNx___, best_BxN // V)
        return picked.reshape(x_BNx___.shape)

      dead_BxN = jnp.take_along_axis(score_BxNV, best_BxN, 1) == -jnp.inf
      hypotheses = jax.tree.map(rows, hypotheses).without(dead_BxN.reshape(-1))
      return hypotheses, rows, (best_BxN % V).reshape(-1)

    start = Hypotheses.empty(B * N, max_tokens)
    end = _write(
      choose,
      start.without(jnp.arange(B * N) % N > 0),  # They all are the same.
      repeat(logits_BxV),
      step,
      map_rows(repeat, cache),
      max_tokens,
      map_rows,
    )
    score_BN = self.score(end.log_prob_B, end.length_B)
    exists_BNx1 = jnp.isfinite(score_BN)[:, None]
    tokens_BNxT = jnp.where(exists_BNx1, end.tokens_BxT, PAD)
    return tokens_BNxT.reshape(B, N, -1), score_BN.reshape(B, N)

  def score(self, log_prob: Array, length: Array) -> Array:
    """Log-probabilities over the length penalty."""
    return log_prob / ((5 + length) / 6) ** self.alpha


def _write(
  choose: Callable[[Array, Hypotheses, Array], tuple],
  start: Hypotheses,
  logits_BxV: Array,
  step: Step,
  cache: Any,
  max_tokens: int,
  map_rows: MapRows = jax.tree.map,
) -> Hypotheses:
  """The hypotheses when all are done or have `max_tokens` tokens.

  Args:
    choose: (t, hypotheses, log_probs_BxV) -> (the hypotheses that go on, how
      their rows were taken from the rows before or None, token_B of each).
      Padding has log-probability -inf.
  """
  if max_tokens < 1:
    raise ValueError(f'max_tokens must be at least 1, not {max_tokens}.')

  def extend(t, hypotheses, logits_BxV):
    log_probs_BxV = jax.nn.log_softmax(logits_BxV.astype(jnp.float32))
    log_probs_BxV = log_probs_BxV.at[:, PAD].set(-jnp.inf)
    hypotheses, rows, token_B = choose(t, hypotheses, log_probs_BxV)
    if rows is not None:
      log_probs_BxV = rows(log_probs_BxV)
    return hypotheses.write(t, token_B, log_probs_BxV), rows

  def proceed(carry):
    t, hypotheses, _ = carry
    return (t < max_tokens) & ~hypotheses.done_B.all()

  def turn(carry):
    t, hypotheses, cache = carry
    last_B = jax.lax.dynamic_index_in_dim(
      hypotheses.tokens_BxT, t - 1, 1, keepdims=False
    )
    cache, logits_BxV = step(cache, last_B)
    hypotheses, rows = extend(t, hypotheses, logits_BxV)
    if rows is not None:
      cache = map_rows(rows, cache)
    return t + 1, hypotheses, cache

  # Rows that go on from the start all have the cache of the start.
  hypotheses, _ = extend(jnp.int32(0), start, logits_BxV)
  carry = jnp.int32(1), hypotheses, cache
  return jax.lax.while_loop(proceed, turn, carry)[1]
