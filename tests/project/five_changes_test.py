"""Five changes are one Python file, one gin file, or both, and nothing else.

Each is made in a copy of the checkout; scripts/docs.sh writes the rows that are
made of it, and the tests that it falls under pass there. The router and the
expert are those that docs/routers.md shows.
"""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Mapping

import checkout
import documents
import pytest
from paths import ROOT


def _shown(name):
  """The Python of docs/routers.md that defines a class."""
  blocks = documents.blocks(ROOT / 'docs/routers.md')
  (block,) = (block for block in blocks if f'class {name}(' in block)
  return block


ROUTER = {
  'sparse_experts/moe/routers/modulo.py': '"""Experts in turns."""\n\n'
  + _shown('Modulo'),
  'gin/routers/modulo.gin': """\
# Modulo: a token's expert is its position modulo NUM_EXPERTS.
#
# Kind: fixed or given
# Original: not compared
# Provides: ROUTER, DECODER_ROUTER, LOSS_WEIGHTS
# Requires: a model of gin/models/
# After: gin/models/blocks.gin, gin/modern.gin

from __gin__ import dynamic_registration

from sparse_experts.moe.routers import modulo

ROUTER = @modulo.Modulo
DECODER_ROUTER = @modulo.Modulo
LOSS_WEIGHTS = {}

modulo.Modulo.num_experts = %NUM_EXPERTS
""",
}

EXPERT = {
  'sparse_experts/layers/scaled.py': (
    '"""An FFN, normed before and scaled after."""\n\n'
    'from flax import linen as nn\n\n' + _shown('Scaled')
  ),
  'gin/experts/scaled.gin': """\
# Experts that are normed before and scaled after.
#
# Requires: a model of gin/models/
# After: gin/models/blocks.gin

from __gin__ import dynamic_registration

from sparse_experts.layers import scaled
from sparse_experts.moe import layer

layer.MoE.make_expert = @scaled.Scaled

scaled.Scaled.hidden_width = %MLP_DIM
""",
}

RECIPE = {
  'gin/models/mine/small.gin': """\
# Mine: a small decoder, every second FFN of which is eight experts.
#
# Provides: MODEL, TASK_FEATURE_LENGTHS, BATCH_SIZE
# Requires: nothing

include 'gin/models/decoder_only.gin'
include 'gin/routers/switch.gin'

TASK_FEATURE_LENGTHS = {'targets': 256}
BATCH_SIZE = 64
NUM_EMBEDDINGS = 8100
NUM_LAYERS = 4
EMBED_DIM = 128
NUM_HEADS = 4
HEAD_DIM = 32
MLP_DIM = 512
NUM_EXPERTS = 8
SPARSE_LAYERS = 2
""",
}

TASK = {
  'sparse_experts/data/tasks/counting.py': '''\
"""Numbers that go up by one: 'targets', int32 [8], first 2 to 21."""

import numpy as np
import seqio
import tensorflow as tf

from sparse_experts.data.tasks.arrays import ArraySource


def read():
  """All of them, for training and for validation."""
  columns = {'targets': np.arange(2, 22)[:, None] + np.arange(8)}
  columns = {'targets': columns['targets'].astype(np.int32)}
  return {'train': columns, 'validation': columns}


seqio.TaskRegistry.add(
  'counting',
  source=ArraySource(read, ('train', 'validation')),
  preprocessors=[],
  output_features={
    'targets': seqio.Feature(
      seqio.PassThroughVocabulary(32, eos_id=1), add_eos=False, dtype=tf.int32
    )
  },
  shuffle_buffer_size=None,
)
''',
  'gin/tasks/counting.gin': """\
# Numbers that go up by one. No download.
#
# Provides: MIXTURE_OR_TASK_NAME, TASK_FEATURE_LENGTHS
# Requires: a decoder with a vocabulary of at least 32
# After: gin/models/blocks.gin

MIXTURE_OR_TASK_NAME = 'counting'
TASK_FEATURE_LENGTHS = {'targets': 8}
""",
}

