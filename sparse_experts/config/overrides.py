"""Overrides of gin files, and what is wrong with them in one line."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable
from typing import Any

import gin.config

import gin


def first_line(error: BaseException) -> str:
  """An exception's own message, without what gin appends to it."""
  text = str(error).split('\n  In call to configurable')[0]
  if lacks_argument(error):
    text = text.split('\nNo values supplied')[0].split('\n  No values')[0]
    text += (
      ', and the gin files bind none: bind it, or name in its place what they '
      'do bind.'
    )
  text = text.split('\nNo values supplied')[0]
  return ' '.join(text.split()) or type(error).__name__


def one_line(function, *args) -> Any:
  """What a function of gin returns; its error as one line."""
  try:
    return function(*args)
  except Exception as error:
    line = first_line(error)
    if "doesn't have a parameter named" in line:  # Maybe not any more.
      line += (
        '; if an earlier version wrote it, CHANGELOG.md says what came of that '
        'argument: delete or rename it there.'
      )
    raise ValueError(line) from error


def lacks_argument(error: BaseException) -> bool:
  """Whether what a gin file names was called without an argument it needs."""
  return 'No values supplied by Gin or caller' in str(error)


def macros() -> set[str]:
  """Macros that files define."""
  return {
    scope for scope, selector in gin.config._CONFIG if selector == 'gin.macro'
  }


def required_macros() -> set[str]:
  """Macros that files refer to."""
  return _macros_in(gin.config._CONFIG)


def check_circles() -> None:
  """Raises where a macro is itself, maybe by way of others."""
  ends = set()  # What has been followed to its end.

  def follow(name: str, within: tuple[str, ...]) -> None:
    if name in within:
      circle = ' = '.join(f'%{each}' for each in (*within, name))
      raise ValueError(
        f'the macro {name} is itself, {circle}; give it a value.'
      )
    if name not in ends and (name, 'gin.macro') in gin.config._CONFIG:
      for other in sorted(_macros_in(gin.config._CONFIG[(name, 'gin.macro')])):
        follow(other, (*within, name))
      ends.add(name)

  for name in sorted(macros()):
    follow(name, ())


def _macros_in(config: Any) -> set[str]:
  macro = gin.get_configurable(gin.config.macro)
  return {
    reference.scoped_selector.rpartition('/')[0]
    for reference in gin.config.iterate_references(config, to=macro)
  }


def check_macro(name: str) -> None:
  """Raises where `name` is a macro that no file defines or requires."""
  known = macros() | required_macros()
  if name not in known:
    raise ValueError(
      f'--gin.{name}: no gin file defines or requires a macro {name}; '
      f'{_nearest(name, known)}Known: {", ".join(sorted(known))}.'
    )


def check_argument(name: str) -> None:
  """Raises where no gin file has the scope, the function or the argument."""
  scope, _, path = name.rpartition('/')
  function, _, argument = path.rpartition('.')
  registry = gin.config._REGISTRY
  matches = registry.matching_selectors(function)
  if not matches:
    near = _nearest(
      function, ('.'.join(s.split('.')[-2:]) for s, _ in registry.items())
    )
    raise ValueError(
      f'--gin.{name}: No configurable matching {function!r}; {near}no '
      'gin file names it.'
    )
  of_match = inspect.signature(
    one_line(registry.get_match, function).wrapped
  ).parameters
  takes_any = any(p.kind is p.VAR_KEYWORD for p in of_match.values())
  if argument not in of_match and not takes_any:
    raise ValueError(
      f"--gin.{name}: {function!r} doesn't have a parameter named "
      f'{argument!r}; {_nearest(argument, of_match)}It has: '
      f'{", ".join(of_match)}.'
    )
  known = {
    scope
    for scope, selector in gin.config._CONFIG
    if scope and selector != 'gin.macro'
  } | {
    '/'.join(reference.scopes)
    for reference in gin.config.iterate_references(gin.config._CONFIG)
    if reference.scopes and reference.configurable.selector != 'gin.macro'
  }
  if scope and scope not in known:
    raise ValueError(
      f'--gin.{name}: no gin file has the scope {scope}; '
      f'{_nearest(scope, known)}Known: {", ".join(sorted(known))}.'
    )


def _nearest(name: str, known: Iterable[str]) -> str:
  near = difflib.get_close_matches(name, list(known), n=1)
  return f'did you mean {near[0]}? ' if near else ''


def bind(name: str, text: str) -> None:
  """Binds `name` to what gin reads in `text`, otherwise to the text itself.

  A shell eats quotes, so --gin.MODEL_DIR=/tmp/run means '/tmp/run'.
  """
  try:
    gin.parse_config(f'{name} = {text}')
  except Exception as error:
    if not text.startswith('@'):
      now = gin.config._CONFIG.get((name, 'gin.macro'), {}).get('value')
      if now is not None and not isinstance(now, str):
        raise ValueError(
          f'--gin.{name}={text} is text, but the gin files have {name} = '
          f'{now!r}; give a value of that kind.'
        ) from error
      text = repr(text)
    one_line(gin.parse_config, f'{name} = {text}')
