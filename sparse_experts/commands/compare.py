"""compare: runs side by side, and what they differ in."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

from sparse_experts.commands import printing, settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    'runs',
    metavar='RUN',
    nargs='+',
    help='MODEL_DIR of a run, or --output of a sweep; groups are compared with '
    'that of the first',
  )
  parser.add_argument(
    '--output', metavar='FILE', help='of an HTML page: FILE.html'
  )


def run(args: argparse.Namespace) -> None:
  from sparse_experts.sweeps import (
    comparison,
    comparison_page,
    written_runs,
  )
  from sparse_experts.training import directories

  settings.refuse(
    args, 'compare takes runs alone; their config.gin has the rest.'
  )
  if args.output is not None:
    if not args.output.endswith('.html'):
      raise ValueError(f'--output={args.output} must end in .html.')
    directories.check_new(
      directories.absolute(args.output).parent, by='--output'
    )
  groups = comparison.groups(list(map(written_runs.read, _folders(args.runs))))
  if args.dry_run:
    return printing.checked(args)
  groups = [group.with_flops(_flops_per_step(group)) for group in groups]
  if args.output is not None:
    comparison_page.write(directories.absolute(args.output), groups)
  if args.json:
    page = {} if args.output is None else {'path': args.output}
    return printing.as_json({**comparison.facts(groups), **page})
  print(_text(groups))
  if args.output is not None:
    print(f'\npage:  {args.output}')


def _folders(given: Sequence[str]) -> list:
  """Of runs; those that are finished of a sweep."""
  from sparse_experts.sweeps import results
  from sparse_experts.training import directories

  found = []
  for path in map(directories.absolute, given):
    runs = results.finished(path)
    if runs is None:
      found.append(path)
      continue
    left = {run.name for run in (path / 'runs').glob('*')}
    if left := sorted(left - {run.name for run in runs}):
      print(
        f'{path}: {len(left)} runs have not finished, or are of other source '
        f'code, and are left out: {", ".join(left)}',
        file=sys.stderr,
      )
    if not runs:
      raise ValueError(f'{path} has no finished run yet.')
    found += runs
  return list(dict.fromkeys(found))


def _flops_per_step(group) -> int | None:
  """Useful ones; None, and a line, where the model cannot be built here."""
  from sparse_experts import config
  from sparse_experts.config import overrides

  model_dir = group.runs[0].model_dir
  try:
    config.parse_text((model_dir / 'config.gin').read_text())
    return settings.flops_per_step()
  except (ValueError, ImportError, OSError) as error:
    reason = overrides.first_line(error)
    print(f'no FLOPs of {group.name}: {reason}', file=sys.stderr)
    return None


def _text(groups) -> str:
  from sparse_experts import console
  from sparse_experts.sweeps import comparison, comparison_page

  def tables() -> Iterator[str]:
    metric, *_ = comparison.metrics(groups)
    yield console.table(
      ('group', 'seeds', 'steps', metric),
      [
        (
          group.name,
          f'{len(group.runs)}',
          comparison_page.steps(group),
          comparison_page.reached(metric, group),
        )
        for group in groups
      ],
    )
    if different := comparison.settings(groups):
      yield console.table(
        ('configuration', *(group.name for group in groups)),
        [
          (name, *('-' if value is None else value for value in values))
          for name, values in different.items()
        ],
      )
    found = comparison_page.differences(comparison.differences(metric, groups))
    if told := comparison_page.apart(groups):
      yield told
    if found:
      yield console.table(
        (f'{metric} of', *comparison_page.DIFFERENCES[1:]), found
      )

  return '\n\n'.join(tables())
