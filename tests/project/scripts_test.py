"""Scripts that are run by hand: what they print to be run next, and refuse."""

import shutil
import subprocess
import sys

import pytest
from paths import ROOT

# In place of the one that installs: its Python writes down what it is given.
ENVIRONMENT = """
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV="its own"
"""
PYTHON = """#!/usr/bin/env bash
printf '%s\\n' "$@" END >> given
"""


@pytest.mark.parametrize('model_dir', ['runs/sentences', 'my runs/a'])
def test_the_quickstarts_hints_have_its_arguments(model_dir, tmp_path):
  scripts, python = tmp_path / 'scripts', tmp_path / 'its own/bin/python'
  scripts.mkdir()
  shutil.copy(ROOT / 'scripts/quickstart.sh', scripts)
  (scripts / 'environment.sh').write_text(ENVIRONMENT)
  python.parent.mkdir(parents=True)
  python.write_text(PYTHON)
  python.chmod(0o755)
  (tmp_path / model_dir).mkdir(parents=True)  # As training does.
  given = ['--gin.TRAIN_STEPS=800', "--gin.NOTE='a b'"]
  if model_dir != 'runs/sentences':
    given.append(f'--gin.MODEL_DIR={model_dir}')

  def run(*command):
    (tmp_path / 'given').write_text('')
    ended = subprocess.run(
      ['bash', *command], cwd=tmp_path, capture_output=True, text=True
    )
    assert not ended.returncode, ended.stderr
    calls = (tmp_path / 'given').read_text().split('\nEND\n')[:-1]
    return ended.stdout, [call.split('\n')[2:] for call in calls]

  stdout, calls = run(scripts / 'quickstart.sh', *given)
  train, *_, infer = calls
  hints = stdout.partition('== three things to try next ==\n')[2]
  _, (report, mine, dense, compare) = run('-ec', hints)
  twin = f'{model_dir}-dense'
  assert report == ['report', model_dir]
  assert (tmp_path / model_dir / 'mine.txt').read_text()
  recipe = train[1:]
  assert recipe[-len(given) :] == given
  assert f'--gin.MODEL_DIR={model_dir}' in recipe
  assert infer[1:4] == recipe[:3]
  file = f'--input={model_dir}/mine.txt'
  short = '--gin.infer.infer.max_tokens=12'
  assert mine == ['infer', *recipe, file, '--top=3', short]
  assert dense == [
    'train',
    *('--gin_file=gin/quickstart_dense.gin', recipe[1], *given),
    f'--gin.MODEL_DIR={twin}',
  ]
  assert compare == ['compare', twin, model_dir, f'--output={model_dir}.html']


def test_a_random_olmoe_of_no_text_leaves_no_folder(tmp_path):
  pytest.importorskip('tokenizers')
  ended = subprocess.run(
    [
      *(sys.executable, ROOT / 'scripts/random_olmoe.py', tmp_path / 'new'),
      f'--text={tmp_path / "none"}',
    ],
    capture_output=True,
  )
  assert ended.returncode and not (tmp_path / 'new').exists()
