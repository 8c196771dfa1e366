"""Gin: the files that describe a run, and the objects they describe.

The only place that knows gin. A file configures functions and classes of this
package by dynamic registration, so modules carry no decorators.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import io
import os
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import gin.config
import gin.config_parser

import gin
from sparse_experts import earlier, storage
from sparse_experts.config import order, overrides, provenance, types

_PACKAGE = pathlib.Path(__file__).resolve().parent.parent


def root() -> pathlib.Path:
  """The folder that holds our `gin/`: the checkout, or the wheel's data."""
  data = _PACKAGE / '_data'
  return data if data.exists() else _PACKAGE.parent


def files(search_paths: Sequence[str] = ()) -> list[str]:
  """What `parse` finds in folders `gin/`, as it is given them.

  Args:
    search_paths: further folders that have a `gin/`, as `parse` takes them.
  """
  folders = map(pathlib.Path, _folders(search_paths))
  return sorted(
    {
      str(path.relative_to(folder))
      for folder in folders
      for path in (folder / 'gin').rglob('*.gin')
    }
  )


def routers(search_paths: Sequence[str] = ()) -> list[str]:
  """The routers there is a file for in gin/routers/, ours and one's own.

  Args:
    search_paths: as in `files`.
  """
  paths = map(pathlib.PurePath, files(search_paths))
  return [path.stem for path in paths if str(path.parent) == 'gin/routers']


def parse(
  files: Sequence[str], bindings: Sequence[str], search_paths: Sequence[str]
) -> None:
  """Reads gin files, then overrides.

  Args:
    files: paths, looked for in the current folder, `search_paths` and `root`.
    bindings: `NAME=VALUE` for a macro that the files define or require, or
      `module.Class.argument=VALUE`.
    search_paths: further folders.

  Raises:
    ValueError, FileNotFoundError: one line that names what is wrong.
  """
  gin.clear_config(clear_constants=True)
  folders = _folders(search_paths)
  gin.config._LOCATION_PREFIXES[:] = folders
  # Gin also looks into Python packages, and logs an ERROR where a file is not.
  gin.config._FILE_READERS[:] = [(_Open, os.path.isfile)]
  for file in files:
    searched = [pathlib.Path(folder) / file for folder in folders]
    if not any(path.is_file() for path in searched):
      raise FileNotFoundError(
        f'gin file {file!r} is not in {", ".join(map(str, searched))}; '
        '`python -m sparse_experts list` names those that come with the '
        'package, --gin_search_paths adds folders.'
      )
    overrides.one_line(gin.parse_config_file, file)
  order.check(provenance.trace(files, [], folders))
  for binding in bindings:
    name, _, text = binding.partition('=')
    if '.' in name:
      overrides.check_argument(name)
    else:
      overrides.check_macro(name)
    overrides.bind(name, text)
  missing = overrides.required_macros() - overrides.macros()
  if missing:
    raise ValueError(
      f'the gin files require {", ".join(sorted(missing))}; give each by '
      '--gin.NAME=VALUE, or add a file that defines it.'
    )
  overrides.check_circles()
  types.check()
  overrides.one_line(gin.finalize)


def parse_text(gin_text: str, bindings: Sequence[str] = ()) -> None:
  """As `parse`, of the text of a gin file."""
  with tempfile.NamedTemporaryFile('w', suffix='.gin') as file:
    file.write(gin_text)
    file.flush()
    parse([file.name], bindings, [])


def trace(
  files: Sequence[str], bindings: Sequence[str], search_paths: Sequence[str]
) -> list[list[provenance.Binding]]:
  """All bindings of each name of what `parse` has read, the last in effect.

  Args:
    files, bindings, search_paths: as `parse` was given them.
  """
  return provenance.trace(files, bindings, _folders(search_paths))


def _folders(search_paths: Sequence[str]) -> tuple[str, ...]:
  return ('', *search_paths, str(root()))


def value(name: str, of: Any = None) -> Any:
  """The object that macro `name` describes, e.g. MODEL.

  Args:
    name: of the macro.
    of: its type, for one that may be bound to no parameter, which says it.

  Raises:
    ValueError: no file defines it, or it is of another type.
  """
  if name not in overrides.macros():
    raise ValueError(
      f'no gin file defines {name}; add one that does '
      '(`python -m sparse_experts list` names them), or --gin.'
      f'{name}=VALUE.'
    )
  if of is not None:
    types.check_macro(name, of)
  return copy.deepcopy(gin.config.parse_value(f'%{name}'))


def now(name: str) -> Any:
  """As `value`, with every argument bound now.

  What `value` returns looks its arguments up when it is used; this does not
  change when other files are parsed.
  """
  value(name)  # Raises if there is none.
  macro = gin.config._CONFIG[(name, 'gin.macro')]
  return _bind_now(macro['value'], (name,))


def model() -> Any:
  """MODEL, with every argument bound now."""
  return now('MODEL')


def model_of(gin_text: str, bindings: Sequence[str] = ()) -> Any:
  """`model` of the text of a gin file, which is then what is parsed."""
  parse_text(gin_text, bindings)
  return model()


