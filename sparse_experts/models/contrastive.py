"""Contrastive: which inputs belong together, among all pairs of a batch."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparse_experts.data.dataset import Dataset
from sparse_experts.data.features.pairs import Pairs
from sparse_experts.letters import Array
from sparse_experts.models import auxiliary
from sparse_experts.models.auxiliary import Statistics, Totals
from sparse_experts.models.likelihood import likelihood
from sparse_experts.models.objective import Batch, Judged, Objective
from sparse_experts.models.sums import Mean
from sparse_experts.models.two_towers import Embeddings
from sparse_experts.sharding import constrain

KINDS = ('softmax', 'sigmoid')
MAX_SCALE = 100.0  # Of CLIP's softmax (section 2.5).
_NEVER = -1e30  # A logit; an infinite one could become NaN.


class Rows(NamedTuple):
  """Pairs of a microbatch, [B, ...], or of all of them, [n, B, ...]."""

  left_BxA: Array
  right_BxA: Array
  weights_B: Array


@dataclasses.dataclass(frozen=True)
class Contrastive(Objective):
  """Finds the other half of each pair: the objective of `TwoTowers`.

  Of pairs i with embeddings l_i and r_i of length 1, over the global batch:

      z_ij = s l_i . r_j (+ b)
      loss = mean over i of (row(z, i) + row(z^T, i)) / 2 + auxiliary losses

      softmax   -log softmax(z_i)_i, a choice among all of the batch (CLIP)
      sigmoid   -sum_j log sigmoid(+-z_ij), + where i = j: each pair of inputs
                is or is not one (SigLIP)

  The scale s, the exponential of a parameter, is at most 100 with softmax.
  Rows of `weight` 0 are nobody's negatives. Means are 'loss', the one above,
  and 'accuracy', how often the other half is the most similar of the batch, in
  both directions: B pairs have 1 / B by chance. 'rows' are counted.

  With microbatches each of them compares all pairs of the step, of which its
  own have gradients and those of others are constants found in a first forward
  pass (`statistics`), with the same draws: loss and gradient are those of one
  batch. That costs a forward pass more, and the B^2 similarities in every
  microbatch.

  Attributes:
    kind: 'softmax' or 'sigmoid'.

  References:
    Radford et al. 2021, https://arxiv.org/abs/2103.00020, figure 3.
    Zhai et al. 2023, https://arxiv.org/abs/2303.15343, Algorithm 1.

  Example:
    >>> import functools
    >>> from flax import linen as nn
    >>> from sparse_experts.layers.attention import Attention
    >>> from sparse_experts.layers.embed import TokenEmbed
    >>> from sparse_experts.layers.mlp import Mlp
    >>> from sparse_experts.models.transformer import Block, Stack
    >>> from sparse_experts.models.two_towers import TextTower, TwoTowers
    >>> partial = functools.partial
    >>> block = partial(
    ...   Block,
    ...   make_attention=partial(Attention, num_heads=2, head_width=4),
    ...   make_mlp=partial(Mlp, hidden_width=16),
    ... )
    >>> tower = TextTower(TokenEmbed(50, 8), Stack(1, block))
    >>> model = Contrastive(TwoTowers(tower, right=None, width=4))
    >>> batch = {'left': jnp.array([[5, 6, 7], [8, 9, 0]]),
    ...          'right': jnp.array([[5, 6], [8, 0]])}
    >>> params = nn.unbox(model.init(jax.random.key(0), batch))
    >>> loss, sums = model.loss(params, batch, train=False)
    >>> float(sums['counts']['rows'])
    2.0
  """

  kind: str = 'softmax'

  def __post_init__(self):
    super().__post_init__()
    if self.kind not in KINDS:
      raise ValueError(
        f'kind must be one of {", ".join(KINDS)}, not {self.kind!r}.'
      )
    bias = self.module.initial_bias
    if (bias is None) == (self.kind == 'sigmoid'):
      remedy = {
        'softmax': 'which no bias changes: set it to None',
        'sigmoid': 'which needs one: set it to a number, -10.0 in SigLIP',
      }
      raise ValueError(
        f'initial_bias={bias} of the towers does not fit kind={self.kind!r}, '
        f'{remedy[self.kind]}.'
      )
    if self.bias_rate and self.module.right is None:
      raise ValueError(
        f'bias_rate={self.bias_rate} moves biases by the load of one stack, '
        'and routers of a shared tower have two: give `right` a tower, or set '
        'bias_rate=0.'
      )

  @property
  def features(self) -> Pairs:
    """The inputs of both towers."""
    return self.module.inputs

  @property
  def headline(self) -> str:
    """Checkpoints are compared by accuracy."""
    return 'accuracy'

  @property
  def needs_statistics(self) -> bool:
    """Every pair of a step is compared with all others."""
    return True

  def weight(self, batch: Batch) -> Array:
    """Pairs that count, float32."""
    return _weights(batch).sum()

  def statistics(
    self, params, batch: Batch, rng: Array | None = None, *, step=None
  ) -> Statistics:
    """The embeddings of a microbatch, for the others; see `Objective`."""
    embeddings, auxes = self.outputs(params, batch, rng, train=True, step=step)
    return Statistics(auxiliary.counts(auxes), _rows(embeddings, batch))

  def measure(
    self, outputs: Embeddings, batch: Batch, totals: Totals
  ) -> Judged:
    """The loss of all pairs, and the means of the batch's own."""
    own = _rows(outputs, batch)
    pairs, part = own, 0
    if totals.rows is not None:
      pairs, part = _among(own, Rows(*totals.rows), totals.part), totals.part
    loss_B, right_B = self._compare(pairs, outputs)
    loss = (loss_B * pairs.weights_B).sum()
    loss /= auxiliary.or_one(pairs.weights_B.sum())

    def own_sum(x_B):
      x_xB = x_B.reshape(-1, own.weights_B.size)
      return (x_xB[part] * own.weights_B).sum()

    rows = own.weights_B.sum()
    return Judged(
      loss=loss,
      means={
        'loss': Mean(own_sum(loss_B), rows),
        'accuracy': Mean(own_sum(right_B), rows),
      },
      counts={'rows': rows},
    )

  def check_data(self, dataset: Dataset) -> None:
    """Raises ValueError where a tower does not know all ids of the task."""
    for side in (self.features.left, self.features.right):
      if side.num_ids is None:
        continue
      ids = dataset.vocabulary_size(side.feature)
      if ids > side.num_ids:
        raise ValueError(
          f'{side.feature!r} of task {dataset.mixture_or_task_name!r} has '
          f'{ids} token ids, but its tower embeds only {side.num_ids}: give it '
          f'a vocabulary of at least {ids}.'
        )

  def _compare(self, pairs: Rows, outputs: Embeddings) -> tuple[Array, Array]:
    """Each pair's loss and share of right answers, [B]; see the class."""
    log_scale = outputs.log_scale
    if self.kind == 'softmax':
      log_scale = at_most(log_scale, math.log(MAX_SCALE))
    similar_BxI = jnp.einsum(
      'BA,IA->BI',
      constrain(pairs.left_BxA, 'batch', None),
      constrain(pairs.right_BxA, None, None),
      precision=jax.lax.Precision.HIGHEST,
    )
    logits_BxI = jnp.exp(log_scale) * similar_BxI
    if outputs.bias is not None:
      logits_BxI += outputs.bias
    (loss_1_B, right_1_B), (loss_2_B, right_2_B) = (
      self._choose(logits_BxI, pairs.weights_B > 0)
      for logits_BxI in (logits_BxI, logits_BxI.T)
    )
    return (loss_1_B + loss_2_B) / 2, (right_1_B + right_2_B) / 2

  def _choose(self, logits_BxI: Array, is_pair_I: Array) -> tuple[Array, Array]:
    """Of each row its loss, and whether its own column is the largest; [B]."""
    I = logits_BxI.shape[1]
    is_pair_1xI = is_pair_I[None]
    found = likelihood(
      jnp.where(is_pair_1xI, logits_BxI, _NEVER), jnp.arange(I)
    )
    right_B = found.correct.astype(jnp.float32)
    if self.kind == 'softmax':
      return -found.log_prob, right_B
    sign_BxI = 2 * jnp.eye(I) - 1
    log_prob_BxI = jax.nn.log_sigmoid(sign_BxI * logits_BxI)
    return -jnp.where(is_pair_1xI, log_prob_BxI, 0).sum(-1), right_B


