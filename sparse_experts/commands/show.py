"""show: every value of an experiment, where it was set, and over what."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from sparse_experts.commands import printing, settings

# What a value is about, by the modules of what takes it: the longest that fits.
# Other packages are subjects of their own.
SUBJECTS = {
  'sparse_experts.data': 'task and data',
  'sparse_experts.models': 'model',
  'sparse_experts.layers': 'model',
  'sparse_experts.moe.routers': 'router',
  'sparse_experts.moe': 'sparse layers',
  'sparse_experts.training': 'training',
  'sparse_experts.evaluation': 'evaluation',
  'sparse_experts.models.decoding': 'decoding',
  'sparse_experts.inference': 'decoding',
  'sparse_experts.sharding': 'mesh',
}


def run(args: argparse.Namespace) -> None:
  settings.parse(args)
  chains = settings.trace(args)
  if args.json:
    return printing.as_json(list(_facts(chains)))
  print(_text(chains))


def macros(args: argparse.Namespace) -> str:
  """What has a name of its own, as a dry run prints it."""
  return _text(settings.trace(args), only_macros=True)


def _facts(chains) -> Iterator[dict]:
  """For --json: what a file can say, references as text."""
  from sparse_experts.config import provenance

  for *overridden, last in chains:
    yield {
      'name': last.name,
      'value': provenance.in_effect(last.value, chains),
      'file': last.file,
      'line': last.line,
      'overrides': [
        {'value': binding.value, 'file': binding.file, 'line': binding.line}
        for binding in overridden
      ],
    }


def _text(chains, only_macros: bool = False) -> str:
  """Lines below their subjects.

  An argument that only passes a macro on has no line: the macro has.
  """
  from sparse_experts.config import provenance

  subjects = {subject: [] for subject in SUBJECTS.values()}
  for chain in chains:
    *overridden, last = chain
    passes_on = provenance.is_macro(last.value) and all(
      binding.value == last.value for binding in overridden
    )
    if '.' in last.name and (only_macros or passes_on):
      continue
    value = provenance.in_effect(last.value, chains)
    lines = subjects.setdefault(_subject(last, chains), [])
    lines.append(_line(f'  {last.name} = {value!r}', last))
    if not only_macros:
      lines += [
        _line(f'      over {binding.value!r}', binding)
        for binding in reversed(overridden)
      ]
  return '\n\n'.join(
    '\n'.join([subject, *lines]) for subject, lines in subjects.items() if lines
  )


def _line(text: str, binding) -> str:
  line = f':{binding.line}' if binding.line else ''
  return f'{text:<52}  {binding.file}{line}'


def _subject(binding, chains) -> str:
  """What a value is about; of a macro, what takes it first is about that."""
  from sparse_experts.config import provenance

  if binding.about:
    fits = [
      module for module in SUBJECTS if f'{binding.about}.'.startswith(module)
    ]
    package = binding.about.removeprefix('sparse_experts.').partition('.')[0]
    return SUBJECTS[max(fits, key=len)] if fits else package
  for *_, taker in chains:
    if binding.name in provenance.macros_in(taker.value):
      return _subject(taker, chains)
  return 'unused'
