"""Two towers: each maps an input to a vector, and they meet in one space."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparse_experts import sharding
from sparse_experts.data.features.pairs import SIDES, Pairs, Side
from sparse_experts.data.special_tokens import T5, SpecialTokens
from sparse_experts.layers.cost import Cost
from sparse_experts.layers.embed import TokenEmbed
from sparse_experts.layers.linear import Linear
from sparse_experts.letters import Array, Dtype
from sparse_experts.models.layout import LayerId
from sparse_experts.models.text_encoder import TextEncoder
from sparse_experts.models.transformer import Stack
from sparse_experts.moe.outputs import Aux
from sparse_experts.numbers import Count, Positive

_LEAST = 1e-24  # Square of the least length that is divided by.


class Embeddings(NamedTuple):
  """What `TwoTowers` makes of a batch; all float32.

  Attributes:
    left_BxA, right_BxA: of the two inputs, of length 1.
    log_scale: scalar; similarities are multiplied by its exponential.
    bias: scalar, added to them then; None: there is none.
  """

  left_BxA: Array
  right_BxA: Array
  log_scale: Array
  bias: Array | None


class TwoTowers(nn.Module):
  """Pairs -> embeddings [B, A] of both sides, in one space.

  A tower maps its side to vectors [B, D], which a matrix without bias projects
  to `width`; then they are divided by their length. It is a module of a batch
  with `input`, `weight` and maybe `task_ids`, as those of other objectives, and
  its outputs are the vectors; `side(feature)` says what it reads. `TextTower`
  is one, and a `vision.VisionTransformer` with `num_outputs=None`.

  Layers are named by side and stack, 'left/encoder/layers_1', those of a shared
  tower too, whose parameters are the left one's.

  Attributes:
    left: the tower of the left side.
    right: that of the right side; None: the left one, its projection included.
    width: A.
    features: what the task calls the left and the right input.
    initial_scale: what similarities are multiplied by at first: 1 / 0.07 in
      CLIP, 10 in SigLIP. Its logarithm is learned.
    initial_bias: what is added then, -10 in SigLIP; None: there is no bias.
    init_scale: of the projections, see `linear.Linear`.

  References:
    Radford et al. 2021, https://arxiv.org/abs/2103.00020, section 2.4 and
    figure 3. Zhai et al. 2023, https://arxiv.org/abs/2303.15343, Algorithm 1.
  """

  left: nn.Module
  right: nn.Module | None
  width: Count
  features: tuple[str, str] = ('inputs', 'targets')
  initial_scale: Positive = 1 / 0.07
  initial_bias: float | None = None
  init_scale: Positive = 1.0

  def setup(self):
    def projection():
      return Linear((self.width,), ('embed', 'kv'), init_scale=self.init_scale)

    def scalar(name, value):
      init = sharding.named(nn.initializers.constant(value))
      return self.param(name, init, (), jnp.float32)

    self.left_projection = projection()
    if self.right is not None:
      self.right_projection = projection()
    self.log_scale = scalar('log_scale', math.log(self.initial_scale))
    if self.initial_bias is not None:
      self.bias = scalar('bias', self.initial_bias)

  def __call__(
    self,
    batch: Mapping[str, Array],
    *,
    step: Array | None = None,
    capacity_factor: float | None = None,
    deterministic: bool = True,
    record: bool = False,
  ) -> tuple[Embeddings, dict[str, Aux]]:
    """Embeddings of the pairs, and the Aux of every sparse layer.

    Args:
      batch: of `data.features.pairs.Pairs`; `weight` may be missing.
      step: int32 training step, for routers with a schedule.
      capacity_factor: of sparse layers; None drops nothing.
      deterministic: no dropout, jitter or noise.
      record: sparse layers return `Aux.record`.
    """
    projections = {'left': self.left_projection}
    if self.right is not None:
      projections['right'] = self.right_projection
    z_BxA, auxes = {}, {}
    for side, tower in self.towers.items():
      x_BxD, of_tower = tower(
        _of_side(batch, side),
        step=step,
        capacity_factor=capacity_factor,
        deterministic=deterministic,
        record=record,
      )
      project = projections.get(side, self.left_projection)
      z_BxA[side] = unit(project(x_BxD.astype(jnp.float32)))
      for name, aux in of_tower.items():
        layer = LayerId.parse(name)
        stack = f'{side}/{layer.stack}'
        auxes[str(dataclasses.replace(layer, stack=stack))] = aux
    bias = None if self.initial_bias is None else self.bias
    return Embeddings(
      z_BxA['left'], z_BxA['right'], self.log_scale, bias
    ), auxes

  def cost(self, batch: Mapping[str, Array], **options) -> Cost:
    """Of its own parameters, which are in no product: nothing."""
    del batch, options
    return Cost()

  def masks(self, batch: Mapping[str, Array]) -> dict[str, Array]:
    """By stack, the tokens that its layers route, boolean [B, L]."""
    return {
      f'{side}/{stack}': mask_BxL
      for side, tower in self.towers.items()
      for stack, mask_BxL in tower.masks(_of_side(batch, side)).items()
    }

  @property
  def towers(self) -> dict[str, nn.Module]:
    """By side; a shared one has both."""
    return dict(zip(SIDES, (self.left, self.right or self.left)))

  @property
  def inputs(self) -> Pairs:
    """The features of both sides."""
    return Pairs(
      *(
        tower.side(feature)
        for tower, feature in zip(
          self.towers.values(), self.features, strict=True
        )
      )
    )

  @property
  def stacks(self) -> dict[str, Stack]:
    """By name, in the order that they run in; a shared one has two names."""
    return {
      f'{side}/{name}': stack
      for side, tower in self.towers.items()
      for name, stack in tower.stacks.items()
    }

  @property
  def dtype(self) -> Dtype:
    """Of the activations of the left tower."""
    return self.left.dtype


class TextTower(nn.Module):
  """Text -> one vector: the mean over its tokens, [B, L] -> [B, D].

  Tokens of rows whose `weight` is 0 are padding.

  Attributes:
    embed, encoder, special_tokens: of a `text_encoder.TextEncoder`.
  """

  embed: TokenEmbed
  encoder: Stack
  special_tokens: SpecialTokens = T5

  def setup(self):
    self.text = TextEncoder(self.embed, self.encoder, self.special_tokens)

  def __call__(
    self,
    batch: Mapping[str, Array],
    *,
    step: Array | None = None,
    capacity_factor: float | None = None,
    deterministic: bool = True,
    record: bool = False,
  ) -> tuple[Array, dict[str, Aux]]:
    """Vectors [B, D], float32, and the Aux of every sparse layer.

    Args:
      batch: `input`, int32 [B, L]; may have `weight` [B], `task_ids` [B, L].
      step, capacity_factor, deterministic, record: see `TextEncoder`.
    """
    mask_BxL = self.masks(batch)['encoder']
    y_BxLxD, auxes = self.text(
      jnp.where(mask_BxL, batch['input'], self.special_tokens.pad),
      task_ids_BxL=batch.get('task_ids'),
      step=step,
      capacity_factor=capacity_factor,
      deterministic=deterministic,
      record=record,
    )
    y_BxLxD = jnp.where(mask_BxL[..., None], y_BxLxD.astype(jnp.float32), 0)
    tokens_Bx1 = jnp.maximum(mask_BxL.sum(1, keepdims=True), 1)
    auxes = {f'encoder/{name}': aux for name, aux in auxes.items()}
    return y_BxLxD.sum(1) / tokens_Bx1, auxes

  def masks(self, batch: Mapping[str, Array]) -> dict[str, Array]:
    """The tokens that the encoder's layers route, boolean [B, L]."""
    mask_BxL = self.special_tokens.is_token(batch['input'])
    if 'weight' in batch:
      mask_BxL &= batch['weight'][:, None] > 0
    return {'encoder': mask_BxL}

  def side(self, feature: str) -> Side:
    """What it reads, if the task calls it so."""
    return Side(
      feature, pad=self.special_tokens.pad, num_ids=self.embed.vocab_size
    )

  @property
  def stacks(self) -> dict[str, Stack]:
    """By name."""
    return {'encoder': self.encoder}

  @property
  def dtype(self) -> Dtype:
    """Of the activations."""
    return self.embed.dtype


def unit(x_BxA: Array) -> Array:
  """x divided by its length; a vector of zeros stays one, without NaN.

  Example:
    >>> unit(jnp.array([[0.0, -4.0], [0.0, 0.0]])).tolist()
    [[0.0, -1.0], [0.0, 0.0]]
  """
  square_Bx1 = jnp.square(x_BxA).sum(-1, keepdims=True)
  return x_BxA * jax.lax.rsqrt(jnp.maximum(square_Bx1, _LEAST))


def _of_side(batch: Mapping[str, Array], side: str) -> dict[str, Array]:
  """The batch of a tower."""
  names = {side: 'input', f'{side}_task_ids': 'task_ids', 'weight': 'weight'}
  return {new: batch[name] for name, new in names.items() if name in batch}
