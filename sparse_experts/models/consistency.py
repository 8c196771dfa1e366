"""THOR's objective: two passes with different draws, which should agree."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparse_experts.letters import Array
from sparse_experts.models import auxiliary
from sparse_experts.models.auxiliary import Totals
from sparse_experts.models.objective import Batch, Objective
from sparse_experts.models.sums import Sums
from sparse_experts.models.wrapper import Wrapper
from sparse_experts.numbers import NotNegative


class Two(NamedTuple):
  """Of the two passes of a batch."""

  first: Any
  second: Any


@dataclasses.dataclass(frozen=True)
class Consistency(Wrapper):
  """Trains on every batch twice, at twice the cost (Zuo et al. 2021).

      loss = loss_1 + loss_2 + alpha * (KL(p_1, p_2) + KL(p_2, p_1)) / 2,

  p the predictions and the last term a mean over what counts, named
  'consistency' among the auxiliary losses. Other sums are the mean of both.
  Evaluation makes one pass. https://arxiv.org/abs/2110.04260, section 3.

  Attributes:
    objective: the one inside.
    alpha: of the regulariser.

  Raises:
    ValueError: the balance loss is of one pass over a batch.
  """

  objective: Objective
  alpha: NotNegative

  def __post_init__(self):
    if self.objective.balance_over not in ('group', 'microbatch'):
      raise ValueError(
        f'balance_over={self.objective.balance_over!r} is of one pass over a '
        "batch, and consistency makes two: set balance_over='group' or "
        "'microbatch'."
      )

  def outputs(
    self,
    params,
    batch: Batch,
    rng: Array | None = None,
    *,
    train: bool,
    step: Array | None = None,
  ) -> tuple[Any, Any]:
    """As `Objective.outputs`; in training, of both passes."""
    if not train:
      return self.objective.outputs(params, batch, rng, train=False, step=step)
    passes = [
      self.objective.outputs(
        params, batch, jax.random.fold_in(rng, i), train=True, step=step
      )
      for i in range(2)
    ]
    outputs, auxes = zip(*passes)
    return Two(*outputs), Two(*auxes)

  def predictions(self, outputs: Any, batch: Batch) -> tuple[Array, Array]:
    """As `Objective.predictions`, of one pass."""
    if isinstance(outputs, Two):
      raise ValueError(
        'consistency predicts twice in training, and what wraps it needs one '
        'prediction: put it around the other wrapper.'
      )
    return self.objective.predictions(outputs, batch)

  def record(self, params, batch: Batch, *args, train: bool = False, **kwargs):
    """As `Objective.record`, of evaluation.

    Raises:
      ValueError: in training there are two passes.
    """
    if train:
      raise ValueError(
        'consistency passes twice over a batch in training, with two routings; '
        'a record is of one: replay a run without it.'
      )
    return self.objective.record(params, batch, *args, **kwargs)

  def judge(
    self, outputs: Any, auxes: Any, batch: Batch, totals: Totals
  ) -> tuple[Array, Sums]:
    """As `Objective.judge`."""
    if not isinstance(outputs, Two):
      return self.objective.judge(outputs, auxes, batch, totals)
    (loss_1, sums_1), (loss_2, sums_2) = (
      self.objective.judge(*one, batch, totals) for one in zip(outputs, auxes)
    )
    logits_1, weights = self.objective.predictions(outputs.first, batch)
    logits_2, _ = self.objective.predictions(outputs.second, batch)
    divergence = (_symmetric_kl(logits_1, logits_2) * weights).sum()
    divergence /= auxiliary.or_one(totals.weight)
    sums = jax.tree.map(lambda a, b: (a + b) / 2, sums_1, sums_2)
    sums['own_loss'] *= 2  # Of both.
    sums['aux_losses']['consistency'] = divergence
    return loss_1 + loss_2 + self.alpha * divergence, sums


def _symmetric_kl(logits_1: Array, logits_2: Array) -> Array:
  """(KL(p_1, p_2) + KL(p_2, p_1)) / 2 of the softmax of logits, over V.

  References:
    Zuo et al. 2021, `symmetric_KL_loss` of their code, `translation_thor.py`.
  """
  log_1, log_2 = (
    jax.nn.log_softmax(logits.astype(jnp.float32))
    for logits in (logits_1, logits_2)
  )
  return 0.5 * ((jnp.exp(log_1) - jnp.exp(log_2)) * (log_1 - log_2)).sum(-1)
