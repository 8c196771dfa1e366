"""Files of one's own as tasks: what gin/tasks/csv.gin and its like name.

A task is registered under a name that says its format, its first file and, by a
hash, all else that it is made of, so a gin file may call these wherever a task
is named, and a run's config.gin, which keeps FILES and the rest, finds the task
again. Files are read when examples are.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence

from sparse_experts.data import file_rows, host_tensorflow, vocabularies
from sparse_experts.data.metrics import named as named_metric
from sparse_experts.numbers import Count

Files = Mapping[str, str | Sequence[str]]


def task(
  files: Files,
  format: str,
  inputs: str,
  targets: str,
  *,
  metrics: Sequence[str | Callable] = ('accuracy',),
  options: Sequence[str] | str | None = None,
  vocabulary: str = 'docs',
) -> str:
  """Registers the rows of JSON lines or CSV as a task and returns its name.

  Args:
    files: by split a path, a glob, or a list of these, relative to the current
      folder. Without a 'validation' 5% of 'train' is that, see `FileSource`.
    format: 'jsonl' or 'csv'.
    inputs, targets: templates; {field} is a column or key, {outer/inner} a
      nested one, {{ and }} are braces.
    metrics: names of functions of `data.metrics`, or such functions.
    options: templates of the answers that RANK_OPTIONS chooses from, of which
      each target is one; or the key of a list of them; None: all targets of
      'train', if they are at most 100 and there are twice as many examples. A
      target of another split that is none of those found counts as wrong. ():
      none.
    vocabulary: see `vocabularies.named`.

  Raises:
    ValueError: an argument is none of these. What is wrong with files shows
      when they are read.
  """
  _check_files(files)
  _check_known('format', format, ('jsonl', 'csv'))
  if isinstance(metrics, str):
    raise ValueError(f'METRICS are several: write ({metrics!r},).')
  host_tensorflow.load()
  from sparse_experts.data.tasks import benchmark, own_options
  from sparse_experts.data.tasks.file_source import FileSource

  lists = (options,) if isinstance(options, str) else ()
  if lists and format == 'csv':
    raise ValueError(
      f'OPTIONS = {options!r} names a list, which CSV has none of: write the '
      f'options, such as OPTIONS = ({options!r}, ...).'
    )
  if not lists and options and len(set(options)) < len(options):
    raise ValueError(
      f'OPTIONS = {options!r} has one twice; an answer is one of them.'
    )
  fields = {
    name: None  # In order, once each.
    for what, template in (
      ('INPUTS', inputs),
      ('TARGETS', targets),
      *(('OPTIONS', option) for option in (() if lists else options or ())),
    )
    for name in _fields(what, template)
  }
  row = benchmark.Benchmark(
    _name(format, files, inputs, targets, metrics, options, vocabulary),
    FileSource(files, format, (*fields, *lists), lists=lists),
    inputs=inputs,
    targets=targets,
    label='',
    metrics=tuple(map(named_metric, metrics)),
    normalise=False,
  )
  choose = functools.cache(functools.partial(own_options.of, row, options))
  row = dataclasses.replace(row, options=choose)
  return _register(
    row.name, files, lambda: benchmark.add(row, vocabularies.named(vocabulary))
  )


def text_task(
  files: Files,
  objective: str,
  *,
  vocabulary: str = 'docs',
  documents: str = 'paragraph',
) -> str:
  """Registers text files as a task and returns its name.

  Args:
    files: as in `task`.
    objective: a function of `data.preprocessors`: 'lm', 'prefix_lm' or
      'span_corruption'. Documents are joined, and cut to the lengths.
    vocabulary: see `vocabularies.named`.
    documents: what is a document, is shuffled and may be held out: a
      'paragraph' (between blank lines), a 'line' or a 'file'.

  Raises:
    As `task`.
  """
  _check_files(files)
  features = {
    'lm': ('targets',),
    'prefix_lm': ('inputs', 'targets'),
    'span_corruption': ('inputs', 'targets'),
  }
  _check_known('objective', objective, features)
  _check_known('DOCUMENTS', documents, file_rows.DOCUMENTS)
  host_tensorflow.load()
  import seqio

  from sparse_experts.data import preprocessors
  from sparse_experts.data.tasks import arrays, docs
  from sparse_experts.data.tasks.file_source import FileSource

  def add():
    # Of a prefix and its continuation neither is a text's end.
    of = seqio.Feature(
      vocabularies.named(vocabulary), add_eos=objective != 'prefix_lm'
    )
    source = FileSource(files, 'text', documents=documents)
    rekey, _, cut = preprocessors.from_text(getattr(preprocessors, objective))
    steps = [
      rekey,
      functools.partial(preprocessors.tokenize, copy_pretokenized=False),
    ]
    if arrays.is_python(of.vocabulary):
      source = arrays.TokenSource(source, rekey, {'targets': of})
      # And not the texts that they were.
      keys = {'targets': 'targets'}
      steps = [functools.partial(seqio.preprocessors.rekey, key_map=keys)]
    seqio.TaskRegistry.add(
      name,
      source=source,
      preprocessors=[*steps, cut],
      output_features=dict.fromkeys(features[objective], of),
      metric_fns=[],
      shuffle_buffer_size=docs.SHUFFLE_BUFFER,
    )

  name = _name('text', files, objective, documents, vocabulary)
  return _register(name, files, add)


def questions(lengths: Mapping[str, Count], vocabulary: str) -> str:
  """Registers a task without data and returns its name.

  Of texts that are given to a command: questions of `infer`, say.

  Args:
    lengths: in tokens, by feature: 'inputs' and 'targets', or 'targets' alone,
      which a decoder continues.
    vocabulary: see `vocabularies.named`.
  """
  host_tensorflow.load()
  import seqio

  from sparse_experts.data.tasks.file_source import FileSource

  def add():
    of = seqio.Feature(vocabularies.named(vocabulary))
    seqio.TaskRegistry.add(
      name,
      source=FileSource({}, 'text'),
      preprocessors=[],
      output_features=dict.fromkeys(lengths, of),
    )

  made_of = [sorted(lengths), vocabulary, vocabularies.digest(vocabulary)]
  hashed = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
  name = f'questions_{hashed[:8]}'
  return _register(name, {}, add)


# Of each task that is registered, what its files were then.
_STATES: dict[str, tuple] = {}


def _register(name: str, of: Files, add: Callable[[], object]) -> str:
  """Adds a task, anew where its files have changed since."""
  import seqio

  state = _state(of)
  if name in seqio.TaskRegistry.names():
    if _STATES[name] == state:
      return name
    seqio.TaskRegistry.remove(name)
  add()
  _STATES[name] = state
  return name


def _state(of: Files) -> tuple:
  """What tells whether files have changed; () where some are not there."""
  try:
    found = {split: file_rows.find(given) for split, given in of.items()}
  except FileNotFoundError:  # Whoever reads them says so.
    return ()
  return tuple(
    (split, str(path.absolute()), path.stat().length, path.stat().mtime)
    for split, paths in found.items()
    for path in paths
  )


def _name(format: str, of: Files, *made_of) -> str:
  """Of a task: the same wherever the same is asked for."""
  vocabulary = vocabularies.digest(made_of[-1])
  described = json.dumps([dict(of), made_of, vocabulary], default=_named)
  first = next(iter(of.values()))
  first = first if isinstance(first, str) else next(iter(first))
  stem = os.path.basename(first).partition('.')[0]
  stem = ''.join(c if c.isalnum() and c.isascii() else '_' for c in stem)
  hashed = hashlib.sha256(described.encode()).hexdigest()[:8]
  return f'{format}_{stem}_{hashed}'


def _named(function: Callable) -> str:
  return f'{function.__module__}.{function.__qualname__}'


def _check_files(of: Files) -> None:
  """Raises ValueError unless FILES says of splits where they are."""

  def is_path(value):
    return isinstance(value, str) and bool(value)

  if not isinstance(of, Mapping) or not of:
    raise ValueError(
      f'FILES = {of!r} must say where each split is, such as '
      "{'train': 'a.csv', 'validation': 'b.csv'}."
    )
  for split, given in of.items():
    is_list = isinstance(given, (list, tuple)) and given
    if not is_path(given) and not (is_list and all(map(is_path, given))):
      raise ValueError(
        f'FILES[{split!r}] = {given!r} must be a path, a glob, or a list of '
        'these.'
      )
    if not isinstance(split, str) or not split.isidentifier():
      raise ValueError(
        f"FILES has the split {split!r}; a split is a name, such as 'train'."
      )


def _check_known(what: str, name: str, known) -> None:
  if name not in known:
    close = difflib.get_close_matches(str(name), known, n=1)
    meant = f'did you mean {close[0]!r}? ' if close else ''
    raise ValueError(
      f'{what} has {name!r}; {meant}known are {", ".join(map(repr, known))}.'
    )


def _fields(what: str, template: str) -> list[str]:
  """The fields of a template.

  Raises:
    ValueError: it is none.
  """
  from sparse_experts.data.tasks import benchmark

  if not isinstance(template, str):
    raise ValueError(
      f'{what} has {template!r}, which is no text; write {{field}} where a '
      'column or key goes.'
    )
  try:
    _, names = benchmark.split(template)
  except ValueError as error:
    raise ValueError(f'{what}: {error}') from error
  if what == 'TARGETS' and not names:
    raise ValueError(
      f'TARGETS = {template!r} has no {{field}}, so all answers would be one; '
      "write the column or key, such as TARGETS = '{label}'."
    )
  return names
