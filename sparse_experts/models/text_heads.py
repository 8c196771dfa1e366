"""Heads of a text encoder: what is predicted of its tokens, or of its rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
from flax import linen as nn

from sparse_experts.layers.linear import Linear
from sparse_experts.letters import Array
from sparse_experts.models.classification import KINDS
from sparse_experts.models.text_encoder import TextEncoder
from sparse_experts.models.transformer import Stack
from sparse_experts.moe.outputs import Aux
from sparse_experts.numbers import NotNegative, Positive
from sparse_experts.sharding import constrain

MASKED = 'masked'
READS = ('tokens', 'first', 'mean')


@dataclasses.dataclass(frozen=True)
class Head:
  """What one head predicts.

  Attributes:
    kind: 'masked': tokens that are not shown, against the token table (as
      BERT's, but without a layer between). Or what labels are, as of
      `classification.Classification`: 'softmax', one of V classes, 'sigmoid',
      several, 'squared', V numbers.
    num_outputs: V; of 'masked' the token table says it.
    reads: 'tokens': each has a label; or rows have one, and what is read is
      their 'first' token, or the 'mean' of their tokens.
    weight: of its loss, in the sum over heads.

  Raises:
    ValueError: kind or reads is not known; V is missing, or is the table's.
  """

  kind: str
  num_outputs: int | None = None
  reads: str = 'tokens'
  weight: NotNegative = 1.0

  def __post_init__(self):
    for name, known in (('kind', (MASKED, *KINDS)), ('reads', READS)):
      if getattr(self, name) not in known:
        raise ValueError(
          f'{name} of a head must be one of {", ".join(known)}, not '
          f'{getattr(self, name)!r}.'
        )
    is_masked = self.kind == MASKED
    if is_masked and (self.num_outputs, self.reads) != (None, 'tokens'):
      raise ValueError(
        f'a masked head predicts each token by the token table, so '
        f'num_outputs={self.num_outputs} and reads={self.reads!r} are none of '
        "its: leave them out, or set kind='softmax'."
      )
    if not is_masked and not self.num_outputs:
      raise ValueError(
        f'a head of kind {self.kind!r} needs num_outputs, such as its classes.'
      )

  @property
  def of_tokens(self) -> bool:
    """Whether each token has a label, and not each row."""
    return self.reads == 'tokens'


class TextHeads(TextEncoder):
  """A text encoder with heads: tokens -> outputs by head.

  Attributes:
    heads: by name, in any order.
    init_scale: of the heads' matrices, see `linear.Linear`.
  """

  heads: Mapping[str, Head] = dataclasses.field(kw_only=True)
  init_scale: Positive = 1.0

  def setup(self):
    self.head = _Heads(self.heads, self.init_scale)

  def __call__(
    self,
    batch: Mapping[str, Array],
    *,
    step: Array | None = None,
    capacity_factor: float | None = None,
    deterministic: bool = True,
    record: bool = False,
  ) -> tuple[dict[str, Array], dict[str, Aux]]:
    """Outputs by head, float32 [B, V] or [B, L, V], and Aux of sparse layers.

    Args:
      batch: 'tokens', int32 [B, L]; may have 'task_ids'.
      step: int32 training step, for routers with a schedule.
      capacity_factor: of sparse layers; None drops nothing.
      deterministic: no dropout, jitter or noise.
      record: sparse layers return `Aux.record`.
    """
    y_BxLxD, auxes = super().__call__(
      batch['tokens'],
      task_ids_BxL=batch.get('task_ids'),
      step=step,
      capacity_factor=capacity_factor,
      deterministic=deterministic,
      record=record,
    )
    y_BxLxD = y_BxLxD.astype(jnp.float32)
    outputs = self.head(y_BxLxD, self.mask(batch['tokens']))
    for name, head in self.heads.items():
      if head.kind == MASKED:
        logits_BxLxV = self.embed.attend(y_BxLxD)
        outputs[name] = constrain(logits_BxLxV, 'batch', 'length', 'vocab')
    return outputs, {f'encoder/{name}': aux for name, aux in auxes.items()}

  def masks(self, batch: Mapping[str, Array]) -> dict[str, Array]:
    """The tokens that the encoder's layers route, boolean [B, L]."""
    return {'encoder': self.mask(batch['tokens'])}

  @property
  def stacks(self) -> dict[str, Stack]:
    """By name, in the order that they run in."""
    return {'encoder': self.encoder}


class _Heads(nn.Module):
  """The heads that have a matrix of their own."""

  heads: Mapping[str, Head]
  init_scale: Positive

  @nn.compact
  def __call__(self, y_BxLxD: Array, mask_BxL: Array) -> dict[str, Array]:
    outputs = {}
    for name, head in sorted(self.heads.items()):
      if head.kind == MASKED:
        continue
      read = {
        'tokens': lambda: y_BxLxD,
        'first': lambda: y_BxLxD[:, 0],
        'mean': lambda: _mean(y_BxLxD, mask_BxL),
      }[head.reads]()
      outputs[name] = Linear(
        (head.num_outputs,),
        ('embed', 'vocab'),
        init_scale=self.init_scale,
        name=name,
      )(read)
    return outputs


def _mean(y_BxLxD: Array, mask_BxL: Array) -> Array:
  """Of the tokens of each row, [B, D]; zeros where there are none."""
  total_BxD = jnp.einsum('BLD,BL->BD', y_BxLxD, mask_BxL.astype(y_BxLxD.dtype))
  return total_BxD / jnp.maximum(mask_BxL.sum(-1), 1)[:, None]
