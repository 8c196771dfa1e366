"""Shapes in names: every letter is in the legend, and letters are true.

A name's letters are what a reader, and nothing else, checks: here they are
held to the legend, to the shapes that are unpacked from them, and to einsums.
"""

import ast
import re

import pytest
from paths import ROOT

from sparse_experts import letters

# As the last part of a name: `x_GxSxK`, `x_1xL`, `x_GxSK`, `load_E`, `x_Bx___`.
SUFFIX = re.compile(
  r'_(?P<axes>(?:[A-Z]{1,2}|1)(?:x(?:[A-Z]{1,2}|1))*)(?P<rest>x_+|_+)?$'
)
EINSUM = re.compile(r'[A-Z,]+->[A-Z]*')
LEGEND = re.findall(r'(?m)(?:^|  )([A-Z])  \S', letters.__doc__)
FILES = sorted((ROOT / 'sparse_experts').rglob('*.py'))


def axes(name):
  """The axes that a name ends in; None for one that says none.

  'x_GxSK' -> ['G', 'SK']; a constant such as `MAX_B` has no shape.
  """
  suffix = SUFFIX.search(name)
  if name.isupper() or not suffix or suffix['rest']:
    return None
  return suffix['axes'].split('x')


def names(tree):
  """All identifiers with their lines."""
  for node in ast.walk(tree):
    for field in ('id', 'arg', 'attr', 'name'):
      name = getattr(node, field, None)
      if isinstance(name, str):
        yield name, getattr(node, 'lineno', 0)


def name_of(node):
  """The last part of `a` or `a.b`; '' for other expressions."""
  return getattr(node, 'id', getattr(node, 'attr', ''))


def einsums(tree):
  """Calls of einsum: the string, its operands, and the name of the result."""
  results = {
    node.value: node.targets[0]
    for node in ast.walk(tree)
    if isinstance(node, ast.Assign)
  }
  for node in ast.walk(tree):
    if isinstance(node, ast.Call) and name_of(node.func) == 'einsum':
      text, *operands = node.args
      if isinstance(text, ast.Constant):
        yield node.lineno, text.value, operands, results.get(node)


def unpacked(tree):
  """Assignments `B, L = x_BxL.shape`: line, the names, the axes of x."""
  for node in ast.walk(tree):
    if (
      isinstance(node, ast.Assign)
      and isinstance(node.targets[0], ast.Tuple)
      and name_of(node.value) == 'shape'
      and (of := axes(name_of(node.value.value)))
    ):
      yield node.lineno, [name_of(x) for x in node.targets[0].elts], of


def agrees(letter, axis):
  """Whether an einsum's letter, or a size's name, may be of this axis.

  A merged axis is one dimension, for which any letter of the legend stands;
  an axis of size one may be called what it is broadcast to.
  """
  return letter == axis or len(axis) > 1 or axis == '1'


def test_the_legend_lists_a_letter_once():
  assert LEGEND[:2] == ['B', 'G']
  assert len(LEGEND) == len(set(LEGEND)) > 20


@pytest.mark.parametrize(
  ('name', 'expected'),
  [
    ('x_GxSxK', ['G', 'S', 'K']),
    ('choice_GxEC', ['G', 'EC']),
    ('self.load_E', ['E']),
    ('here_BxMx1x1', ['B', 'M', '1', '1']),
    ('MAX_B', None),
    ('x_Bx___', None),
    ('balance_over', None),
    ('num_experts', None),
  ],
)
def test_the_axes_of_a_name(name, expected):
  assert axes(name) == expected


def test_letters_are_in_the_legend():
  strange, known = {}, set()
  for path in FILES:
    tree = ast.parse(path.read_text())
    found = [
      (line, name, ''.join(axes(name) or ())) for name, line in names(tree)
    ]
    found += [(line, text, text) for line, text, *_ in einsums(tree)]
    for line, name, of in found:
      of = set(re.findall('[A-Z]', of))
      known |= of
      if of - set(LEGEND):
        strange[f'{path.relative_to(ROOT)}:{line}'] = name
  assert not strange
  assert set(LEGEND) - known == set(), 'The legend lists what no name has.'


def test_sizes_are_called_as_the_axes_they_are_taken_from():
  wrong, checked = {}, 0
  for path in FILES:
    for line, sizes, of in unpacked(ast.parse(path.read_text())):
      checked += 1
      if len(sizes) != len(of) or not all(
        len(size) > 1 or size in ('', '_') or agrees(size, axis)
        for size, axis in zip(sizes, of)
      ):
        wrong[f'{path.relative_to(ROOT)}:{line}'] = (sizes, of)
  assert not wrong
  assert checked > 20


def test_einsums_have_the_letters_of_their_operands():
  wrong, checked = {}, 0
  for path in FILES:
    for line, text, operands, result in einsums(ast.parse(path.read_text())):
      assert EINSUM.fullmatch(text), f'{path}:{line} {text}'
      terms = [*text.split('->')[0].split(','), text.split('->')[1]]
      for term, node in zip(terms, [*operands, result]):
        of = axes(name_of(node))
        if of is None:
          continue
        checked += 1
        if len(of) != len(term) or not all(map(agrees, term, of)):
          wrong[f'{path.relative_to(ROOT)}:{line}'] = (text, name_of(node))
  assert not wrong
  assert checked > 20
