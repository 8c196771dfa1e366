"""Compares models with transformers, both ways; see check_hugging_face.sh.

Three stages take turns, as torch and this project have environments of their
own: `theirs` writes small random checkpoints of transformers with what they
compute, `ours` computes the same from them, and exports them and models of our
own with what those compute, and `again` loads the exports and compares.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys

import numpy as np

NEW_TOKENS = 12
PROMPTS = (9, 4, 6)  # Lengths.
STD = 0.3  # Wide enough that tokens differ in experts and in what follows.

_DECODER = dict(
  vocab_size=96,
  hidden_size=48,
  intermediate_size=40,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=80,
)
_SWITCH = dict(
  vocab_size=96,
  d_model=48,
  d_kv=8,
  d_ff=40,
  num_layers=4,
  num_sparse_encoder_layers=2,
  num_decoder_layers=4,
  num_sparse_decoder_layers=2,
  num_heads=4,
  num_experts=4,
  dropout_rate=0.0,
  expert_capacity=500,
)
# Model type, its configuration, and how many tokens end an answer.
THEIRS = {
  'mixtral': (
    'mixtral',
    {**_DECODER, 'num_local_experts': 4, 'bos_token_id': 1},
    1,
  ),
  'mixtral tied, k 3, tanh GELU': (
    'mixtral',
    {
      **_DECODER,
      'num_local_experts': 5,
      'num_experts_per_tok': 3,
      'tie_word_embeddings': True,
      'hidden_act': 'gelu_pytorch_tanh',
      'bos_token_id': 17,
      'pad_token_id': 33,
      'head_dim': 20,
      'router_aux_loss_coef': 0.02,
    },
    2,
  ),
  'olmoe': (
    'olmoe',
    {**_DECODER, 'num_experts': 8, 'num_experts_per_tok': 3},
    1,
  ),
  'olmoe tied, renormalised': (
    'olmoe',
    {
      **_DECODER,
      'num_experts': 4,
      'num_experts_per_tok': 2,
      'norm_topk_prob': True,
      'tie_word_embeddings': True,
      'bos_token_id': 40,
      'pad_token_id': None,
      'hidden_act': 'gelu',
    },
    3,
  ),
  'switch': (
    'switch_transformers',
    {**_SWITCH, 'decoder_start_token_id': 0},
    1,
  ),
  'switch untied, all or one sparse, tanh GELU': (
    'switch_transformers',
    {
      **_SWITCH,
      'num_layers': 3,
      'num_sparse_encoder_layers': 3,
      'num_decoder_layers': 2,
      'num_sparse_decoder_layers': 1,
      'tie_word_embeddings': False,
      'dense_act_fn': 'gelu_pytorch_tanh',
      'pad_token_id': 9,
      'decoder_start_token_id': 21,
    },
    2,
  ),
  'switch, one block of 5 sparse': (
    'switch_transformers',
    {
      **_SWITCH,
      'num_layers': 5,
      'num_sparse_encoder_layers': 1,
      'decoder_start_token_id': 0,
      'dense_act_fn': 'gelu_new',
    },
    1,
  ),
}
_OWN = """
include 'gin/models/{model}.gin'
include 'gin/routers/{router}.gin'
NUM_EMBEDDINGS = 96
EMBED_DIM = 48
NUM_HEADS = 4
MLP_DIM = 40
"""
_OWN_DECODER = """
SHARED_BIAS = None
SPARSE_LAYERS = 1
SCALED_ATTENTION = True
ACTIVATION = 'silu'
ROTARY_BASE = 1e4
NUM_LAYERS = 2
NUM_EXPERTS = 4
HEAD_DIM = 12
"""
OURS = {
  'our quickstart': """
include 'gin/quickstart.gin'
NUM_EMBEDDINGS = 96
EMBED_DIM = 48
MLP_DIM = 40
""",
  'our quickstart, blocks 0 and 2 of 4 sparse, scanned': """
