"""Public functions of three or more arguments say what each is.

In `Args:`, or by naming the function whose arguments they are. A method that
overrides another says what its base does not.
"""

import ast
import collections
import re

import falling
import pytest
from paths import ROOT
from rooms import FILES

KIND = 'functions without Args'
SAYS = re.compile(r'^ *Args:|[Aa]rguments[^.]*`\w|^As `\w', re.MULTILINE)


def functions(tree):
  """(class or None, function) of all that are public."""
  for node in tree.body:
    if isinstance(node, ast.FunctionDef):
      yield None, node
    elif isinstance(node, ast.ClassDef):
      for inner in node.body:
        if isinstance(inner, ast.FunctionDef):
          yield node, inner


def names(function):
  """Its arguments, but for the object or class that it is of."""
  given = function.args
  found = [*given.posonlyargs, *given.args, *given.kwonlyargs]
  return [each.arg for each in found if each.arg not in ('self', 'cls')]


def last(node):
  """The last part of `a.b`, `a` or `a[b]`."""
  if isinstance(node, ast.Subscript):
    node = node.value
  return getattr(node, 'attr', getattr(node, 'id', ''))


def undocumented(trees=None):
  """'line: function(arguments)' of those that say nothing, by file."""
  trees = trees or {
    str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in FILES
  }
  says, bases = set(), {}
  for file, tree in trees.items():
    for of, function in functions(tree):
      if of:
        of_class = {last(base) for base in of.bases} - {of.name}
        bases.setdefault(of.name, set()).update(of_class)
      if SAYS.search(ast.get_docstring(function) or ''):
        says.add((of.name if of else file, function.name))

  def said(of, name):
    return (of, name) in says or any(
      said(base, name) for base in bases.get(of, ())
    )

  found = collections.defaultdict(list)
  for file, tree in trees.items():
    for of, function in functions(tree):
      public = not (function.name.startswith('_') or (of and of.name[0] == '_'))
      arguments = names(function)
      says_it = said(of.name if of else file, function.name)
      if public and len(arguments) >= 3 and not says_it:
        name = f'{of.name}.{function.name}' if of else function.name
        line = f'{function.lineno}: {name}({", ".join(arguments)})'
        found[file].append(line)
  return found


def test_no_file_has_more_that_say_nothing():
  falling.check(KIND, undocumented())


def test_numbers_only_fall(monkeypatch):
  monkeypatch.setattr(falling, 'held', lambda: {'faults': {'a.py': 1}})
  falling.check('faults', {'a.py': ['1: f']})
  with pytest.raises(AssertionError, match='a.py: 2 faults, at most 1\n  1: f'):
    falling.check('faults', {'a.py': ['1: f', '2: g']})
  with pytest.raises(AssertionError, match='b.py: 1 faults, at most 0'):
    falling.check('faults', {'a.py': ['1: f'], 'b.py': ['1: f']})
  with pytest.raises(AssertionError, match='fewer faults in a.py'):
    falling.check('faults', {})
  assert falling.lowered('faults', {'a.py': ['1: f', '2: g']}) == {'a.py': 1}
  assert falling.lowered('faults', {'b.py': ['1: f']}) == {}


def test_which_say_nothing():
  tree = ast.parse('''
class Base:
  def f(self, a, b, c):
    """It.

    Args:
      a, b, c: numbers.
    """

class Sub(Base):
  def f(self, a, b, c):
    """Its own."""
  def g(self, a, b, c):
    """Nothing."""

class _Hidden:
  def f(self, a, b, c): ...

def two(a, b): ...
def by_name(a, b, *, c):
  """Arguments as of `Base.f`."""
def three(a, b, *, c): ...
''')
  assert undocumented({'x.py': tree}) == {
    'x.py': ['13: Sub.g(a, b, c)', '22: three(a, b, c)']
  }
