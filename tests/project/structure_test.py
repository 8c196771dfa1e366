"""The direction of imports and who may import what, read from the source."""

import ast
import subprocess
import sys

import pytest
from paths import ROOT

PACKAGE = ROOT / 'sparse_experts'

# Ground first. A file imports only from its own line or from lines above.
LAYERS = (
  'letters console',
  'sharding',
  'data layers',
  'moe',
  'models',
  'training',
  'inference',
  'evaluation',
  'planning',
  'insight bench',
  'config',
  'papers convert',
  'surgery',
  'commands',
  'cli t5x_adapter',
)
RANK = {name: i for i, line in enumerate(LAYERS) for name in line.split()}
ONLY = {
  'gin': {'config'},
  't5x': {'t5x_adapter'},
}
FILES = sorted(
  path for path in PACKAGE.rglob('*.py') if path.name != '__main__.py'
)


def part(path):
  return path.relative_to(PACKAGE).with_suffix('').parts[0]


def imports(tree):
  for node in ast.walk(tree):
    if isinstance(node, ast.ImportFrom) and node.module:
      yield from (f'{node.module}.{alias.name}' for alias in node.names)
    elif isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)


@pytest.mark.parametrize(
  'path', FILES, ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_imports_point_one_way(path):
  me = part(path)
  for name in imports(ast.parse(path.read_text())):
    head, *rest = name.split('.')
    if head in ONLY:
      assert me in ONLY[head], f'{path} imports {head}'
    if head == 'sparse_experts' and me != '__init__' and rest[0] in RANK:
      assert RANK[rest[0]] <= RANK[me], f'{me} imports {name}'
      siblings = RANK[rest[0]] == RANK[me] and rest[0] != me
      assert not siblings, f'{me} imports its sibling {name}'


def test_every_part_has_a_place():
  assert {part(path) for path in FILES} - {'__init__'} <= set(RANK)


def test_there_is_no_gin_package():
  # gin/__init__.py would shadow gin-config for whoever runs from the checkout.
  assert not list((ROOT / 'gin').rglob('__init__.py'))


def test_only_gin_t5x_speaks_of_t5x():
  for path in sorted((ROOT / 'gin').rglob('*.gin')):
    if 't5x' not in path.relative_to(ROOT / 'gin').parts:
      assert 't5x' not in path.read_text(), path


def test_names_of_files_say_what_they_hold():
  vague = {'utils', 'util', 'common', 'helpers', 'misc'}
  assert not [path for path in FILES if path.stem in vague]


def test_the_library_imports_without_tensorflow():
  # Everything but the files that register tasks, what seqio calls, and T5X.
  of_seqio = {'preprocessors', 'converters', 'packing'}
  modules = [
    '.'.join(path.relative_to(ROOT).with_suffix('').parts)
    for path in FILES
    if path.name != '__init__.py'
    and not {'tasks', 't5x_adapter'} & set(path.parts)
    and path.stem not in of_seqio
  ]
  code = (
    f'import importlib, sys\nfor m in {modules}: importlib.import_module(m)\n'
    "assert not {'tensorflow', 'seqio'} & set(sys.modules)"
  )
  subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT)
