"""A vision Transformer: patches of an image are the tokens of an encoder."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
from flax import linen as nn

from sparse_experts import sharding
from sparse_experts.data.features.arrays import Labelled
from sparse_experts.data.features.pairs import Side
from sparse_experts.layers.cost import Cost
from sparse_experts.layers.linear import Linear
from sparse_experts.letters import Array, Dtype
from sparse_experts.models.context import Context
from sparse_experts.models.transformer import Stack
from sparse_experts.moe.outputs import Aux
from sparse_experts.numbers import Count, Positive
from sparse_experts.sharding import constrain

POOLING = ('class_token', 'mean')


class VisionTransformer(nn.Module):
  """Image -> patches -> encoder -> outputs, [B, ...] -> [B, V].

  Patches run by rows of the image. An image becomes L tokens: its patches, and
  before them the class token, if that is what is pooled; each has a learned
  position. All tokens of rows whose `weight` is not 0 are routed.

  Attributes:
    encoder: a `transformer.Stack` that is not causal, without relative bias.
    image_shape: rows, columns, channels.
    patch_size: rows and columns of a patch; divides those of the image.
    width: D.
    num_outputs: V of the head, such as classes; None: there is no head, and
      outputs are what it would read, [B, D].
    pooling: what the head reads: 'class_token', or the 'mean' of all patches.
    dtype: of the activations; outputs are float32.
    init_scale: of the two matrices here, see `linear.Linear`.
    input: what tasks call an image.

  References:
    Dosovitskiy et al. 2020, https://arxiv.org/abs/2010.11929, section 3.1, but
    without biases of matrices.
  """

  encoder: Stack
  image_shape: tuple[Count, Count, Count]
  patch_size: Count
  width: Count
  num_outputs: Count | None
  pooling: str = 'class_token'
  dtype: Dtype = jnp.float32
  init_scale: Positive = 1.0
  input: str = 'image'

  @nn.compact
  def __call__(
    self,
    batch: Mapping[str, Array],
    *,
    step: Array | None = None,
    capacity_factor: float | None = None,
    deterministic: bool = True,
    record: bool = False,
  ) -> tuple[Array, dict[str, Aux]]:
    """Outputs [B, V], float32, and the Aux of every sparse layer.

    Args:
      batch: `input`, float32 [B, rows, columns, channels]; may have `weight`.
      step: int32 training step, for routers with a schedule.
      capacity_factor: of sparse layers; None drops nothing.
      deterministic: no dropout, jitter or noise.
      record: sparse layers return `Aux.record`.
    """
    x_BxLxD = self._embed(batch['input'])
    L = x_BxLxD.shape[1]
    positions_1xL = jnp.arange(L)[None]
    y_BxLxD, auxes = self.encoder(
      x_BxLxD,
      Context(
        mask_BxL=self.masks(batch)['encoder'],
        attend_BxLxM=jnp.ones((1, L, L), bool),
        queries_BxL=positions_1xL,
        keys_BxM=positions_1xL,
        step=step,
        capacity_factor=capacity_factor,
        deterministic=deterministic,
        record=record,
      ),
    )
    by_token = self.pooling == 'class_token'
    y_BxD = y_BxLxD[:, 0] if by_token else y_BxLxD.mean(1)
    y_BxD = y_BxD.astype(jnp.float32)
    auxes = {f'encoder/{name}': aux for name, aux in auxes.items()}
    if self.num_outputs is None:
      return y_BxD, auxes
    outputs_BxV = Linear(
      (self.num_outputs,),
      ('embed', 'vocab'),
      init_scale=self.init_scale,
      name='head',
    )(y_BxD)
    return constrain(outputs_BxV, 'batch', 'vocab'), auxes

  def cost(self, batch: Mapping[str, Array], **_) -> Cost:
    """Nothing beside its matrices, which tell their own part."""
    del batch
    return Cost()

  def masks(self, batch: Mapping[str, Array]) -> dict[str, Array]:
    """The tokens that the encoder's layers route, boolean [B, L]."""
    B = batch['input'].shape[0]
    weights_B = batch.get('weight', jnp.ones(B))
    mask_BxL = jnp.broadcast_to(weights_B[:, None] > 0, (B, self.num_tokens))
    return {'encoder': mask_BxL}

  @property
  def inputs(self) -> Labelled:
    """The features of an image."""
    return Labelled(self.input, self.image_shape)

  def side(self, feature: str) -> Side:
    """An image of a pair, if the task calls it so."""
    return Side(feature, self.image_shape)

  @property
  def stacks(self) -> dict[str, Stack]:
    """By name, in the order that they run in."""
    return {'encoder': self.encoder}

  @property
  def num_tokens(self) -> int:
    """L, of an image.

    Raises:
      ValueError: patches do not fit the image, or pooling is not known.
    """
    rows, columns, _ = self.image_shape
    if self.pooling not in POOLING:
      raise ValueError(
        f'pooling must be one of {", ".join(POOLING)}, not {self.pooling!r}.'
      )
    if rows % self.patch_size or columns % self.patch_size:
      raise ValueError(
        f'patch_size={self.patch_size} must divide the {rows} rows and '
        f'{columns} columns of an image.'
      )
    patches = (rows // self.patch_size) * (columns // self.patch_size)
    return patches + (self.pooling == 'class_token')

  def _embed(self, image_Bx___: Array) -> Array:
    """Tokens [B, L, D] of images."""
    L, D = self.num_tokens, self.width
    patches_BxLxZ = patches(image_Bx___, self.patch_size)
    x_BxLxD = Linear(
      (D,), ('patch', 'embed'), init_scale=self.init_scale, name='patches'
    )(patches_BxLxZ.astype(self.dtype))

    def parameter(name, shape, *names):
      init = sharding.named(nn.initializers.normal(0.02), *names)
      return self.param(name, init, shape, jnp.float32).astype(self.dtype)

    if self.pooling == 'class_token':
      token_D = parameter('class_token', (D,), 'embed')
      token_Bx1xD = jnp.broadcast_to(token_D, (x_BxLxD.shape[0], 1, D))
      x_BxLxD = jnp.concatenate([token_Bx1xD, x_BxLxD], axis=1)
    positions_LxD = parameter('positions', (L, D), 'position', 'embed')
    return constrain(
      x_BxLxD + positions_LxD[None], 'batch', 'length', 'act_embed'
    )


def patches(image_Bx___: Array, size: int) -> Array:
  """Images [B, rows, columns, channels] as patches [B, L, Z], row by row.

  Example:
    >>> image = jnp.arange(8.0).reshape(1, 2, 4, 1)
    >>> patches(image, 2).tolist()
    [[[0.0, 1.0, 4.0, 5.0], [2.0, 3.0, 6.0, 7.0]]]
  """
  B, rows, columns, channels = image_Bx___.shape
  down, across = rows // size, columns // size
  x = image_Bx___.reshape(B, down, size, across, size, channels)
  return x.swapaxes(2, 3).reshape(B, down * across, size * size * channels)
