"""Checkpoints of T5X and Hugging Face: in, out, and what is refused."""

import dataclasses
import json
import pathlib
import re
import shutil
import zipfile

import command
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tensorstore as ts
from converted import assert_same, params_of, refused, write_native
from flax import serialization
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paths import DATA

from sparse_experts import config, sharding
from sparse_experts.convert import (
  conversion,
  convert,
  hugging_face,
  load,
  t5x,
  tensor_map,
)
from sparse_experts.convert.architectures import ARCHITECTURES
from sparse_experts.convert.arguments import arguments, differences
from sparse_experts.data import dataset, prompts
from sparse_experts.data.special_tokens import SpecialTokens
from sparse_experts.inference import infer
from sparse_experts.models import layout
from sparse_experts.training import checkpoints

HF = ('hf_switch_tiny', 'hf_mixtral_tiny', 'hf_olmoe_tiny')
T5X = {'legacy': 'legacy_checkpoint_40', 'orbax': 'orbax_checkpoint_40'}


@pytest.fixture(scope='module')
def t5x_folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('t5x')
  with zipfile.ZipFile(DATA / 't5x_switch_tiny.zip') as archive:
    archive.extractall(folder)
  return folder


def compare_logits(path, expected):
  model, params = load(path)
  batch = dict(np.load(expected))
  logits = batch.pop('logits')
  got = jax.jit(model.logits)(params, batch)
  real = slice(None)
  if 'decoder_target_tokens' in batch:
    real = batch['decoder_target_tokens'] > 0
  np.testing.assert_allclose(np.asarray(got)[real], logits[real], atol=1e-4)


@pytest.mark.parametrize('name', HF)
def test_logits_of_hugging_face(name):
  compare_logits(DATA / name, DATA / name / 'expected.npz')


def as_generated(folder, name):
  """The checkpoint of `generated.npz`: one of HF with another config.json."""
  source = folder / name
  shutil.copytree(DATA / name, source)
  changes = json.loads((DATA / name / 'generated.json').read_text())
  if name == 'hf_mixtral_tiny':  # The file that has the last word.
    said = {k: changes.pop(k) for k in ('eos_token_id', 'bos_token_id')}
    (source / 'generation_config.json').write_text(json.dumps(said))
  found = json.loads((source / 'config.json').read_text())
  (source / 'config.json').write_text(json.dumps({**found, **changes}))
  if changes.get('tie_word_embeddings'):
    file = source / 'model.safetensors'
    tensors = safetensors.numpy.load_file(file)
    del tensors['lm_head.weight']
    safetensors.numpy.save_file(tensors, file)
  return source


@pytest.mark.parametrize('name', HF)
def test_writes_what_transformers_writes(name, tmp_path):
  """Logits, greedy answers to unequal prompts, and the routers' losses."""
  model, params = load(as_generated(tmp_path, name))
  special_tokens = model.special_tokens
  stored = np.load(DATA / name / 'generated.npz')
  lengths_B = stored['lengths']
  is_token_BxL = np.arange(lengths_B.max()) < lengths_B[:, None]
  tokens_BxL = np.where(is_token_BxL, stored['prompts'], special_tokens.pad)
  batch = {
    'decoder_input_tokens': tokens_BxL,
    'decoder_target_tokens': tokens_BxL,
  }
  if model.module.encoder is not None:
    shifted_BxT = np.insert(stored['targets'], 0, special_tokens.start, 1)
    batch = {
      'encoder_input_tokens': tokens_BxL,
      'decoder_input_tokens': shifted_BxT[:, :-1],
      'decoder_target_tokens': stored['targets'],
    }
    is_token_BxL = np.ones(stored['targets'].shape, bool)
  # Answers: a prompt is all that a decoder reads.
  begun = dataclasses.replace(special_tokens, start=None)
  features = dataclasses.replace(model.features, special_tokens=begun)
  asked = [
    features.prompt(row[:length], len(row))
    for row, length in zip(stored['prompts'], lengths_B)
  ]
  questions = {name: np.stack([a[name] for a in asked]) for name in asked[0]}
  # transformers' Switch counts padding in its losses: on what all rows have.
  without = dict(batch)
  if 'encoder_input_tokens' in batch:
    fewest = lengths_B.min()
    without['encoder_input_tokens'] = tokens_BxL[:, :fewest]

  @jax.jit
  def run(params):
    answers, _ = model.decode(params, questions, max_tokens=10)
    _, sums = model.loss(params, without, train=False)
    return model.logits(params, batch), answers, sums['aux_losses']

  logits, answers, losses = run(params)
  far = np.abs(np.asarray(logits) - stored['logits'])[is_token_BxL].max()
  assert far < 1e-5 * np.abs(stored['logits']).max()
  for ours, theirs in zip(np.asarray(answers), stored['answers']):
    ends = np.flatnonzero(special_tokens.is_eos(theirs))
    length = ends[0] + 1 if ends.size else len(theirs)
    np.testing.assert_array_equal(ours[:length], theirs[:length])
    assert (ours[length:] == special_tokens.pad).all()
    if special_tokens.pad >= 0:
      np.testing.assert_array_equal(ours, theirs)
  expected = {'load_balance': stored['losses'][0]}
  if 'encoder_input_tokens' in batch:  # Encoder's and decoder's, and z.
    of_encoder, of_decoder, *of_z = stored['losses']
    expected = {'load_balance': of_encoder + of_decoder, 'router_z': sum(of_z)}
  for loss, value in expected.items():
    np.testing.assert_allclose(losses[loss], value, rtol=1e-5, err_msg=loss)
  coefficients = {
    'hf_mixtral_tiny': {'load_balance': 0.03},
    'hf_olmoe_tiny': {'load_balance': 0.01},
    'hf_switch_tiny': {'load_balance': 0.001, 'router_z': 0.001},
  }
  assert model.loss_weights == coefficients[name]


