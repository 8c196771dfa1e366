"""Fine-tuning: where a run begins, what it trains, and how it is judged."""

import functools
import json
import math
import os
import re
import shutil

import command
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from paths import ROOT

from sparse_experts import config
from sparse_experts.commands import evaluate as evaluate_command
from sparse_experts.evaluation import evaluate
from sparse_experts.training import optimizers, subsets, train


@pytest.fixture(scope='module')
def pretrained(tmp_path_factory):
  """MODEL_DIR of a run of two steps."""
  model_dir = tmp_path_factory.mktemp('pretrained')
  command.train(model_dir, '--gin.TRAIN_STEPS=2')
  return model_dir


@pytest.fixture(scope='module')
def finetuned(pretrained, tmp_path_factory):
  """Steps 1 to 3 of a run from there that trains attention."""
  model_dir = tmp_path_factory.mktemp('finetuned')
  command.train(
    model_dir,
    f'--gin_file={ROOT}/gin/finetune/subset.gin',
    '--gin.TRAINED=attention',
    f'--gin.INITIAL_CHECKPOINT={pretrained}',
    '--gin.TRAIN_STEPS=3',
    '--gin.CHECKPOINT_PERIOD=1',
    '--gin.KEEP_CHECKPOINTS=None',
    '--gin.BASE_LEARNING_RATE=1.0',
  )
  return model_dir


def params_of(model_dir, step):
  return {
    name.removeprefix('params/'): array
    for name, array in command.saved(model_dir, step).items()
    if name.startswith('params/')
  }


# Where a run begins.


def test_a_run_begins_with_the_checkpoint_and_a_fresh_optimizer(
  pretrained, tmp_path
):
  command.train(
    tmp_path,
    f'--gin.train.train.initial_checkpoint={pretrained}',
    '--gin.TRAIN_STEPS=1',
    '--gin.BASE_LEARNING_RATE=0.0',
  )
  before, after = command.saved(pretrained, 2), command.saved(tmp_path, 1)
  assert int(after['optimizer/step']) == 1
  assert int(after['optimizer/opt_state/0/step']) == 1
  command.assert_same_bits(params_of(pretrained, 2), params_of(tmp_path, 1))
  assert int(before['optimizer/opt_state/0/step']) == 2


@pytest.mark.parametrize(
  'arguments,message',
  [
    (('INITIAL_CHECKPOINT=/nowhere',), 'no complete checkpoint in /nowhere'),
    (('NUM_EXPERTS=2',), 'is of another architecture'),
    (('TRAINED=nothing',), "trained='nothing' matches no parameter"),
    (('TRAINED=(',), "not '('"),
  ],
)
def test_bad_beginnings(arguments, message, pretrained, tmp_path):
  outcome = command.run(
    'train',
    command.TINY,
    f'--gin_file={ROOT}/gin/finetune/subset.gin',
    f'--gin.MODEL_DIR={tmp_path}',
    f'--gin.INITIAL_CHECKPOINT={pretrained}',
    '--gin.TRAINED=all',
    *(f'--gin.{argument}' for argument in arguments),
  )
  assert (outcome.code, outcome.stdout) == (2, '')
  assert outcome.stderr.startswith('error: ') and message in outcome.stderr
  assert outcome.stderr.count('\n') == 1


# What is trained.


def test_frozen_parameters_keep_every_bit(pretrained, finetuned):
  before, after = params_of(pretrained, 2), params_of(finetuned, 3)
  assert before.keys() == after.keys()
  moved = {
    name for name in before if before[name].tobytes() != after[name].tobytes()
  }
  assert moved == {name for name in before if '/attention/' in name}


def test_frozen_parameters_have_no_optimizer_state(finetuned):
  moments = [
    name for name in command.saved(finetuned, 3) if '/moments/' in name
  ]
  assert moments and all('/attention/' in name for name in moments)


