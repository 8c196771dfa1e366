"""The first code cell of every notebook, and where the project is hosted.

The address is one setting, `repository` of [tool.sparse_experts] in
pyproject.toml: 'https://github.com/OWNER/NAME', or '' where there is none.
"""

import json
import pathlib
import re
import tomllib

ROOT = pathlib.Path(__file__).resolve().parents[1]
ADDRESS = re.compile(r'https://github\.com/([\w.-]+/[\w.-]+)')

CELL = """\
import glob
import importlib.util
import os
import shutil
import subprocess
import sys

SOURCE = {address}
if os.path.exists('../setup.py'):  # In a checkout.
  SOURCE = '..'

if importlib.util.find_spec('sparse_experts') is None:  # In Colab, say.{refuse}
  jax_of_machine = 'jax'
  if shutil.which('nvidia-smi'):
    jax_of_machine = 'jax[cuda12]'
  elif glob.glob('/dev/accel*') or glob.glob('/dev/vfio/[0-9]*'):
    jax_of_machine = 'jax[tpu]'
  pip = [sys.executable, '-m', 'pip', 'install', '--quiet']
  subprocess.run([*pip, SOURCE, jax_of_machine, 'matplotlib'], check=True)

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
SHORT = bool(os.environ.get('SPARSE_EXPERTS_SHORT'))  # Tests: fewer steps."""
REFUSE = """
  if not SOURCE:
    raise ModuleNotFoundError(
      'sparse_experts is not installed: set SOURCE to a wheel that you '
      'uploaded (`pip wheel --no-deps .` makes one) or to a path.'
    )"""


def repository() -> str:
  """The address that is set; '' if none is.

  Raises:
    ValueError: it is no address of a repository that Colab could open.
  """
  with (ROOT / 'pyproject.toml').open('rb') as file:
    address = tomllib.load(file)['tool']['sparse_experts']['repository']
  if address and not ADDRESS.fullmatch(address):
    raise ValueError(
      f'repository = {address!r} in pyproject.toml must be '
      "'https://github.com/OWNER/NAME', or '' for none."
    )
  return address


def names() -> list[str]:
  """The notebooks, without their folder and suffix."""
  return sorted(path.stem for path in (ROOT / 'notebooks').glob('*.ipynb'))


def cell(address: str) -> str:
  """The source of the cell that installs the project where it is not."""
  return CELL.format(
    address=repr(f'git+{address}' if address else ''),
    refuse='' if address else REFUSE,
  )


def colab(address: str) -> str:
  """What pages say of Colab: its links, or what to do without an address."""
  if not address:
    return (
      'To run a notebook in Colab, upload it and a wheel of the project\n'
      '(`pip wheel --no-deps .` makes one), and set `SOURCE` in the first cell '
      "to the\nwheel's name.\n"
    )
  place = ADDRESS.fullmatch(address)[1]
  links = (
    f'[{name[:2]}](https://colab.research.google.com/github/{place}/blob/main/'
    f'notebooks/{name}.ipynb)'
    for name in names()
  )
  return f'The notebooks run in Colab: {", ".join(links)}.\n'


def notebook(name: str, source: str) -> str:
  """The text of a notebook whose first code cell is this."""
  read = json.loads((ROOT / f'notebooks/{name}.ipynb').read_text())
  first = next(each for each in read['cells'] if each['cell_type'] == 'code')
  first['source'] = source.splitlines(keepends=True)
  return json.dumps(read, indent=1, ensure_ascii=False) + '\n'


def page(name: str, source: str) -> str:
  """The text of a notebook's page, likewise."""
  text = (ROOT / f'docs/notebooks/{name}.md').read_text()
  before, fence, rest = text.partition('```python\n')
  _, end, after = rest.partition('\n```')
  return before + fence + source + end + after


def with_cell(source: str) -> dict[pathlib.Path, str]:
  """All notebooks and their pages with this cell: the text of each file."""
  return {
    ROOT / folder / f'{name}{suffix}': make(name, source)
    for name in names()
    for folder, suffix, make in (
      ('notebooks', '.ipynb', notebook),
      ('docs/notebooks', '.md', page),
    )
  }