def test_infer_answers_token_ids_as_transformers(tmp_path):
  """Of any task: its vocabulary, which the model has not, is not asked."""
  stored = np.load(DATA / 'hf_mixtral_tiny/generated.npz')
  convert(as_generated(tmp_path, 'hf_mixtral_tiny'), tmp_path / 'native')
  model = config.model_of((tmp_path / 'native/config.gin').read_text())
  rows = [
    row[:length].tolist()
    for row, length in zip(stored['prompts'], stored['lengths'])
  ]
  questions = tmp_path / 'questions.jsonl'
  questions.write_text(
    '\n'.join(json.dumps({'inputs': row}) for row in rows) + '\n'
  )
  sums = dataset.Dataset(
    'tiny_sums',
    {'inputs': 12, 'targets': 10},
    batch_size=8,
    pack=False,
    modules=['tiny_tasks'],
  )
  answers = infer.infer(model, str(tmp_path / 'native'), sums, input=questions)
  for answer, theirs in zip(answers, stored['answers'].tolist()):
    ends = [i + 1 for i, token in enumerate(theirs) if token in (134, 99)]
    assert answer['prediction'] == theirs[: min([*ends, 10])]
  questions.write_text('{"inputs": "a text"}\n')
  with pytest.raises(ValueError, match='359 token ids'):
    infer.infer(model, str(tmp_path / 'native'), sums, input=questions)


def test_texts_in_the_tokenizer_that_came_along(tmp_path, forget_new_tasks):
  """Its pieces are the numbers of ids: prompts are those of transformers."""
  tokenizers = pytest.importorskip('tokenizers')
  stored = np.load(DATA / 'hf_mixtral_tiny/generated.npz')
  source, native = as_generated(tmp_path, 'hf_mixtral_tiny'), tmp_path / 'ours'
  numbers = {str(i): i for i in range(160)}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, '0'))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokenizer.save(str(source / 'tokenizer.json'))
  (source / 'tokenizer_config.json').write_text('{"eos_token": "134"}')
  convert(source, native)
  config.parse(
    [f'{native}/config.gin', 'gin/runs/questions.gin'],
    [
      f"MODEL_DIR='{native}'",
      f"VOCABULARY='{native}/tokenizer.json'",
      "TASK_FEATURE_LENGTHS={'targets': 10}",
    ],
    [],
  )
  model = config.value('MODEL')
  texts = config.argument(infer.infer, 'dataset')
  model.check_data(texts)
  assert (stored['prompts'][:, 0] == 5).all()  # The model's start token.
  prompts_L = [
    row[:length] for row, length in zip(stored['prompts'], stored['lengths'])
  ]
  questions = [{'inputs': ' '.join(map(str, row[1:]))} for row in prompts_L]
  asked = prompts.of_file(questions, texts, model.features)
  for example, row in zip(asked, prompts_L, strict=True):
    tokens = example.features['decoder_input_tokens']
    real = example.features['decoder_causal_attention'] > 0
    assert tokens[real].tolist() == row.tolist()
  assert texts.text('targets', stored['answers'][1, :6]) == '33 33 33 33 33</s>'
  with pytest.raises(ValueError, match='has none, for texts that a command'):
    next(iter(texts.evaluation(model.features)))


@pytest.mark.parametrize('name', HF)
def test_what_config_json_says_survives(name, tmp_path):
  """Special tokens, coefficients and the tokenizer, there and back."""
  source = as_generated(tmp_path, name)
  (source / 'tokenizer.json').write_text('{"of": "transformers"}')
  (source / 'spiece.model').write_bytes(b'pieces')
  (source / 'README.md').write_text('no part of it')
  there = convert(source, tmp_path / 'native')
  back = convert(
    tmp_path / 'native/checkpoints/0', tmp_path / 'hf', target='hf'
  )
  assert back['unsaid'] == []
  for report, folder in ((there, 'native'), (back, 'hf')):
    assert report['tokenizer'] == ['spiece.model', 'tokenizer.json']
    assert (tmp_path / folder / 'spiece.model').read_bytes() == b'pieces'
    assert not (tmp_path / folder / 'README.md').exists()
  theirs = json.loads((source / 'config.json').read_text())
  if (source / 'generation_config.json').exists():
    theirs |= json.loads((source / 'generation_config.json').read_text())
  ours = json.loads((tmp_path / 'hf/config.json').read_text())
  generation = json.loads((tmp_path / 'hf/generation_config.json').read_text())
  keys = [
    'eos_token_id',
    'pad_token_id',
    'bos_token_id',
    'router_aux_loss_coef',
  ]
  keys += ['max_position_embeddings']
  if name == 'hf_switch_tiny':
    keys[2:] = ['decoder_start_token_id', 'router_aux_loss_coef']
    keys += ['router_z_loss_coef', 'router_jitter_noise', 'dropout_rate']
  assert {k: ours[k] for k in keys} == {k: theirs[k] for k in keys}
  assert generation == {
    k: theirs[k]
    for k in keys
    if k.endswith('token_id') and theirs[k] is not None
  }


