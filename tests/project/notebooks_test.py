"""The notebooks run in clean kernels; what git and docs/ have of them is so."""

import os

import nbclient
import nbformat
import pytest
from paths import ROOT

PATHS = sorted((ROOT / 'notebooks').glob('*.ipynb'))
DOCS = ROOT / 'docs'

each_notebook = pytest.mark.parametrize('path', PATHS, ids=lambda p: p.stem)


def read(path):
  return nbformat.read(path, as_version=4)


def code(path):
  return [cell for cell in read(path).cells if cell.cell_type == 'code']


def execute(path, folder, without=(), **variables):
  """Runs a notebook, whose assertions check what it shows."""
  without = {'XLA_FLAGS', *without}  # A notebook chooses its own devices.
  variables['TMPDIR'] = str(folder)
  environment = {k: v for k, v in os.environ.items() if k not in without}
  nbclient.NotebookClient(
    read(path), timeout=900, resources={'metadata': {'path': path.parent}}
  ).execute(env=environment | variables)


# The others, some 20 seconds each and up, are in the full run.
QUICK = '07_scaling_laws_of_routed_models'


@pytest.mark.parametrize(
  'path',
  [
    pytest.param(
      path, id=path.stem, marks=[pytest.mark.slow] * (path.stem != QUICK)
    )
    for path in PATHS
  ],
)
def test_short(path, tmp_path):
  execute(path, tmp_path, SPARSE_EXPERTS_SHORT='1')


@pytest.mark.slow
@each_notebook
def test_full_length(path, tmp_path):
  execute(path, tmp_path, without=['JAX_DISABLE_MOST_OPTIMIZATIONS'])


@each_notebook
def test_git_has_no_outputs(path):
  for cell in code(path):
    assert cell.outputs == [] and cell.execution_count is None


def test_one_setup_cell():
  assert len(PATHS) == 7
  setup = {code(path)[0].source for path in PATHS}
  assert len(setup) == 1
  assert 'REPOSITORY = ' in setup.pop()


@each_notebook
def test_the_rendered_page_is_of_this_notebook(path):
  page = (DOCS / 'notebooks' / f'{path.stem}.md').read_text()
  for cell in read(path).cells:
    assert cell.source in page


def test_rendered_pages_are_small():
  size = sum(path.stat().st_size for path in (DOCS / 'notebooks').iterdir())
  assert size < 1.5e6


@each_notebook
def test_colab_opens_it_from_the_repository(path):
  _, _, rest = code(path)[0].source.partition(
    "REPOSITORY = 'https://github.com/"
  )
  place, _, _ = rest.partition("'")
  link = (
    f'https://colab.research.google.com/github/{place}/blob/main/notebooks/'
    f'{path.name}'
  )
  assert link in (DOCS / 'notebooks.md').read_text()
