"""Objective: what a batch is worth. Everything trains through it.

It has more than 350 lines because what all objectives are given is said here.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparse_experts import moe
from sparse_experts.data.dataset import Dataset
from sparse_experts.data.features.base import Features
from sparse_experts.letters import Array
from sparse_experts.models import auxiliary, policy_gradient
from sparse_experts.models.auxiliary import Statistics, Totals
from sparse_experts.models.sums import Mean, Sums
from sparse_experts.moe.outputs import Aux
from sparse_experts.numbers import Finite, Positive

Batch = Mapping[str, Array]


class Judged(NamedTuple):
  """What an objective says of a module's outputs, its sparse layers aside.

  Attributes:
    loss: float32, a sum over what counts, over `totals.weight`.
    means: by name, for people; 'loss' is what is compared between models.
    counts: by name, sums for people, such as of targets.
  """

  loss: Array
  means: dict[str, Mean]
  counts: dict[str, Array]


class Frozen(NamedTuple):
  """A model beside the one that is trained, whose parameters never move.

  Attributes:
    objective: what the parameters are of.
    directory: the MODEL_DIR that they come from, or one checkpoints/<step>.
  """

  objective: Objective
  directory: str


@dataclasses.dataclass(frozen=True)
class Objective(abc.ABC):
  """A module, and what its outputs are worth.

      batch -> outputs -> (outputs, auxes) -> judge -> (loss, sums)

      loss = own loss + sum over names w_name * (over layers) aux_name

  A module maps (batch, step=, capacity_factor=, deterministic=, record=) to
  outputs and the Aux of every sparse layer, and says in `masks(batch)` which
  tokens each of its stacks routes; what plans it asks for its `stacks`, by name
  in the order they run in, and the `dtype` of its activations. The base knows
  no feature by name. An objective of its own says `features`, `weight` and
  `measure`; one whose routers may learn from reward also `rewards`, one that
  can be distilled `predictions`, and one whose checkpoints are compared by more
  than their loss `headline`.

  Attributes:
    module: what the parameters are of.
    loss_weights: weight of each auxiliary loss the routers return, by name.
    layer_reduction: auxiliary losses are combined over sparse layers by 'sum'
      (Mesh TF, so Switch and ST-MoE as published), 'mean' (flaxformer,
      MegaBlocks), or 'joint': the balance loss is of all tokens of a stack's
      layers together, whose f and P are averaged before they are multiplied;
      other losses are the mean over a stack's layers, and stacks add
      (transformers: Mixtral, OLMoE, Switch).
    balance_over: the tokens that f and P of the balance loss are means over.
      'group': each group of a layer, as routers return it (Mesh TF,
        DeepSeek-V3's sequences).
      'microbatch': what one forward pass sees, on all devices (transformers,
        MegaBlocks, Megatron: there, on one device); microbatches weigh alike.
      'batch': all tokens of a step (Qiu et al. 2025,
        https://arxiv.org/abs/2501.11873), exactly: with microbatches, a first
        forward pass over all of them, up to the last router, counts choices,
        with the same draws. It costs a third of a step at most, a quarter where
        remat makes a step of four passes.
      'batch_so_far': the step's microbatches up to this one, an approximation
        that costs nothing (their buffer; Megatron's `global_aux_loss`).
      'last_step': f of the step before and P of this one, an approximation
        that costs a state of E counts a layer.
      Without microbatches the three in the middle are one.
    capacity_factor_train, capacity_factor_eval: of sparse layers; None drops
      nothing.
    bias_rate: how far routers' balance biases move after each training step
      (`balance_bias.update_biases`); 0 for routers that have none.
  """

  module: nn.Module
  loss_weights: Mapping[str, Finite] = dataclasses.field(
    default_factory=lambda: {'load_balance': 1e-2}
  )
  layer_reduction: str = 'sum'
  balance_over: str = 'group'
  capacity_factor_train: Positive | None = 1.25
  capacity_factor_eval: Positive | None = 2.0
  bias_rate: float = 0.0

  def __post_init__(self):
    auxiliary.check(self.layer_reduction, self.balance_over)
    if not isinstance(self.loss_weights, Mapping):
      raise ValueError(
        f'loss_weights={self.loss_weights!r} must say the weight of each loss '
        "by its name, as {'load_balance': 1e-2}, or be {}."
      )

  # What each objective says.

  @property
  def features(self) -> Features:
    """What its batches look like."""
    raise NotImplementedError

  def weight(self, batch: Batch) -> Array:
    """What a batch's loss is divided by, float32: targets, rows, frames."""
    raise NotImplementedError

  def measure(self, outputs: Any, /, batch: Batch, totals: Totals) -> Judged:
    """The loss of the outputs, and what people want to know of them.

    Args:
      outputs: of the module, as `outputs` returns them.
      batch: of `features`.
      totals: what a step's losses are divided by, see `totals`.
    """
    raise NotImplementedError

  @property
  def headline(self) -> str | None:
    """The mean that checkpoints are compared by; None: minus the loss.

    A minus before the name of one of which less is better, as of errors.
    """
    return None

  def rewards(
    self, outputs: Any, /, batch: Batch
  ) -> dict[str, tuple[Array, Array]]:
    """By stack, the reward of each token and its weight, float32 [B, L]."""
    raise ValueError(
      f'a router learns from reward, and {type(self).__name__} gives none; '
      'take another router of gin/routers/.'
    )

  def predictions(self, outputs: Any, /, batch: Batch) -> tuple[Array, Array]:
    """Logits [..., V] of what is predicted, and weights [...] of each."""
    raise ValueError(
      f'{type(self).__name__} predicts no distribution: it can neither be '
      'distilled nor be consistent with itself.'
    )

  @property
  def frozen(self) -> Mapping[str, Frozen]:
    """Models that the loss of training needs beside the module, by name.

    `params` of training has their parameters under these names; those of
    checkpoints and of evaluation have not, see `training.frozen`.
    """
    return {}

  def check_data(self, dataset: Dataset) -> None:
    """Raises ValueError where the data is none of the module's."""
    del dataset  # Here any will do.

  # What all share.

  def init(self, rng: Array, shapes: Mapping[str, jax.ShapeDtypeStruct]):
    """Boxed parameters (with axis names) for batches of these shapes.

    Under `jax.eval_shape` it costs nothing at any size; under `jax.jit` with
    out_shardings the parameters are created where they live.
    """
    batch = {k: jnp.zeros(v.shape, v.dtype) for k, v in shapes.items()}
    return self.module.init(rng, batch)['params']

  def loss(
    self,
    params,
    batch: Batch,
    rng: Array | None = None,
    *,
    train: bool,
    step: Array | None = None,
    totals: Totals | None = None,
  ) -> tuple[Array, Sums]:
    """The training objective and sums that metrics are read from.

    Args:
      params: unboxed parameters.
      batch: features.
      rng: for dropout, jitter and noise; required in training.
      train: training's capacity, policies and dropout, or evaluation's.
      step: int32 training step, for routers with a schedule.
      totals: what losses are divided by, the batch's own by default. A
        microbatch is given the mean of all, so that the mean over microbatches
        is the whole batch's loss.

    Returns:
      Scalar loss; sums (see `sums.summary`), which add over batches. Among them
      'own_loss' is the loss without auxiliary ones, and 'balance' what
      `statistics` has of it.
    """
    if totals is None:
      totals = self.totals(batch)
    outputs, auxes = self.outputs(params, batch, rng, train=train, step=step)
    return self.judge(outputs, auxes, batch, totals)

  def outputs(
    self,
    params,
    batch: Batch,
    rng: Array | None = None,
    *,
    train: bool,
    step: Array | None = None,
  ) -> tuple[Any, Any]:
    """What the module computes, and every sparse layer's Aux; see `loss`.

    Args:
      params: unboxed.
      batch: of `features`; each array begins with B.
      rng: of dropout, jitter and routers that draw; None: nothing is drawn.
      train: training's capacity factor and draws, or evaluation's.
      step: int32 scalar, which routers that anneal read; None outside training.
    """
    factor = self.capacity_factor_train if train else self.capacity_factor_eval
    return self.apply(
      params, batch, rng, train=train, step=step, capacity_factor=factor
    )

  def judge(
    self, outputs: Any, auxes: Any, batch: Batch, totals: Totals
  ) -> tuple[Array, Sums]:
    """Loss and sums of what `outputs` returns; see `loss`.

    Args:
      outputs, auxes: of `outputs`, on this batch.
      batch: the batch.
      totals: what losses are divided by; where this is a microbatch, of all of
        its step.

    Raises:
      ValueError: no router returns a loss that has a weight, or one learns by
        reward and there is none.
    """
    with jax.named_scope('loss'):
      judged = self.measure(outputs, batch, totals)
    counted = auxiliary.counts(auxes)
    auxes = auxiliary.of_layers(auxes, self.balance_over, totals)
    if any(aux.decisions for aux in auxes.values()):
      auxes = policy_gradient.losses(
        auxes, self.rewards(outputs, batch), auxiliary.or_one(totals.weight)
      )
    self._check_weights(auxes)
    aux_losses = auxiliary.over_layers(
      auxes, self.layer_reduction, self.balance_over, totals
    )
    loss = judged.loss
    for name, value in aux_losses.items():
      loss += self.loss_weights.get(name, 0.0) * value
    sums = {
      'batches': jnp.float32(1),
      'own_loss': judged.loss,
      'means': judged.means,
      'counts': judged.counts,
      'aux_losses': aux_losses,
      'layers': {name: aux.metrics for name, aux in auxes.items()},
      'balance': counted,
    }
    return loss, sums

  def totals(self, batch: Batch) -> Totals:
    """What the losses of a batch are divided by."""
    return Totals(
      weight=self.weight(batch),
      tokens={
        stack: mask.sum().astype(jnp.float32)
        for stack, mask in self.module.masks(batch).items()
      },
    )

  def positions(self, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> int:
    """Positions of a batch in all stacks, those of padding too."""
    masks = jax.eval_shape(self.module.masks, dict(shapes))
    return sum(mask.size for mask in masks.values())

  @property
  def needs_statistics(self) -> bool:
    """Whether losses of a microbatch need `statistics` of all of them."""
    return self.balance_over == 'batch'

  def statistics(
    self, params, batch: Batch, rng: Array | None = None, *, step=None
  ) -> Statistics:
    """What the loss of a step needs to know of all its microbatches first.

    A forward pass with the draws of `loss`; arguments as there.

    Args:
      params, batch, rng, step: as of `loss`, so that its draws are these.
    """
    _, auxes = self.outputs(params, batch, rng, train=True, step=step)
    return Statistics(balance=auxiliary.counts(auxes))

  def record(
    self,
    params,
    batch: Batch,
    rng: Array | None = None,
    *,
    train: bool = False,
    step: Array | None = None,
  ) -> dict[str, moe.Record]:
    """What every sparse layer does with every token, by layer.

    Args:
      params: unboxed parameters.
      batch: features.
      rng, step: as in `loss`.
      train: at training's capacity, with its draws, or at evaluation's.
    """
    factor = self.capacity_factor_train if train else self.capacity_factor_eval
    _, auxes = self.apply(
      params,
      batch,
      rng,
      train=train,
      step=step,
      capacity_factor=factor,
      record=True,
    )
    return {name: aux.record for name, aux in auxes.items()}

  def apply(
    self,
    params,
    batch: Batch,
    rng: Array | None = None,
    *,
    train: bool = False,
    step: Array | None = None,
    capacity_factor: float | None = None,
    record: bool = False,
  ) -> tuple[Any, dict[str, Aux]]:
    """The module on a batch, by default exactly: nothing is dropped.

    Args:
      params: unboxed.
      batch: of `features`; each array begins with B.
      rng: of whatever draws; None where nothing does.
      train: dropout and routers draw.
      step: int32 scalar; None outside training.
      capacity_factor: of all sparse layers; None drops nothing.
      record: fill `Aux.record`.
    """
    return self.module.apply(
      {'params': params},
      batch,
      step=step,
      capacity_factor=capacity_factor,
      deterministic=not train,
      record=record,
      rngs=None if rng is None else {'dropout': rng},
    )

  def _check_weights(self, auxes: Mapping[str, Aux]) -> None:
    """Raises ValueError if a weighed loss is no router's."""
    there = {name for aux in auxes.values() for name in aux.losses}
    unknown = set(self.loss_weights) - there
    if auxes and unknown:
      raise ValueError(
        f'loss_weights names {sorted(unknown)}, which no router returns; they '
        f'return {sorted(there)}: take it out of LOSS_WEIGHTS.'
      )