def test_negative_zeros_stay():
  names = {'a': {'w': ('embed',)}, 'b': {'w': ('embed',)}}
  params = jax.tree.map(
    lambda _: jnp.array([-0.0, 0.0, 1.5]),
    names,
    is_leaf=lambda x: isinstance(x, tuple),
  )
  tx = subsets.only(
    names,
    learning_rate=0.1,
    optimizer=optimizers.adafactor,
    trained='a/.*',
  )

  @jax.jit
  def step(params, state):
    updates, state = tx.update(params, state, params)
    return jax.tree.map(jnp.add, params, updates)

  after = step(params, tx.init(params))
  frozen, trained = np.asarray(after['b']['w']), np.asarray(after['a']['w'])
  assert frozen.tobytes() == np.array([-0.0, 0.0, 1.5], np.float32).tobytes()
  assert trained[2] != 1.5


def test_trained_parameters_move_as_if_alone():
  """Clipping to a global norm, too, is of the subset."""
  random = np.random.default_rng(0)
  names = {part: {'w': ('embed', 'mlp')} for part in ('a', 'b')}
  params, grads = (
    {
      part: {'w': jnp.asarray(random.normal(size=(2, 3)), jnp.float32)}
      for part in names
    }
    for _ in range(2)
  )
  clipped = functools.partial(optimizers.adam, max_grad_norm=0.1)
  alone = clipped({'a': names['a']}, learning_rate=0.1)
  expected, _ = alone.update(
    {'a': grads['a']}, alone.init({'a': params['a']}), {'a': params['a']}
  )
  tx = subsets.only(names, learning_rate=0.1, optimizer=clipped, trained='a/w')
  updates, _ = tx.update(grads, tx.init(params), params)
  np.testing.assert_array_equal(updates['a']['w'], expected['a']['w'])


def test_subsets_of_st_moe():
  """Each parameter of the recipe belongs to exactly one part."""
  config.parse(['gin/models/st_moe/base.gin'], ['SCAN=False'], [])
  model = config.value('MODEL')
  shapes = model.features.shapes({'inputs': 128, 'targets': 128}, 16)
  params = jax.eval_shape(lambda: model.init(jax.random.key(0), shapes))
  paths = traverse_util.flatten_dict(params, sep='/')

  def part(path):
    words = set(path.split('/'))
    if words & {'attention', 'cross_attention'}:
      return 'attention'
    return next((w for w in ('extra_mlp', 'mlp', 'moe') if w in words), 'rest')

  everything = {'attention', 'mlp', 'extra_mlp', 'moe', 'rest'}
  assert {part(path) for path in paths} == everything
  for subset, parts in {
    'all': everything,
    'non_moe': everything - {'moe'},
    'moe': {'moe'},
    'attention': {'attention'},
    'ffn': {'mlp', 'extra_mlp'},
  }.items():
    pattern = subsets.SUBSETS[subset]
    matched = {path for path in paths if re.fullmatch(pattern, path)}
    assert matched == {p for p in paths if part(p) in parts}, subset


# How it is judged.


def run_evaluation(model_dir, *arguments):
  outcome = command.run(
    'evaluate', command.TINY, f'--gin.MODEL_DIR={model_dir}', *arguments
  )
  assert outcome.code == 0, outcome.stderr
  return outcome.stdout


@pytest.fixture(scope='module')
def evaluated(finetuned):
  """MODEL_DIR whose checkpoints are evaluated, and what was printed."""
  return finetuned, run_evaluation(finetuned, '--all_checkpoints')


def evaluated_copy(evaluated, folder):
  """Its checkpoints and their results in another MODEL_DIR."""
  for part in ('checkpoints', 'evaluation'):
    shutil.copytree(evaluated[0] / part, folder / part)
  return folder


def test_all_checkpoints(evaluated):
  model_dir, text = evaluated
  lines = [line.split() for line in text.splitlines()]
  assert [line[1] for line in lines if line[:1] == ['step']][:3] == list('123')
  table = lines[lines.index(['step', 'loss', 'accuracy']) + 2 :]
  assert [row[0] for row in table] == ['1', '2', '3']
  assert sum('peak' in row for row in table) == 1
  file = model_dir / 'evaluation' / 'tiny_sums-validation.json'
  summary = json.loads(file.read_text())
  scores = [step['score'] for step in summary['steps']]
  assert summary['peak']['score'] == max(scores)
  assert summary['peak']['step'] == 1 + scores.index(max(scores))
  assert summary['last']['step'] == 3