def _weights(batch: Batch) -> Array:
  """How much each pair of a batch counts, float32 [B]; by default 1."""
  if 'weight' in batch:
    return batch['weight'].astype(jnp.float32)
  return jnp.ones(batch['left'].shape[:1], jnp.float32)


def _rows(embeddings: Embeddings, batch: Batch) -> Rows:
  return Rows(embeddings.left_BxA, embeddings.right_BxA, _weights(batch))


def _among(own: Rows, of_parts: Rows, part: Array) -> Rows:
  """All pairs of a step, of which a microbatch's own have gradients.

  The mean over the n microbatches has a pair's gradient in one of them, so it
  counts n times there. What all of them see, as the scale, counts once in each.

  Args:
    own: of the microbatch.
    of_parts: of all, [n, B, ...], constants.
    part: which of the n it is.
  """

  def place(x, others):
    n, constant = len(others), jax.lax.stop_gradient(x)
    x = constant + n * (x - constant)
    whole = jax.lax.dynamic_update_index_in_dim(others, x, part, 0)
    # On every device, for rows that lie split among them are put in a line.
    whole = constrain(whole, *[None] * whole.ndim)
    return whole.reshape(-1, *x.shape[1:])

  return jax.tree.map(place, own, of_parts)


@jax.custom_vjp
def at_most(x: Array, limit: float) -> Array:
  """min(x, limit), which has a gradient where that leads back from the limit.

  A minimum has none beyond the limit: a parameter that a step has carried there
  would stay for ever.

  Example:
    >>> slope = lambda sign: jax.grad(lambda x: sign * at_most(x, 1.0))
    >>> [float(slope(sign)(x)) for x in (0.5, 2.0) for sign in (1.0, -1.0)]
    [1.0, -1.0, 1.0, 0.0]
  """
  return jnp.minimum(x, limit)


def _at_most_forward(x, limit):
  return at_most(x, limit), (x, limit)


def _at_most_backward(residuals, slope):
  x, limit = residuals
  # A step goes against the gradient: a positive one leads down.
  return jnp.where((x < limit) | (slope > 0), slope, 0.0), None


at_most.defvjp(_at_most_forward, _at_most_backward)