def test_losses_and_noise_of_a_switch(tmp_path):
  source = edited(tmp_path, 'hf_switch_tiny', lambda tensors: None)
  file = source / 'config.json'
  found = json.loads(file.read_text())
  changes = {
    'router_aux_loss_coef': 0.02,
    'router_z_loss_coef': 0.0,
    'router_jitter_noise': 0.03,
    'dropout_rate': 0.04,
  }
  file.write_text(json.dumps({**found, **changes}))
  model, _ = load(source)
  assert model.loss_weights == {'load_balance': 0.02}
  assert (model.layer_reduction, model.z_loss) == ('joint', 0.0)
  values = arguments(model)
  for stack in ('encoder', 'decoder'):
    block = f'{stack}.make_block'
    assert values[f'{block}.make_moe.make_router.jitter'] == 0.03
    assert values[f'{block}.dropout_rate'] == 0.04
    assert values[f'{block}.make_moe.make_expert.dropout_rate'] == 0.04
  # Without a step transformers has one sparse block, the second, though
  # num_sparse_encoder_layers says none; absent values are its class's.
  for key in (*changes, 'encoder_sparse_step'):
    del found[key]
  found['num_sparse_encoder_layers'] = 0
  said = hugging_face._gin(found)
  values = arguments(config.model_of(said))
  assert list(values['encoder.sparse_layers']) == [1]
  assert values['encoder.make_block.dropout_rate'] == 0.1
  assert values['encoder.make_block.make_moe.make_router.jitter'] == 0.01


def test_no_expert_of_an_exported_switch_is_full(tmp_path):
  convert(DATA / 'hf_switch_tiny', tmp_path / 'native')
  convert(tmp_path / 'native', tmp_path / 'hf', target='hf')
  found = json.loads((tmp_path / 'hf/config.json').read_text())
  assert found['expert_capacity'] == 2**31 - 1


QUICKSTART = """
include 'gin/quickstart.gin'
NUM_EMBEDDINGS = 8
EMBED_DIM = 8
MLP_DIM = 4
"""


def test_a_layout_that_config_json_says_after_blocks_of_zeros(tmp_path):
  """The quickstart's: the first block is sparse, and not all are."""
  ours = write_native(tmp_path / 'native', QUICKSTART, seed=0)
  report = convert(tmp_path / 'native', tmp_path / 'hf', target='hf')
  assert report['added'] == [
    '1 block of zeros before those of the encoder',
    '1 block of zeros before those of the decoder',
  ]
  found = json.loads((tmp_path / 'hf/config.json').read_text())
  assert found['num_layers'] == found['num_decoder_layers'] == 3
  for stack in ('encoder', 'decoder'):
    assert found[f'num_sparse_{stack}_layers'] == 1
    assert found[f'{stack}_sparse_step'] == 3  # Of 0, 1, 2 that is 1.
  tensors = safetensors.numpy.load_file(tmp_path / 'hf/model.safetensors')
  bias = 'SelfAttention.relative_attention_bias'  # Of a stack, in its first.
  zeros = [n for n in tensors if '.block.0.' in n and bias not in n]
  # An attention has 4 and its norm, an FFN 2 and its norm.
  assert len(zeros) == (5 + 3) + (5 + 5 + 3)
  assert not any(tensors[name].any() for name in zeros)
  random = np.random.default_rng(1)
  tokens_BxL = random.integers(2, 8, (3, 9))
  batch = {
    'encoder_input_tokens': tokens_BxL,
    'decoder_input_tokens': np.insert(tokens_BxL, 0, 0, 1)[:, :-1],
    'decoder_target_tokens': tokens_BxL,
  }
  _, params = load(tmp_path / 'native')
  logits = jax.jit(ours.logits)(params, batch)
  theirs, params = load(tmp_path / 'hf')
  assert theirs.module.encoder.num_layers == 3
  np.testing.assert_allclose(
    jax.jit(theirs.logits)(params, batch), logits, rtol=1e-5, atol=1e-5
  )


def test_which_layouts_need_a_block_before():
  before = ARCHITECTURES['switch_transformers'].blocks_before
  # The format's: sparse are blocks 1, 1 + n, 1 + 2 n and so on, all, or none.
  for kinds, number in {
    (True, False): 1,
    (True, False, True): 1,  # 1 and 3 of 4.
    (True, False, False, True): 1,  # 1 and 4 of 5.
    (False, True): 0,
    (False, True, False, True): 0,
    (True, True): 0,
    (False, False): 0,
    (False, False, True): 0,  # And none helps:
    (True, True, False): 0,
    (True, False, True, False, False, False): 0,
  }.items():
    assert before(kinds) == number, kinds
  assert ARCHITECTURES['mixtral'].blocks_before((True, False)) == 0


def test_what_training_says_that_config_json_cannot(tmp_path):
  wrong = 'NUM_LAYERS = 3\nSPARSE_LAYERS = (2,)\n'
  write_native(tmp_path / 'native', QUICKSTART + wrong, seed=0)
  refused(
    tmp_path / 'native',
    tmp_path,
    'sparse_layers is (False, False, True) and would be (False, True, False)',
    'every n-th from the first or second on',
    target='hf',
  )
  shutil.rmtree(tmp_path / 'native')
  write_native(
    tmp_path / 'native', QUICKSTART + 'SPARSE_LAYERS = (1,)\n', seed=0
  )
  report = convert(
    tmp_path / 'native', tmp_path / 'hf', target='hf', dry_run=True
  )
  assert report['unsaid'] == [
    "layer_reduction 'sum', there 'joint'",
    'capacity_factor_train 2.0, there 1.25',
    'z_loss 0.0001, there 0.0',
  ]