include 'gin/quickstart.gin'
NUM_EMBEDDINGS = 96
EMBED_DIM = 48
MLP_DIM = 40
NUM_LAYERS = 4
SPARSE_LAYERS = (0, 2)
SCAN = True
""",
  'our Switch-Base': """
include 'gin/models/switch/base.gin'
NUM_EMBEDDINGS = 96
EMBED_DIM = 48
NUM_HEADS = 4
HEAD_DIM = 8
MLP_DIM = 40
NUM_LAYERS = 4
NUM_EXPERTS = 8
GROUP_SIZE = None
DECODER_GROUP_SIZE = None
DTYPE = 'float32'
""",
  'our Mixtral, of T5 tokens': _OWN.format(
    model='decoder_only', router='mixtral'
  )
  + _OWN_DECODER,
  'our OLMoE, tied, of other tokens': _OWN.format(
    model='decoder_only', router='olmoe'
  )
  + _OWN_DECODER
  + """
ATTENTION_NORM = True
TIED_LOGITS = True
SCALED_LOGITS = False
PAD_ID = -1
EOS_IDS = (5, 80)
START_ID = 3
SUPPRESSED_IDS = ()
MAX_LENGTH = 64
SCAN = True
""",
}


def questions(vocab: int, encoder: bool, avoid: list[int], first: int | None):
  """Rows of tokens, from 0 on, that avoid some; lengths."""
  random = np.random.default_rng(1)
  lengths = (400, 250, 31) if encoder else PROMPTS
  allowed = [i for i in range(vocab) if i not in avoid]
  rows = [random.choice(allowed, n) for n in lengths]
  if first is not None and not encoder:
    for row in rows:
      row[0] = first
  return rows


def padded(rows, pad: int, left: bool = False):
  """Tokens [B, L] and a mask of them."""
  longest = max(map(len, rows))
  tokens_BxL = np.full((len(rows), longest), pad)
  mask_BxL = np.zeros((len(rows), longest), int)
  for b, row in enumerate(rows):
    where = slice(longest - len(row), None) if left else slice(len(row))
    tokens_BxL[b, where], mask_BxL[b, where] = row, 1
  return tokens_BxL, mask_BxL


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
  return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


# In the environment of transformers.


def run_theirs(model, rows, targets_BxL):
  """Logits of rows of a model, greedy answers, and the losses of routers."""
  import torch

  config = model.config
  pad = model.generation_config.pad_token_id
  pad = 0 if pad is None else pad  # Masked wherever it stands.
  tensor = torch.tensor
  with torch.no_grad():
    if config.is_encoder_decoder:
      tokens_BxM, mask_BxM = map(tensor, padded(rows, pad))
      asked = {'input_ids': tokens_BxM, 'attention_mask': mask_BxM}
      start = config.decoder_start_token_id
      inputs_BxL = np.insert(targets_BxL, 0, start, 1)[:, :-1]
      logits = model(**asked, decoder_input_ids=tensor(inputs_BxL)).logits
      # Its losses count padding, too: of the tokens that all rows have.
      fewest = min(map(len, rows))
      out = model(
        input_ids=tokens_BxM[:, :fewest],
        decoder_input_ids=tensor(inputs_BxL),
        output_router_logits=True,
      )
      losses = [
        float(out.encoder_aux_loss + out.decoder_aux_loss),
        float(out.encoder_z_loss + out.decoder_z_loss),
      ]
      if config.encoder_sparse_step == 1:  # Then it has no losses.
        losses = []
    else:
      tokens_BxL, mask_BxL = map(tensor, padded(rows, pad))
      out = model(
        tokens_BxL, attention_mask=mask_BxL, output_router_logits=True
      )
      logits, losses = out.logits, [float(out.aux_loss)]
      tokens_BxM, mask_BxM = map(tensor, padded(rows, pad, left=True))
      asked = {'input_ids': tokens_BxM, 'attention_mask': mask_BxM}
    answers = model.generate(
      **asked, do_sample=False, max_new_tokens=NEW_TOKENS
    ).numpy()
  skip = 1 if config.is_encoder_decoder else tokens_BxM.shape[1]
  return logits.numpy(), answers[:, skip:], np.array(losses)


def theirs(folder: pathlib.Path) -> None:
  import torch
  import transformers

  for seed, (name, (kind, arguments, num_eos)) in enumerate(THEIRS.items()):
    # First without an end, to see which tokens it writes in the middle.
    config = transformers.AutoConfig.for_model(
      kind, **{**arguments, 'eos_token_id': None}
    )
    encoder = config.is_encoder_decoder
    make = (
      transformers.AutoModelForSeq2SeqLM
      if encoder
      else transformers.AutoModelForCausalLM
    )
    torch.manual_seed(seed)
    model = make.from_config(config).eval()
    for parameter in model.parameters():
      torch.nn.init.normal_(parameter, 0.0, STD)
    model.tie_weights()
    if encoder:  # The stacks have tables of their own where logits are untied.
      for stack in (model.encoder, model.decoder):
        stack.embed_tokens.weight.data = model.shared.weight.data
    special = [config.pad_token_id] if config.pad_token_id is not None else []
    rows = questions(config.vocab_size, encoder, special, config.bos_token_id)
    random = np.random.default_rng(2)
    allowed = [i for i in range(config.vocab_size) if i not in special]
    targets_BxL = random.choice(allowed, (len(rows), 7))
    model.generation_config.pad_token_id = config.pad_token_id or 0
    _, answers, _ = run_theirs(model, rows, targets_BxL)
    # Tokens that the rows write, but not among their first three.
    early = {*special, *answers[:, :3].ravel().tolist()}
    ends = dict.fromkeys(
      t for t in answers.T.ravel().tolist() if t not in early
    )
    ends = [*ends, *(t for t in allowed if t not in early)][:num_eos]
    config.eos_token_id = ends if num_eos > 1 else ends[0]
    model.config.eos_token_id = config.eos_token_id
    model.generation_config = transformers.GenerationConfig.from_model_config(
      model.config
    )
    logits, answers, losses = run_theirs(model, rows, targets_BxL)
    model.save_pretrained(folder / 'theirs' / name)
    (folder / 'theirs' / name / 'tokenizer.json').write_text(f'"{name}"\n')
    save(
      folder / 'theirs' / f'{name}.npz',
      rows,
      targets_BxL,
      logits=logits,
      answers=answers,
      losses=losses,
    )


def save(path, rows, targets_BxL, **found) -> None:
  tokens_BxL, mask_BxL = padded(rows, 0)
  np.savez(path, rows=tokens_BxL, mask=mask_BxL, targets=targets_BxL, **found)


def saved(path):
  """rows, targets and the rest of what `save` wrote."""
  found = dict(np.load(path))
  tokens_BxL, mask_BxL = found.pop('rows'), found.pop('mask').astype(bool)
  rows = [tokens[mask] for tokens, mask in zip(tokens_BxL, mask_BxL)]
  return rows, found.pop('targets'), found


# In the environment of this project.


def run_ours(model, params, rows, targets_BxL):
  import functools

  import jax

  special = model.special_tokens
  tokens_BxL, mask_BxL = padded(rows, special.pad)
  decode = jax.jit(functools.partial(model.decode, max_tokens=NEW_TOKENS))
  batch = {'tokens': tokens_BxL}
  batch_of_losses = {
    'decoder_input_tokens': tokens_BxL,
    'decoder_target_tokens': special.pad + mask_BxL,  # Real, or not.
  }
  if model.module.encoder is not None:
    inputs_BxL = np.insert(targets_BxL, 0, special.first(), 1)[:, :-1]
    decoder = {
      'decoder_input_tokens': inputs_BxL,
      'decoder_target_tokens': targets_BxL,
    }
    batch = {'encoder_input_tokens': tokens_BxL, **decoder}
    fewest = min(map(len, rows))
    batch_of_losses = {
      'encoder_input_tokens': tokens_BxL[:, :fewest],
      **decoder,
    }
  logits = jax.jit(model.logits)(params, batch)
  _, sums = jax.jit(functools.partial(model.loss, train=False))(
    params, batch_of_losses
  )
  losses = [
    float(sums['aux_losses'][name]) for name in sorted(model.loss_weights)
  ]
  # Rows are all that a decoder reads.
  begun = dataclasses.replace(special, start=None)
  features = dataclasses.replace(model.features, special_tokens=begun)
  asked = [features.prompt(row, max(map(len, rows))) for row in rows]
  answers, _ = decode(
    params, {name: np.stack([a[name] for a in asked]) for name in asked[0]}
  )
  return np.asarray(logits), np.asarray(answers), np.array(losses)


def write_own(folder: pathlib.Path, gin: str) -> None:
  """A checkpoint of a model of random parameters, as `train` writes it."""
  import jax
  import orbax.checkpoint as ocp
  from flax import linen as nn

  from sparse_experts import config

  model = config.model_of(gin)
  names = ['decoder_input_tokens', 'decoder_target_tokens']
  if model.module.encoder is not None:
    names.append('encoder_input_tokens')
  tokens = jax.ShapeDtypeStruct((2, 8), np.int32)
  boxed = jax.eval_shape(
    lambda: model.init(jax.random.key(0), dict.fromkeys(names, tokens))
  )
  random = np.random.default_rng(3)
  params = jax.tree.map(
    lambda x: random.normal(scale=STD, size=x.shape).astype(np.float32),
    nn.unbox(boxed),
  )
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save((folder / 'checkpoints/0/params').absolute(), params)
  (folder / 'config.gin').write_text(config.text())


def ours(folder: pathlib.Path) -> None:
  from sparse_experts import convert

  for name in [*THEIRS, *OURS]:
    native = folder / 'native' / name
    found = {}
    if name in THEIRS:
      source = folder / 'theirs' / name
      rows, targets_BxL, _ = saved(source.with_name(f'{name}.npz'))
      convert.convert(source, native)
      model, params = convert.load(source)
    else:
      write_own(native, OURS[name])
      model, params = convert.load(native)
      special = model.special_tokens
      rows = questions(
        96, model.module.encoder is not None, [special.pad], special.start
      )
      targets_BxL = np.random.default_rng(4).integers(10, 90, (3, 7))
    names = ('logits', 'answers', 'losses')
    found = dict(zip(names, run_ours(model, params, rows, targets_BxL)))
    special = model.special_tokens
    found |= {'pad': special.pad, 'eos': special.eos}
    report = convert.convert(native, folder / 'exported' / name, target='hf')
    save(folder / 'exported' / f'{name}.npz', rows, targets_BxL, **found)
    lines = '\n'.join(report['unsaid'])
    (folder / 'exported' / f'{name}.unsaid').write_text(lines)


# In that of transformers again.


def again(folder: pathlib.Path, page: pathlib.Path) -> None:
  import torch
  import transformers

  lines, unsaid = [], []
  for name in [*THEIRS, *OURS]:
    exported = folder / 'exported' / name
    rows, targets_BxL, ours = saved(exported.with_name(f'{name}.npz'))
    config = transformers.AutoConfig.from_pretrained(exported)
    make = (
      transformers.AutoModelForSeq2SeqLM
      if config.is_encoder_decoder
      else transformers.AutoModelForCausalLM
    )
    model = make.from_pretrained(exported, dtype=torch.float32).eval()
    logits, answers, losses = run_theirs(model, rows, targets_BxL)
    cells = [name]
    if name in THEIRS:
      _, _, source = saved(folder / 'theirs' / f'{name}.npz')
      cells += compare(ours, source, rows, targets_BxL)
      kept = (exported / 'tokenizer.json').read_text() == f'"{name}"\n'
    else:
      cells += ['', '', '']
      kept = True
      said = (folder / 'exported' / f'{name}.unsaid').read_text().splitlines()
      unsaid.append(f'* {name}: ' + '; '.join(f'`{line}`' for line in said))
    out = {'logits': logits, 'answers': answers, 'losses': losses}
    cells += compare(ours, out, rows, targets_BxL)
    if name in THEIRS:
      cells.append(same_configuration(folder / 'theirs' / name, exported))
    else:
      cells.append('')
    assert kept, name
    lines.append('| ' + ' | '.join(cells) + ' |')
  head = (
    'model',
    'import: logits',
    'greedy',
    'losses',
    'export: logits',
    'greedy',
    'losses',
    'changed in config.json',
  )
  table = [
    '| ' + ' | '.join(head) + ' |',
    '|---' * len(head) + '|',
    *lines,
  ]
  versions = (
    f'transformers {transformers.__version__}, torch {torch.__version__}'
  )
  text = PAGE.format(
    versions=versions,
    table='\n'.join(table),
    rows=len(PROMPTS),
    tokens=NEW_TOKENS,
    unsaid='\n'.join(unsaid),
  )
  page.write_text(text)
  print(text)


def compare(ours, theirs, rows, targets_BxL) -> list[str]:
  """Cells: how far logits differ, equal answers, how far losses differ."""
  mask_BxL = padded(rows, 0)[1].astype(bool)
  if theirs['logits'].shape[1] != mask_BxL.shape[1]:  # Those of targets.
    mask_BxL = np.ones(targets_BxL.shape, bool)
  far = relative(ours['logits'][mask_BxL], theirs['logits'][mask_BxL])
  assert far < 1e-5, far
  equal = 0
  for mine, other in zip(ours['answers'], theirs['answers']):
    ends = np.flatnonzero(np.isin(mine, ours['eos']))
    length = ends[0] + 1 if ends.size else NEW_TOKENS
    np.testing.assert_array_equal(mine[:length], other[:length])
    assert ours['pad'] < 0 or (other[length:] == ours['pad']).all()
    equal += length
  losses = ''
  if ours['losses'].shape == theirs['losses'].shape:
    losses = f'{relative(ours["losses"], theirs["losses"]):.1e}'
  return [f'{far:.1e}', f'{equal} of {equal}', losses]


def same_configuration(source: pathlib.Path, exported: pathlib.Path) -> str:
  mine, other = (
    json.loads((folder / 'config.json').read_text())
    for folder in (exported, source)
  )
  changed = {k for k in mine.keys() & other.keys() if mine[k] != other[k]}
  return ', '.join(sorted(changed))


PAGE = """# Models checked by transformers

