"""Distillation: a student that learns from data and from a teacher."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparse_experts.data.dataset import Dataset
from sparse_experts.letters import Array
from sparse_experts.models import auxiliary
from sparse_experts.models.auxiliary import Totals
from sparse_experts.models.objective import Batch, Frozen, Objective
from sparse_experts.models.sums import Mean, Sums
from sparse_experts.models.wrapper import Wrapper

TEACHER = 'teacher'


class Taught(NamedTuple):
  """Of a batch, what student and teacher computed."""

  student: Any
  teacher: Any


@dataclasses.dataclass(frozen=True)
class Distillation(Wrapper):
  """Trains a student on labels and on what a teacher says of the same batch.

      loss = (1 - a) own + a T^2 mean of -sum_v p_v log q_v + auxiliary losses
      p = softmax(teacher's logits / T),   q = softmax(student's logits / T)

  with own the student's loss without its auxiliary ones, which weigh as they do
  alone, and a mean over what counts: the predictions of both objectives, of
  tokens or of classes. T^2 makes the gradients of both parts alike (Hinton et
  al. 2015, https://arxiv.org/abs/1503.02531, section 2). The defaults are those
  of a sparse teacher and a dense student: "a mixture of 0.25 for the teacher
  probabilities and 0.75 for the ground truth" (Fedus et al. 2021,
  https://arxiv.org/abs/2101.03961, section 4.1, table 6).

  The teacher is as in its evaluation: without draws, at its own capacity factor
  of evaluation (None there: exact). No gradient reaches it, and its auxiliary
  losses count for nothing. In training its parameters are `params['teacher']`.
  Outside of it the student is alone: loss, score and answers are its own, and
  so are checkpoints, which its own recipe reads.

  Means are the student's, with 'soft_loss', T^2 times the cross-entropy above,
  and 'teacher_agreement', the share of predictions that are the teacher's too.

  Attributes:
    objective: the student.
    teacher: what the teacher's parameters are of.
    teacher_dir: the teacher's MODEL_DIR, or one checkpoints/<step> of it.
    teacher_share: a, in [0, 1].
    temperature: T, above 0.

  Raises:
    ValueError: a number is out of range, the two read different batches, or the
      student has a teacher; in training, they predict over different
      vocabularies, or the parameters have no teacher.
  """

  objective: Objective
  teacher: Objective
  teacher_dir: str
  teacher_share: float = 0.25
  temperature: float = 1.0

  def __post_init__(self):
    if not 0 <= self.teacher_share <= 1:
      raise ValueError(
        f'teacher_share={self.teacher_share} must be between 0, labels alone, '
        'and 1, the teacher alone.'
      )
    if not self.temperature > 0:
      raise ValueError(
        f'temperature={self.temperature} must be above 0; 1 leaves the '
        "teacher's probabilities as they are."
      )
    if TEACHER in self.objective.frozen:
      raise ValueError(
        'the student of a distillation has a teacher already: distill twice, '
        'one run after the other.'
      )
    if self.teacher.features != self.objective.features:
      raise ValueError(
        f'the teacher reads {self.teacher.features}, the student '
        f'{self.objective.features}; take a teacher that was trained on such '
        'batches.'
      )

  @property
  def frozen(self) -> Mapping[str, Frozen]:
    """The teacher, beside what the student has."""
    teacher = Frozen(self.teacher, self.teacher_dir)
    return {**self.objective.frozen, TEACHER: teacher}

  def check_data(self, dataset: Dataset) -> None:
    """Raises ValueError where the data is none of student and teacher."""
    self.objective.check_data(dataset)
    self.teacher.check_data(dataset)

  def outputs(
    self,
    params,
    batch: Batch,
    rng: Array | None = None,
    *,
    train: bool,
    step: Array | None = None,
  ) -> tuple[Any, Any]:
    """As `Objective.outputs`; in training, of both, with the student's Aux."""
    own = {name: tree for name, tree in params.items() if name != TEACHER}
    outputs, auxes = self.objective.outputs(
      own, batch, rng, train=train, step=step
    )
    if not train:
      return outputs, auxes
    if TEACHER not in params:
      raise ValueError(
        f'parameters in training of a distillation have no {TEACHER!r}, but '
        f'{", ".join(sorted(params))}: add those of the teacher, as `train` '
        'does.'
      )
    taught, _ = self.teacher.outputs(
      jax.lax.stop_gradient(params[TEACHER]), batch, train=False
    )
    return Taught(outputs, taught), auxes

  def judge(
    self, outputs: Any, auxes: Any, batch: Batch, totals: Totals
  ) -> tuple[Array, Sums]:
    """As `Objective.judge`."""
    if not isinstance(outputs, Taught):
      return self.objective.judge(outputs, auxes, batch, totals)
    loss, sums = self.objective.judge(outputs.student, auxes, batch, totals)
    total, agreement = self._compared(outputs, batch)
    soft = total / auxiliary.or_one(totals.weight)
    change = self.teacher_share * (soft - sums['own_loss'])
    means = {
      **sums['means'],
      'soft_loss': Mean(total, self.objective.weight(batch)),
      'teacher_agreement': agreement,
    }
    own_loss = sums['own_loss'] + change
    return loss + change, {**sums, 'own_loss': own_loss, 'means': means}

  def predictions(self, outputs: Any, batch: Batch) -> tuple[Array, Array]:
    """As `Objective.predictions`, the student's."""
    student = outputs.student if isinstance(outputs, Taught) else outputs
    return self.objective.predictions(student, batch)

  def _compared(self, outputs: Taught, batch: Batch) -> tuple[Array, Mean]:
    """The sum of soft losses, and the share of predictions that agree."""
    logits, weights = self.objective.predictions(outputs.student, batch)
    taught, _ = self.teacher.predictions(outputs.teacher, batch)
    if logits.shape != taught.shape:
      raise ValueError(
        f'the student predicts one of {logits.shape[-1]} (logits of shape '
        f'{logits.shape}), the teacher one of {taught.shape[-1]} '
        f'({taught.shape}): give the student the vocabulary of its teacher.'
      )
    T = self.temperature
    log_q = jax.nn.log_softmax(logits.astype(jnp.float32) / T)
    p = jax.nn.softmax(taught.astype(jnp.float32) / T)
    soft = -(T**2) * (p * log_q).sum(-1)
    agree = logits.argmax(-1) == taught.argmax(-1)
    agreement = Mean((agree * weights).sum(), weights.sum())
    return (soft * weights).sum(), agreement
