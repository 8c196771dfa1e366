"""What Hugging Face's config.json says, and what it is among our models.

One table an architecture, to be read side by side: hence its 410 lines.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sparse_experts.convert import parameter_names
from sparse_experts.convert.parameter_names import Row
from sparse_experts.data.special_tokens import NO_TOKEN
from sparse_experts.models.layout import kinds

# Several names of transformers' are one function.
_ACTIVATIONS = {
  'relu': 'relu',
  'gelu': 'gelu_exact',
  'gelu_python': 'gelu_exact',
  'gelu_new': 'gelu',
  'gelu_pytorch_tanh': 'gelu',
  'gelu_python_tanh': 'gelu',
  'gelu_accurate': 'gelu',
  'gelu_fast': 'gelu',
  'silu': 'silu',
  'swish': 'silu',
}
_THEIR_ACTIVATION = {
  'relu': 'relu',
  'gelu_exact': 'gelu',
  'gelu': 'gelu_new',
  'silu': 'silu',
}
# Slots of an expert in a sequence: more than one has tokens, so none is lost.
_NO_CAPACITY = 2**31 - 1


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
    absent: what other keys are where they are absent, as in transformers.
    to_ours: the rest of the gin bindings, from config.json.
    to_theirs: the rest of config.json, from arguments of a model, and of what
      trains it (`arguments.training`).
    remedies: what to do about an argument, by its name, that it has no key for.
    copies: tensors that may repeat the embedding, the table's first; the
      logits' only where they are tied.
    blocks_before: how many dense blocks a stack of such kinds needs before its
      own, for config.json to say which are sparse; 0 where none helps.
  """

  name: str
  table: list[Row]
  gin: str
  same: list[tuple[str, str, str]]
  fixed: Mapping[str, Any]
  absent: Mapping[str, Any]
  to_ours: Callable[[Mapping[str, Any]], dict[str, Any]]
  to_theirs: Callable[[Mapping[str, Any]], dict[str, Any]]
  remedies: Mapping[str, str]
  copies: tuple[str, ...] = ()
  blocks_before: Callable[[Sequence[int]], int] = lambda kinds: 0


_BLOCK = 'decoder.make_block'
_MOE = f'{_BLOCK}.make_moe'
_ATTENTION = f'{_BLOCK}.make_attention'


def _sparse_of_step(num_layers: int, step: int) -> list[int]:
  """Which blocks of a Switch's stack are sparse."""
  if step == 1:
    return list(range(num_layers))
  return [i for i in range(num_layers) if step and i % step == 1]


def _step_of_sparse(num_layers: int, sparse: Sequence[int]) -> int:
  """The step that these blocks are sparse by, if there is one."""
  if not sparse:
    return 0
  return sparse[1] - sparse[0] if sparse[1:] else num_layers


def _switch_blocks_before(of_stack: Sequence[int]) -> int:
  for number in (0, 1):
    num_layers = number + len(of_stack)
    sparse = [number + i for i, kind in enumerate(of_stack) if kind]
    step = _step_of_sparse(num_layers, sparse)
    if _sparse_of_step(num_layers, step) == sparse:
      return number
  return 0


def _switch_to_ours(found: Mapping[str, Any]) -> dict[str, Any]:
  def steps(stack, num_layers):
    number = found[f'num_sparse_{stack}_layers']
    derived = num_layers // number if number else num_layers
    step = found.get(f'{stack}_sparse_step', derived)
    return _sparse_of_step(num_layers, step)

  return {
    'NUM_LAYERS': found['num_decoder_layers'],
    'SPARSE_LAYERS': steps('decoder', found['num_decoder_layers']),
    'encoder/transformer.Stack.num_layers': found['num_layers'],
    'encoder/transformer.Stack.sparse_layers': steps(
      'encoder', found['num_layers']
    ),
    'ACTIVATION': _our_activation(found, 'dense_act_fn'),
    'LOSS_WEIGHTS': _loss_weights(
      load_balance=found['router_aux_loss_coef'],
      router_z=found['router_z_loss_coef'],
    ),
    'top_k.TopK.jitter': float(found['router_jitter_noise']),
    'DROPOUT_RATE': found['dropout_rate'],
    'EXPERT_DROPOUT_RATE': found['dropout_rate'],
    # As T5's, which begin with padding.
    **_tokens_to_ours(
      found, found.get('decoder_start_token_id', found['pad_token_id'])
    ),
  }


