"""What T5X's configuration says of flaxformer's models, as gin files of ours.

The template has flaxformer's conventions, where they differ from the papers'.
Its GROUP_SIZE is a maximum, which here has no counterpart: a group is a
sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TEMPLATE = """
from __gin__ import dynamic_registration
from sparse_experts.layers import attention
from sparse_experts.layers import mlp
from sparse_experts.models import transformer
from sparse_experts.moe import capacity
from sparse_experts.moe.routers import expert_choice
from sparse_experts.moe.routers import top_k

include 'gin/models/encoder_decoder.gin'

capacity.CapacityRule.per_choice = False
capacity.CapacityRule.rounding = 'round'
capacity.CapacityRule.minimum = 4
capacity.CapacityRule.clip = False
top_k.TopK.gates = 'all'
top_k.TopK.choose_by = 'probs'
top_k.TopK.balance_counts = 'all'
top_k.TopK.losses_over = 'positions'
expert_choice.ExpertChoice.num_experts = %NUM_EXPERTS
LAYER_REDUCTION = 'mean'
ALLOW_NON_CAUSAL_ROUTING = True
"""

_ATTENTION = 'dense_attention.MultiHeadDotProductAttention'
_BIAS = 'relative_position_biases.RelativePositionBiases'


def gin(found: Mapping[str, Any]) -> str:
  """A gin file of the model that T5X's configuration describes.

  Args:
    found: its bindings, see `provenance.statements`.

  Raises:
    ValueError: it is none of flaxformer's sparse encoder-decoders, or has what
      has no counterpart here.
  """

  def get(selector, argument, scope='', default=None):
    for name in (f'{scope}/{selector}.{argument}', f'{selector}.{argument}'):
      if name in found:
        return found[name]
    if default is None:
      raise ValueError(
        f"T5X's configuration has no {selector}.{argument}, so this is not a "
        'model of flaxformer/t5x/configs/moe; give --gin_file=MODEL.'
      )
    return default

  mlp, moe = 'dense.MlpBlock', 'moe_layers.MoeLayer'
  arch, model = 'moe_architecture', 'models.MoeEncoderDecoderModel'
  activations = tuple(get(mlp, 'activations'))
  if activations != tuple(get(mlp, 'activations', 'expert')):
    raise ValueError('dense and sparse FFNs differ in activation; we have one.')
  if activations not in (('relu',), ('gelu',), ('gelu', 'linear')):
    raise ValueError(f'{mlp}.activations={activations} is unknown here.')
  extra = get(f'{arch}.SparseEncoderLayer', 'extra_mlp', default='None')
  logits = get(f'{arch}.SparseDecoder', 'output_logits_factory', default='None')
  bindings = {
    'NUM_EMBEDDINGS': get('embedding.Embed', 'num_embeddings'),
    'EMBED_DIM': get('embedding.Embed', 'features'),
    'NUM_HEADS': get(_ATTENTION, 'num_heads'),
    'HEAD_DIM': get(_ATTENTION, 'head_dim'),
    'MLP_DIM': get(mlp, 'intermediate_dim'),
    'EXPERT_DIM': get(mlp, 'intermediate_dim', 'expert'),
    'NUM_EXPERTS': get(moe, 'num_experts'),
    'NUM_LAYERS': get(f'{arch}.SparseDecoder', 'num_layers'),
    'SPARSE_LAYERS': _sparse(get, f'{arch}.SparseDecoder'),
    'encoder/transformer.Stack.num_layers': get(
      f'{arch}.SparseEncoder', 'num_layers'
    ),
    'encoder/transformer.Stack.sparse_layers': _sparse(
      get, f'{arch}.SparseEncoder'
    ),
    'attention.RelativeBias.num_buckets': get(_BIAS, 'num_buckets'),
    'attention.RelativeBias.max_distance': get(_BIAS, 'max_distance'),
    'ACTIVATION': activations[0],
    'GATED': activations[1:] == ('linear',),
    'TIED_LOGITS': logits in (None, 'None'),
    'DROPOUT_RATE': get(mlp, 'intermediate_dropout_rate'),
    'EXPERT_DROPOUT_RATE': get(mlp, 'intermediate_dropout_rate', 'expert'),
    'TRAIN_CAPACITY_FACTOR': get(moe, 'train_capacity_factor'),
    'EVAL_CAPACITY_FACTOR': get(moe, 'eval_capacity_factor'),
    'LOSS_WEIGHTS': {
      'load_balance': get(model, 'aux_loss_factor'),
      'router_z': get(model, 'router_z_loss_factor'),
    },
    'Z_LOSS': get(model, 'z_loss'),
  }
  lines = [f'{name} = {value!r}' for name, value in bindings.items()]
  if extra not in (None, 'None'):
    lines.append('EXTRA_MLP = @mlp.Mlp')
  for macro, scope in (
    ('ROUTER', 'sparse_encoder'),
    ('DECODER_ROUTER', 'sparse_decoder'),
  ):
    lines += _router(get, macro, scope)
  return '\n'.join([_TEMPLATE, *lines, ''])


def _router(get, macro: str, scope: str) -> list[str]:
  """Gin lines of the router of a stack."""
  reference = get('moe_layers.MoeLayer', 'router', scope)
  name = reference.rpartition('.')[2].removesuffix('()')
  selector = f'routing.{name}'
  if name in ('TokensChooseMaskedRouter', 'TokensChooseScatterRouter'):
    by_confidence = get(selector, 'batch_prioritized_routing', scope)
    return [
      f'{macro} = @{scope}/top_k.TopK',
      f'{scope}/top_k.TopK.k = {get(selector, "num_selected_experts", scope)}',
      f'{scope}/top_k.TopK.priority = '
      + repr('confidence' if by_confidence else 'choice'),
    ]
  if name == 'ExpertsChooseMaskedRouter':
    factor = get('moe_layers.MoeLayer', 'train_capacity_factor')
    if factor != int(factor):
      raise ValueError(
        f'an expert takes train_capacity_factor={factor} times its share of '
        'tokens; expert choice has whole numbers here: give --gin_file=MODEL.'
      )
    return [
      f'{macro} = @expert_choice.ExpertChoice',
      f'expert_choice.ExpertChoice.k = {int(factor)}',
    ]
  raise ValueError(f'the router {name} is unknown here.')


def _sparse(get, stack: str) -> list[int]:
  """Which blocks of a stack are sparse."""
  n, sparse = get(stack, 'num_layers'), get(stack, 'num_sparse_layers')
  layout = get(stack, 'sparse_layout').rpartition('.')[2]
  return {
    'MIXED': lambda: [
      i for i in range(n) if sparse and (i + 1) % (n // sparse) == 0
    ],
    'BOTTOM': lambda: list(range(sparse)),
    'TOP': lambda: list(range(n - sparse, n)),
    'MIDDLE': lambda: [i for i in range(n) if n - sparse <= 2 * i < n + sparse],
  }[layout]()
