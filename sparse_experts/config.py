"""Gin: the files that describe a run, and the objects they describe.

With cli.py the only place that knows gin. A file configures functions and
classes of this package by dynamic registration, so modules carry no
decorators.
"""

from __future__ import annotations

import copy
import difflib
import importlib.util  # noqa: F401  gin forgets it and needs it.
import logging
import pathlib
from collections.abc import Sequence
from typing import Any

import gin

_PACKAGE = pathlib.Path(__file__).resolve().parent


def root() -> pathlib.Path:
  """The folder that holds our `gin/`: the checkout, or the wheel's data."""
  data = _PACKAGE / '_data'
  return data if data.exists() else _PACKAGE.parent


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
  # Gin logs an ERROR for every folder in which a file is not.
  logging.getLogger('gin').setLevel(logging.CRITICAL)
  for path in ('', *search_paths, str(root())):
    gin.add_config_file_search_path(path)
  for file in files:
    searched = [pathlib.Path(p) / file for p in ('', *search_paths, root())]
    if not any(path.is_file() for path in searched):
      raise FileNotFoundError(
        f'gin file {file!r} is not in {", ".join(map(str, searched))}; '
        '`python -m sparse_experts list` names those that come with the '
        'package, --gin_search_paths adds folders.'
      )
    _one_line(gin.parse_config_file, file)
  for binding in bindings:
    name, _, value = binding.partition('=')
    if '.' not in name:
      _check_macro(name)
    _one_line(gin.parse_config, f'{name} = {_literal(value)}')
  _one_line(gin.finalize)


def value(name: str) -> Any:
  """The object that macro `name` describes, e.g. MODEL.

  Raises:
    ValueError: no file defines it.
  """
  if name not in _macros():
    raise ValueError(
      f'no gin file defines {name}; add one that does '
      '(`python -m sparse_experts list` names them), or --gin.'
      f'{name}=VALUE.'
    )
  return copy.deepcopy(gin.config.parse_value(f'%{name}'))


def defined(name: str) -> bool:
  """Whether a file or an override defines macro `name`."""
  return name in _macros()


def bound(function):
  """`function` with the arguments the files bind.

  Raises:
    ValueError: they bind none.
  """
  try:
    return gin.get_configurable(function)
  except ValueError as error:
    raise ValueError(
      f'the gin files say nothing about {function.__name__}; add '
      f'--gin_file=gin/runs/{function.__name__}.gin.'
    ) from error


def operative() -> str:
  """Every value in use, as a gin file; of functions called so far."""
  return gin.operative_config_str()


def first_line(error: BaseException) -> str:
  """An exception's own message, without what gin appends to it."""
  text = str(error).split('\n  In call to configurable')[0]
  text = text.split('\nNo values supplied')[0]
  return ' '.join(text.split()) or type(error).__name__


def _one_line(function, *args):
  try:
    return function(*args)
  except Exception as error:
    raise ValueError(first_line(error)) from error


def _macros() -> set[str]:
  return {
    scope for scope, selector in gin.config._CONFIG if selector == 'gin.macro'
  }


def _check_macro(name: str) -> None:
  """Raises where `name` is a macro that no file defines or requires."""
  required = {
    reference.scoped_selector.rpartition('/')[0]
    for reference in gin.config.iterate_references(
      gin.config._CONFIG, to=gin.config.macro
    )
  }
  known = _macros() | required
  if name not in known:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f'did you mean {near[0]}? ' if near else ''
    raise ValueError(
      f'--gin.{name}: no gin file defines or requires a macro {name}; {hint}'
      f'Known: {", ".join(sorted(known))}.'
    )


def _literal(value: str) -> str:
  """`value` as it is if gin can read it, otherwise as a string.

  A shell eats quotes, so --gin.MODEL_DIR=/tmp/run means '/tmp/run'.
  """
  try:
    gin.config.parse_value(value)
  except Exception:
    return repr(value)
  return value
