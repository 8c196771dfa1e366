"""What Hugging Face's config.json says, and what it is among our models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from sparse_experts.convert import tables
from sparse_experts.convert.tables import Row
from sparse_experts.models.layout import kinds

_ACTIVATIONS = {
  'relu': 'relu',
  'gelu_new': 'gelu',
  'gelu': 'gelu_exact',
  'silu': 'silu',
}


@dataclasses.dataclass(frozen=True)
class Architecture:
  """What we know of one `model_type`.

  Attributes:
    name: of transformers' class.
    table: names of parameters.
    gin: files that a recipe of it includes, and what it needs beside.
    same: keys of config.json, our gin names, and where the value stands among
      `arguments` of a model.
    fixed: keys that must have this value, or be absent.
    absent: what other keys are where they are absent.
    read: the rest of the gin bindings, from config.json.
    write: the rest of config.json, from arguments of a model.
    copies: tensors that may repeat the embedding, the table's first; the
      logits' only where they are tied.
  """

  name: str
  table: list[Row]
  gin: str
  same: list[tuple[str, str, str]]
  fixed: Mapping[str, Any]
  absent: Mapping[str, Any]
  read: Callable[[Mapping[str, Any]], dict[str, Any]]
  write: Callable[[Mapping[str, Any]], dict[str, Any]]
  copies: tuple[str, ...] = ()


_BLOCK = 'decoder.make_block'
_MOE = f'{_BLOCK}.make_moe'
_ATTENTION = f'{_BLOCK}.make_attention'


def _read_switch(found: Mapping[str, Any]) -> dict[str, Any]:
  def sparse(num_layers, step):
    if step == 1:
      return list(range(num_layers))
    return [i for i in range(num_layers) if step and i % step == 1]

  def steps(stack, num_layers):
    number = found[f'num_sparse_{stack}_layers']
    derived = num_layers // number if number else 0
    return sparse(num_layers, found.get(f'{stack}_sparse_step', derived))

  return {
    'NUM_LAYERS': found['num_decoder_layers'],
    'SPARSE_LAYERS': steps('decoder', found['num_decoder_layers']),
    'encoder/transformer.Stack.num_layers': found['num_layers'],
    'encoder/transformer.Stack.sparse_layers': steps(
      'encoder', found['num_layers']
    ),
    'ACTIVATION': _ACTIVATIONS[found['dense_act_fn']],
  }


def _write_switch(found: Mapping[str, Any]) -> dict[str, Any]:
  def sparse(stack):
    number = found[f'{stack}.num_layers']
    sparse_layers = kinds(number, found[f'{stack}.sparse_layers'])
    indices = [i for i, kind in enumerate(sparse_layers) if kind]
    step = indices[1] - indices[0] if indices[1:] else number
    return {
      f'num_sparse_{stack}_layers': len(indices),
      f'{stack}_sparse_step': step if indices else 0,
    }

  return {
    'num_layers': found['encoder.num_layers'],
    'num_decoder_layers': found['decoder.num_layers'],
    **sparse('encoder'),
    **sparse('decoder'),
    'dense_act_fn': _their_activation(found),
    'dropout_rate': found[f'{_BLOCK}.dropout_rate'],
    'expert_capacity': 64,
    'router_jitter_noise': 0.0,
    'router_dtype': 'float32',
    'is_encoder_decoder': True,
    'decoder_start_token_id': 0,
    'pad_token_id': 0,
    'eos_token_id': 1,
  }


def _their_activation(found: Mapping[str, Any]) -> str:
  theirs = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
  return theirs[found[f'{_MOE}.make_expert.activation']]


def _read_decoder(found: Mapping[str, Any]) -> dict[str, Any]:
  rope = found.get('rope_parameters') or found
  heads = found['num_attention_heads']
  return {
    'HEAD_DIM': found.get('head_dim') or found['hidden_size'] // heads,
    'ROTARY_BASE': float(rope['rope_theta']),
    'SPARSE_LAYERS': 1,
    'ACTIVATION': _ACTIVATIONS[found['hidden_act']],
  }


def _write_decoder(found: Mapping[str, Any]) -> dict[str, Any]:
  base = found[f'{_ATTENTION}.rotary_base']
  return {
    'rope_theta': base,  # Before transformers 5.
    'rope_parameters': {'rope_theta': base, 'rope_type': 'default'},
    'hidden_act': _their_activation(found),
  }


def _write_mixtral(found: Mapping[str, Any]) -> dict[str, Any]:
  return {
    **_write_decoder(found),
    'head_dim': found[f'{_ATTENTION}.head_width'],
  }


def _read_olmoe(found: Mapping[str, Any]) -> dict[str, Any]:
  return {
    **_read_decoder(found),
    'top_k.TopK.gates': 'chosen' if found['norm_topk_prob'] else 'all',
  }


def _write_olmoe(found: Mapping[str, Any]) -> dict[str, Any]:
  gates = found[f'{_MOE}.make_router.gates']
  return {**_write_decoder(found), 'norm_topk_prob': gates == 'chosen'}


_DECODER = [
  ('vocab_size', 'NUM_EMBEDDINGS', 'embed.vocab_size'),
  ('hidden_size', 'EMBED_DIM', 'embed.width'),
  ('num_hidden_layers', 'NUM_LAYERS', 'decoder.num_layers'),
  ('num_attention_heads', 'NUM_HEADS', f'{_ATTENTION}.num_heads'),
  ('num_key_value_heads', 'NUM_KV_HEADS', f'{_ATTENTION}.num_kv_heads'),
  ('intermediate_size', 'MLP_DIM', f'{_MOE}.make_expert.hidden_width'),
  ('num_experts_per_tok', 'top_k.TopK.k', f'{_MOE}.make_router.k'),
  ('rms_norm_eps', 'NORM_EPSILON', 'decoder.make_norm.epsilon'),
  ('tie_word_embeddings', 'TIED_LOGITS', 'tied_logits'),
]
_DECODER_GIN = """
include 'gin/models/decoder_only.gin'
include 'gin/routers/{router}.gin'
SHARED_BIAS = None
SCALED_ATTENTION = True
GATED = True
TRAIN_CAPACITY_FACTOR = None
EVAL_CAPACITY_FACTOR = None
"""
_DECODER_FIXED = {
  'attention_bias': False,
  'sliding_window': None,
  'clip_qkv': None,
  'rope_scaling': None,
}

ARCHITECTURES = {
  'switch_transformers': Architecture(
    name='SwitchTransformersForConditionalGeneration',
    table=tables.SWITCH,
    gin="""
