"""Writing one answer a row: greedy, or drawn."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from sparse_experts.data.special_tokens import NO_TOKEN, T5, SpecialTokens
from sparse_experts.letters import Array
from sparse_experts.models.token_loop import MapRows, Step, write


@struct.dataclass
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
    end = write(
      advance, start, logits_BxV, step, cache, max_tokens, special_tokens
    )
    return end.tokens_BxT, end.log_prob_B

  def draw(
    self, keys_B: Array | None, position: Array, logits_BxV: Array
  ) -> Array:
    """A token for each row, int32 [B].

    Args:
      keys_B: a random key for each row; None at temperature 0.
      position: int32 scalar, of the token in its answer.
      logits_BxV: float32.

    Raises:
      ValueError: there are no keys, and the temperature is above 0.
    """
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
