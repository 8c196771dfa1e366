"""Spikes are written down, and a replay is the run once more."""

import json
import math
import types

import command
import jax.numpy as jnp
import numpy as np
import pytest
from paths import ROOT

from sparse_experts import moe
from sparse_experts.insight import records
from sparse_experts.training import spike

# The rule.


def judge(tmp_path, losses, window=4, deviations=2.0):
  """Steps of these losses, None one that was skipped; what was written."""
  hook = spike.Spikes(window, deviations)
  said = []
  run = types.SimpleNamespace(
    model_dir=tmp_path,
    say=said.append,
    summary=lambda sums: {'skipped': int(sums['skipped'])},
  )
  for step, loss in enumerate([math.inf, *losses]):
    run.step, run.ending = step, step == len(losses)
    run.sums = None
    if step:
      skipped = loss is None
      # Two microbatches, whose losses are added.
      sums = {'objective': 2 * (loss or 0), 'batches': 2 * (1 - skipped)}
      run.sums = {k: jnp.float32(v) for k, v in sums.items()}
      run.sums['skipped'] = jnp.int32(skipped)
    hook(run)
  assert len(said) == len(list(tmp_path.glob('spikes/*')))
  return {
    int(path.stem): json.loads(path.read_text())
    for path in tmp_path.glob('spikes/*.json')
  }


def test_a_spike_by_hand(tmp_path):
  """1, 3, 1, 3 have a mean of 2 and a deviation of 2 / sqrt(3) = 1.1547.

  4.309 is within 2 of them, 4.310 is not.
  """
  assert judge(tmp_path, [1, 3, 1, 3, 4.309]) == {}
  found = judge(tmp_path, [1, 3, 1, 3, 4.310])
  assert found == {
    5: {
      'step': 5,
      'metrics': {'skipped': 0, 'objective': pytest.approx(4.31)},
      'mean': 2.0,
      'deviation': pytest.approx(2 / math.sqrt(3)),
    }
  }


def test_the_window_is_full_before_it_judges_and_moves_on(tmp_path):
  assert judge(tmp_path, [1, 1, 1, 50]) == {}
  # 9 is one to 1, 1, 1, 1; 9 again is none to 1, 1, 1, 9.
  assert set(judge(tmp_path, [1, 1, 1, 1, 9, 9])) == {5}


def test_a_skipped_step_is_a_spike_and_not_of_the_window(tmp_path):
  found = judge(tmp_path, [1, None, 1, 1, 1, 9])
  assert found[2] == {'step': 2, 'metrics': {'skipped': 1}}
  assert set(found) == {2, 6} and found[6]['mean'] == 1


@pytest.mark.parametrize(
  'arguments, message',
  [((1, 6.0), 'at least 2, not 1'), ((9, 0.0), 'above 0, not 0.0')],
)
def test_rules_that_are_none(arguments, message):
  with pytest.raises(ValueError, match=message):
    spike.Spikes(*arguments)


# A run and its replay, with microbatches on eight devices.

RUN = (
  f'--gin_file={ROOT}/gin/spikes.gin',
  *('--gin.SPIKE_WINDOW=2', '--gin.SPIKE_DEVIATIONS=0.01'),
  *('--gin.TRAIN_STEPS=6', '--gin.CHECKPOINT_PERIOD=2'),
  *('--gin.BATCH_SIZE=16', '--gin.MICROBATCHES=2'),
  "--gin.MESH={'data': 2, 'expert': 4}",
  '--gin.BASE_LEARNING_RATE=30.0',  # Losses go up.
)


def contents(folder):
  return {
    path.relative_to(folder): path.read_bytes()
    for path in folder.rglob('*')
    if path.is_file()
  }


@pytest.fixture(scope='module')
def replayed(tmp_path_factory):
  """MODEL_DIR, its last spike, and a replay's output and new files."""
  model_dir = tmp_path_factory.mktemp('spikes')
  command.train(model_dir, *RUN)
  found = {int(p.stem): p for p in (model_dir / 'spikes').glob('*.json')}
  step = max(found)
  before = contents(model_dir)
  outcome = command.run(
    *('train', command.TINY, f'--gin.MODEL_DIR={model_dir}'),
    *(command.NO_EVALUATION, *RUN, f'--replay={step}', '--json'),
  )
  assert outcome.code == 0, outcome.stderr
  after = contents(model_dir)
  new = {str(path) for path in after.keys() - before.keys()}
  assert {path: after[path] for path in before} == before
  return model_dir, json.loads(found[step].read_text()), outcome, new


def test_a_replay_is_the_step_bit_for_bit(replayed):
  model_dir, ours, outcome, new = replayed
  step = ours['step']
  assert new == {f'replays/{step}.json', f'replays/{step}.npz'}
  again = json.loads((model_dir / f'replays/{step}.json').read_text())
  assert again == {'step': step, 'metrics': ours['metrics']}
  assert again['metrics']['gradient_norm'] > 0
  assert json.loads(outcome.stdout)['from'] == (step - 1) // 2 * 2


def test_its_record_is_of_the_step(replayed):
  """Its draws, capacity and parameters: choices count up to the run's load."""
  model_dir, ours, _, _ = replayed
  found = records.load(model_dir / f'replays/{ours["step"]}.npz')
  layers = ours['metrics']['layers']
  assert found.layers.keys() == layers.keys() and layers
  kept = moe.record.FATES.index('kept')
  for name, record in found.layers.items():
    chosen = record.expert_BxLxK < record.num_experts
    counts = np.bincount(record.expert_BxLxK[chosen], minlength=4)
    np.testing.assert_array_equal(counts / counts.sum(), layers[name]['load_E'])
    dropped = (record.fate_BxLxK[chosen] != kept).mean()
    assert dropped == pytest.approx(layers[name]['dropped'], abs=1e-12)
  assert found.tokens['decoder'].shape == (16, 32)
  assert found.facts['split'] == 'train' and found.pieces['decoder']


def test_no_checkpoint_before(replayed):
  model_dir, *_ = replayed
  outcome = command.run(
    *('train', command.TINY, f'--gin.MODEL_DIR={model_dir}'),
    *(*RUN, '--replay=2'),
  )
  assert outcome.code == 2
  assert outcome.stderr.startswith(
    f'error: no complete checkpoint before step 2 in {model_dir}, which has '
    '2, 4, 6; replay a later step, or'
  )