def _switch_to_theirs(found: Mapping[str, Any]) -> dict[str, Any]:
  def sparse(stack):
    number = found[f'{stack}.num_layers']
    sparse_layers = kinds(number, found[f'{stack}.sparse_layers'])
    indices = [i for i, kind in enumerate(sparse_layers) if kind]
    return {
      f'num_sparse_{stack}_layers': len(indices),
      f'{stack}_sparse_step': _step_of_sparse(number, indices),
    }

  return {
    'num_layers': found['encoder.num_layers'],
    'num_decoder_layers': found['decoder.num_layers'],
    **sparse('encoder'),
    **sparse('decoder'),
    'dense_act_fn': _their_activation(found),
    'dropout_rate': found[f'{_BLOCK}.dropout_rate'],
    'expert_capacity': _NO_CAPACITY,
    'router_jitter_noise': found[f'{_MOE}.make_router.jitter'],
    'router_aux_loss_coef': found['loss_weights'].get('load_balance', 0.0),
    'router_z_loss_coef': found['loss_weights'].get('router_z', 0.0),
    'router_dtype': 'float32',
    'is_encoder_decoder': True,
    **_tokens_to_theirs(found, 'decoder_start_token_id'),
  }


def _our_activation(found: Mapping[str, Any], key: str) -> str:
  if found[key] not in _ACTIVATIONS:
    raise ValueError(
      f'config.json has {key}={found[key]!r}, which has no counterpart here; '
      f'it must be one of {", ".join(_ACTIVATIONS)}.'
    )
  return _ACTIVATIONS[found[key]]


def _their_activation(found: Mapping[str, Any]) -> str:
  return _THEIR_ACTIVATION[found[f'{_MOE}.make_expert.activation']]


def _loss_weights(**weights: float) -> dict[str, float]:
  return {name: weight for name, weight in weights.items() if weight}


def _tokens_to_ours(
  found: Mapping[str, Any], start: int | None
) -> dict[str, Any]:
  """Macros of `SpecialTokens`; the keys are generation_config.json's, too."""
  eos = found['eos_token_id']
  eos = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
  pad = found['pad_token_id']
  if pad is None or pad in eos:  # Which some use as padding: it is a token.
    pad = NO_TOKEN
  return {
    'PAD_ID': pad,
    'EOS_IDS': eos,
    'START_ID': start,
    'SUPPRESSED_IDS': tuple(found.get('suppress_tokens') or ()),
  }


def _tokens_to_theirs(found: Mapping[str, Any], start: str) -> dict[str, Any]:
  """Keys of config.json; `start`: the one of a decoder's first input."""
  eos, pad = found['special_tokens.eos'], found['special_tokens.pad']
  return {
    'pad_token_id': None if pad == NO_TOKEN else pad,
    'eos_token_id': list(eos) if len(eos) > 1 else (*eos, None)[0],
    start: found['special_tokens.start'],
    'suppress_tokens': list(found['special_tokens.suppressed']) or None,
  }


def _decoder_to_ours(found: Mapping[str, Any]) -> dict[str, Any]:
  rope = found.get('rope_parameters') or found
  heads = found['num_attention_heads']
  return {
    'HEAD_DIM': found.get('head_dim') or found['hidden_size'] // heads,
    'ROTARY_BASE': float(rope['rope_theta']),
    'SPARSE_LAYERS': 1,
    'ACTIVATION': _our_activation(found, 'hidden_act'),
    'LOSS_WEIGHTS': _loss_weights(load_balance=found['router_aux_loss_coef']),
    'attention.Attention.dropout_rate': found.get('attention_dropout', 0.0),
    'MAX_LENGTH': found['max_position_embeddings'],
    **_tokens_to_ours(found, found['bos_token_id']),
  }


def _decoder_to_theirs(found: Mapping[str, Any]) -> dict[str, Any]:
  base, length = found[f'{_ATTENTION}.rotary_base'], found['max_length']
  return {
    'rope_theta': base,  # Before transformers 5.
    'rope_parameters': {'rope_theta': base, 'rope_type': 'default'},
    'hidden_act': _their_activation(found),
    'attention_dropout': found[f'{_ATTENTION}.dropout_rate'],
    'router_aux_loss_coef': found['loss_weights'].get('load_balance', 0.0),
    **_tokens_to_theirs(found, 'bos_token_id'),
    **({} if length is None else {'max_position_embeddings': length}),
  }


def _mixtral_to_ours(found: Mapping[str, Any]) -> dict[str, Any]:
  return {
    **_decoder_to_ours(found),
    **_gates(found, renormalised=True),
    'top_k.TopK.jitter': float(found['router_jitter_noise']),
  }


def _mixtral_to_theirs(found: Mapping[str, Any]) -> dict[str, Any]:
  return {
    **_decoder_to_theirs(found),
    'head_dim': found[f'{_ATTENTION}.head_width'],
    'router_jitter_noise': found[f'{_MOE}.make_router.jitter'],
  }


