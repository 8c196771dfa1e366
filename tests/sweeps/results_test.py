"""What is said of a run, from what it wrote; numbers by hand."""

import json
import shutil

import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from sparse_experts.sweeps import identity, results
from sparse_experts.sweeps.grid import Point


def _save_optimizer(folder, step, state):
  path = folder / f'checkpoints/{step}/optimizer'
  shutil.rmtree(path, ignore_errors=True)
  ocp.PyTreeCheckpointer().save(path, {'opt_state': state})


@pytest.fixture
def model_dir(tmp_path):
  """Of a run that has saved steps 20 and 40."""
  lines = [
    {'step': 10, 'name': 'train', 'loss': 3.0, 'seconds_per_step': 0.5},
    {'step': 20, 'name': 'train', 'loss': 2.0, 'seconds_per_step': 0.25},
    {'step': 20, 'name': 'eval', 'loss': 2.5, 'layers/a/load_E/0': 1.0},
    {'step': 40, 'name': 'train', 'loss': 1.0, 'seconds_per_step': 0.2},
    {'step': 40, 'name': 'eval', 'loss': 1.5, 'layers/a/load_E/0': 1.0},
  ]
  folder = tmp_path / 'run'
  for step in (20, 40):
    (folder / f'checkpoints/{step}/params').mkdir(parents=True)
    _save_optimizer(folder, step, {'m': np.zeros(2)})
    sums = {f'{item}/x': {} for item in ('params', 'optimizer')}
    file = folder / f'checkpoints/{step}/checksums.json'
    file.write_text(json.dumps(sums))
    (folder / f'checkpoints/{step}/commit_success.txt').touch()
  text = ''.join(json.dumps(line) + '\n' for line in lines)
  (folder / 'metrics.jsonl').write_text(text)
  return folder


def test_a_line(model_dir):
  point = Point({'NUM_EXPERTS': '4', 'ROUTER': '@a.B', 'LAYERS': '(0, 1)'}, 3)
  assert results.of(model_dir, point, flops_per_step=7, inputs='0f') == {
    'overrides': {'NUM_EXPERTS': 4, 'ROUTER': '@a.B', 'LAYERS': (0, 1)},
    'seed': 3,
    'run': 'run',
    'step': 40,
    'eval': {'loss': 1.5},
    'seconds': 11.5,  # 10 * 0.5 + 10 * 0.25 + 20 * 0.2.
    'flops': 280,
    'code': identity.code(),
    'inputs': '0f',
  }


def test_lines_of_another_sweep_stay_while_its_runs_do(tmp_path):
  for name in 'abc':
    (tmp_path / 'runs' / name).mkdir(parents=True)
  results.write(tmp_path, [{'run': 'a', 'seed': 0}, {'run': 'b', 'seed': 1}])
  (tmp_path / 'runs/a').rmdir()
  results.write(tmp_path, [{'run': 'c', 'seed': 2}])
  assert results.finished(tmp_path) == [
    tmp_path / 'runs/b',
    tmp_path / 'runs/c',
  ]
  assert results.finished(tmp_path / 'runs') is None
  # A run of two sweeps has what both say of it; one of other code goes.
  shared = {'run': 'b', 'seed': 1, 'overrides': {'WIDTH': 64}}
  results.write(tmp_path, [{**shared, 'code': 'old'}])
  shared['overrides'] = {'NUM_EXPERTS': 2}
  assert results.write(tmp_path, [shared, {'run': 'c', 'code': 'old'}]) == 1
  assert results.write(tmp_path, [shared]) == 1
  lines = (tmp_path / 'results.jsonl').read_text().splitlines()
  assert [json.loads(line) for line in lines] == [
    {'run': 'b', 'seed': 1, 'overrides': {'NUM_EXPERTS': 2}}
  ]
  results.write(tmp_path, [{**shared, 'overrides': {'WIDTH': 64}}])
  assert json.loads((tmp_path / 'results.jsonl').read_text())['overrides'] == {
    'NUM_EXPERTS': 2,
    'WIDTH': 64,
  }


def test_lines_are_in_the_order_of_the_sweep(tmp_path):
  """Though the second run ended first, as with --parallel=2."""
  first, second = {'run': 'a', 'seed': 0}, {'run': 'b', 'seed': 1}
  for name in 'abz':
    (tmp_path / 'runs' / name).mkdir(parents=True)
  for lines in ([{'run': 'z', 'seed': 7}], [second], [first, second]):
    results.write(tmp_path, lines)
  text = (tmp_path / results.FILE).read_text()
  assert [json.loads(line)['run'] for line in text.splitlines()] == [*'zab']


def test_what_json_has_not(model_dir):
  point = Point({'A': '{(0, 1): 2}', 'B': '1e999'}, 0)
  with (model_dir / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 41, "name": "eval", "loss": NaN}\n')
  found = results.of(model_dir, point, flops_per_step=7, inputs='')
  assert found['eval'] == {'loss': None}
  assert found['overrides'] == point.overrides


def test_averages_of_parameters_stay(model_dir):
  _save_optimizer(model_dir, 40, {'average': {'w': np.zeros(2)}})
  results.slim(model_dir)
  assert (model_dir / 'checkpoints/40/optimizer').exists()


def test_a_slim_run_has_its_last_parameters(model_dir):
  results.slim(model_dir)
  results.slim(model_dir)  # Once more is no error.
  folder = model_dir / 'checkpoints'
  assert [path.name for path in folder.iterdir()] == ['40']
  assert {path.name for path in (folder / '40').iterdir()} == {
    *('params', 'checksums.json', 'commit_success.txt')
  }
  assert json.loads((folder / '40/checksums.json').read_text()) == {
    'params/x': {}
  }


def test_the_size_of_a_folder(model_dir):
  (model_dir / 'large').write_bytes(bytes(10**6))
  assert 0.001 < results.gigabytes(model_dir) < 0.0011


def test_what_a_run_has_reached(model_dir):
  seen = results.Seen()
  for path in (model_dir, epath.Path(model_dir)):
    assert seen.of(path) == (40, '1.5000')
  (model_dir / 'metrics.jsonl').write_text('')  # As one that starts anew.
  assert seen.of(model_dir) == (0, '')
  (model_dir / 'metrics.jsonl').unlink()
  assert seen.of(model_dir) == (0, '')
