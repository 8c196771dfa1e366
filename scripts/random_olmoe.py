"""Writes a small OLMoE as Hugging Face has them, of random numbers.

    python scripts/random_olmoe.py FOLDER --text=LICENSE

config.json, model.safetensors, and a tokenizer.json that is trained on a text:
what a real one has that is converted and asked. Needs safetensors and
tokenizers, not torch; the same text gives the same files.
"""

import argparse
import json
import pathlib

import numpy as np
import safetensors.numpy
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

V, D, F, E, NUM_LAYERS, NUM_HEADS = 500, 32, 64, 8, 2, 4
SPECIAL = ('<|padding|>', '<|endoftext|>')
CONFIG = {
  'model_type': 'olmoe',
  'vocab_size': V,
  'hidden_size': D,
  'intermediate_size': F,
  'num_experts': E,
  'num_experts_per_tok': 2,
  'num_hidden_layers': NUM_LAYERS,
  'num_attention_heads': NUM_HEADS,
  'num_key_value_heads': NUM_HEADS,
  'hidden_act': 'silu',
  'norm_topk_prob': False,
  'rms_norm_eps': 1e-5,
  'rope_theta': 10000.0,
  'pad_token_id': SPECIAL.index('<|padding|>'),
  'eos_token_id': SPECIAL.index('<|endoftext|>'),
}


def tokenizer(text):
  """One of bytes and pairs, trained on a file."""
  made = tokenizers.Tokenizer(models.BPE())
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=V,
    special_tokens=list(SPECIAL),
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  made.train([text], trainer)
  return made


def shapes():
  """Of every tensor, by its name without '.weight'."""
  found = {
    'model.embed_tokens': (V, D),
    'model.norm': (D,),
    'lm_head': (V, D),
  }
  for i in range(NUM_LAYERS):
    layer = f'model.layers.{i}'
    norms = ('input_layernorm', 'post_attention_layernorm')
    norms += ('self_attn.q_norm', 'self_attn.k_norm')
    found |= {f'{layer}.{norm}': (D,) for norm in norms}
    found |= {f'{layer}.self_attn.{x}_proj': (D, D) for x in 'qkvo'}
    found[f'{layer}.mlp.gate'] = (E, D)
    for e in range(E):
      expert = f'{layer}.mlp.experts.{e}'
      found |= {f'{expert}.{name}_proj': (F, D) for name in ('gate', 'up')}
      found[f'{expert}.down_proj'] = (D, F)
  return found


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('folder', type=pathlib.Path, help='a new one')
  parser.add_argument('--text', required=True, help='of the tokenizer')
  args = parser.parse_args()
  trained = tokenizer(args.text)  # Which fails where there is no such text.
  args.folder.mkdir(parents=True)
  trained.save(str(args.folder / 'tokenizer.json'))
  (args.folder / 'config.json').write_text(json.dumps(CONFIG, indent=2) + '\n')
  random = np.random.default_rng(0)
  tensors = {
    f'{name}.weight': random.normal(0, 0.3, shape).astype(np.float32)
    for name, shape in shapes().items()
  }
  safetensors.numpy.save_file(tensors, args.folder / 'model.safetensors')


if __name__ == '__main__':
  main()
