"""What gin binds is held to the annotation of the parameter that it enters.

Annotations are the one place that says what a parameter takes: a wrong value
is found before anything is built, and every command finds it. Ranges are in
them, too (`numbers.py`); what depends on several values the constructors say.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import inspect
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import annotated_types
import gin.config
import pydantic
from pydantic_core import core_schema

import gin

_STRICT = pydantic.ConfigDict(
  strict=True
)  # No text for a number, no 1 for True.
_DATA = (int, float, bool, str, bytes, list, tuple, dict, set, types.NoneType)
_UNIONS = (typing.Union, types.UnionType)
_CONTAINERS: tuple[Any, ...] = (
  *(list, tuple, dict, set, frozenset),
  *(collections.abc.Sequence, collections.abc.Mapping),
)


def check() -> None:
  """Holds every binding of what was parsed to its parameter's annotation.

  `@x` is taken as what can be called, `@x()` as an object of the class that it
  makes; macros as what they stand for. A parameter without an annotation that
  can be read, and an object of which no class is known, pass.

  Raises:
    ValueError: one line names the binding, its value and what was expected.
  """
  for (scope, selector), bindings in gin.config._CONFIG.items():
    if selector == 'gin.macro':
      continue
    takes = _parameters(gin.config._REGISTRY[selector].wrapped)
    function = '.'.join(selector.split('.')[-2:])
    for argument, bound in bindings.items():
      if argument not in takes:
        continue
      name = f'{scope}/{function}' if scope else function
      name = f'{name}.{argument}'
      macro, value = _resolved(bound)
      if not takes[argument].accepts(value):
        where = f'{macro} = {_shown(value)} ({name})'
        raise ValueError(
          f'{where if macro else f"{name} = {_shown(value)}"} must be '
          f'{_text(takes[argument].hint)}.'
        )


def check_macro(name: str, hint: Any) -> None:
  """Holds a macro that no parameter has to a type, as `check` does."""
  value = _resolved(gin.config._CONFIG[(name, 'gin.macro')]['value'])[1]
  if not _Parameter(hint, inspect.Parameter.empty).accepts(value):
    raise ValueError(f'{name} = {_shown(value)} must be {_text(hint)}.')


@dataclasses.dataclass(frozen=True)
class _Parameter:
  """What a parameter takes.

  Attributes:
    hint: its type.
    default: which is right whatever the hint says.
  """

  hint: Any
  default: Any

  def accepts(self, value: Any) -> bool:
    """Whether a value, as gin keeps it, is of the type."""
    # Alike inside, too: (True,) equals (1,).
    if value == self.default and repr(value) == repr(self.default):
      return True
    try:
      self._adapter.validate_python(_stand_in(value))
    except _UnknownError:
      return True
    except pydantic.ValidationError:
      return False
    return True

  @functools.cached_property
  def _adapter(self) -> pydantic.TypeAdapter:
    return pydantic.TypeAdapter(_schema(self.hint), config=_STRICT)


class _Makes:
  """Takes what makes objects of a type, as far as it says what it makes."""

  def __init__(self, hint: Any):
    self._hint = hint

  def __call__(self, function: Callable) -> Callable:
    try:
      made = _made_by(function)
    except _UnknownError:
      return function
    self._adapter.validate_python(made)
    return function

  @functools.cached_property
  def _adapter(self) -> pydantic.TypeAdapter:
    return pydantic.TypeAdapter(_schema(self._hint), config=_STRICT)


class _UnknownError(Exception):
  """Nobody says of which class an object will be."""


@functools.cache
def _parameters(function: Callable) -> Mapping[str, _Parameter]:
  """The parameters of a function or class whose types can be read."""
  try:
    signature = inspect.signature(function).parameters
  except ValueError:  # Built in.
    return {}
  found = {}
  for name, hint in _hints(function):
    if name in signature:
      found[name] = _Parameter(hint, signature[name].default)
  return found


def _hints(function: Callable) -> Iterator[tuple[str, Any]]:
  """Names and types; no types that cannot be read here.

  Names that only a type checker imports are not there to be read.
  """
  if inspect.isclass(function) and dataclasses.is_dataclass(function):
    sources = [
      (vars(of).get('__annotations__', {}), vars(sys.modules[of.__module__]))
      for of in reversed(function.__mro__)
    ]
  else:
    code = function.__init__ if inspect.isclass(function) else function
    code = inspect.unwrap(code)
    sources = [
      (getattr(code, '__annotations__', {}), getattr(code, '__globals__', {}))
    ]
  for said, names in sources:
    for name, annotation in said.items():
      one = types.SimpleNamespace(__annotations__={name: annotation})
      try:
        hint = typing.get_type_hints(one, names, include_extras=True)[name]
      except (NameError, AttributeError, TypeError):
        continue
      yield name, hint


def _text(hint: Any) -> str:
  """A type as its source says it.

  Example:
    >>> _text(typing.Literal['a', 'b'] | collections.abc.Sequence[int])
    "'a' | 'b' | Sequence[int]"
  """
  origin, arguments = typing.get_origin(hint), typing.get_args(hint)
  if origin is typing.Literal:
    return ' | '.join(map(repr, arguments))
  if origin in _UNIONS:
    return ' | '.join(map(_text, arguments))
  if hint is types.NoneType:
    return 'None'
  if origin is typing.Annotated:
    bounds = ', '.join(filter(None, map(_bound, hint.__metadata__)))
    return f'{_text(arguments[0])} {bounds}'
  if origin is not None and origin is not collections.abc.Callable:
    name = re.sub(r'\b\w+\.', '', str(origin.__name__))
    inside = ('...' if x is ... else _text(x) for x in arguments)
    return f'{name}[{", ".join(inside)}]'
  if origin is None and isinstance(hint, type):
    return hint.__name__
  return re.sub(r'\b\w+\.', '', str(hint))


def _bound(of: Any) -> str:
  match of:
    case annotated_types.Ge(least):
      return f'at least {least}'
    case annotated_types.Gt(least) if least > -math.inf:
      return f'above {least}'
    case annotated_types.Le(most):
      return f'at most {most}'
    case annotated_types.Lt(most) if most < math.inf:
      return f'below {most}'
    case annotated_types.Lt():
      return 'finite'
  return ''


def _schema(hint: Any) -> Any:
  """`hint` as pydantic is to read it: of a class, an object is one or is not.

  By itself it looks into dataclasses, whose fields are no concern here.
  """
  origin, arguments = typing.get_origin(hint), typing.get_args(hint)
  if origin is typing.Annotated:
    bounds = hint.__metadata__
    return typing.Annotated[(_schema(hint.__origin__), *bounds)]
  if origin in _UNIONS:
    return typing.Union[tuple(map(_schema, arguments))]  # noqa: UP007
  if origin is typing.Literal or hint in _DATA:
    return hint
  if collections.abc.Callable in (origin, hint):
    if not arguments:
      return Callable
    return typing.Annotated[
      Callable, pydantic.AfterValidator(_Makes(arguments[-1]))
    ]
  if origin in _CONTAINERS:
    return origin[tuple(x if x is ... else _schema(x) for x in arguments)]
  of = origin or hint
  if getattr(of, '_is_protocol', False):  # Most cannot be asked for.
    return Callable if '__call__' in vars(of) else Any
  try:
    isinstance(None, of)
  except TypeError:  # No class.
    return Any
  return typing.Annotated[
    Any,
    pydantic.GetPydanticSchema(
      lambda source, handler: core_schema.is_instance_schema(of)
    ),
  ]


def _resolved(value: Any) -> tuple[str | None, Any]:
  """The last of a chain of macros and its value; None where it is none."""
  name = None
  while _is_reference(value) and value.configurable.selector == 'gin.macro':
    name = '/'.join(value.scopes)
    value = gin.config._CONFIG[(name, 'gin.macro')]['value']
  return name, value


def _stand_in(value: Any) -> Any:
  """A value with something of the right class for every reference in it.

  Raises:
    _UnknownError: nobody says what one will be.
  """
  if isinstance(value, (list, tuple)):
    return type(value)(map(_stand_in, value))
  if isinstance(value, dict):
    return {_stand_in(key): _stand_in(item) for key, item in value.items()}
  if not _is_reference(value):
    return value
  if value.configurable.selector == 'gin.macro':
    return _stand_in(_resolved(value)[1])
  function = value.configurable.wrapped
  return _made_by(function) if value.evaluate else function


def _made_by(function: Callable) -> Any:
  """An object as a function or class makes: of its class, not initialised.

  Raises:
    _UnknownError: nobody says what it makes.
  """
  made: Any = function
  if not inspect.isclass(function):
    made = dict(_hints(function)).get('return')
  if typing.get_origin(made) is collections.abc.Callable:
    return lambda: None
  if made is types.NoneType:
    return None
  if made is Any:
    raise _UnknownError
  try:
    return object.__new__(made)
  except TypeError as error:  # Built in, a union, or not said.
    raise _UnknownError from error


def _is_reference(value: Any) -> bool:
  return isinstance(value, gin.config.ConfigurableReference)


def _shown(value: Any) -> str:
  text = ' '.join(repr(value).split())
  return text if len(text) <= 80 else f'{text[:77]}...'
