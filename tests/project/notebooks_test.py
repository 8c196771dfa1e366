"""The notebooks run in clean kernels; what git and docs/ have of them is so."""

import os
import re
import subprocess
import sys

import nbclient
import nbformat
import notebook_setup
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


def test_there_are_seven():
  assert [path.stem for path in PATHS] == notebook_setup.names()
  assert len(PATHS) == 7


@each_notebook
def test_the_rendered_page_is_of_this_notebook(path):
  page = (DOCS / 'notebooks' / f'{path.stem}.md').read_text()
  for cell in read(path).cells:
    assert cell.source in page


def test_rendered_pages_are_small():
  size = sum(path.stat().st_size for path in (DOCS / 'notebooks').iterdir())
  assert size < 1.5e6


PLACE = 'somebody/a.copy-of_it'
ADDRESS = f'https://github.com/{PLACE}'


def ran(cell, folder):
  """What a first cell does on a Python without the package.

  Beside the cell lies a module that is found before pip and writes down what it
  is to install.
  """
  (folder / 'pip.py').write_text(
    "import sys; open('installed', 'w').write(' '.join(sys.argv[1:]))"
  )
  # -S: no installed package is seen, this one least of all.
  process = subprocess.run(
    [sys.executable, '-S', '-c', cell],
    cwd=folder,
    env={'PATH': str(folder)},
    capture_output=True,
    text=True,
  )
  installed = folder / 'installed'
  return process.stderr, installed.read_text() if installed.exists() else None


def test_the_first_cell_without_an_address_asks_for_a_wheel(tmp_path):
  cell = notebook_setup.cell('')
  stderr, installed = ran(cell, tmp_path)
  error = stderr.splitlines()[-1]
  assert error.startswith('ModuleNotFoundError: ') and 'pip wheel' in error
  assert installed is None and 'github' not in cell
  named = cell.replace("SOURCE = ''", "SOURCE = 'sparse_experts-1.whl'")
  assert ran(named, tmp_path) == (
    '',
    'install --quiet sparse_experts-1.whl jax matplotlib',
  )


def test_the_first_cell_installs_from_the_address(tmp_path):
  assert ran(notebook_setup.cell(ADDRESS), tmp_path) == (
    '',
    f'install --quiet git+{ADDRESS} jax matplotlib',
  )


def test_the_first_cell_installs_a_checkout_first(tmp_path):
  (tmp_path / 'setup.py').touch()
  (tmp_path / 'notebooks').mkdir()
  assert ran(notebook_setup.cell(ADDRESS), tmp_path / 'notebooks') == (
    '',
    'install --quiet .. jax matplotlib',
  )


def test_all_files_have_the_cell_of_an_address():
  source = notebook_setup.cell(ADDRESS)
  texts = notebook_setup.with_cell(source)
  assert len(texts) == 2 * len(PATHS)
  for path in PATHS:
    notebook = nbformat.reads(texts[path], as_version=4)
    before = read(path)
    first = next(i for i, c in enumerate(before.cells) if c in code(path))
    assert notebook.cells[first].source == source
    before.cells[first].source = source
    assert notebook == before  # Nothing else moved.
    assert source in texts[DOCS / 'notebooks' / f'{path.stem}.md']


def test_links_to_colab():
  links = re.findall(r'\]\((.*?)\)', notebook_setup.colab(ADDRESS))
  assert links == [
    f'https://colab.research.google.com/github/{PLACE}/blob/main/notebooks/'
    f'{path.name}'
    for path in PATHS
  ]
  assert '](' not in notebook_setup.colab('')


def test_an_address_that_colab_cannot_open_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(notebook_setup, 'ROOT', tmp_path)
  setting = tmp_path / 'pyproject.toml'
  for address in (ADDRESS, ''):
    setting.write_text(f"[tool.sparse_experts]\nrepository = '{address}'\n")
    assert notebook_setup.repository() == address
  for address in (PLACE, ADDRESS + '/', 'https://example.org/a/b'):
    setting.write_text(f"[tool.sparse_experts]\nrepository = '{address}'\n")
    with pytest.raises(ValueError, match='must be .*OWNER/NAME.* or .. for'):
      notebook_setup.repository()
