"""What is said of a run, from what it wrote; numbers by hand."""

import json

import pytest

from sparse_experts.sweeps import results
from sparse_experts.sweeps.grid import Point


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
    for item in ('params', 'optimizer'):
      (folder / f'checkpoints/{step}/{item}').mkdir(parents=True)
      (folder / f'checkpoints/{step}/{item}/x').write_text(item)
    sums = {f'{item}/x': {} for item in ('params', 'optimizer')}
    file = folder / f'checkpoints/{step}/checksums.json'
    file.write_text(json.dumps(sums))
    (folder / f'checkpoints/{step}/commit_success.txt').touch()
  text = ''.join(json.dumps(line) + '\n' for line in lines)
  (folder / 'metrics.jsonl').write_text(text)
  return folder


def test_a_line(model_dir):
  point = Point({'NUM_EXPERTS': '4', 'ROUTER': '@a.B', 'LAYERS': '(0, 1)'}, 3)
  assert results.of(model_dir, point, flops_per_step=7) == {
    'overrides': {'NUM_EXPERTS': 4, 'ROUTER': '@a.B', 'LAYERS': (0, 1)},
    'seed': 3,
    'run': 'run',
    'step': 40,
    'eval': {'loss': 1.5},
    'seconds': 11.5,  # 10 * 0.5 + 10 * 0.25 + 20 * 0.2.
    'flops': 280,
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
  results.write(tmp_path, [{'run': 'b', 'seed': 3}])
  lines = (tmp_path / 'results.jsonl').read_text().splitlines()
  assert [json.loads(line)['seed'] for line in lines] == [2, 3]
  assert results.finished(tmp_path / 'runs') is None


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
