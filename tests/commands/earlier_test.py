"""A run directory of an earlier version goes on."""

import json
import zipfile

import command
import numpy as np
import pytest
from paths import DATA


@pytest.fixture
def model_dir(tmp_path):
  """Four steps of the tiny model, by a version before the present folders."""
  folder = tmp_path / 'run'
  zipfile.ZipFile(DATA / 'run_before_rooms.zip').extractall(folder)
  return folder


def test_training_goes_on(model_dir, tmp_path):
  steps = '--gin.TRAIN_STEPS=6'
  config = f'--gin_file={model_dir / "config.gin"}'
  outcome = command.run('train', config, f'--gin.MODEL_DIR={model_dir}', steps)
  assert outcome.code == 0, outcome.stderr
  assert 'resumed at step 4' in outcome.stderr
  command.train(tmp_path / 'anew', steps, '--gin.LOG_PERIOD=1')
  resumed = command.saved(model_dir, 6)
  anew = command.saved(tmp_path / 'anew', 6)
  assert resumed.keys() == anew.keys()
  for name, array in anew.items():
    np.testing.assert_allclose(resumed[name], array, 1e-4, 1e-6, err_msg=name)


def test_it_is_evaluated_reported_and_converted(model_dir, tmp_path):
  # Its own config.gin, after what a command has beside a run's.
  flags = (
    '--gin_file=gin/runs/default.gin',
    f'--gin_file={model_dir / "config.gin"}',
    f'--gin.MODEL_DIR={model_dir}',
  )
  outcome = command.run('evaluate', *flags, '--json')
  assert outcome.code == 0, outcome.stderr
  before = [
    json.loads(line)
    for line in (model_dir / 'metrics.jsonl').read_text().splitlines()
  ]
  loss = [row['loss'] for row in before if row['name'] == 'eval'][-1]
  now = json.loads(outcome.stdout)['metrics']['loss']
  np.testing.assert_allclose(now, loss, 1e-4)
  outcome = command.run('report', str(model_dir))
  assert outcome.code == 0, outcome.stderr
  page = (model_dir / 'report.html').read_text()
  assert 'no parameters' not in outcome.stderr and 'active' in page
  outcome = command.run(
    'convert',
    f'--input={model_dir}',
    f'--output={tmp_path / "t5x"}',
    '--to=t5x',
  )
  assert outcome.code == 0, outcome.stderr
