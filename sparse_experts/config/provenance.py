"""Where values come from: which line of which file bound them, over what.

Gin keeps the last binding of a name and not where it was. The files are read
once more here, by gin's own parser and in the order in which gin executes them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import gin.config
import gin.config_parser

import gin
from sparse_experts import earlier

COMMAND_LINE = 'command line'


class Written(str):
  """A reference or a macro as a file has it: '@mlp.Mlp', '%NUM_LAYERS'."""

  __repr__ = str.__str__  # Without quotes, as in a file.


class AsWritten(gin.config_parser.ParserDelegate):
  """Values of what a file names, which need not be there, as text."""

  def configurable_reference(self, scoped_configurable_name, evaluate):
    return Written(f'@{scoped_configurable_name}{"()" if evaluate else ""}')

  def macro(self, macro_name):
    return Written(f'%{macro_name}')


@dataclasses.dataclass(eq=False)
class Source:
  """One reading of a gin file; a file that is included twice is read twice.

  Attributes:
    name: of the package's own, from its root; of others, the path.
    after: the files that its header says it comes after.
    parent: what includes it; None: the command line.
    names: its own and those of all that it includes, in turn.
  """

  name: str
  after: Sequence[str]
  parent: Source | None
  names: set[str]

  def path(self) -> list[Source]:
    """From the file that the command line names down to this one."""
    return [*(self.parent.path() if self.parent else ()), self]


@dataclasses.dataclass(frozen=True)
class Binding:
  """A line that gives a name a value.

  Attributes:
    name: as overrides give it, `MACRO` or `scope/module.Class.argument`.
    about: the function or class, with its whole module, that has the argument
      or that a macro names; '' for other macros.
    value: as written, see `Written`.
    source: None: the command line.
    line: of its first word, from 1.
  """

  name: str
  about: str
  value: Any
  source: Source | None = None
  line: int | None = None

  @property
  def file(self) -> str:
    return self.source.name if self.source else COMMAND_LINE


def trace(
  files: Sequence[str], bindings: Sequence[str], folders: Sequence[str]
) -> list[list[Binding]]:
  """The bindings of each name, first to last; names as they first appear.

  Args:
    files: gin files, which gin can read.
    bindings: `NAME=VALUE`, after the files.
    folders: to look for files in, in order; the last is the package's root.
  """
  chains: dict[tuple[str, str, str], list[Binding]] = {}
  of_files = (_of_file(file, None, folders) for file in files)
  of_command_line = map(_of_override, bindings)
  for key, binding in itertools.chain(*of_files, of_command_line):
    chains.setdefault(key, []).append(binding)
  return list(chains.values())


def in_effect(value: Any, chains: Sequence[Sequence[Binding]]) -> Any:
  """A value as written with its macros replaced by what they are."""
  macros = {last.name: last.value for *_, last in chains}

  def replaced(value):
    if isinstance(value, (list, tuple)):
      return type(value)(map(replaced, value))
    if isinstance(value, dict):
      return {key: replaced(item) for key, item in value.items()}
    if is_macro(value) and value[1:] in macros:
      return replaced(macros[value[1:]])
    return value

  return replaced(value)


def macros_in(value: Any) -> list[str]:
  """Names of the macros that a value as written has."""
  if isinstance(value, dict):
    value = list(value.values())
  if isinstance(value, (list, tuple)):
    return [name for item in value for name in macros_in(item)]
  return [value[1:]] if is_macro(value) else []


def is_macro(value: Any) -> bool:
  """Whether a value as written is a macro and no more."""
  return isinstance(value, Written) and value.startswith('%')


def statements(path: str) -> dict[str, Any]:
  """As `written`, of a file, with macros replaced by what it says they are."""
  bindings = written(pathlib.Path(path).read_text('utf-8-sig'))

  def resolved(value):
    while isinstance(value, str) and value[:1] == '%' and value[1:] in bindings:
      value = bindings[value[1:]]
    return value

  return {name: resolved(value) for name, value in bindings.items()}


def written(text: str) -> dict[str, Any]:
  """Bindings of any gin text by name; nothing that it names need be there.

  References and macros are text, see `Written`.
  """
  bindings = {}
  for statement in gin.config_parser.ConfigParser(text, AsWritten()):
    if isinstance(statement, gin.config_parser.BindingStatement):
      parts = (statement.scope, statement.selector, statement.arg_name)
      scope, selector, argument = parts
      name = f'{scope}/{selector}' if scope else selector
      name = f'{name}.{argument}' if argument else name
      bindings[name] = statement.value
  return bindings


def _of_file(
  file: str, parent: Source | None, folders: Sequence[str]
) -> Iterator[tuple[tuple[str, str, str], Binding]]:
  """Its bindings and those of what it includes, as they are executed."""
  paths = (pathlib.Path(folder) / file for folder in folders)
  path = next(path for path in paths if path.is_file())
  text = path.read_text('utf-8-sig')
  name = _name(path, pathlib.Path(folders[-1]))
  source = Source(name, _after(text), parent, set())
  for ancestor in source.path():
    ancestor.names.add(name)
  context = gin.config.ParseContext()  # Which names the file has imported.
  for statement in _statements(earlier.translate(text)):
    if isinstance(statement, gin.config_parser.ImportStatement):
      context.process_import(statement)
    elif isinstance(statement, gin.config_parser.IncludeStatement):
      yield from _of_file(statement.filename, source, folders)
    elif isinstance(statement, gin.config_parser.BindingStatement):
      yield _bound(statement, context.get_configurable, source)


def _of_override(text: str) -> tuple[tuple[str, str, str], Binding]:
  """Of `NAME=VALUE`, whose value is text where gin cannot read it."""
  name, _, value = text.partition('=')
  try:
    (statement,) = _statements(f'{name} = {value}')
  except (SyntaxError, ValueError):
    (statement,) = _statements(f'{name} = {value!r}')
  return _bound(statement, gin.config._REGISTRY.get_match, None)


def _bound(
  statement, configurable_of, source: Source | None
) -> tuple[tuple[str, str, str], Binding]:
  """A statement's binding, and what gin knows its name by."""
  scope, selector, argument, value, location = statement
  if argument:
    about = configurable_of(selector).selector
    key = (scope, about, argument)
    short = '.'.join(about.split('.')[-2:])
    name = '/'.join(filter(None, (scope, f'{short}.{argument}')))
  else:
    name = '/'.join(filter(None, (scope, selector)))
    key, about = (name, 'gin.macro', 'value'), ''
    if isinstance(value, Written) and value.startswith('@'):
      _, _, selector = value.strip('@()').rpartition('/')
      about = configurable_of(selector).selector
  line = location.line_num if source else None
  return key, Binding(name, about, value, source, line)


@functools.lru_cache(maxsize=256)
def _statements(text: str) -> Sequence:
  """What gin's parser finds in a file; most are read many times."""
  return tuple(gin.config_parser.ConfigParser(text, AsWritten()))


def _name(path: pathlib.Path, root: pathlib.Path) -> str:
  absolute, root = path.resolve(), root.resolve()
  if absolute.is_relative_to(root):
    return absolute.relative_to(root).as_posix()
  return str(path)


def _after(text: str) -> list[str]:
  """The files that a line `# After: FILE, FILE` of a header names."""
  header = itertools.takewhile(
    lambda line: line.startswith('#'), text.splitlines()
  )
  return [
    file.strip()
    for line in header
    if line.startswith('# After: ')
    for file in line.removeprefix('# After: ').split(',')
  ]