def model_of_run(model_dir: str, student_dir: str | None = None) -> Any:
  """`model` of the config.gin of a run, such as a teacher.

  A gin file may name it; what was parsed stays what is parsed.

  Args:
    model_dir: a MODEL_DIR, or one checkpoints/<step> of it.
    student_dir: the MODEL_DIR of what learns from it. Once that has a copy of
      the teacher, see `training.frozen`, this is read instead.

  Raises:
    FileNotFoundError: there is no config.gin.
  """
  from sparse_experts.models import distillation
  from sparse_experts.training import checkpoints, frozen

  root = checkpoints.root_of(model_dir)
  if student_dir is not None:
    kept = frozen.copy_of(student_dir, distillation.TEACHER)
    root = kept if kept.exists() else root
  file = root / 'config.gin'
  if not file.exists():
    raise FileNotFoundError(
      f'{root} has no config.gin, which says of what its parameters are: give '
      'a MODEL_DIR that `train` has made.'
    )
  with _aside():
    return model_of(file.read_text())


# All that gin keeps of what was parsed and called. Not its registry: what
# files name is registered once, whoever names it.
_STATE = (
  '_CONFIG',
  '_OPERATIVE_CONFIG',
  '_IMPORTS',
  '_SINGLETONS',
  '_CONSTANTS',
  '_LOCATION_PREFIXES',
  '_FILE_READERS',
  '_CONFIG_IS_LOCKED',
)


@contextlib.contextmanager
def _aside() -> Iterator[None]:
  """Other files may be parsed; after it, gin is as it was before."""
  before = {name: getattr(gin.config, name) for name in _STATE}
  for name, held in before.items():
    setattr(gin.config, name, copy.copy(held))
  try:
    with gin.config_scope(None):
      yield
  finally:
    for name, held in before.items():
      setattr(gin.config, name, held)


def text() -> str:
  """All that was parsed, as one gin file."""
  return gin.config_str()


def defined(name: str) -> bool:
  """Whether a file or an override defines macro `name`."""
  return name in overrides.macros()


def bound(function, given: Sequence[str] = ()):
  """`function` with the arguments the files bind; the caller has those `given`.

  Raises:
    ValueError: they do not bind all that it needs.
  """
  try:
    bindings = gin.get_bindings(function, resolve_references=False)
  except ValueError:  # No file imports its module.
    bindings = {}
  missing = [
    name
    for name, parameter in inspect.signature(function).parameters.items()
    if parameter.default is parameter.empty and name not in (*bindings, *given)
  ]
  if missing:
    raise ValueError(
      f'the gin files give {function.__name__} no {", ".join(missing)}; add a '
      'file that does, such as --gin_file=gin/runs/default.gin.'
    )
  return gin.get_configurable(function)


def argument(function, name: str) -> Any:
  """The value that the files bind to an argument of `function`.

  Raises:
    ValueError: they bind none.
  """
  try:
    bindings = gin.get_bindings(function, resolve_references=False)
  except ValueError:  # No file imports its module.
    bindings = {}
  if name not in bindings:
    raise ValueError(
      f'the gin files give {function.__name__} no {name}; add a file that does.'
    )
  return gin.get_bindings(function)[name]


def operative() -> str:
  """Every value in use, as a gin file; of functions called so far."""
  return gin.operative_config_str()


def _bind_now(value: Any, scopes: Sequence[str]) -> Any:
  """A parsed value with the bindings of all that it refers to.

  Args:
    value: as gin keeps it.
    scopes: that a reference without scopes of its own is evaluated in.
  """
  if isinstance(value, (list, tuple)):
    return type(value)(_bind_now(item, scopes) for item in value)
  if isinstance(value, dict):
    return {key: _bind_now(item, scopes) for key, item in value.items()}
  if not isinstance(value, gin.config.ConfigurableReference):
    return value
  selector = value.configurable.selector
  if selector == 'gin.macro':  # Its name is a scope, too.
    macro = gin.config._CONFIG[('/'.join(value.scopes), selector)]
    return _bind_now(macro['value'], value.scopes)
  # What is only named is called later, when no scope is active any more.
  scopes = value.scopes or (scopes if value.evaluate else ())
  arguments = {}
  for depth in range(len(scopes) + 1):
    key = ('/'.join(scopes[:depth]), selector)
    arguments.update(gin.config._CONFIG.get(key, {}))
  arguments = {
    name: _bind_now(argument, scopes) for name, argument in arguments.items()
  }
  function = functools.partial(value.configurable.wrapped, **arguments)
  return function() if value.evaluate else function


_READING: list[str] = []  # Files that are open; each includes the next.


class _Open(io.StringIO):
  """The text of a gin file, for as long as gin reads it."""

  def __init__(self, path: str):
    self._path = os.path.realpath(path)
    if self._path in _READING:
      chain = [*_READING[_READING.index(self._path) :], self._path]
      raise ValueError(f'a gin file includes itself: {" -> ".join(chain)}.')
    text = storage.decoded(path, pathlib.Path(path).read_bytes())
    super().__init__(earlier.translate(text))

  def __enter__(self):
    _READING.append(self._path)
    return super().__enter__()

  def __exit__(self, kind, error, trace):
    _READING.remove(self._path)
    if isinstance(error, (ImportError, SystemExit)):
      reason = str(error).partition('\n')[0]
      if isinstance(error, SystemExit):
        reason = 'it ends Python'
      raise ImportError(
        f'{self._path} imports what cannot be imported ({reason}); modules are '
        "found in the current folder and on Python's path."
      ) from error
    if isinstance(error, SyntaxError) and error.filename is None:
      error.filename = self._path  # Which its message has, then.
    return super().__exit__(kind, error, trace)
