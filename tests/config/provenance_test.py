"""Where values come from is what gin has made of the same files."""

import re

import pytest
from paths import ROOT, TESTS

import gin
from sparse_experts import config
from sparse_experts.config import provenance

FILES = sorted(
  str(path.relative_to(ROOT))
  for folder in ('models/*', 'small', 'bench')
  for path in (ROOT / 'gin').glob(f'{folder}/*.gin')
)
PRETRAIN = 'gin/runs/pretrain.gin'
STEP = 'gin/bench/step.gin'  # It requires a model.


def as_written(value):
  """A value that gin has parsed, with references as text."""
  if isinstance(value, (list, tuple)):
    return type(value)(map(as_written, value))
  if isinstance(value, dict):
    return {key: as_written(item) for key, item in value.items()}
  if isinstance(value, gin.config.ConfigurableReference):
    return repr(value)
  return value


def of_gin():
  return {
    (scope, selector, argument): as_written(value)
    for (scope, selector), arguments in gin.config._CONFIG.items()
    for argument, value in arguments.items()
  }


def of_trace(*given):
  found = {}
  for *_, last in config.trace(*given):
    scope, _, name = last.name.rpartition('/')
    if '.' in name:
      key = (scope, last.about, name.rpartition('.')[2])
    else:
      key = (last.name, 'gin.macro', 'value')
    found[key] = last.value
  return found


@pytest.mark.parametrize(
  'files, bindings',
  [
    *(([file], ()) for file in FILES if file != STEP),
    (['gin/models/switch/base.gin', STEP], ()),
    (
      [
        'gin/models/switch/base.gin',
        'gin/tasks/c4.gin',
        'gin/runs/pretrain.gin',
      ],
      (
        'SEED=1',
        'SEED=2',
        'top_k.TopK.k=2',
        'MODEL_DIR=/a b',
        'ROUTER=@top_k.TopK',
      ),
    ),
    (['gin/models/olmoe/1b_7b.gin', 'gin/modern.gin'], ()),
    (
      [
        'gin/quickstart.gin',
        'gin/tasks/docs_domain.gin',
        'gin/finetune/docs.gin',
      ],
      ('INITIAL_CHECKPOINT=run', 'encoder/layer.MoE.group_size=8'),
    ),
  ],
  ids=lambda value: '+'.join(value) or 'no overrides',
)
def test_it_is_what_gin_has(files, bindings):
  config.parse(files, bindings, [])
  assert of_trace(files, bindings, []) == of_gin()


def test_blocks_scopes_and_macros_of_macros(tmp_path):
  (tmp_path / 'mine.gin').write_text(
    'from __gin__ import dynamic_registration\n'
    'from sparse_experts.moe.routers import top_k as gate\n'
    "include 'other.gin'\n"
    'K = %WANTED\n'
    'WEIGHTS = {\n'
    "    'load_balance': %WEIGHT,\n"
    '}\n'
    'late/gate.TopK:\n'
    '  k = %K\n'
    '\n'
    "  gates = 'all'\n"
  )
  (tmp_path / 'other.gin').write_text(
    'from __gin__ import dynamic_registration\n'
    'from sparse_experts import moe\n'
    '\n'
    'WANTED = 3\n'
    'WEIGHT = 0.5\n'
    "late/moe.TopK.gates = 'chosen'\n"
  )
  given = ['mine.gin'], ['WANTED=4'], [str(tmp_path)]
  config.parse(*given)
  chains = config.trace(*given)
  assert of_trace(*given) == of_gin()
  mine, other = str(tmp_path / 'mine.gin'), str(tmp_path / 'other.gin')
  found = {
    last.name: (
      provenance.in_effect(last.value, chains),
      [(binding.file, binding.line) for binding in (*before, last)],
    )
    for *before, last in chains
  }
  assert found.pop('WANTED') == (4, [(other, 4), ('command line', None)])
  assert found.pop('WEIGHT') == (0.5, [(other, 5)])
  assert found.pop('K') == (4, [(mine, 4)])
  assert found.pop('WEIGHTS') == ({'load_balance': 0.5}, [(mine, 5)])
  # Two names of one class; gin knows it by that of whoever came first.
  gates, k = sorted(found)
  assert re.fullmatch(r'late/\w+.TopK.gates', gates)
  assert found[gates] == ('all', [(other, 6), (mine, 11)])
  assert re.fullmatch(r'late/\w+.TopK.k', k)
  assert found[k] == (4, [(mine, 9)])


def test_files_are_found_as_gin_finds_them(tmp_path, monkeypatch):
  for folder, layers in (('here', 3), ('there', 5)):
    (tmp_path / folder).mkdir()
    (tmp_path / folder / 'size.gin').write_text(f'NUM_LAYERS = {layers}\n')
  monkeypatch.chdir(tmp_path / 'here')
  given = ['gin/quickstart.gin', 'size.gin'], [], [str(tmp_path / 'there')]
  (chain,) = (c for c in config.trace(*given) if c[0].name == 'NUM_LAYERS')
  assert [(binding.file, binding.value) for binding in chain] == [
    ('gin/quickstart.gin', 2),
    ('size.gin', 3),
  ]
  given = [str(TESTS / 'tiny.gin')], [], []
  (chain,) = (c for c in config.trace(*given) if c[0].name == 'NUM_LAYERS')
  assert chain[-1].file == str((TESTS / 'tiny.gin').relative_to(ROOT))