# But for SCALED_ATTENTION.
TINY_MIXTRAL = """
include 'gin/models/decoder_only.gin'
include 'gin/routers/mixtral.gin'
NUM_EMBEDDINGS = 8
NUM_LAYERS = 1
EMBED_DIM = 8
NUM_HEADS = 2
HEAD_DIM = 4
MLP_DIM = 4
NUM_EXPERTS = 2
SPARSE_LAYERS = 1
SHARED_BIAS = None
ACTIVATION = 'silu'
ROTARY_BASE = 1e4
"""


def test_special_tokens_of_our_own_decoders(tmp_path):
  gin_text = TINY_MIXTRAL + 'SCALED_ATTENTION = True\n'
  write_native(tmp_path / 'native', gin_text, seed=0)
  report = convert(tmp_path / 'native', tmp_path / 'hf', target='hf')
  # It pads and begins with 0, which it never writes, and ends with 1.
  assert json.loads((tmp_path / 'hf/generation_config.json').read_text()) == {
    'bos_token_id': 0,
    'eos_token_id': 1,
    'pad_token_id': 0,
    'suppress_tokens': [0],
  }
  found = json.loads((tmp_path / 'hf/config.json').read_text())
  assert found['max_position_embeddings'] == 4096 * 32
  assert found['router_aux_loss_coef'] == 0.02
  assert report['unsaid'] == [
    'capacity_factor_train 1.25, there None',
    'z_loss 0.0001, there 0.0',
    'max_length None, there 131072',
  ]
  convert(tmp_path / 'hf', tmp_path / 'again')
  model = config.model_of((tmp_path / 'again/config.gin').read_text())
  assert model.special_tokens == SpecialTokens()
  # Tied logits of ours are scaled, and those of the format are not.
  write_native(tmp_path / 'tied', gin_text + 'TIED_LOGITS = True\n', seed=0)
  refused(tmp_path / 'tied', tmp_path, 'SCALED_LOGITS = False', target='hf')


def test_what_formats_have_of_the_table_of_tokens(tmp_path):
  gin_text = '\n'.join(
    [
      "include 'gin/models/encoder_decoder.gin'",
      "include 'gin/routers/switch.gin'",
      'NUM_EMBEDDINGS = 8',
      'NUM_LAYERS = 2',
      'EMBED_DIM = 8',
      'NUM_HEADS = 2',
      'HEAD_DIM = 4',
      'MLP_DIM = 4',
      'NUM_EXPERTS = 2',
      'SPARSE_LAYERS = 2',
      'GATED = False',
      "ACTIVATION = 'relu'",
      'TIED_LOGITS = False',
    ]
  )
  # T5X's have neither other padding nor logits against the bare table.
  for more, *words in [
    ('PAD_ID = 3', 'pads with 3'),
    ('START_ID = 2', 'begins with 2'),
    ('TIED_LOGITS = True\nSCALED_LOGITS = False', 'sqrt(EMBED_DIM)'),
  ]:
    write_native(tmp_path / 'native', f'{gin_text}\n{more}', seed=0)
    refused(tmp_path / 'native', tmp_path, *words, target='t5x')
    shutil.rmtree(tmp_path / 'native')
  write_native(tmp_path / 'native', gin_text, seed=0)
  report = convert(tmp_path / 'native', tmp_path / 'hf', target='hf')
  # Three tables and a matrix of logits, 8 x 8 each, are two more than there.
  assert report['bytes'] == 4 * (report['parameters'] + 2 * 8 * 8)
  tensors = safetensors.numpy.load_file(tmp_path / 'hf/model.safetensors')
  for stack in ('encoder', 'decoder'):
    np.testing.assert_array_equal(
      tensors[f'{stack}.embed_tokens.weight'], tensors['shared.weight']
    )
  assert (tensors['lm_head.weight'] != tensors['shared.weight']).any()
  report = convert(tmp_path / 'hf', tmp_path / 'again')
  assert len(report['unused']) == 2
  assert_same(params_of(tmp_path / 'native'), params_of(tmp_path / 'again'))


@pytest.mark.parametrize('name', T5X)
def test_logits_of_t5x(name, t5x_folder):
  compare_logits(t5x_folder / T5X[name], t5x_folder / f'expected_{name}.npz')


@pytest.mark.parametrize('name', HF)
def test_to_native_and_back_to_hugging_face(name, tmp_path):
  scan = ['SCAN=True'] if name == 'hf_switch_tiny' else []
  there = convert(DATA / name, tmp_path / 'native', bindings=scan)
  back = convert(tmp_path / 'native', tmp_path / 'hf', target='hf')
  assert there['sha256'] == back['sha256']
  assert there['unused'] == there['missing'] == []
  assert_same(
    safetensors.numpy.load_file(DATA / name / 'model.safetensors'),
    safetensors.numpy.load_file(tmp_path / 'hf' / 'model.safetensors'),
  )
  # What we write of the architecture is what transformers wrote.
  ours, theirs = (
    json.loads((folder / 'config.json').read_text())
    for folder in (tmp_path / 'hf', DATA / name)
  )
  free = {'expert_capacity', 'rope_parameters', 'head_dim'}
  shared = ours.keys() & theirs.keys() - free
  assert {k: ours[k] for k in shared} == {k: theirs[k] for k in shared}


