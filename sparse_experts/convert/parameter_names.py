"""Names of parameters: ours (of stacks without scan) and those of others.

Each row is (ours, theirs, rule of `axes`), used in both directions. `{s}` is a
stack, 'encoder' or 'decoder', `{i}` a block of it; `{e}`, on their side, an
expert, where each has a tensor of its own: the rule is then for one of them.
"""

from __future__ import annotations

Row = tuple[str, str, str]


def _rows(ours: str, theirs: str, *leaves: Row) -> list[Row]:
  """Rows below a common pair of paths."""
  return [(ours + mine, theirs + other, rule) for mine, other, rule in leaves]


# T5X: flaxformer's encoder-decoders.

_T5X_MLP = [
  (f'/{name}/kernel', f'/{name}/kernel', '') for name in ('wi', 'wi_0', 'wi_1')
] + [('/wo/kernel', '/wo/kernel', '')]
_T5X_ATTENTION = [
  *[(f'/{x}/kernel', f'/{x}/kernel', 'DHA = D(HA)') for x in ('query', 'key')],
  ('/value/kernel', '/value/kernel', 'DHA = D(HA)'),
  ('/out/kernel', '/out/kernel', 'HAD = (HA)D'),
]


def _t5x_stack(s: str, attention: str) -> list[Row]:
  block = f'{s}/layers_{{i}}'
  return [
    (f'{s}/norm/scale', f'{s}/{s}_norm/scale', ''),
    (f'{s}/relative_bias/embedding', f'{s}/relpos_bias/rel_embedding', ''),
    *_rows(f'{block}/attention', f'{block}/{attention}', *_T5X_ATTENTION),
    *_rows(f'{block}/mlp', f'{block}/mlp', *_T5X_MLP),
    *_rows(f'{block}/moe/expert', f'{block}/mlp/expert', *_T5X_MLP),
    *_rows(f'{block}/extra_mlp', f'{block}/extra_mlp', *_T5X_MLP),
    *_rows(
      block,
      block,
      ('/attention_norm/scale', f'/pre_{attention}_layer_norm/scale', ''),
      ('/mlp_norm/scale', '/pre_mlp_layer_norm/scale', ''),
      ('/extra_mlp_norm/scale', '/pre_extra_mlp_layer_norm/scale', ''),
      ('/moe/router/kernel', '/mlp/router/router_weights/w/kernel', ''),
    ),
  ]


T5X: list[Row] = [
  ('embed/embedding', 'token_embedder/embedding', ''),
  ('logits/kernel', 'decoder/logits_dense/kernel', ''),
  *_t5x_stack('encoder', 'attention'),
  *_t5x_stack('decoder', 'self_attention'),
  *_rows(
    'decoder/layers_{i}/cross_attention',
    'decoder/layers_{i}/encoder_decoder_attention',
    *_T5X_ATTENTION,
  ),
  (
    'decoder/layers_{i}/cross_attention_norm/scale',
    'decoder/layers_{i}/pre_cross_attention_layer_norm/scale',
    '',
  ),
]

# Hugging Face, whose linear layers have the output's axis first.


def _attention(**names: str) -> list[Row]:
  return [
    *[
      (f'/{ours}/kernel', f'.{names[ours]}.weight', 'DHA = (HA)D')
      for ours in ('query', 'key', 'value')
    ],
    ('/out/kernel', f'.{names["out"]}.weight', 'HAD = D(HA)'),
  ]


def _mlp(**names: str) -> list[Row]:
  return [
    (
      f'/{ours}/kernel',
      f'.{theirs}.weight',
      'FD = DF' if ours == 'wo' else 'DF = FD',
    )
    for ours, theirs in names.items()
  ]


_SWITCH_ATTENTION = _attention(query='q', key='k', value='v', out='o')


def _switch_stack(s: str, mlp: int) -> list[Row]:
  """`mlp`: which sub-layer the FFN is."""
  ours, theirs = f'{s}/layers_{{i}}', f'{s}.block.{{i}}.layer'
  bias = f'{s}.block.0.layer.0.SelfAttention.relative_attention_bias.weight'
  return [
    (f'{s}/norm/scale', f'{s}.final_layer_norm.weight', ''),
    (f'{s}/relative_bias/embedding', bias, 'HU = UH'),
    *_rows(
      f'{ours}/attention', f'{theirs}.0.SelfAttention', *_SWITCH_ATTENTION
    ),
    (f'{ours}/attention_norm/scale', f'{theirs}.0.layer_norm.weight', ''),
    (f'{ours}/mlp_norm/scale', f'{theirs}.{mlp}.layer_norm.weight', ''),
    *_rows(f'{ours}/mlp', f'{theirs}.{mlp}.mlp', *_mlp(wi='wi', wo='wo')),
    *_rows(
      f'{ours}/moe/expert',
      f'{theirs}.{mlp}.mlp.experts.expert_{{e}}',
      *_mlp(wi='wi', wo='wo'),
    ),
    (
      f'{ours}/moe/router/kernel',
      f'{theirs}.{mlp}.mlp.router.classifier.weight',
      'DE = ED',
    ),
  ]


SWITCH: list[Row] = [
  ('embed/embedding', 'shared.weight', ''),
  ('logits/kernel', 'lm_head.weight', 'DV = VD'),
  *_switch_stack('encoder', mlp=1),
  *_switch_stack('decoder', mlp=2),
  *_rows(
    'decoder/layers_{i}/cross_attention',
    'decoder.block.{i}.layer.1.EncDecAttention',
    *_SWITCH_ATTENTION,
  ),
  (
    'decoder/layers_{i}/cross_attention_norm/scale',
    'decoder.block.{i}.layer.1.layer_norm.weight',
    '',
  ),
]


def _decoder_only(moe: str, **expert: str) -> list[Row]:
  """Mixtral's kind; `moe`: their name of the sparse layer."""
  ours, theirs = 'decoder/layers_{i}', 'model.layers.{i}'
  return [
    ('embed/embedding', 'model.embed_tokens.weight', ''),
    ('logits/kernel', 'lm_head.weight', 'DV = VD'),
    ('decoder/norm/scale', 'model.norm.weight', ''),
    *_rows(
      f'{ours}/attention',
      f'{theirs}.self_attn',
      *_attention(query='q_proj', key='k_proj', value='v_proj', out='o_proj'),
      ('/query_norm/scale', '.q_norm.weight', ''),
      ('/key_norm/scale', '.k_norm.weight', ''),
    ),
    (f'{ours}/attention_norm/scale', f'{theirs}.input_layernorm.weight', ''),
    (f'{ours}/mlp_norm/scale', f'{theirs}.post_attention_layernorm.weight', ''),
    (f'{ours}/moe/router/kernel', f'{theirs}.{moe}.gate.weight', 'DE = ED'),
    *_rows(
      f'{ours}/moe/expert', f'{theirs}.{moe}.experts.{{e}}', *_mlp(**expert)
    ),
  ]


MIXTRAL = _decoder_only('block_sparse_moe', wi_0='w1', wi_1='w3', wo='w2')
OLMOE = _decoder_only('mlp', wi_0='gate_proj', wi_1='up_proj', wo='down_proj')
