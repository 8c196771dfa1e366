"""A text encoder: token ids in, what each of them means in its text out."""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn

from sparse_experts.data.special_tokens import T5, SpecialTokens
from sparse_experts.layers.cost import Cost
from sparse_experts.layers.embed import TokenEmbed
from sparse_experts.letters import Array, Dtype
from sparse_experts.models.transformer import Context, Stack
from sparse_experts.moe.outputs import Aux
from sparse_experts.sharding import constrain


class TextEncoder(nn.Module):
  """A token table and a stack whose tokens all see one another.

  It is part of a module that reads what it returns, by heads or as a tower,
  and that prefixes names of layers by where the stack lies in its parameters,
  such as 'encoder/layers_3'.

  Attributes:
    embed: the token table.
    encoder: a `transformer.Stack` that is not causal; ends in its norm.
    special_tokens: which ids are padding.

  References:
    Devlin et al. 2018, https://arxiv.org/abs/1810.04805, section 3, but with
    the positions that the stack has, and no embedding of a sentence's place.
  """

  embed: TokenEmbed
  encoder: Stack
  special_tokens: SpecialTokens = T5

  def __call__(
    self,
    tokens_BxL: Array,
    *,
    segment_ids_BxL: Array | None = None,
    task_ids_BxL: Array | None = None,
    step: Array | None = None,
    capacity_factor: float | None = None,
    deterministic: bool = True,
    record: bool = False,
  ) -> tuple[Array, dict[str, Aux]]:
    """The tokens' representations [B, L, D], and the Aux of sparse layers.

    Aux are by names without a stack, 'layers_3'. What padding has is not
    looked at by any token, and is not routed.

    Args:
      tokens_BxL: int32 ids.
      segment_ids_BxL: tokens see those of the same segment alone, where several
        texts share a row; None: of the row.
      task_ids_BxL: int32, for routers that need them.
      step: int32 training step, for routers with a schedule.
      capacity_factor: of sparse layers; None drops nothing.
      deterministic: no dropout, jitter or noise.
      record: sparse layers return `Aux.record`.
    """
    mask_BxL = self.mask(tokens_BxL)
    attend_BxLxM = mask_BxL[:, None, :]
    if segment_ids_BxL is not None:
      attend_BxLxM &= segment_ids_BxL[:, :, None] == segment_ids_BxL[:, None, :]
    positions_1xL = jnp.arange(tokens_BxL.shape[1])[None]
    # Padding may be -1, the table's last line here: nothing looks at it.
    x_BxLxD = constrain(self.embed(tokens_BxL), 'batch', 'length', 'act_embed')
    return self.encoder(
      x_BxLxD,
      Context(
        mask_BxL=mask_BxL,
        attend_BxLxM=attend_BxLxM,
        queries_BxL=positions_1xL,
        keys_BxM=positions_1xL,
        token_ids_BxL=tokens_BxL,
        task_ids_BxL=task_ids_BxL,
        step=step,
        capacity_factor=capacity_factor,
        deterministic=deterministic,
        record=record,
      ),
    )

  def cost(self, *given, **options) -> Cost:
    """Of itself, beside its parts: nothing."""
    del given, options
    return Cost()

  def mask(self, tokens_BxL: Array) -> Array:
    """The tokens that its layers route, boolean [B, L]."""
    return self.special_tokens.is_token(tokens_BxL)

  @property
  def dtype(self) -> Dtype:
    """Of the activations."""
    return self.embed.dtype