@pytest.mark.parametrize('name', T5X)
def test_to_native_and_back_to_t5x(name, t5x_folder, tmp_path):
  there = convert(t5x_folder / T5X[name], tmp_path / 'native')
  assert there['step'] == 40 and there['unused'] == ['state']
  convert(tmp_path / 'native', tmp_path / 't5x', target='t5x')
  convert(tmp_path / 't5x', tmp_path / 'again', source='t5x')
  assert_same(params_of(tmp_path / 'native'), params_of(tmp_path / 'again'))
  written = tmp_path / 't5x' / 'checkpoint_40'
  if name == 'legacy':  # The same folders of arrays, with the same numbers.
    arrays = list((t5x_folder / T5X[name]).glob('target.*'))
    assert {p.name for p in arrays} == {
      p.name for p in written.glob('target.*')
    }
    for path in arrays:
      ours, theirs = (read_zarr(p) for p in (path, written / path.name))
      np.testing.assert_array_equal(ours, theirs, err_msg=path.name)
    ours, theirs = (
      serialization.msgpack_restore((folder / 'checkpoint').read_bytes())
      for folder in (written, t5x_folder / T5X[name])
    )
    ours, theirs = (
      tree['optimizer']['state']['step'] for tree in (ours, theirs)
    )
    assert ours.dtype == theirs.dtype and ours == theirs == 40


def read_zarr(path):
  spec = {'driver': 'zarr', 'kvstore': {'driver': 'file', 'path': f'{path}/'}}
  return ts.open(spec).result().read().result()


def test_scan_is_layouts_roll(tmp_path):
  convert(DATA / 'hf_mixtral_tiny', tmp_path / 'plain')
  convert(tmp_path / 'plain', tmp_path / 'scan', bindings=['SCAN=True'])
  convert(tmp_path / 'scan', tmp_path / 'again', bindings=['SCAN=False'])
  plain, _ = checkpoints.load_params(tmp_path / 'plain')
  decoder = layout.roll(plain['decoder'], layout.kinds(3, 1))
  rolled = checkpoints.flatten({**plain, 'decoder': decoder})
  assert_same(params_of(tmp_path / 'scan'), rolled)
  assert_same(params_of(tmp_path / 'again'), checkpoints.flatten(plain))


def test_scanned_checkpoints_of_t5x(tmp_path):
  convert(DATA / 'hf_switch_tiny', tmp_path / 'native')
  convert(tmp_path / 'native', tmp_path / 't5x', target='t5x')
  stored, _, _ = t5x._legacy(tmp_path / 't5x/checkpoint_0')
  arrays = {name: tensor.read(()) for name, tensor in stored.items()}
  # Blocks 0 and 2, and 1 and 3, along axis 1, as flaxformer's scan has them.
  scanned = {}
  for name, array in arrays.items():
    match = re.fullmatch(r'(\w+)/layers_([01])/(.*)', name)
    if match:
      stack, i, rest = match[1], int(match[2]), match[3]
      later = arrays[f'{stack}/layers_{i + 2}/{rest}']
      array = np.stack([array, later], axis=1)
      scanned[f'{stack}/{stack}/subblock_{i}/{rest}'] = array
    elif '/layers_' not in name:
      scanned[name] = array
  shapes = {name: array.shape for name, array in scanned.items()}
  writer = t5x.Writer(
    tensor_map.Target(tmp_path / 'scanned', None, shapes, shapes, step=7)
  )
  for name, array in scanned.items():
    writer.write(name, (), array)
  writer.finish((tmp_path / 't5x/model.gin').read_text())
  report = convert(tmp_path / 'scanned', tmp_path / 'again')
  assert report['step'] == 7
  assert_same(params_of(tmp_path / 'native'), params_of(tmp_path / 'again'))


def test_other_models_of_flaxformer(t5x_folder, tmp_path):
  """ST-MoE's extra FFNs, and experts that choose, from T5X's configuration."""
  text = (t5x_folder / 'operative_config.gin').read_text()
  text = text.replace(
    '@sparse_encoder/routing.TokensChooseMaskedRouter()',
    '@sparse_encoder/routing.ExpertsChooseMaskedRouter()',
  )
  text = text.replace("('relu',)", "('gelu', 'linear')")
  text = text.replace(
    'output_logits_factory = None', 'output_logits_factory = 3'
  )
  text = text.replace('NUM_SELECTED_EXPERTS = 1', 'NUM_SELECTED_EXPERTS = 2')
  text = text.replace(
    'TRAIN_EXPERT_CAPACITY_FACTOR = 1.25', 'TRAIN_EXPERT_CAPACITY_FACTOR = 2.0'
  )
  for stack in ('Encoder', 'Decoder'):
    text += (
      f'\nmoe_architecture.Sparse{stack}Layer.extra_mlp = @dense.MlpBlock()'
    )
  (tmp_path / 'config.gin').write_text(text)
  described = t5x.gin(tmp_path)
  model = config.model_of(described)
  found = arguments(model)
  assert found['encoder.make_block.make_moe.make_router'] == 'ExpertChoice'
  assert found['decoder.make_block.make_moe.make_router.k'] == 2
  assert found['decoder.make_block.make_moe.make_router.gates'] == 'all'
  assert not found['tied_logits']
  write_native(tmp_path / 'native', described, seed=1)
  convert(tmp_path / 'native', tmp_path / 't5x', target='t5x')
  (tmp_path / 't5x/model.gin').unlink()
  shutil.copy(tmp_path / 'config.gin', tmp_path / 't5x')
  names = {p.name for p in (tmp_path / 't5x/checkpoint_0').iterdir()}
  assert 'target.decoder.logits_dense.kernel' in names
  assert 'target.encoder.layers_1.extra_mlp.wi_1.kernel' in names
  convert(tmp_path / 't5x', tmp_path / 'again')
  assert_same(params_of(tmp_path / 'native'), params_of(tmp_path / 'again'))


