"""The small recipes, as they are, beat chance."""

import os
import subprocess
import sys

import pytest
from paths import ROOT

from sparse_experts.insight import curves

# Of the validation split: what is guessed without the input, and a limit
# between it and what the recipe's file says, with room for other seeds.
BETTER = {
  'classification': {'accuracy': (0.1, 0.8)},
  'contrastive': {'accuracy': (1 / 64, 0.2)},
  'masked_language': {
    'masked/accuracy': (0.095, 0.2),
    'domain/accuracy': (0.17, 0.5),
  },
  'transcription': {'symbol_error_rate': (0.89, 0.5)},
  'distillation': {'loss': (5.88, 5.3)},
}


def train(file, model_dir, *bindings):
  """As a user does, compiled as for a user; returns what the run ends with."""
  theirs = {
    name: value
    for name, value in os.environ.items()
    if name not in ('XLA_FLAGS', 'JAX_DISABLE_MOST_OPTIMIZATIONS')
  }
  given = [f'--gin.MODEL_DIR={model_dir}', *(f'--gin.{b}' for b in bindings)]
  command = [sys.executable, '-m', 'sparse_experts', 'train']
  subprocess.run(
    [*command, f'--gin_file={file}', *given],
    env={**theirs, 'PYTHONPATH': str(ROOT)},
    check=True,
  )
  ends = curves.read(model_dir)['eval']
  return {name: curve.values[-1] for name, curve in ends.items()}


@pytest.mark.slow
@pytest.mark.parametrize('name', BETTER)
def test_a_small_recipe_learns_what_its_inputs_say(name, tmp_path):
  bindings = []
  if name == 'distillation':
    train('gin/quickstart.gin', tmp_path / 'teacher', 'TRAIN_STEPS=200')
    bindings = [f'TEACHER={tmp_path / "teacher"}']
  found = train(f'gin/small/{name}.gin', tmp_path / 'run', *bindings)
  for metric, (chance, limit) in BETTER[name].items():
    if limit > chance:
      assert found[metric] > limit
    else:
      assert found[metric] < limit


def test_every_small_recipe_has_a_limit():
  assert {path.stem for path in (ROOT / 'gin/small').glob('*.gin')} == {*BETTER}
