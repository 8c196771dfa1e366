"""The runner: other meshes read a checkpoint, and bad steps do no harm."""

import functools
import json
import math
import os
import signal
import types

import command
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sparse_experts import config, sharding
from sparse_experts.data.dataset import Dataset
from sparse_experts.data.features.text import Text
from sparse_experts.models.language import Language
from sparse_experts.training import (
  checkpoints,
  ema,
  held_out,
  loop,
  optimizers,
  progress,
  saver,
  state,
  step,
  total,
  train,
)

DATASET = Dataset(
  'tiny_sums', {'inputs': 16, 'targets': 16}, 8, modules=('tiny_tasks',)
)
FEATURES = Text()


@pytest.fixture(scope='module')
def model() -> Language:
  config.parse([command.TINY.partition('=')[2]], ['MODEL_DIR=/none'], [])
  return config.value('MODEL')


def _abstract(model: Language, learning_rate: float = 0.1, average=False):
  make = functools.partial(optimizers.adafactor, learning_rate=learning_rate)
  if average:
    make = functools.partial(
      ema.averaged,
      learning_rate=learning_rate,
      optimizer=optimizers.adafactor,
      decay=0.5,
    )
  return state.abstract(model, DATASET.shapes(Text()), make)


# Checkpoints on other meshes.


@pytest.fixture(scope='module')
def on_eight(tmp_path_factory):
  """MODEL_DIR of two steps on 2 x 4 devices."""
  model_dir = tmp_path_factory.mktemp('eight')
  eight = "--gin.MESH={'data': 2, 'expert': 4}"
  command.train(model_dir, eight, '--gin.TRAIN_STEPS=2')
  return model_dir


