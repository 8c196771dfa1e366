"""The small objectives, made tiny: what tests over all of them run.

A new objective is a line of `SMALL`.
"""

import dataclasses
import functools
import tempfile
from collections.abc import Sequence

import jax
from command import TESTS

from sparse_experts import config, sharding
from sparse_experts.training import train as runner


@dataclasses.dataclass(frozen=True)
class Small:
  """A file of gin/small/, and what makes it cheap.

  Attributes:
    file: of gin/small/, or one that includes it.
    tiny: bindings of a model and batch that take seconds.
    exact: further ones, so that a step draws nothing and its optimizer does not
      blow up differences of rounding.
    teacher: the gin file of a run that there must be before.
  """

  file: str
  tiny: Sequence[str]
  exact: Sequence[str]
  teacher: str | None = None

  def bindings(self, model_dir) -> list[str]:
    """What makes it cheap, in a directory."""
    bindings = [*self.tiny, f'MODEL_DIR={model_dir}']
    if self.teacher is None:
      return bindings
    return [*bindings, f'TEACHER={_taught(self).name}']

  def arguments(self, model_dir) -> tuple[str, ...]:
    """Of a command."""
    bindings = (f'--gin.{binding}' for binding in self.bindings(model_dir))
    return (f'--gin_file={self.file}', *bindings)


_WIDTHS = ('NUM_LAYERS=2', 'EMBED_DIM=16', 'HEAD_DIM=8', 'NUM_HEADS=2')
_RUN = (
  *('TRAIN_STEPS=12', 'CHECKPOINT_PERIOD=6', 'LOG_PERIOD=4', 'BATCH_SIZE=16'),
  'EVAL_BATCHES=2',
)

SMALL = {
  'classification': Small(
    'gin/small/classification.gin',
    (*_WIDTHS, *_RUN, 'MLP_DIM=32', 'BASE_LEARNING_RATE=0.01'),
    ('v_moe.VMoE.noise=0.0', 'DROPOUT_RATE=0.0', 'optimizers.adam.eps=0.001'),
  ),
  'contrastive': Small(
    'gin/small/contrastive.gin',
    (
      *(*_WIDTHS, *_RUN, 'MLP_DIM=32', 'BASE_LEARNING_RATE=0.01'),
      "TASK_FEATURE_LENGTHS={'inputs': 12, 'targets': 8}",
    ),
    ('optimizers.adam.eps=0.001',),
  ),
  'distillation': Small(
    str(TESTS / 'distillation.gin'),
    (
      *(*_WIDTHS, *_RUN, 'MLP_DIM=32', 'NUM_EXPERTS=4'),
      "TASK_FEATURE_LENGTHS={'inputs': 16, 'targets': 12}",
      'BASE_LEARNING_RATE=0.01',
    ),
    ('optimizers.adam.eps=0.001',),
    teacher='gin/quickstart.gin',
  ),
  'masked_language': Small(
    str(TESTS / 'masked_language.gin'),
    (
      *(*_WIDTHS, *_RUN, 'MLP_DIM=32', "TASK_FEATURE_LENGTHS={'tokens': 16}"),
      *('BASE_LEARNING_RATE=0.01', 'INIT_SCALE=1.0'),
    ),
    ('optimizers.adam.eps=0.001',),
  ),
  'transcription': Small(
    'gin/small/transcription.gin',
    (
      *(*_WIDTHS, *_RUN, 'MLP_DIM=32', 'FRAMES_PER_TOKEN=8'),
      'BASE_LEARNING_RATE=0.01',
    ),
    ('v_moe.VMoE.noise=0.0', 'optimizers.adam.eps=0.001'),
  ),
}


@functools.cache
def _taught(small: Small) -> tempfile.TemporaryDirectory:
  """MODEL_DIR of a teacher of two steps, removed with the process."""
  folder = tempfile.TemporaryDirectory()
  bindings = [*small.tiny, f'MODEL_DIR={folder.name}', 'TRAIN_STEPS=2']
  config.parse([small.teacher], bindings, [])
  config.bound(runner.train)(
    eval_dataset=None,
    on_start=lambda path: (path / 'config.gin').write_text(config.operative()),
  )
  return folder


def train(
  name: str, model_dir, *bindings: str, devices: int = 8, **mesh: int
) -> dict:
  """Trains a small objective without evaluation; returns the results."""
  small = SMALL[name]
  given = [*small.bindings(model_dir), *bindings]
  config.parse([small.file], given, [])
  return config.bound(runner.train)(
    placement=sharding.Placement(mesh, devices=jax.devices()[:devices]),
    eval_dataset=None,
  )