include 'gin/models/encoder_decoder.gin'
include 'gin/routers/switch.gin'
GATED = False
EVAL_CAPACITY_FACTOR = None
""",
    same=[
      ('vocab_size', 'NUM_EMBEDDINGS', 'embed.vocab_size'),
      ('d_model', 'EMBED_DIM', 'embed.width'),
      ('num_heads', 'NUM_HEADS', f'{_ATTENTION}.num_heads'),
      ('d_kv', 'HEAD_DIM', f'{_ATTENTION}.head_width'),
      ('d_ff', 'MLP_DIM', f'{_MOE}.make_expert.hidden_width'),
      ('num_experts', 'NUM_EXPERTS', f'{_MOE}.make_router.num_experts'),
      ('layer_norm_epsilon', 'NORM_EPSILON', 'decoder.make_norm.epsilon'),
      ('tie_word_embeddings', 'TIED_LOGITS', 'tied_logits'),
      (
        'relative_attention_num_buckets',
        'attention.RelativeBias.num_buckets',
        'decoder.make_shared_bias.num_buckets',
      ),
      (
        'relative_attention_max_distance',
        'attention.RelativeBias.max_distance',
        'decoder.make_shared_bias.max_distance',
      ),
    ],
    fixed={'router_bias': False, 'is_gated_act': False},
    absent={'tie_word_embeddings': True},
    read=_read_switch,
    write=_write_switch,
    copies=(
      'encoder.embed_tokens.weight',
      'decoder.embed_tokens.weight',
      'lm_head.weight',
    ),
  ),
  'mixtral': Architecture(
    name='MixtralForCausalLM',
    table=tables.MIXTRAL,
    gin=_DECODER_GIN.format(router='mixtral'),
    same=[
      *_DECODER,
      ('num_local_experts', 'NUM_EXPERTS', f'{_MOE}.make_router.num_experts'),
    ],
    fixed=_DECODER_FIXED,
    absent={'tie_word_embeddings': False},
    read=_read_decoder,
    write=_write_mixtral,
  ),
  'olmoe': Architecture(
    name='OlmoeForCausalLM',
    table=tables.OLMOE,
    gin=_DECODER_GIN.format(router='olmoe') + 'ATTENTION_NORM = True\n',
    same=[
      *_DECODER,
      ('num_experts', 'NUM_EXPERTS', f'{_MOE}.make_router.num_experts'),
    ],
    fixed=_DECODER_FIXED,
    absent={'tie_word_embeddings': False},
    read=_read_olmoe,
    write=_write_olmoe,
  ),
}