def test_each_is_as_if_alone(evaluated, tmp_path):
  evaluated_copy(evaluated, tmp_path)
  file = tmp_path / 'evaluation' / 'tiny_sums-validation-2.json'
  before = json.loads(file.read_text())
  run_evaluation(tmp_path / 'checkpoints' / '2')
  assert json.loads(file.read_text()) == before


def test_what_is_finished_is_not_done_again(evaluated, tmp_path):
  folder = evaluated_copy(evaluated, tmp_path) / 'evaluation'
  files = {s: folder / f'tiny_sums-validation-{s}.json' for s in (1, 2, 3)}
  before = {step: file.stat().st_ino for step, file in files.items()}
  files[2].unlink()
  other = json.loads(files[3].read_text())
  other['settings']['num_batches'] = 7
  files[3].write_text(json.dumps(other))
  run_evaluation(tmp_path, '--all_checkpoints')
  after = {step: file.stat().st_ino for step, file in files.items()}
  assert {s for s in files if before[s] != after[s]} == {2, 3}
  # Step 1 of another run, in the place of this one's.
  os.utime(tmp_path / 'checkpoints/1/params/_METADATA')
  run_evaluation(tmp_path, '--all_checkpoints')
  last = {step: file.stat().st_ino for step, file in files.items()}
  assert {s for s in files if after[s] != last[s]} == {1}
  assert not list(folder.glob('*.unfinished'))


def test_continuous_evaluation_waits_for_the_last_step(
  evaluated, tmp_path, monkeypatch
):
  evaluated_copy(evaluated, tmp_path)
  there, waited = tmp_path / 'checkpoints', []
  for step in '23':
    (there / step).rename(tmp_path / step)

  def sleep(seconds):
    waited.append(seconds)
    step = str(1 + len(waited))
    (tmp_path / step).rename(there / step)

  monkeypatch.setattr(evaluate.time, 'sleep', sleep)
  text = run_evaluation(tmp_path, '--continuous', '--gin.TRAIN_STEPS=3')
  assert len(waited) == 2
  steps = [line for line in text.splitlines() if line.startswith('step ')]
  assert [line.split()[1] for line in steps] == ['1', '2', '3', 'loss']


def test_a_checkpoint_that_is_deleted_before_its_turn(
  evaluated, tmp_path, monkeypatch
):
  evaluated_copy(evaluated, tmp_path)
  (tmp_path / 'evaluation' / 'tiny_sums-validation-2.json').unlink()
  restore = evaluate.restore_params

  def training_goes_on(model, path, *arguments):
    shutil.rmtree(path)
    return restore(model, path, *arguments)

  monkeypatch.setattr(evaluate, 'restore_params', training_goes_on)
  text = run_evaluation(tmp_path, '--all_checkpoints', '--json')
  steps = json.loads(text)['steps']
  assert [results['step'] for results in steps] == [1, 3]


def test_a_mixture_and_its_options(finetuned, tmp_path):
  """Twenty sums of two tasks: one is written by beams, one chosen from 19."""
  shutil.copytree(finetuned / 'checkpoints' / '3', tmp_path / 'checkpoints/3')
  image = tmp_path / 'diagram.png'
  results = json.loads(
    run_evaluation(
      tmp_path,
      '--gin.MIXTURE_OR_TASK_NAME=tiny_mixture',
      '--gin.RANK_OPTIONS=True',
      '--gin.EVAL_BATCHES=None',
      '--gin.STRATEGY=@decoding.BeamSearch()',
      '--gin.BEAMS=2',
      f'--reliability={image}',
      '--json',
    )
  )
  written, chosen = (
    results['task_metrics'][f'tiny_{task}/accuracy']
    for task in ('sums', 'choices')
  )
  assert results['task_metrics']['average'] == (written + chosen) / 2
  assert results['score'] == results['task_metrics']['average']
  file = tmp_path / 'evaluation' / 'tiny_mixture-validation-ranked-3.json'
  settings = json.loads(file.read_text())['settings']
  assert settings['strategy'] == 'BeamSearch(width=2, alpha=0.6)'
  assert results['ranking'] == {'tiny_choices': {'examples': 20, 'ties': 0}}
  (calibrated,) = results['calibration'].values()
  assert 100 * calibrated['accuracy'] == pytest.approx(chosen)
  assert sum(b['count'] for b in calibrated['bins']) == 20
  # At least what 19 equal options have.
  assert calibrated['confidence'] > 1 / 19
  assert image.read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize(
  'show', [evaluate_command._print, evaluate_command._step_printer()]
)
def test_ties_are_told(show, capsys):
  results = {
    'task': 'some', 'split': 'test', 'step': 3, 'capacity_factor': None,
    'metrics': {'loss': 1.0, 'layers': {}}, 'task_metrics': {},
    'calibration': {}, 'score': 60.0,
    'ranking': {
      'clear': {'examples': 5, 'ties': 0}, 'vague': {'examples': 5, 'ties': 3},
    },
  }  # fmt: skip
  show(results)
  said = capsys.readouterr().out
  assert 'vague: 3 of 5 examples have several most probable options' in said
  assert 'clear' not in said


