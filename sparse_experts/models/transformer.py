"""One block, dense or sparse, and a stack of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn

from sparse_experts.layers.dropout import Dropout
from sparse_experts.layers.norm import RMSNorm
from sparse_experts.letters import Array
from sparse_experts.models import layout
from sparse_experts.models.context import Context
from sparse_experts.models.layout import LayerId
from sparse_experts.moe.outputs import Aux
from sparse_experts.numbers import Depth, Rate
from sparse_experts.sharding import constrain

REMAT_POLICIES = {
  'none': None,
  'full': jax.checkpoint_policies.nothing_saveable,
  'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Block(nn.Module):
  """Pre-norm self-attention, cross-attention if any, and an FFN or experts.

  Attributes:
    make_attention: builds self-attention.
    make_mlp: builds the FFN of a dense block.
    make_moe: builds the experts that replace it in a sparse block; None: they
      do not.
    make_sparse_attention: builds self-attention of a sparse block, with experts
      in it (`Attention.make_projection`); None: as of a dense one.
    make_extra_mlp: builds a dense FFN after the experts of a sparse block (the
      "sparse-dense" stack of Zoph et al. 2022, appendix C); None: no such.
    make_cross_attention: builds attention to memory; None: no such.
    make_bias: builds this block's own relative bias (GLaM); None: the stack's.
    make_norm: builds the norm before each sub-layer.
    dropout_rate: on each sub-layer's output.
    sparse: which of the two this block is; a number of experts, where the
      sparse blocks of a stack differ in it, makes it one that has so many.
    causal: it is part of a decoder.
    allow_non_causal_routing: a decoder may hold a router that lets later tokens
      decide the fate of earlier ones (top-2 in GShard's order, and others).
      Training then leaks the future a little, as it did in those papers.
  """

  make_attention: Callable[..., nn.Module]
  make_mlp: Callable[..., nn.Module]
  make_moe: Callable[..., nn.Module] | None = None
  make_sparse_attention: Callable[..., nn.Module] | None = None
  make_extra_mlp: Callable[..., nn.Module] | None = None
  make_cross_attention: Callable[..., nn.Module] | None = None
  make_bias: Callable[..., nn.Module] | None = None
  make_norm: Callable[..., nn.Module] = RMSNorm
  dropout_rate: Rate = 0.0
  sparse: bool | int = False
  causal: bool = False
  allow_non_causal_routing: bool = False

  @nn.compact
  def __call__(
    self, x_BxLxD: Array, context: Context
  ) -> tuple[Array, dict[str, Aux]]:
    """The output, and the Aux of each sparse layer: 'layers' in FFN's place."""
    routing = self._routing(context)
    x_BxLxD, auxes = self._attend(x_BxLxD, context, routing)
    x_BxLxD = self._attend_memory(x_BxLxD, context)
    x_BxLxD, of_ffn = self._feed_forward(x_BxLxD, routing)
    return x_BxLxD, auxes | of_ffn

  def _routing(self, context: Context) -> dict[str, Any]:
    """What layers with experts are given beside their input."""
    if self.sparse and self.make_sparse_attention is self.make_moe is None:
      raise ValueError(
        'a sparse block needs make_moe or make_sparse_attention; give one, or '
        'set sparse_layers=0.'
      )
    return {
      'mask_BxL': context.mask_BxL,
      'token_ids_BxL': context.token_ids_BxL,
      'task_ids_BxL': context.task_ids_BxL,
      'step': context.step,
      'capacity_factor': context.capacity_factor,
      'deterministic': context.deterministic,
      'require_causal': self.causal and not self.allow_non_causal_routing,
      'record': context.record,
    }

  def _attend(
    self, x_BxLxD: Array, context: Context, routing: dict[str, Any]
  ) -> tuple[Array, dict[str, Aux]]:
    """Self-attention, and the Aux of the experts in it."""
    bias_1xHxLxM = context.bias_1xHxLxM
    if self.make_bias is not None:
      bias_1xHxLxM = self.make_bias(
        bidirectional=not self.causal, name='relative_bias'
      )(context.queries_BxL, context.keys_BxM)
    h_BxLxD = self.make_norm(name='attention_norm')(x_BxLxD)
    make_sparse = self.make_sparse_attention if self.sparse else None
    h_BxLxD = (make_sparse or self.make_attention)(name='attention')(
      h_BxLxD,
      h_BxLxD,
      mask_BxLxM=context.attend_BxLxM,
      bias_1xHxLxM=bias_1xHxLxM,
      cache={'step': 'extend'}.get(context.cache, context.cache),
      cache_length=context.cache_length,
      positions_B=context.positions_B,
      queries_BxL=context.queries_BxL,
      keys_BxM=context.keys_BxM,
      deterministic=context.deterministic,
      **({'routing': routing} if make_sparse else {}),
    )
    h_BxLxD, auxes = h_BxLxD if make_sparse else (h_BxLxD, {})
    return self._add(x_BxLxD, h_BxLxD, context.deterministic), auxes

  def _attend_memory(self, x_BxLxD: Array, context: Context) -> Array:
    """Cross-attention, if there is any."""
    if self.make_cross_attention is None:
      return x_BxLxD
    memory_BxMxD = context.memory_BxMxD  # None once it is in the cache.
    h_BxLxD = self.make_norm(name='cross_attention_norm')(x_BxLxD)
    h_BxLxD = self.make_cross_attention(name='cross_attention')(
      h_BxLxD,
      memory_BxMxD,
      mask_BxLxM=context.attend_memory_BxLxM,
      cache={'step': 'read'}.get(context.cache, context.cache),
      cache_length=0 if memory_BxMxD is None else memory_BxMxD.shape[1],
      deterministic=context.deterministic,
    )
    return self._add(x_BxLxD, h_BxLxD, context.deterministic)

  def _feed_forward(
    self, x_BxLxD: Array, routing: dict[str, Any]
  ) -> tuple[Array, dict[str, Aux]]:
    """The FFN, or the experts in its place with their Aux."""
    deterministic = routing['deterministic']
    h_BxLxD = self.make_norm(name='mlp_norm')(x_BxLxD)
    if not self.sparse or self.make_moe is None:
      h_BxLxD = self.make_mlp(name='mlp')(h_BxLxD, deterministic=deterministic)
      return self._add(x_BxLxD, h_BxLxD, deterministic), {}
    make_moe = self.make_moe
    if not isinstance(self.sparse, bool):
      make_moe = functools.partial(make_moe, num_experts=self.sparse)
    h_BxLxD, aux = make_moe(name='moe')(h_BxLxD, **routing)
    x_BxLxD = self._add(x_BxLxD, h_BxLxD, deterministic)
    if self.make_extra_mlp is not None:
      h_BxLxD = self.make_norm(name='extra_mlp_norm')(x_BxLxD)
      h_BxLxD = self.make_extra_mlp(name='extra_mlp')(
        h_BxLxD, deterministic=deterministic
      )
      x_BxLxD = self._add(x_BxLxD, h_BxLxD, deterministic)
    return x_BxLxD, {layout.FFN: aux}

  def _add(self, x_BxLxD: Array, y_BxLxD: Array, deterministic: bool) -> Array:
    """The residual connection, with dropout on what is added."""
    y_BxLxD = Dropout(self.dropout_rate, broadcast_dims=(-2,))(
      y_BxLxD, deterministic=deterministic
    )
    return constrain(x_BxLxD + y_BxLxD, 'batch', 'length', 'act_embed')


class Stack(nn.Module):
  """Blocks one after another, then a norm: an encoder's or a decoder's body.

  Attributes:
    num_layers: N.
    make_block: builds a `Block`, given `sparse`, `causal` and `name`.
    sparse_layers: which blocks are sparse: an integer n makes every n-th so
      (blocks n-1, 2n-1, ...; 0: none, 1: all), or their indices, from 0, or a
      number of experts by index (a pyramid, Rajbhandari et al. 2022, section
      4.1).
    causal: a decoder.
    make_shared_bias: builds one relative bias for all blocks; None: no such.
    make_norm: builds the norm at the end.
    dropout_rate: on the input and the output.
    scan: compile one period of the layout and loop over it.
    remat: what to keep for the backward pass: 'none' recomputes nothing, 'full'
      all of a block, 'dots' all but the products with parameters.
  """

  num_layers: Depth
  make_block: Callable[..., nn.Module]
  sparse_layers: int | Sequence[int] | Mapping[int, int] = 0
  causal: bool = False
  make_shared_bias: Callable[..., nn.Module] | None = None
  make_norm: Callable[..., nn.Module] = RMSNorm
  dropout_rate: Rate = 0.0
  scan: bool = False
  remat: str = 'none'

  @nn.compact
  def __call__(
    self, x_BxLxD: Array, context: Context
  ) -> tuple[Array, dict[str, Aux]]:
    """Returns the output and the Aux of each sparse layer: 'layers_3', if it is
    in the place of an FFN, 'query_3' and so on if it is in attention."""

    def dropout(x_BxLxD):
      return Dropout(self.dropout_rate, broadcast_dims=(-2,))(
        x_BxLxD, deterministic=context.deterministic
      )

    if self.make_shared_bias is not None:
      bias_1xHxLxM = self.make_shared_bias(
        bidirectional=not self.causal, name='relative_bias'
      )(context.queries_BxL, context.keys_BxM)
      context = dataclasses.replace(context, bias_1xHxLxM=bias_1xHxLxM)

    N = self.num_layers
    kinds = layout.kinds(N, self.sparse_layers)
    split = layout.Split(prefix=N, period=0, repeats=0)
    if self.scan:
      split = layout.split_period(kinds)
    suffix = split.index(turn=split.repeats, j=0)
    make_block = functools.partial(self.make_block, causal=self.causal)

    x_BxLxD = dropout(x_BxLxD)
    x_BxLxD, auxes = run_blocks(
      make_block, range(split.prefix), kinds, self.remat, x_BxLxD, context
    )
    if split.repeats:
      period = kinds[split.prefix : split.index(turn=1, j=0)]
      scanned = nn.scan(
        _Period,
        variable_axes={'params': 0, 'cache': 0},
        split_rngs={'params': True, 'dropout': True},
        in_axes=nn.broadcast,
        length=split.repeats,
        metadata_params={nn.PARTITION_NAME: 'layers'},
      )(make_block, period, self.remat, name=layout.PERIOD)
      x_BxLxD, stacked = scanned(x_BxLxD, context)
      for name, aux in stacked.items():
        layer = LayerId.parse(name)
        for r in range(split.repeats):
          index = split.index(r, layer.index)
          auxes[str(dataclasses.replace(layer, index=index))] = jax.tree.map(
            lambda leaf, r=r: leaf[r], aux
          )
    x_BxLxD, auxes_of_suffix = run_blocks(
      make_block, range(suffix, N), kinds, self.remat, x_BxLxD, context
    )
    auxes |= auxes_of_suffix
    x_BxLxD = dropout(self.make_norm(name='norm')(x_BxLxD))
    return x_BxLxD, auxes


def map_rows(function: Callable[[Array], Array], cache: Any) -> Any:
  """Applies a function of arrays [rows, ...] to the collection 'cache'.

  Scanned blocks' arrays have an axis of layers before that of rows.
  """

  def apply(path, leaf):
    scanned = layout.is_scanned([getattr(key, 'key', '') for key in path])
    return (jax.vmap(function) if scanned else function)(leaf)

  return jax.tree_util.tree_map_with_path(apply, cache)


class _Period(nn.Module):
  """The blocks that a scan repeats."""

  make_block: Callable[..., nn.Module]
  kinds: tuple[bool | int, ...]
  remat: str

  @nn.compact
  def __call__(self, x_BxLxD: Array, context: Context):
    return run_blocks(
      self.make_block,
      range(len(self.kinds)),
      self.kinds,
      self.remat,
      x_BxLxD,
      context,
    )


def run_blocks(
  make_block: Callable[..., nn.Module],
  indices: Sequence[int],
  kinds: Sequence[bool | int],
  remat: str,
  x_BxLxD: Array,
  context: Context,
) -> tuple[Array, dict[str, Aux]]:
  """Applies these blocks in turn; call it inside a compact method.

  Args:
    make_block: is given `sparse` and `name`.
    indices: of the blocks in their stack, in the order they run.
    kinds: of all blocks of the stack, False or 0 dense, see `layout.kinds`.
    remat: of REMAT_POLICIES.
    x_BxLxD: activations.
    context: what all blocks see.

  Returns:
    Activations, and the Aux of each sparse layer by its `LayerId` in no stack.

  Raises:
    ValueError: no such `remat`.
  """
  if remat not in REMAT_POLICIES:
    raise ValueError(
      f'remat must be one of {", ".join(REMAT_POLICIES)}, not {remat!r}.'
    )

  def apply(block, x_BxLxD, context):
    return block(x_BxLxD, context)

  if remat != 'none':
    apply = nn.remat(apply, policy=REMAT_POLICIES[remat])
  auxes = {}
  for i in indices:
    block = make_block(sparse=kinds[i], name=layout.block_name(i))
    x_BxLxD, of_block = apply(block, x_BxLxD, context)
    auxes |= {str(LayerId('', i, kind)): aux for kind, aux in of_block.items()}
  return x_BxLxD, auxes