`scripts/check_hugging_face.sh` wrote this page with {versions}
on a CPU, in float32. Parameters are random, with deviation 0.3, so that tokens
differ in their experts and in what follows them.

* *Logits* is the largest difference divided by the largest logit, over {rows}
  sequences of unequal length; for a Switch these have 400, 250 and 31 inputs.
  The check fails from 1e-5 on.
* *Greedy* counts the tokens that equal those of `generate`, up to and with the
  end, for a batch of unequal prompts with at most {tokens} tokens each. Each
  model has its own tokens that pad, begin and end. One different token fails.
* *Losses* is the relative difference of what routers add to the loss over all
  layers: the balance loss, and for a Switch the z-loss too. It is empty where
  there is nothing to compare: transformers' Switch has no such loss in a stack
  whose blocks are all sparse, and our recipes may have other losses.
* *Import* reads a checkpoint of transformers here. *Export* is what
  `convert --to=hf` made of it, through a native checkpoint, read by
  transformers again.

{table}

`head_dim` was null and is written out. `gelu_pytorch_tanh` is written as
`gelu_new`, which is the same function. `expert_capacity` is a number that drops
no token.

The conversion's report lists what transformers would train otherwise:

{unsaid}
"""

if __name__ == '__main__':
  stage, folder, *more = sys.argv[1:]
  {'theirs': theirs, 'ours': ours, 'again': again}[stage](
    pathlib.Path(folder), *map(pathlib.Path, more)
  )