def test_a_score_of_nan_is_no_peak(monkeypatch):
  """Every comparison with NaN is False, so `max` would keep the first."""
  evaluation = object.__new__(evaluate.Evaluation)
  scores = [math.nan, 1.0, 2.0, math.nan]
  found = [{'step': i, 'score': score} for i, score in enumerate(scores)]
  monkeypatch.setattr(evaluation, '_each', lambda until: iter(found))
  monkeypatch.setattr(evaluation, '_write', lambda suffix, results: None)
  assert evaluation.all()['peak']['step'] == 2


@pytest.mark.parametrize(
  'arguments,message',
  [
    (('--reliability=x.png',), '--reliability needs'),
    (('--gin.RANK_OPTIONS=True',), 'no task whose examples list options'),
    (('--gin.EVAL_SPLIT=tests',), "no split 'tests'"),
    (('--gin.MIXTURE_OR_TASK_NAME=tiny_sum',), "did you mean 'tiny_sums'"),
    (('--gin.NUM_EXPERTS=2',), 'of another architecture'),
  ],
)
def test_bad_evaluations(arguments, message, finetuned):
  outcome = command.run(
    'evaluate', command.TINY, f'--gin.MODEL_DIR={finetuned}', *arguments
  )
  assert (outcome.code, outcome.stdout) == (2, '')
  assert message in outcome.stderr and outcome.stderr.count('\n') == 1


def test_ctrl_c_ends_with_what_is_done(evaluated, tmp_path):
  evaluated_copy(evaluated, tmp_path)
  config.parse([command.TINY.partition('=')[2]], [f'MODEL_DIR={tmp_path}'], [])

  def stop(results):
    if results['step'] == 2:
      raise KeyboardInterrupt

  summary = config.bound(evaluate.Evaluation)().all(until=9, on_results=stop)
  assert [results['step'] for results in summary['steps']] == [1, 2]


def test_nothing_to_evaluate(tmp_path):
  outcome = command.run(
    'evaluate', command.TINY, f'--gin.MODEL_DIR={tmp_path}', '--all_checkpoints'
  )
  assert outcome.code == 2
  assert 'no complete checkpoint' in outcome.stderr


@pytest.mark.parametrize('recipe', ['switch', 'st_moe'])
def test_recipes(recipe):
  """They bind everything that training needs beside a model."""
  config.parse(
    [f'gin/models/{recipe}/base.gin', f'gin/finetune/{recipe}.gin'],
    ['MODEL_DIR=x', 'INITIAL_CHECKPOINT=y'],
    [],
  )
  config.bound(train.train)
  assert config.value('DROPOUT_RATE') == 0.1
  assert config.value('LEARNING_RATE')(10**5) > 0


@pytest.mark.parametrize('name', ['nlg', 'nlu', 'all'])
def test_tasks_of_glam(name):
  config.parse(
    ['gin/models/glam/0.1b.gin', 'gin/runs/default.gin',
     f'gin/tasks/glam/{name}.gin'],
    ['MODEL_DIR=x', 'TRAIN_STEPS=1', 'BATCH_SIZE=1', 'SHOTS=few'],
    [],
  )  # fmt: skip
  config.bound(evaluate.Evaluation)
  assert config.value('RANK_OPTIONS') == (name != 'nlg')
  assert config.value('STRATEGY').width == 4
  part = 'glam' if name == 'all' else f'glam_{name}'
  mixture = config.value('MIXTURE_OR_TASK_NAME')
  assert mixture == f'{part}_few_shot_seed_0'
