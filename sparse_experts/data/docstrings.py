"""Docstrings as documents: read by `ast`, never imported; no text twice."""

import ast
import contextlib
import gc
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

# Shorter docstrings are labels ('See base class.'), not text.
MIN_CHARACTERS = 100

Item = TypeVar('Item')


def docstrings(source: bytes, module: str) -> Iterator[tuple[str, str]]:
  """The docstrings of a file, in its order, as dotted paths and texts.

  Every Python gives the same for a file that it can parse; one that it cannot,
  such as a template, has none.

  Args:
    source: of the file.
    module: its dotted path.

  Example:
    >>> source = b'def f():\\n  ' + repr('words ' * 20).encode()
    >>> [name for name, _ in docstrings(source, 'package.module')]
    ['package.module.f']
  """
  try:
    tree = ast.parse(source)
  except SyntaxError:
    return
  pending: list[tuple[str, ast.AST]] = [(module, tree)]
  while pending:
    name, node = pending.pop()
    if isinstance(
      node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    ):
      if not isinstance(node, ast.Module):
        name = f'{name}.{node.name}'
      lines = (ast.get_docstring(node) or '').splitlines()
      text = '\n'.join(line.rstrip() for line in lines).strip()
      if len(text) >= MIN_CHARACTERS:
        yield name, text
    pending.extend(
      (name, child)
      for child in reversed(list(ast.iter_child_nodes(node)))
      if isinstance(child, ast.stmt | ast.ExceptHandler)
    )


@contextlib.contextmanager
def parsing() -> Iterator[None]:
  """While many files are parsed: faster, and without what parsers warn of."""
  # Syntax trees have no cycles, and looking for some takes a third longer.
  gc.disable()
  try:
    with warnings.catch_warnings():
      # Other people's invalid escapes.
      warnings.simplefilter('ignore')
      yield
  finally:
    gc.enable()


def without_near_duplicates(
  items: Iterable[Item], text: Callable[[Item], str]
) -> Iterator[Item]:
  """Leaves out texts that say little which was not said before.

  A line of a text is new if no text kept before has it, indented or not. A text
  stays if its new lines have at least half of the characters of its lines, each
  counted once. So the first of equal texts stays, and of the overloads of a
  function, which share what they say of arguments.

  Args:
    items: in the order that decides which of two alike is the first.
    text: of an item.

  Example:
    >>> texts = ['one\\n  two', 'one\\ntwo', 'one\\nsix', 'six\\nand seven']
    >>> list(without_near_duplicates(texts, str))
    ['one\\n  two', 'one\\nsix', 'six\\nand seven']
  """
  seen = set()
  for item in items:
    lines = {line.strip() for line in text(item).splitlines()}
    new = lines - seen
    if 2 * sum(map(len, new)) >= sum(map(len, lines)):
      seen |= new
      yield item