MODELS = {
  'switch_transformers': ('switch', 'encoder_decoder', ''),
  'mixtral': ('mixtral', 'decoder_only', 'SHARED_BIAS = None'),
  'olmoe': ('olmoe', 'decoder_only', 'SHARED_BIAS = None'),
}


@st.composite
def recipes(draw):
  """A gin file of a small model that one of the architectures can say."""
  kind = draw(st.sampled_from(sorted(MODELS)))
  router, base, more = MODELS[kind]
  heads = draw(st.sampled_from([1, 2, 4]))
  width = draw(st.sampled_from([2, 6]))
  lines = [
    f"include 'gin/models/{base}.gin'",
    f"include 'gin/routers/{router}.gin'",
    f'NUM_EMBEDDINGS = {draw(st.integers(3, 40))}',
    f'NUM_LAYERS = {draw(st.integers(2, 4))}',
    f'NUM_HEADS = {heads}',
    f'HEAD_DIM = {width}',
    f'EMBED_DIM = {heads * width if kind == "olmoe" else 10}',
    f'MLP_DIM = {draw(st.integers(1, 12))}',
    f'NUM_EXPERTS = {draw(st.integers(2, 5))}',
    f'NORM_EPSILON = {draw(st.sampled_from([1e-5, 1e-6]))}',
    more,
  ]
  if kind == 'switch_transformers':
    lines += [
      f'SPARSE_LAYERS = {draw(st.sampled_from([1, 2]))}',
      'GATED = False',
      f"ACTIVATION = '{draw(st.sampled_from(['relu', 'gelu']))}'",
      f'TIED_LOGITS = {draw(st.booleans())}',
    ]
  else:
    divisors = [n for n in (1, 2, 4) if heads % n == 0]
    lines += [
      f'NUM_KV_HEADS = {draw(st.sampled_from(divisors))}',
      f'ROTARY_BASE = {draw(st.sampled_from([1e4, 1e6]))}',
      'SPARSE_LAYERS = 1',
      'SCALED_ATTENTION = True',
      "ACTIVATION = 'silu'",
      f'ATTENTION_NORM = {kind == "olmoe"}',
    ]
  return kind, '\n'.join(lines)