TABLE = {
  'sparse_experts/papers/mine.py': """\
\"\"\"OLMoE once more.\"\"\"

from __future__ import annotations

from sparse_experts.papers.published import Row, Table

TABLES = {
  'mine_table1': Table(
    'Mine (2026), Table 1', (Row('mine', 'olmoe/1b_7b', '6.9B'),)
  ),
}
""",
}

# Of every change: the project's own rules.
PROJECT = (
  *('structure', 'letters', 'rooms', 'gin_files', 'documents', 'docstrings'),
)
PROJECT_NAMES = 'structure or letters or rooms or deeper or part_is or links'


@dataclasses.dataclass(frozen=True)
class Change:
  """A change, and what holds it.

  Attributes:
    files: their text by path.
    parts: of docs/, that scripts/docs.py writes.
    names: what the names of the tests of it have.
    tests: the files of these tests.
    commands: of `sparse_experts`, that succeed.
  """

  files: Mapping[str, str]
  parts: tuple[str, ...]
  names: str
  tests: tuple[str, ...]
  commands: tuple[str, ...] = ()


CHANGES = {
  'router': Change(
    ROUTER,
    ('routers', 'rooms'),
    'modulo or over or originals_are or every_overlay',
    (
      *('moe/routers/every_router', 'moe/originals', 'config/order'),
      'models/recipes',
    ),
    ("equivalence --gin.ROUTERS=('modulo',)",),
  ),
  'expert': Change(
    EXPERT,
    ('rooms',),
    'scaled or every_overlay',
    ('config/order',),
    (
      'train --gin_file=gin/quickstart.gin --gin_file=gin/experts/scaled.gin'
      ' --gin.MODEL_DIR=run --dry_run',
    ),
  ),
  'recipe': Change(
    RECIPE,
    ('recipes',),
    'mine',
    ('models/recipes', 'models/recipe_families', 'config/provenance'),
    ('inspect --gin_file=gin/models/mine/small.gin',),
  ),
  'task': Change(
    TASK,
    ('tasks', 'rooms'),
    'counting or every_overlay or every_docs_task',
    ('config/order', 'data/tasks'),
    (
      'train --gin_file=tests/tiny.gin --gin_file=gin/tasks/counting.gin'
      ' --gin.TRAIN_STEPS=2 --gin.MODEL_DIR=run',
    ),
  ),
  'table': Change(
    TABLE,
    ('papers', 'rooms'),
    'mine or names_that',
    ('papers/published', 'models/recipes'),
    ('table --paper=mine_table1',),
  ),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', CHANGES)
def test_a_change_is_nothing_else(name, tmp_path):
  change, copy = CHANGES[name], tmp_path / 'copy'
  checkout.copy(copy)
  for file, text in change.files.items():
    (copy / file).parent.mkdir(parents=True, exist_ok=True)
    (copy / file).write_text(text)

  def python(*arguments):
    done = subprocess.run(
      [sys.executable, *arguments],
      cwd=copy,
      env={**os.environ, 'PYTHONPATH': f'{copy}:{copy / "tests"}'},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    assert done.returncode == 0, done.stdout

  python('scripts/docs.py', '--write', *change.parts)
  of_project = [f'tests/project/{each}_test.py' for each in PROJECT]
  of_change = [f'tests/{each}_test.py' for each in change.tests]
  python(
    *('-m', 'pytest', '-q', '-x', '-k', f'{PROJECT_NAMES} or {change.names}'),
    *of_project,
    *of_change,
  )
  own = change.names.partition(' or ')[0]  # Fails where none is collected.
  python('-m', 'pytest', '-q', '--co', '-k', own, *of_change)
  for words in change.commands:
    python('-m', 'sparse_experts', *words.split())
  changed = {
    name
    for name in checkout.files()
    if (copy / name).read_bytes() != (ROOT / name).read_bytes()
  }
  assert all(name.startswith('docs/') for name in changed), changed
