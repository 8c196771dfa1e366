"""What a run is a function of: its configuration, its code, and its data.

A finished run is not run again, whichever sweep of a folder asks for it, so
its name must tell it from all that could come out otherwise.
"""

from __future__ import annotations

import functools
import hashlib
import json
import pathlib
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

_PACKAGE = pathlib.Path(__file__).resolve().parent.parent
_IMPORT = re.compile(r'^(?:from (\S+) )?import (\S+)', re.MULTILINE)


def digest(config_text: str, inputs: str) -> str:
  """Of a run, 12 hexadecimal digits.

  It is of the configuration but for MODEL_DIR; of this package's source; of the
  source of modules that the configuration names and that are not installed;
  of files and of checkpoints that its values name; and of the data. Not of
  other packages' versions.

  Args:
    config_text: all of what was parsed.
    inputs: of `inputs`.
  """
  return _of_parts(configuration(config_text), code(), inputs)


def inputs(
  config_text: str, data: Mapping[str, str], modules: Iterable[str] = ()
) -> str:
  """Of all that is neither in the configuration nor in this package's source.

  Args:
    config_text: all of what was parsed.
    data: digests of its tasks' data, where their sources have one.
    modules: names of further modules that are imported, such as those of tasks.

  Returns:
    12 hexadecimal digits.
  """
  return _of_parts(
    sorted(_sources(config_text, modules)),
    sorted(_files(config_text)),
    sorted(data.items()),
  )


def _of_parts(*parts: Any) -> str:
  return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def configuration(text: str) -> str:
  """A gin file's text without where the run lies, which makes it no other."""
  lines = text.splitlines()
  return '\n'.join(line for line in lines if not line.startswith('MODEL_DIR ='))


@functools.cache
def code() -> str:
  """Of the package's Python files, 12 hexadecimal digits."""
  return _of_files(_PACKAGE.rglob('*.py'))


def _sources(config_text: str, modules: Iterable[str]) -> Iterator[list[str]]:
  """Modules of one's own, with digests; of a package, that of all its files."""
  installed = {
    pathlib.Path(sysconfig.get_path(name)).resolve()
    for name in ('stdlib', 'platstdlib', 'purelib', 'platlib')
  }
  names = set(modules)
  for package, name in _IMPORT.findall(config_text):
    names |= {f'{package}.{name}', package} if package else {name}
  for name in names & sys.modules.keys():
    file = getattr(sys.modules[name], '__file__', None)
    if file is None:
      continue
    path = pathlib.Path(file).resolve()
    if {_PACKAGE, *installed} & set(path.parents):
      continue
    root = path.parents[name.count('.') - (path.name != '__init__.py')]
    inside = '.' in name or path.name == '__init__.py'
    yield [name, _of_files(root.rglob('*.py') if inside else [path])]


def _files(config_text: str) -> Iterator[list[str]]:
  """Files that values name, and checkpoints, with digests."""
  from sparse_experts.config import provenance
  from sparse_experts.training import checkpoints, checksums

  for name, value in provenance.written(config_text).items():
    for text in _texts(value) if name != 'MODEL_DIR' else ():
      try:
        path = pathlib.Path(text)
        if path.is_file():
          yield [text, _of_files([path])]
        elif path.is_dir() and (checkpoints.steps(path) or path.name.isdigit()):
          step, _ = checkpoints.find(text)
          yield [text, _of_files([pathlib.Path(step) / checksums.NAME])]
      except (OSError, ValueError):  # No path, or nothing that can be read.
        continue


def _texts(value: Any) -> Iterator[str]:
  if type(value) is str:  # Not what is a reference or a macro.
    yield value
  elif isinstance(value, Mapping):
    value = list(value.values())
  if isinstance(value, (list, tuple)):
    for item in value:
      yield from _texts(item)


def _of_files(paths: Iterable[pathlib.Path]) -> str:
  hashed = hashlib.sha256()
  for path in sorted(paths):
    hashed.update(path.name.encode() + b'\0')
    hashed.update(path.read_bytes() + b'\0')
  return hashed.hexdigest()[:12]
