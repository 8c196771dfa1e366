"""The direction of imports and who may import what, read from the source."""

import ast
import re
import subprocess
import sys

import pytest
from paths import ROOT
from rooms import FILES, PACKAGE, RANK, imports, room

ONLY = {
  'gin': {'config'},
  't5x': {'t5x_adapter'},
}


@pytest.mark.parametrize(
  'path', FILES, ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_imports_point_one_way(path):
  me = room(path)
  for name in imports(path):
    head, *rest = name.split('.')
    if head in ONLY:
      assert me in ONLY[head], f'{path} imports {head}'
    if head == 'sparse_experts' and me != '__init__' and rest[0] in RANK:
      assert RANK[rest[0]] <= RANK[me], f'{me} imports {name}'
      siblings = RANK[rest[0]] == RANK[me] and rest[0] != me
      assert not siblings, f'{me} imports its sibling {name}'


def test_every_part_has_a_place():
  assert {room(path) for path in FILES} - {'__init__'} <= set(RANK)


def test_there_is_no_gin_package():
  # gin/__init__.py would shadow gin-config for whoever runs from the checkout.
  assert not list((ROOT / 'gin').rglob('__init__.py'))


def test_only_gin_t5x_speaks_of_t5x():
  for path in sorted((ROOT / 'gin').rglob('*.gin')):
    if 't5x' not in path.relative_to(ROOT / 'gin').parts:
      assert 't5x' not in path.read_text(), path


# They write our names of blocks beside those of another format, or T5X's own,
# which are alike.
NAME_BLOCKS = {
  'models/layout.py',
  'convert/parameter_names.py',
  'convert/t5x.py',
}


def test_only_layout_knows_how_blocks_are_named():
  for path in FILES:
    tree = ast.parse(path.read_text())
    documentation = {
      node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)
    }
    names = [
      node.value
      for node in ast.walk(tree)
      if isinstance(node, ast.Constant)
      and isinstance(node.value, str)
      and node not in documentation
      and re.search(r'\blayers_|\bperiod/|^period$', node.value)
    ]
    if str(path.relative_to(PACKAGE)) in NAME_BLOCKS:
      assert names, f'{path} names no block any more: take it off the list.'
    else:
      assert not names, f'{path} names blocks, {names}: ask layout.py.'


def test_what_is_private_of_jax_is_in_one_file():
  private = {
    path.stem: names
    for path in FILES
    if (
      names := [
        name
        for name in imports(path)
        if name.split('.')[0] in ('jax', 'jaxlib')
        and (name.startswith('jaxlib') or '._' in name)
      ]
    )
  }
  assert set(private) == {'jax_internals'}, private


def test_planning_knows_no_layer():
  # Layers tell what they cost: whoever adds one changes no plan.
  for path in FILES:
    if room(path) == 'planning':
      names = [name.split('.') for name in imports(path)]
      known = {tuple(name[1:3]) for name in names if name[1:2] == ['layers']}
      assert known <= {('layers', 'cost')}, path
      assert not [name for name in names if name[1:2] == ['moe']], path


def test_names_of_files_say_what_they_hold():
  vague = {'utils', 'util', 'common', 'helpers', 'misc'}
  assert not [path for path in FILES if path.stem in vague]


def test_the_library_imports_without_tensorflow():
  # Everything but the files that register tasks, what seqio calls, and T5X.
  of_seqio = {
    *('preprocessors', 'masking', 'converters', 'packing', 'json_vocabulary'),
  }
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


def body(function):
  """The lines of a function without its signature and documentation."""
  first = function.body[ast.get_docstring(function) is not None :]
  return function.end_lineno - first[0].lineno + 1 if first else 0


def test_functions_and_files_are_short():
  for path in FILES:
    text = path.read_text()
    tree = ast.parse(text)
    if text.count('\n') > 350:
      assert 'lines' in (ast.get_docstring(tree) or ''), (
        f'{path} is longer than 350 lines; its header does not say why.'
      )
    if room(path) in ('training', 'models'):
      long = {
        node.name: body(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and body(node) > 60
      }
      assert not long, (path, long)
