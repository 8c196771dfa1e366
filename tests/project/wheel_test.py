"""The wheel holds all it needs, and runs far from the checkout."""

import json
import os
import subprocess
import sys

import checkout
import pytest

from sparse_experts import cli


@pytest.mark.slow  # Builds with pip, which fetches setuptools.
def test_the_installed_wheel_answers_from_anywhere(tmp_path, capsys):
  def pip(*arguments):
    subprocess.run(
      [sys.executable, '-m', 'pip', '--quiet', *arguments],
      check=True,
      cwd=tmp_path,
    )

  # From a copy: building leaves folders in the tree.
  source = tmp_path / 'source'
  checkout.copy(source)
  pip('wheel', '--no-deps', '--wheel-dir', 'wheels', str(source))
  (wheel,) = (tmp_path / 'wheels').glob('*.whl')
  pip('install', '--no-deps', '--target', 'site', str(wheel))

  site = tmp_path / 'site'
  output = subprocess.run(
    [
      sys.executable,
      '-m',
      'sparse_experts',
      'inspect',
      '--gin_file=gin/quickstart.gin',
      '--json',
    ],
    check=True,
    cwd='/',
    env={**os.environ, 'PYTHONPATH': str(site)},
    capture_output=True,
    text=True,
  ).stdout
  assert cli.main(['inspect', '--gin_file=gin/quickstart.gin', '--json']) == 0
  assert json.loads(output) == json.loads(capsys.readouterr().out)
  assert (site / 'sparse_experts/data/assets/docs_8k.model').exists()
  assert (site / 'sparse_experts/py.typed').exists()
  # gin-config's package is named gin: nothing of ours may land in it.
  assert not (site / 'gin').exists()