@pytest.mark.parametrize(
  'mesh,rules',
  [
    ({'data': 1}, {}),
    ({'data': 1, 'expert': 4}, {}),
    ({'data': 1, 'expert': 2, 'model': 2}, {}),
    ({'data': 2, 'expert': 2}, {'embed': 'data'}),
    ({'data': 8}, {'embed': 'data'}),
  ],
)
def test_any_mesh_reads_a_checkpoint(mesh, rules, on_eight, model):
  devices = jax.devices()[: math.prod(mesh.values())]
  built = sharding.make_mesh(**mesh, devices=devices)
  with sharding.use_mesh(built, rules):
    boxed, _ = _abstract(model)
    placed = state.shardings(boxed, built)
    batches = DATASET.training(FEATURES, slice(None))
    restored = checkpoints.restore(on_eight, 2, boxed, placed, batches)

  assert jax.tree.all(
    jax.tree.map(
      lambda leaf, sharding: leaf.sharding.is_equivalent_to(
        sharding, leaf.ndim
      ),
      restored,
      placed,
    )
  )
  # wi is [expert, embed, mlp] = [4, 16, 32], and no device has more than this.
  wi = restored.params['decoder']['layers_1']['moe']['expert']['wi_0']
  embed = mesh['data'] if rules else 1
  part = (4 // mesh.get('expert', 1), 16 // embed, 32 // mesh.get('model', 1))
  assert {s.data.shape for s in wi['kernel'].addressable_shards} == {part}

  optimizer = {'opt_state': restored.opt_state}
  optimizer |= {'step': restored.step, 'skipped': restored.skipped}
  arrays = {'params': restored.params, 'optimizer': optimizer}
  command.assert_same_bits(
    {k: np.asarray(x) for k, x in checkpoints.flatten(arrays).items()},
    command.saved(on_eight, 2),
  )


def test_experts_of_all_devices_are_written(tmp_path):
  """Those of each, not the first's in the places of all."""
  mesh = sharding.make_mesh(1, 8, 1)
  params = {'expert': np.arange(16.0, dtype=np.float32).reshape(8, 2)}
  placed = jax.device_put(params, NamedSharding(mesh, PartitionSpec('expert')))
  zero = jnp.int32(0)
  no_data = types.SimpleNamespace(save=lambda directory, streams: None)
  saved = saver.Saver(tmp_path)
  saved.save(
    state.TrainState(zero, placed, {'rate': zero}, zero),
    saver.DataArgs(no_data),
  )
  saved.close()
  found, _ = checkpoints.load_params(tmp_path)
  np.testing.assert_array_equal(found['expert'], params['expert'])


# Steps that are not finite.


@pytest.fixture(scope='module')
def start(model) -> state.TrainState:
  """The state at step 0, on one device."""
  boxed, optimizer = _abstract(model, average=True)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  placed = state.shardings(boxed, mesh)
  shapes = DATASET.shapes(Text())
  return state.create(model, shapes, optimizer, placed, seed=0)


def _step(model, learning_rate=0.1, microbatches=1):
  _, optimizer = _abstract(model, learning_rate, average=True)
  take = functools.partial(
    step.train_step,
    model=model,
    optimizer=optimizer,
    microbatches=microbatches,
  )
  return functools.partial(jax.jit(take), key=jax.random.key(0))


@pytest.fixture
def batch():
  """Eight rows of random tokens; targets have a weight of 1."""
  shapes = DATASET.shapes(Text())
  random = np.random.default_rng(0)
  tokens = random.integers(2, 300, shapes['decoder_target_tokens'].shape)
  batch = {name: np.ones(leaf.shape, np.int32) for name, leaf in shapes.items()}
  batch['decoder_target_tokens'] = tokens.astype(np.int32)
  batch['decoder_input_tokens'] = np.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
  batch['decoder_loss_weights'] = np.ones(tokens.shape, np.float32)
  return {name: jnp.asarray(x) for name, x in batch.items()}


def _assert_equal(some, others):
  jax.tree.map(np.testing.assert_array_equal, some, others)


@pytest.mark.parametrize('microbatches', [1, 2])
def test_a_bad_batch_is_skipped_and_counted(microbatches, model, start, batch):
  take = _step(model, microbatches=microbatches)
  # One target of one row, so of one microbatch.
  weights = batch['decoder_loss_weights'].at[5, 3].set(jnp.inf)
  after, sums = take(start, {**batch, 'decoder_loss_weights': weights})
  assert (int(after.step), int(after.skipped)) == (1, 1)
  assert int(sums['skipped']) == 1
  assert step.summary(sums, microbatches) == {'skipped': 1}
  _assert_equal(after.params, start.params)
  _assert_equal(after.opt_state, start.opt_state)
  bad = sums

  # Good ones go on as though the bad one had passed without a trace.
  after, sums = take(after, batch)
  assert (int(after.step), int(after.skipped)) == (2, 1)
  assert int(sums['skipped']) == 0
  alone = step.summary(sums, microbatches)
  both = total.Total()
  both.add(bad)
  both.add(sums)
  together = step.summary(both.sums(), microbatches)
  assert alone.pop('skipped') == 0 and together.pop('skipped') == 1
  _assert_equal(together, alone)
  expected, _ = take(start.replace(step=jnp.int32(1)), batch)
  _assert_equal(after.params, expected.params)
  _assert_equal(after.opt_state, expected.opt_state)
  changed = jax.tree.map(lambda a, b: (a != b).any(), after, start)
  assert jax.tree.all(changed.params)


def test_an_update_that_is_not_finite_is_skipped(model, start, batch):
  """Loss and gradient are, the rate times the update overflows."""
  grads, sums = step.gradients(start, batch, jax.random.key(0), model=model)
  assert np.isfinite(sums['objective'])
  assert np.isfinite(optax.tree.norm(grads))
  after, sums = _step(model, learning_rate=3e38)(start, batch)
  assert int(sums['skipped']) == int(after.skipped) == 1
  _assert_equal(after.params, start.params)


def test_skipped_steps_in_a_row_stop_the_run(tmp_path):
  """Also where each is saved; what was saved is as good as ever."""
  outcome = command.run(
    *('train', command.TINY, f'--gin.MODEL_DIR={tmp_path}'),
    *(command.NO_EVALUATION, '--gin.Z_LOSS=1e38'),
    *('--gin.CHECKPOINT_PERIOD=1', '--gin.LOG_PERIOD=1'),
    '--gin.train.train.max_skipped_in_a_row=3',
  )
  assert outcome.code == 2
  assert outcome.stderr.splitlines()[-1].startswith(
    'error: 3 steps in a row up to step 3 had a loss, gradient or'
  )
  first, second = (command.saved(tmp_path, i) for i in (1, 2))
  assert checkpoints.find(tmp_path)[1] == 2
  counters = ('optimizer/step', 'optimizer/skipped')
  assert [first.pop(name) for name in counters] == [1, 1]
  assert [second.pop(name) for name in counters] == [2, 2]
  command.assert_same_bits(first, second)
  assert all(np.isfinite(array).all() for array in first.values())
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  assert [json.loads(line)['skipped'] for line in lines] == [1, 1, 1]
  assert 'step 1/20  no loss  1 skipped' in outcome.stderr


def test_only_skipped_steps_in_a_row_count():
  guard = loop.Guard(2)

  def take(step, skipped):
    sums = None if skipped is None else {'skipped': jnp.int32(skipped)}
    guard(types.SimpleNamespace(step=step, sums=sums))

  for i, skipped in enumerate([None, 1, 0, 1]):  # None: before the first.
    take(i, skipped)
  guard.check()  # Step 3, which is not counted twice.
  for i, skipped in enumerate([0, 1, 1], start=4):
    take(i, skipped)
  # Each looks at the one before.
  with pytest.raises(FloatingPointError, match='2 steps in a row up to step 6'):
    guard.check()


# What a run says.


def _run(model_dir, **arguments):
  config.parse([command.TINY.partition('=')[2]], [f'MODEL_DIR={model_dir}'], [])
  return config.bound(train.train)(**arguments)


def _logged(model_dir, name='train'):
  lines = (model_dir / 'metrics.jsonl').read_text().splitlines()
  return [x for x in map(json.loads, lines) if x['name'] == name]


class Failing(Language):
  """A model whose loss is NaN at steps 0, 2 and 3 of training."""

  def loss(self, *args, step=None, **kwargs):
    loss, sums = super().loss(*args, step=step, **kwargs)
    is_bad = (step == 0) | (step == 2) | (step == 3)
    return jnp.where(is_bad, jnp.nan, loss), sums


@pytest.fixture(scope='module')
def six_steps(model, tmp_path_factory):
  """The train metrics of six steps, three of which were skipped."""
  model_dir = tmp_path_factory.mktemp('failing')
  _run(
    model_dir,
    model=Failing(**vars(model)),
    dataset=DATASET,
    learning_rate=lambda n: 0.1 * 2.0**-n,
    train_steps=6,
    log_period=1,
    eval_dataset=None,
  )
  return _logged(model_dir)


def test_the_learning_rate_is_that_of_the_last_update(six_steps):
  """Updates 0, 1, 2 are those of steps 1, 4, 5; before them is update 0."""
  assert [x['skipped'] for x in six_steps] == [1, 0, 1, 1, 0, 0]
  rates = [0.1 * 2.0**-n for n in (0, 0, 0, 0, 1, 2)]
  assert [x['learning_rate'] for x in six_steps] == pytest.approx(rates)


def test_tokens_per_second_with_padding_and_without(six_steps):
  assert 'tokens_per_second_with_padding' not in six_steps[0]  # Of no time.
  batches = DATASET.training(Text(), slice(None))
  tokens = [
    (next(batches)['decoder_target_tokens'] > 0).sum() for _ in range(6)
  ]
  assert 0 < sum(tokens) < 6 * 8 * 32
  for done, metrics in enumerate(six_steps[1:], start=2):
    assert metrics['tokens_per_second_with_padding'] == pytest.approx(
      8 * 32 * metrics['steps_per_second']
    )
    assert metrics['tokens_per_second_without_padding'] == pytest.approx(
      sum(tokens[:done]) / done * metrics['steps_per_second']
    )


def test_speed_by_hand(monkeypatch, capsys):
  """Steps 11 to 14 of 20: a second for step 12, 2 for both that follow."""
  clock = iter([100.0, 101.0, 103.0])
  monkeypatch.setattr(progress.time, 'monotonic', lambda: next(clock))
  shown = progress.Progress(10, 20, positions=1000)
  for done in (11, 12):
    shown.step(done)
  two = shown.report(12, {'loss': 1.0, 'skipped': 0}, tokens=1200.0)
  assert two == {
    'steps_per_second': 1,
    'tokens_per_second_with_padding': 1000,
    'tokens_per_second_without_padding': 600,
  }
  for done in (13, 14):
    shown.step(done)
  four = shown.report(14, {'loss': 1.0, 'skipped': 0}, tokens=1600.0)
  # 3 steps in 3 seconds; 2,800 tokens in 4 steps.
  assert four['tokens_per_second_without_padding'] == 700
  assert capsys.readouterr().err.splitlines() == [
    'step 12/20  loss 1.000  600 tokens/s (1,000 with padding)  0:08 left',
    'step 14/20  loss 1.000  700 tokens/s (1,000 with padding)  0:06 left',
  ]


def test_counts_of_400_000_batches_are_exact():
  """Those of the last 1,000 would be 992 each in float32, whose step is 32."""
  running = total.Total()
  first = {'targets': 399_000 * 1000, 'layers': {'a': np.array([3.0, 1.0])}}
  running.add(jax.tree.map(np.float32, first))
  batch = {'targets': 1000, 'layers': {'a': np.array([1.0, 2.0])}}
  batch = jax.tree.map(jnp.float32, batch)
  for _ in range(1000):
    running.add(batch)
  sums = running.sums()
  assert sums['targets'] == 400_000 * 1000
  np.testing.assert_array_equal(sums['layers']['a'], [1003, 2001])
  assert running.sums() is sums  # Read twice, added once.


def test_evaluation_adds_in_float64(model, start, monkeypatch):
  """All of its sums, and the last batch too."""
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  with sharding.use_mesh(mesh):
    evaluation = held_out.LossEvaluation(model, DATASET, mesh)
    batches = [{'targets': jnp.float32(n)} for n in (2**24, 1, 1)]
    seen = []
    monkeypatch.setattr(
      evaluation, '_step', lambda params, batch: batches.pop()
    )
    monkeypatch.setattr(held_out, 'summary', seen.append)
    evaluation(start.params)
  assert seen == [{'targets': 2**24 + 2}]


def test_sigterm_leaves_the_latest_evaluation_with_its_step(tmp_path):
  def rate(step):
    if isinstance(step, int) and step == 2:  # For the log.
      os.kill(os.getpid(), signal.SIGTERM)
    return 0.1

  seen = []

  def hook(run):
    seen.append((run.step, run.results['eval_step'], run.preempted))

  results = _run(
    tmp_path, learning_rate=rate, log_period=1, eval_period=2, hooks=[hook]
  )
  # After evaluation, before what asks for a stop and saves.
  assert seen == [(0, 0, False), (1, 0, False), (2, 2, False), (3, 2, False)]
  assert results['preempted'] and results['step'] == 3
  assert results['eval_step'] == 2
  evaluated = _logged(tmp_path, 'eval')
  assert [record['step'] for record in evaluated] == [0, 2]
  assert results['eval']['loss'] == evaluated[1]['loss']


@pytest.mark.slow
def test_a_trace_of_steps_that_are_partly_there(tmp_path, capfd):
  """A rate may be a number."""
  common = {'eval_dataset': None, 'learning_rate': 0.1}
  traces = tmp_path / 'profile'
  _run(tmp_path, train_steps=2, profile=(1, 9), **common)
  assert len(list(traces.rglob('*.xplane.pb'))) == 1
  _run(tmp_path, train_steps=4, profile=(0, 3), **common)
  assert len(list(traces.rglob('*.xplane.pb'))) == 2
  _run(tmp_path, train_steps=5, profile=(0, 3), **common)
  assert len(list(traces.rglob('*.xplane.pb'))) == 2
  assert 'no step to trace from 4 to 5\n' in capfd.readouterr().err
