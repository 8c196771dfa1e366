"""Classification: a label of each row, several, or numbers."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from sparse_experts.data.dataset import Dataset
from sparse_experts.data.features.arrays import LABEL, Labelled
from sparse_experts.letters import Array
from sparse_experts.models import auxiliary
from sparse_experts.models.auxiliary import Totals
from sparse_experts.models.likelihood import likelihood
from sparse_experts.models.objective import Batch, Judged, Objective
from sparse_experts.models.sums import Mean
from sparse_experts.numbers import Rate

KINDS = ('softmax', 'sigmoid', 'squared')


@dataclasses.dataclass(frozen=True)
class Classification(Objective):
  """Says what rows are, such as images: the objective of a head of V outputs.

      loss = mean over rows of the row's loss + auxiliary losses

  of outputs z_V and a label y:

      softmax   one of V classes, int32 []     -sum_v q_v log softmax(z)_v,
                q = (1 - s) onehot(y) + s / V, s the label smoothing
      sigmoid   several of V, int32 [V]        -sum_v log sigmoid(+-z_v),
                + where y_v is 1, - where it is 0
      squared   V numbers, float32 [V],        mean_v (z_v - y_v)^2
                or [] where V is 1

  Means are 'loss', the row's loss without smoothing, so that runs compare; and
  'accuracy', of classes: the output with the largest logit is the label, or one
  of them ("precision at 1"). Of numbers 'absolute_error', the mean |z_v - y_v|.
  'rows' are counted. `weight` of a batch says how much each row counts; tokens
  of rows that count for nothing are not routed.

  The module has `inputs` (of `data.features.Labelled`: input, shape, dtype) and
  `num_outputs`, see `vision.VisionTransformer`.

  Attributes:
    kind: 'softmax', 'sigmoid' or 'squared'.
    label_smoothing: s, of softmax (Szegedy et al. 2015,
      https://arxiv.org/abs/1512.00567, section 7).

  Example:
    >>> import functools
    >>> from flax import linen as nn
    >>> from sparse_experts.layers.attention import Attention
    >>> from sparse_experts.layers.mlp import Mlp
    >>> from sparse_experts.models.transformer import Block, Stack
    >>> from sparse_experts.models.vision import VisionTransformer
    >>> partial = functools.partial
    >>> block = partial(
    ...   Block,
    ...   make_attention=partial(Attention, num_heads=2, head_width=4),
    ...   make_mlp=partial(Mlp, hidden_width=16),
    ... )
    >>> model = Classification(VisionTransformer(
    ...   encoder=Stack(num_layers=1, make_block=block), image_shape=(4, 4, 1),
    ...   patch_size=2, width=8, num_outputs=3))
    >>> batch = {'input': jnp.ones((2, 4, 4, 1)), 'label': jnp.array([0, 2])}
    >>> params = nn.unbox(jax.jit(model.init)(jax.random.key(0), batch))
    >>> loss, sums = jax.jit(partial(model.loss, train=False))(params, batch)
    >>> float(sums['counts']['rows'])
    2.0
  """

  kind: str = 'softmax'
  label_smoothing: Rate = 0.0

  def __post_init__(self):
    super().__post_init__()
    if self.kind not in KINDS:
      raise ValueError(
        f'kind must be one of {", ".join(KINDS)}, not {self.kind!r}.'
      )
    most = 1 if self.kind == 'softmax' else 0
    if self.label_smoothing and not 0 < self.label_smoothing < most:
      raise ValueError(
        f'label_smoothing={self.label_smoothing} of {self.kind!r}: set it to '
        "at least 0 and less than 1 with 'softmax', to 0 with others."
      )

  @property
  def features(self) -> Labelled:
    """An input of the module, and the label that `kind` has."""
    V = self.module.num_outputs
    is_number = self.kind == 'squared'
    one = self.kind == 'softmax' or (is_number and V == 1)
    return dataclasses.replace(
      self.module.inputs,
      label_shape=() if one else (V,),
      label_dtype='float32' if is_number else 'int32',
    )

  @property
  def headline(self) -> str | None:
    """Classes are compared by accuracy."""
    return None if self.kind == 'squared' else 'accuracy'

  def weight(self, batch: Batch) -> Array:
    """Rows that count, float32."""
    return row_weights(batch).sum()

  def measure(self, outputs_BxV: Array, batch: Batch, totals: Totals) -> Judged:
    """The rows' losses, and how many are right."""
    weights_B = row_weights(batch)
    loss_B, right_B = judge_labels(self.kind, outputs_BxV, batch[LABEL])
    rows = weights_B.sum()
    objective_B = loss_B
    if self.label_smoothing:
      log_prob_BxV = jax.nn.log_softmax(outputs_BxV.astype(jnp.float32))
      s = self.label_smoothing
      objective_B = (1 - s) * loss_B - s * log_prob_BxV.mean(-1)
    other = 'absolute_error' if self.kind == 'squared' else 'accuracy'
    return Judged(
      loss=(objective_B * weights_B).sum() / auxiliary.or_one(totals.weight),
      means={
        'loss': Mean((loss_B * weights_B).sum(), rows),
        other: Mean((right_B * weights_B).sum(), rows),
      },
      counts={'rows': rows},
    )

  def rewards(
    self, outputs_BxV: Array, batch: Batch
  ) -> dict[str, tuple[Array, Array]]:
    """Minus the row's loss, a constant, for each of its tokens.

    Of classes that is the log-probability of the label. The tokens of a row
    share its weight, so that rows count alike in every stack.
    """
    loss_B, _ = judge_labels(self.kind, outputs_BxV, batch[LABEL])
    # The reward is no function of the parameters: it is what the world answers.
    reward_Bx1 = -jax.lax.stop_gradient(loss_B)[:, None]
    weights_Bx1 = row_weights(batch)[:, None]

    def of_stack(mask_BxL):
      tokens_Bx1 = jnp.maximum(mask_BxL.sum(-1, keepdims=True), 1)
      return (
        jnp.broadcast_to(reward_Bx1, mask_BxL.shape),
        mask_BxL * weights_Bx1 / tokens_Bx1,
      )

    masks = self.module.masks(batch)
    return {stack: of_stack(mask_BxL) for stack, mask_BxL in masks.items()}

  def predictions(
    self, outputs_BxV: Array, batch: Batch
  ) -> tuple[Array, Array]:
    """Logits of each distribution, and weights.

    One over V classes, [B, V] and [B]; or of each of several classes one over
    no and yes, [B, V, 2] and [B, V].
    """
    weights_B = row_weights(batch)
    if self.kind == 'softmax':
      return outputs_BxV, weights_B
    if self.kind == 'sigmoid':
      logits_BxVx2 = jnp.stack([jnp.zeros_like(outputs_BxV), outputs_BxV], -1)
      weights_BxV = jnp.broadcast_to(weights_B[:, None], outputs_BxV.shape)
      return logits_BxVx2, weights_BxV
    return super().predictions(outputs_BxV, batch)

  def check_data(self, dataset: Dataset) -> None:
    """Raises ValueError where the task has more classes than the head."""
    if self.kind == 'squared':
      return
    V, classes = self.module.num_outputs, dataset.vocabulary_size(LABEL)
    if classes > V:
      raise ValueError(
        f'task {dataset.mixture_or_task_name!r} has {classes} classes, but the '
        f'head has {V} outputs: give it at least {classes}.'
      )


def judge_labels(
  kind: str, outputs: Array, label: Array
) -> tuple[Array, Array]:
  """The loss of each label, and whether it is right or its absolute error.

  Args:
    kind: of `KINDS`, see `Classification`.
    outputs: [..., V], of rows or of their tokens.
    label: [...] or [..., V], as `kind` has it.

  Returns:
    Two arrays [...].
  """
  outputs = outputs.astype(jnp.float32)
  if kind == 'softmax':
    log_prob, _, correct = likelihood(outputs, label)
    return -log_prob, correct
  if kind == 'sigmoid':
    log_prob = jax.nn.log_sigmoid(jnp.where(label > 0, outputs, -outputs))
    best = outputs.argmax(-1, keepdims=True)
    hit = jnp.take_along_axis(label, best, axis=-1)[..., 0] > 0
    return -log_prob.sum(-1), hit
  error = outputs - label.reshape(outputs.shape)
  return jnp.square(error).mean(-1), jnp.abs(error).mean(-1)


def row_weights(batch: Batch) -> Array:
  """How much each row of a batch counts, float32 [B]; by default 1."""
  if 'weight' in batch:
    return batch['weight'].astype(jnp.float32)
  return jnp.ones(batch['input'].shape[:1], jnp.float32)