def _olmoe_to_ours(found: Mapping[str, Any]) -> dict[str, Any]:
  return {**_decoder_to_ours(found), **_gates(found, found['norm_topk_prob'])}


def _gates(found: Mapping[str, Any], renormalised: bool) -> dict[str, Any]:
  # One choice renormalised is a gate of 1: it decodes, and teaches no router.
  alone = renormalised and found['num_experts_per_tok'] == 1
  return {
    'top_k.TopK.gates': 'chosen' if renormalised else 'all',
    **({'top_k.TopK.allow_no_gradient': True} if alone else {}),
  }


def _olmoe_to_theirs(found: Mapping[str, Any]) -> dict[str, Any]:
  gates = found[f'{_MOE}.make_router.gates']
  return {**_decoder_to_theirs(found), 'norm_topk_prob': gates == 'chosen'}


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
SCALED_LOGITS = False
Z_LOSS = 0.0
top_k.TopK.choose_by = 'probs'
LAYER_REDUCTION = 'joint'
BALANCE_OVER = 'microbatch'  # All tokens that it sees at once.
TRAIN_CAPACITY_FACTOR = None
EVAL_CAPACITY_FACTOR = None
"""
_DECODER_FIXED = {
  'attention_bias': False,
  'sliding_window': None,
  'clip_qkv': None,
  'rope_scaling': None,
}
_DECODER_REMEDIES = {
  'sparse_layers': 'every block of that format is sparse: SPARSE_LAYERS = 1',
  'scaled_logits': (
    'that format does not scale tied logits: SCALED_LOGITS = False, or '
    'TIED_LOGITS = False'
  ),
}

ARCHITECTURES = {
  'switch_transformers': Architecture(
    name='SwitchTransformersForConditionalGeneration',
    table=parameter_names.SWITCH,
    gin="""
include 'gin/models/encoder_decoder.gin'
include 'gin/routers/switch.gin'
GATED = False
Z_LOSS = 0.0
LAYER_REDUCTION = 'joint'
BALANCE_OVER = 'group'  # A sequence.
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
    absent={
      'tie_word_embeddings': True,
      'pad_token_id': 0,
      'eos_token_id': 1,
      'dropout_rate': 0.1,
      'router_jitter_noise': 0.01,
      'router_aux_loss_coef': 0.001,
      'router_z_loss_coef': 0.001,
    },
    to_ours=_switch_to_ours,
    to_theirs=_switch_to_theirs,
    remedies={
      'sparse_layers': (
        'the sparse blocks of that format are all, none, or every n-th from '
        'the first or second on: train with such SPARSE_LAYERS'
      ),
      'scaled_logits': 'that format scales tied logits: SCALED_LOGITS = True',
    },
    copies=(
      'encoder.embed_tokens.weight',
      'decoder.embed_tokens.weight',
      'lm_head.weight',
    ),
    blocks_before=_switch_blocks_before,
  ),
  'mixtral': Architecture(
    name='MixtralForCausalLM',
    table=parameter_names.MIXTRAL,
    gin=_DECODER_GIN.format(router='mixtral'),
    same=[
      *_DECODER,
      ('num_local_experts', 'NUM_EXPERTS', f'{_MOE}.make_router.num_experts'),
    ],
    fixed=_DECODER_FIXED,
    absent={
      'tie_word_embeddings': False,
      'pad_token_id': None,
      'bos_token_id': 1,
      'eos_token_id': 2,
      'max_position_embeddings': 4096 * 32,
      'router_aux_loss_coef': 0.001,
      'router_jitter_noise': 0.0,
    },
    to_ours=_mixtral_to_ours,
    to_theirs=_mixtral_to_theirs,
    remedies=_DECODER_REMEDIES,
  ),
  'olmoe': Architecture(
    name='OlmoeForCausalLM',
    table=parameter_names.OLMOE,
    gin=_DECODER_GIN.format(router='olmoe') + 'ATTENTION_NORM = True\n',
    same=[
      *_DECODER,
      ('num_experts', 'NUM_EXPERTS', f'{_MOE}.make_router.num_experts'),
    ],
    fixed=_DECODER_FIXED,
    absent={
      'tie_word_embeddings': False,
      'pad_token_id': 1,
      'bos_token_id': None,
      'eos_token_id': 50279,
      'max_position_embeddings': 4096,
      'router_aux_loss_coef': 0.01,
    },
    to_ours=_olmoe_to_ours,
    to_theirs=_olmoe_to_theirs,
    remedies=_DECODER_REMEDIES,
  ),
}
