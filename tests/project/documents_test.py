"""What README.md and docs/ show really runs, and what they name is there."""

import contextlib
import re
import types

import documents
import jax
import numpy as np
import pytest
from paths import ROOT

import docs
from sparse_experts.cli import COMMANDS

PAGES = [
  ROOT / 'README.md',
  ROOT / 'CONTRIBUTING.md',
  *ROOT.glob('docs/**/*.md'),
]


def test_layer():
  names = documents.run(ROOT / 'docs/layer.md')
  assert names['y_BxLxD'].shape == names['x_BxLxD'].shape
  assert names['assignment'].expert_GxSxK.tolist() == [[[1, 2], [0, 1]]]
  # Gates over the chosen: .6 / .9 and .3 / .9; .8 / .9 and .1 / .9.
  np.testing.assert_allclose(
    names['assignment'].gate_GxSxK[0],
    [[2 / 3, 1 / 3], [8 / 9, 1 / 9]],
    rtol=1e-5,
  )
  # Expert 1: token 0's first choice, then token 1's second.
  assert names['assignment'].position_GxSxK.tolist() == [[[0, 0], [0, 1]]]
  assert len(documents.blocks(ROOT / 'docs/layer.md')[0].splitlines()) <= 12


def test_architecture():
  with jax.numpy_rank_promotion('raise'):
    names = documents.run(ROOT / 'docs/architecture.md')
  assert names['answers_BxT'].shape == (4, 5)
  assert np.isfinite(names['loss'])


def test_training():
  """Its hook is due after 100 steps and after the last, here 250."""
  written = []
  run = types.SimpleNamespace(
    apart=contextlib.nullcontext,
    start=0,
    state=types.SimpleNamespace(params={'w': np.array([3.0, 4.0])}),
    write=lambda name, metrics: written.append((run.step, name, metrics)),
  )
  hook = documents.run(ROOT / 'docs/training.md')['hook']
  for run.step in (0, 99, 100, 250):
    run.ending = run.step == 250
    hook(run)
  assert written == [
    (100, 'parameters', {'norm': 5.0}),
    (250, 'parameters', {'norm': 5.0}),
  ]


@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.name)
def test_links_and_paths_exist(page):
  text = page.read_text()
  for target in re.findall(r'\]\(([^)#]+)\)', text):
    if not target.startswith('http'):
      assert (page.parent / target).exists(), target
  for path in re.findall(
    r'`((?:gin|scripts|docs|tests|sparse_experts)/[a-z0-9_/.]+)`', text
  ):
    assert (ROOT / path).exists(), path


@pytest.mark.parametrize(
  'part', sorted({*docs.PARTS, *docs.FILES} - {'papers', 'rooms'})
)
def test_a_part_is_of_this_source(part):
  """What scripts/docs.sh writes.

  recipes_test.py has the papers' tables, rooms_test.py the picture.
  """
  for path, text in docs.updated(part).items():
    assert path.read_text() == text, f'bash scripts/docs.sh --write {part}'


def test_a_header_s_first_sentence(tmp_path, monkeypatch):
  monkeypatch.setattr(docs, 'ROOT', tmp_path)
  (tmp_path / 'a.gin').write_text(
    '# A 1.3B model, see gin/b.gin (Du et al. 2021,\n'
    '# https://arxiv.org/abs/1, Table 4). More of it.\n\nA = 1  # Not this.\n'
  )
  assert docs.sentence('a.gin') == (
    'A 1.3B model, see `gin/b.gin` '
    '([Du et al. 2021](https://arxiv.org/abs/1), Table 4)'
  )
  (tmp_path / 'a.gin').write_text('# A title\n#\n# Provides: A\n')
  with pytest.raises(ValueError, match='a.gin .* no sentence'):
    docs.sentence('a.gin')


def test_a_stale_part_is_named_and_written(tmp_path, monkeypatch, capsys):
  page = tmp_path / 'page.md'
  page.write_text('Before.\n' + 'old'.join(docs.marks('few')) + 'After.\n')
  monkeypatch.setattr(docs, 'PARTS', {'few': ([page], lambda: 'new\n')})
  assert docs.main(['--check', 'few']) == 1
  assert capsys.readouterr().out == 'stale: few; bash scripts/docs.sh --write\n'
  assert docs.main(['--write', 'few']) == docs.main(['--check', 'few']) == 0
  assert page.read_text().replace('new\n', 'old') == (
    'Before.\n' + 'old'.join(docs.marks('few')) + 'After.\n'
  )


def test_how_to_add_a_router():
  names = documents.run(ROOT / 'docs/routers.md')
  # Positions 0 to 5 of 4 experts; 4 and 5 come second to experts 0 and 1.
  assert names['assignment'].expert_GxSxK[0, :, 0].tolist() == [
    0,
    1,
    2,
    3,
    0,
    1,
  ]
  assert names['assignment'].position_GxSxK[0, :, 0].tolist() == [
    0,
    0,
    0,
    0,
    1,
    1,
  ]


def test_every_command_is_shown():
  text = (ROOT / 'docs/commands.md').read_text()
  assert all(f'sparse_experts {command}' in text for command in COMMANDS)
