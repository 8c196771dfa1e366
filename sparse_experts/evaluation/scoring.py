"""Choosing among options by their probability.

The answer to a multiple-choice question is the option with the largest
log-likelihood after the question, in total or per token (Brown et al. 2020,
https://arxiv.org/abs/2005.14165, section 2.4; GLaM, Du et al. 2021,
https://arxiv.org/abs/2112.06905, section 5.2). Nothing is dropped, so a score
depends on the question and the option alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sparse_experts import sharding
from sparse_experts.inference.batch_decoding import place
from sparse_experts.letters import Array
from sparse_experts.models.language import Language
from sparse_experts.models.language_model import answered


def log_likelihood(
  model: Language,
  params,
  batch: Mapping[str, Array],
  options_BxT: Array,
  *,
  per_token: bool = False,
) -> Array:
  """log p(option | inputs or prompt) of each row, float32 [B].

  Args:
    model: exact, whatever its capacity factors.
    params: unboxed parameters.
    batch: questions, as `Objective.decode` takes them.
    options_BxT: int32, padded after their end; EOS counts if it is there.
    per_token: divided by the number of tokens.

  Returns:
    Nats; -inf for an option without tokens, which is none.
  """
  special_tokens = model.special_tokens
  score_B = model.score(params, answered(batch, options_BxT, special_tokens))
  tokens_B = special_tokens.is_token(options_BxT).sum(1)
  if per_token:
    score_B /= jnp.maximum(tokens_B, 1)
  return jnp.where(tokens_B > 0, score_B, -jnp.inf)


def rank_options(
  model: Language,
  params,
  batch: Mapping[str, Array],
  options_BxWxT: Array,
  *,
  per_token: bool = False,
) -> Array:
  """`log_likelihood` of each option of each row, float32 [B, W].

  The choice is its argmax over W; `choose` takes it of a row's own options.
  Rows with fewer are filled up with options of padding, which score -inf.

  Args:
    model, params: unboxed parameters.
    batch: questions, B rows.
    options_BxWxT: int32, W options of at most T tokens, padded.
    per_token: divide by an option's number of tokens.
  """

  def score(options_BxT):
    return log_likelihood(
      model, params, batch, options_BxT, per_token=per_token
    )

  return jax.lax.map(score, options_BxWxT.swapaxes(0, 1)).swapaxes(0, 1)


def choose(
  log_likelihood_W: Sequence[float], question: str
) -> tuple[int, bool]:
  """The most probable option, the first of equal ones, and whether it is tied.

  Args:
    log_likelihood_W: of the options of a question.
    question: its name, for errors.

  Raises:
    ValueError: there is no option, or no finite log-likelihood of one.

  >>> choose([-2.0, -1.5], 'Q'), choose([-2.0, -1.5, -1.5], 'Q')
  ((1, False), (1, True))
  """
  scores_W = np.asarray(log_likelihood_W, np.float64)
  if not scores_W.size:
    raise ValueError(f'{question} has no option to choose; leave it out.')
  if not np.isfinite(scores_W).all():
    o = int(np.isfinite(scores_W).argmin())
    raise ValueError(
      f'option {o} of {question} has log-likelihood {scores_W[o]}, and only '
      'finite ones can be ranked: an option needs a token, and the checkpoint '
      'parameters that give finite logits.'
    )
  return int(scores_W.argmax()), bool((scores_W == scores_W.max()).sum() > 1)


class OptionScores:
  """`log_likelihood` of any number of options of each of many examples.

  Pairs of example and option fill batches of one shape.
  """

  def __init__(
    self,
    model: Language,
    mesh: Mesh,
    batch_size: int,
    *,
    length: int,
    per_token: bool = False,
  ):
    """Compiles at the first call.

    Args:
      model, per_token: see `log_likelihood`.
      mesh: entered by the caller.
      batch_size: pairs scored at once.
      length: T, of options; longer ones are an error.
    """
    self._mesh, self._batch_size, self._length = mesh, batch_size, length
    self._pad_id = model.special_tokens.pad

    def score(params, batch, options_BxT):
      return log_likelihood(
        model, params, batch, options_BxT, per_token=per_token
      )

    self._score = jax.jit(score, out_shardings=sharding.replicated(mesh))

  def __call__(
    self,
    params,
    examples: Sequence[Mapping[str, np.ndarray]],
    options: Sequence[Sequence[Sequence[int]]],
  ) -> list[np.ndarray]:
    """Scores of the options of each example.

    Args:
      params: unboxed parameters on the mesh.
      examples: features of one row each, see `data.prompts.features`.
      options: token ids of the options of each.

    Raises:
      ValueError: an option has more than `length` tokens.
    """
    rows = [
      {**example, 'option': self._pad(option)}
      for example, its_options in zip(examples, options, strict=True)
      for option in its_options
    ]
    scores = []
    for start in range(0, len(rows), self._batch_size):
      part = rows[start : start + self._batch_size]
      batch = place(part, self._mesh, self._batch_size)
      score_B = self._score(params, batch, batch.pop('option'))
      scores.append(np.asarray(score_B)[: len(part)])
    ends = np.cumsum([len(its_options) for its_options in options])
    return np.split(np.concatenate([*scores, np.zeros(0)]), ends[:-1])

  def _pad(self, option: Sequence[int]) -> np.ndarray:
    if len(option) > self._length:
      raise ValueError(
        f'an option has {len(option)} tokens, but there is room for '
        f'{self._length}: raise the length.'
      )
    return np.pad(
      np.asarray(option, np.int32),
      (0, self._length - len(option)),
      constant_values=self._pad_id,
    )
