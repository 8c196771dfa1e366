"""A Transformer of speech: frames of a spectrogram, some to a token."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
from flax import linen as nn

from sparse_experts.data.features.speech import Speech
from sparse_experts.layers.linear import Linear
from sparse_experts.layers.relative import sinusoids
from sparse_experts.letters import Array, Dtype
from sparse_experts.models.transformer import Context, Stack
from sparse_experts.moe.outputs import Aux
from sparse_experts.numbers import Count, Positive
from sparse_experts.sharding import constrain


class SpeechEncoder(nn.Module):
  """Frames -> tokens -> encoder -> logits, [B, I, Z] -> [B, L, V].

  Each token is a run of frames, laid side by side and multiplied by one matrix;
  the last may be filled up with zeros. Positions are sines and cosines, so that
  there may be any number of frames; their mean square is 1/2, and frames that
  are to be seen beside them have a variance of about 1. Values of frames beyond
  a row's `frame_lengths` are not read, and tokens of such frames alone are
  neither attended to nor routed.

  Attributes:
    encoder: a `transformer.Stack` that is not causal.
    bands: Z, values of a frame.
    frames_per_token: frames that become one token.
    width: D, even.
    num_labels: V - 1; the last of the V outputs is the blank.
    dtype: of the activations; logits are float32.
    init_scale: of the two matrices here, see `linear.Linear`.

  References:
    Sak et al. 2015, https://arxiv.org/abs/1507.06947 (frames side by side);
    Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, section 3.5
    (positions).
  """

  encoder: Stack
  bands: Count
  frames_per_token: Count
  width: Count
  num_labels: Count
  dtype: Dtype = jnp.float32
  init_scale: Positive = 1.0

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
    """Logits [B, L, V], float32, and the Aux of every sparse layer.

    Args:
      batch: `frames`, float32 [B, I, Z]; `frame_lengths`, int32 [B]; `weight`.
      step: int32 training step, for routers with a schedule.
      capacity_factor: of sparse layers; None drops nothing.
      deterministic: no dropout, jitter or noise.
      record: sparse layers return `Aux.record`.
    """
    is_token_BxL = self.is_token(batch)
    B, L = is_token_BxL.shape
    x_BxLxD = self._embed(batch)
    positions_1xL = jnp.arange(L)[None]
    y_BxLxD, auxes = self.encoder(
      x_BxLxD,
      Context(
        mask_BxL=self.masks(batch)['encoder'],
        attend_BxLxM=jnp.broadcast_to(is_token_BxL[:, None], (B, L, L)),
        queries_BxL=positions_1xL,
        keys_BxM=positions_1xL,
        step=step,
        capacity_factor=capacity_factor,
        deterministic=deterministic,
        record=record,
      ),
    )
    logits_BxLxV = Linear(
      (self.num_labels + 1,),
      ('embed', 'vocab'),
      init_scale=self.init_scale,
      name='head',
    )(y_BxLxD.astype(jnp.float32))
    logits_BxLxV = constrain(logits_BxLxV, 'batch', 'length', 'vocab')
    return logits_BxLxV, {f'encoder/{name}': aux for name, aux in auxes.items()}

  def is_token(self, batch: Mapping[str, Array]) -> Array:
    """Tokens that have a frame, boolean [B, L]."""
    if self.frames_per_token < 1:
      raise ValueError(
        f'frames_per_token={self.frames_per_token}: a token has at least 1.'
      )
    L = -(-batch['frames'].shape[1] // self.frames_per_token)
    starts_1xL = self.frames_per_token * jnp.arange(L)[None]
    return starts_1xL < jnp.asarray(batch['frame_lengths'])[:, None]

  def masks(self, batch: Mapping[str, Array]) -> dict[str, Array]:
    """The tokens that the encoder's layers route, boolean [B, L]."""
    counts_Bx1 = jnp.asarray(batch['weight'])[:, None] > 0
    return {'encoder': self.is_token(batch) & counts_Bx1}

  @property
  def inputs(self) -> Speech:
    """The features of what is said."""
    return Speech(self.bands)

  @property
  def stacks(self) -> dict[str, Stack]:
    """By name, in the order that they run in."""
    return {'encoder': self.encoder}

  def _embed(self, batch: Mapping[str, Array]) -> Array:
    """Tokens [B, L, D] of frames."""
    if self.width % 2:
      raise ValueError(
        f'width={self.width}: half of it are sines of positions, half cosines, '
        'so make it even.'
      )
    x_BxLxZ = side_by_side(
      batch['frames'], batch['frame_lengths'], self.frames_per_token
    )
    x_BxLxD = Linear(
      (self.width,),
      ('patch', 'embed'),
      init_scale=self.init_scale,
      name='frames',
    )(x_BxLxZ.astype(self.dtype))
    positions_LxD = sinusoids(x_BxLxD.shape[1], self.width)
    positions_1xLxD = jnp.asarray(positions_LxD, self.dtype)[None]
    return constrain(x_BxLxD + positions_1xLxD, 'batch', 'length', 'act_embed')


def side_by_side(frames_BxIxZ: Array, lengths_B: Array, size: int) -> Array:
  """Runs of `size` frames as one vector each, zeros where no frame is.

  Args:
    frames_BxIxZ: float.
    lengths_B: int32, frames of each row.
    size: frames of a run.

  Example:
    >>> frames = jnp.arange(1.0, 7).reshape(1, 3, 2)
    >>> side_by_side(frames, jnp.array([3]), 2).tolist()
    [[[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 0.0, 0.0]]]
  """
  B, I, Z = frames_BxIxZ.shape
  is_frame_BxI = jnp.arange(I)[None] < lengths_B[:, None]
  frames_BxIxZ = jnp.where(is_frame_BxI[..., None], frames_BxIxZ, 0)
  missing = -I % size
  frames_BxIxZ = jnp.pad(frames_BxIxZ, ((0, 0), (0, missing), (0, 0)))
  return frames_BxIxZ.reshape(B, (I + missing) // size, size * Z)