@settings(
  max_examples=3,
  deadline=None,
  suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(recipe=recipes(), seed=st.integers(0, 99))
def test_any_small_model_survives_hugging_face(tmp_path_factory, recipe, seed):
  kind, gin_text = recipe
  folder = tmp_path_factory.mktemp('any')
  write_native(folder / 'native', gin_text, seed)
  convert(folder / 'native', folder / 'hf', target='hf')
  assert (
    json.loads((folder / 'hf/config.json').read_text())['model_type'] == kind
  )
  convert(folder / 'hf', folder / 'again')
  assert_same(params_of(folder / 'native'), params_of(folder / 'again'))
  before, after = (
    config.model_of((folder / name / 'config.gin').read_text())
    for name in ('native', 'again')
  )
  assert differences(before, after) == {}


def test_restores_onto_any_mesh(tmp_path):
  convert(DATA / 'hf_mixtral_tiny', tmp_path / 'native')
  saved = params_of(tmp_path / 'native')
  model = load(tmp_path / 'native')[0]
  tokens = jax.ShapeDtypeStruct((8, 2), np.int32)
  names = ('decoder_input_tokens', 'decoder_target_tokens')
  for data, expert, columns in [(2, 4, 1), (2, 2, 2), (8, 1, 1)]:
    mesh = sharding.make_mesh(data, expert, columns)
    with sharding.use_mesh(mesh):
      boxed = jax.eval_shape(
        lambda: model.init(jax.random.key(0), dict.fromkeys(names, tokens))
      )
      placed = sharding.shardings(boxed, mesh)
      params, step = checkpoints.load_params(tmp_path / 'native', boxed, placed)
    assert step == 0
    wi = params['decoder']['layers_0']['moe']['expert']['wi_0']['kernel']
    # 4 experts of 32 x 64, the last axis over `model`.
    part = wi.addressable_shards[0].data
    assert part.shape == (4 // expert, 32, 64 // columns)
    on_host = jax.tree.map(np.asarray, params)
    assert_same(checkpoints.flatten(on_host), saved)


@pytest.mark.parametrize(
  ('recipe', 'k'), [('switch/base', 1), ('st_moe/base', 2), ('olmoe/1b_7b', 8)]
)
def test_a_model_bound_now_is_the_one_gin_builds(recipe, k):
  """Gin's record of what it built, parsed again, gives the same model."""
  config.parse([f'gin/models/{recipe}.gin'], ['SCAN=False', 'NUM_LAYERS=4'], [])
  bound, built = config.model(), config.value('MODEL')
  tokens = jax.ShapeDtypeStruct((2**13 * 57, 8), np.int32)  # Whole groups.
  stacks = ('encoder', 'decoder') if bound.module.encoder else ('decoder',)
  names = [f'{stack}_input_tokens' for stack in stacks]
  batch = dict.fromkeys([*names, 'decoder_target_tokens'], tokens)
  jax.eval_shape(lambda: built.init(jax.random.key(0), batch))
  recorded = config.operative()
  config.parse(['gin/models/mixtral/8x7b.gin'], [], [])
  found = arguments(bound)  # Whatever is parsed meanwhile.
  assert found['decoder.num_layers'] == 4
  assert found['decoder.make_block.make_moe.make_router.k'] == k
  assert differences(bound, config.model_of(recorded)) == {}
  config.parse([f'gin/models/{recipe}.gin'], ['SCAN=False', 'NUM_LAYERS=5'], [])
  changed = set(differences(bound, config.model()))
  assert {path.rpartition('.')[2] for path in changed} <= {
    'num_layers',
    'sparse_layers',
  }
  assert 'decoder.num_layers' in changed


# What is refused.


def edited(tmp_path, name, edit):
  """A copy of a Hugging Face checkpoint with its tensors edited."""
  folder = tmp_path / name
  shutil.copytree(DATA / name, folder)
  file = folder / 'model.safetensors'
  tensors = safetensors.numpy.load_file(file)
  edit(tensors)
  safetensors.numpy.save_file(tensors, file)
  return folder


WI = 'encoder.block.1.layer.1.mlp.experts.expert_2.wi.weight'


def test_renamed_tensor(tmp_path):
  def rename(tensors):
    tensors['encoder.block.1.new.name'] = tensors.pop(WI)

  folder = edited(tmp_path, 'hf_switch_tiny', rename)
  refused(folder, tmp_path, WI, 'encoder.block.1.new.name')


def test_missing_tensor(tmp_path):
  folder = edited(tmp_path, 'hf_switch_tiny', lambda tensors: tensors.pop(WI))
  refused(folder, tmp_path, 'lacks', WI)


@pytest.mark.parametrize('dtype', [np.float16, ml_dtypes.bfloat16, np.int32])
def test_tensor_of_another_dtype(tmp_path, dtype):
  def narrow(tensors):
    tensors[WI] = tensors[WI].astype(dtype)

  refused(edited(tmp_path, 'hf_switch_tiny', narrow), tmp_path, WI, 'float32')


def test_tensor_of_another_shape(tmp_path):
  def transpose(tensors):
    tensors[WI] = np.ascontiguousarray(tensors[WI].T)

  folder = edited(tmp_path, 'hf_switch_tiny', transpose)
  refused(folder, tmp_path, WI, '(32, 64)', '(64, 32)')


def test_truncated_safetensors(tmp_path):
  folder = edited(tmp_path, 'hf_mixtral_tiny', lambda tensors: None)
  file = folder / 'model.safetensors'
  file.write_bytes(file.read_bytes()[:-4])
  header = file.read_bytes()
  names = json.loads(header[8 : 8 + int.from_bytes(header[:8], 'little')])
  last = max(names, key=lambda name: names[name]['data_offsets'])
  refused(folder, tmp_path, last, 'truncated')


def test_a_copy_that_differs(tmp_path):
  def untie(tensors):
    tensors['lm_head.weight'] = tensors['shared.weight'] + 1

  folder = edited(tmp_path, 'hf_switch_tiny', untie)
  refused(folder, tmp_path, 'lm_head.weight', 'shared.weight')


def test_a_copy_that_does_not(tmp_path):
  def tie(tensors):
    tensors['lm_head.weight'] = tensors['shared.weight'].copy()

  folder = edited(tmp_path, 'hf_switch_tiny', tie)
  report = convert(folder, tmp_path / 'output')
  assert report['unused'] == ['lm_head.weight']


def test_config_of_something_else(tmp_path):
  folder = edited(tmp_path, 'hf_mixtral_tiny', lambda tensors: None)
  file = folder / 'config.json'
  known = json.loads(file.read_text())
  for change, *words in [
    ({'sliding_window': 4}, 'sliding_window=4'),
    ({'hidden_act': 'mish'}, "hidden_act='mish'", 'gelu_pytorch_tanh'),
    ({'model_type': 'llama'}, 'llama', 'mixtral'),
    ({'num_hidden_layers': 2}, 'unknown', 'model.layers.2.'),
    ({'rope_parameters': {'rope_type': 'yarn'}}, 'yarn'),
  ]:
    file.write_text(json.dumps({**known, **change}))
    refused(folder, tmp_path, *words)
  del known['hidden_size']
  file.write_text(json.dumps(known))
  refused(folder, tmp_path, 'hidden_size')


KERNEL = 'target.encoder.layers_1.mlp.expert.wi.kernel'


def test_damaged_legacy_checkpoints(t5x_folder, tmp_path):
  def copy(name):
    shutil.copytree(t5x_folder / T5X['legacy'], tmp_path / name)
    shutil.copy(t5x_folder / 'operative_config.gin', tmp_path)
    return tmp_path / name, tmp_path / name / KERNEL

  plain = KERNEL.removeprefix('target.').replace('.', '/')
  source, array = copy('truncated')
  chunk = array / '0.0.0'
  chunk.write_bytes(chunk.read_bytes()[:-100])
  refused(source, tmp_path, plain, 'damaged')
  chunk.unlink()
  refused(source, tmp_path, plain, 'damaged')
  source, array = copy('renamed')
  array.rename(array.with_name('target.new'))
  refused(source, tmp_path, plain)
  source, array = copy('dtype')
  metadata = (array / '.zarray').read_text()
  (array / '.zarray').write_text(metadata.replace('<f4', '<i4'))
  refused(source, tmp_path, plain, 'int32')
  source, array = copy('shape')
  (array / '.zarray').write_text(metadata.replace('[8,64,128]', '[8,64,64]'))
  refused(source, tmp_path, plain, '(8, 64, 64)', '(8, 64, 128)')


def test_damaged_orbax_checkpoint(t5x_folder, tmp_path):
  source = tmp_path / 'orbax'
  shutil.copytree(t5x_folder / T5X['orbax'], source)
  shutil.copy(t5x_folder / 'operative_config.gin', tmp_path)
  files = (source / 'state/ocdbt.process_0/d').iterdir()
  data = max(files, key=lambda path: path.stat().st_size)
  data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
  refused(source, tmp_path, 'tensor ', 'damaged')


def test_a_model_that_nobody_knows(t5x_folder, tmp_path):
  source = tmp_path / 'alone' / 'legacy'
  shutil.copytree(t5x_folder / T5X['legacy'], source)
  refused(source, tmp_path, 'config.gin', '--gin_file')
  other = 'gin/models/switch/base.gin'
  refused(source, tmp_path, 'layers_10', gin_files=[other])


def test_what_a_format_cannot_say(tmp_path):
  write_native(tmp_path / 'native', TINY_MIXTRAL, seed=0)
  refused(tmp_path / 'native', tmp_path, 'scaled', target='hf')
  refused(
    tmp_path / 'native',
    tmp_path,
    'make_router.k',
    bindings=['NUM_EXPERTS=2', 'top_k.TopK.k=1'],
  )


# Interruptions, and the command.


def test_goes_on_after_an_interruption(tmp_path, monkeypatch):
  source = DATA / 'hf_olmoe_tiny'
  whole = convert(source, tmp_path / 'whole')
  read, calls = tensor_map.read, []

  def interrupted(*args):
    calls.append(args)
    if len(calls) > 10:
      raise KeyboardInterrupt
    return read(*args)

  with monkeypatch.context() as patch:
    patch.setattr(conversion.tensor_map, 'read', interrupted)
    with pytest.raises(KeyboardInterrupt):
      convert(source, tmp_path / 'output')
  assert not (tmp_path / 'output').exists()
  with pytest.raises(ValueError, match='another conversion'):
    convert(source, tmp_path / 'output', target='hf')
  report = convert(source, tmp_path / 'output')
  assert report['resumed'] == 10 and report['sha256'] == whole['sha256']
  assert_same(params_of(tmp_path / 'whole'), params_of(tmp_path / 'output'))
  assert sorted(p.name for p in tmp_path.iterdir()) == ['output', 'whole']


def test_command(tmp_path):
  flags = ('convert', '--from=hf', f'--input={DATA / "hf_olmoe_tiny"}')
  output = f'--output={tmp_path / "output"}'
  outcome = command.run(*flags, output, '--dry_run', '--json')
  assert outcome.code == 0 and not list(tmp_path.iterdir())
  outcome = command.run(*flags, output, '--gin.SCAN=True', '--json')
  assert outcome.code == 0, outcome.stderr
  report = json.loads(outcome.stdout)
  # Both embeddings 2 x 160 x 32; a layer: attention 2 x 32 x 32 and 2 x 32 x
  # 16, its norms 32 + 16, other norms 2 x 32, router 32 x 4, experts 4 x 3 x 32
  # x 64; the last norm.
  layer = 2 * 32 * 32 + 2 * 32 * 16 + 48 + 64 + 128 + 4 * 3 * 32 * 64
  assert report['parameters'] == 2 * 160 * 32 + 3 * layer + 32
  assert report['bytes'] == 4 * report['parameters']
  outcome = command.run(
    'inspect', f'--checkpoint={tmp_path / "output"}', '--json'
  )
  facts = json.loads(outcome.stdout)
  assert facts['total_params'] == report['parameters']
  name = 'decoder/period/layers_0/moe/expert/wo/kernel'
  assert facts['tree'][name] == [3, 4, 64, 32]
  outcome = command.run(*flags, output)
  assert outcome.code == 2
  assert outcome.stderr.startswith('error: ') and 'another' in outcome.stderr


def test_page(monkeypatch):
  monkeypatch.chdir(DATA.parent.parent)
  page = pathlib.Path('docs/checkpoints.md').read_text()
  (example,) = re.findall(r'```python\n(.*?)```', page, re.DOTALL)
  names = {}
  exec(compile(example, 'checkpoints.md', 'exec'), names)
  assert names['logits_BxLxV'].shape == (1, 4, 160)
  report = names['report']
  assert [report[name] for name in ('parameters', 'unused', 'missing')] == [
    93792,
    [],
    [],
  ]
  assert (pathlib.Path(names['output']) / 'config.gin').exists()


@pytest.mark.parametrize('name', ['hf_mixtral_tiny', 'hf_olmoe_tiny'])
def test_one_renormalised_choice_decodes(tmp_path, name):
  # Its gate is 1, from which a router learns nothing: the model says so itself.
  folder = tmp_path / name
  shutil.copytree(DATA / name, folder)
  file = folder / 'config.json'
  found = json.loads(file.read_text())
  file.write_text(
    json.dumps({**found, 'num_experts_per_tok': 1, 'norm_topk_prob': True})
  )
  model, params = load(folder)
  router = model.module.decoder.make_block.keywords['make_moe'].keywords[
    'make_router'
  ]()
  assert (router.k, router.gates) == (1, 'chosen')
  assert router.allow_no_gradient
  logits = jax.eval_shape(
    model.logits, params, {'tokens': np.ones((1, 3), int)}
  )
  assert logits.shape[:2] == (1, 3)
