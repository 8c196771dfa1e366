"""Every objective trains, resumes and is the same on any number of devices."""

import json

import command
import numpy as np
import pytest
import small

from sparse_experts import config
from sparse_experts.insight import curves
from sparse_experts.models.decoding import is_decodable


# By default tests/training/frozen_test.py is enough of distillation.
@pytest.fixture(
  scope='module',
  params=[
    pytest.param(name, marks=pytest.mark.slow)
    if small.SMALL[name].teacher
    else name
    for name in small.SMALL
  ],
)
def name(request):
  """Of an objective."""
  return request.param


@pytest.fixture(scope='module')
def whole(name, tmp_path_factory):
  """MODEL_DIR of twelve steps in one go."""
  model_dir = tmp_path_factory.mktemp('whole')
  small.train(name, model_dir)
  return model_dir


def test_the_loss_falls(whole):
  _, losses = curves.read(whole)['train']['loss']
  assert len(losses) == 3
  assert losses[-1] < 0.95 * losses[0]


def test_six_and_six_steps_are_twelve(name, whole, tmp_path):
  small.train(name, tmp_path, 'TRAIN_STEPS=6')
  small.train(name, tmp_path)
  command.assert_same_bits(
    command.saved(whole, 12), command.saved(tmp_path, 12)
  )


# Three programs each: by default of the objective whose loss is over all rows.
@pytest.mark.parametrize(
  'name',
  [
    name
    if name == 'contrastive'
    else pytest.param(name, marks=pytest.mark.slow)
    for name in small.SMALL
  ],
)
def test_a_step_is_the_same_on_devices_and_in_microbatches(name, tmp_path):
  """Adam's first moment after one step is a tenth of the gradient."""
  once = ('TRAIN_STEPS=1', *small.SMALL[name].exact)
  small.train(name, tmp_path / 'one', *once, devices=1)
  small.train(name, tmp_path / 'mesh', *once, data=2, expert=4)
  small.train(name, tmp_path / 'parts', *once, 'MICROBATCHES=2', devices=1)
  expected = command.saved(tmp_path / 'one', 1)
  moments = [x for path, x in expected.items() if '/mu/' in path]
  assert moments and all(np.abs(x).max() > 0 for x in moments)
  for other in ('mesh', 'parts'):
    found = command.saved(tmp_path / other, 1)
    assert found.keys() == expected.keys()
    for path, x in expected.items():
      np.testing.assert_allclose(
        found[path], x, rtol=1e-4, atol=1e-6, err_msg=f'{other}: {path}'
      )


def test_it_is_evaluated_recorded_and_reported(name, whole):
  given = small.SMALL[name].arguments(whole)
  outcome = command.run('evaluate', *given, '--json')
  assert outcome.code == 0, outcome.stderr
  results = json.loads(outcome.stdout)
  assert np.isfinite(results['score'])
  outcome = command.run('record', *given, '--json')
  assert outcome.code == 0, outcome.stderr
  recorded = json.loads(outcome.stdout)['layers']
  for layer, numbers in results['metrics']['layers'].items():
    np.testing.assert_allclose(
      recorded[layer]['load_E'], numbers['load_E'], 1e-5
    )
  outcome = command.run('report', str(whole))
  assert outcome.code == 0, outcome.stderr
  assert 'Routing by token' in (whole / 'report.html').read_text()


def test_what_writes_no_text_is_not_asked(name, whole):
  outcome = command.run('infer', *small.SMALL[name].arguments(whole))
  if is_decodable(config.value('MODEL')):
    assert outcome.code == 0, outcome.stderr
  else:
    assert outcome.code == 2
    assert outcome.stderr.startswith('error: ')
    assert ' writes no text: ' in outcome.stderr
    assert outcome.stderr.count('\n') == 1
