"""sweep: a recipe over a grid of values and several seeds, run after run."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import shlex
import sys
from collections.abc import Iterator
from typing import Any

from sparse_experts.commands import printing, settings

PREFIXES = ('grid',)  # --grid.NAME=VALUE,VALUE, beside --gin.NAME=VALUE.
LAUNCHES = ('here', 'print', 'jobset')


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    '--grid.NAME',
    dest='_grid',
    metavar='VALUE,VALUE',
    help='values of macro NAME, or module.Class.argument; every combination of '
    'several is run',
  )
  parser.add_argument(
    '--seeds',
    type=int,
    default=1,
    metavar='N',
    help='runs of each combination, with SEED, SEED + 1, ... (1)',
  )
  parser.add_argument(
    '--output', required=True, metavar='DIR', help='of runs and results.jsonl'
  )
  parser.add_argument(
    '--parallel', type=int, default=1, metavar='N', help='runs at once (1)'
  )
  parser.add_argument(
    '--max_gb',
    type=float,
    default=50,
    metavar='GB',
    help='start no run once DIR is larger (50)',
  )
  parser.add_argument(
    '--launch',
    choices=LAUNCHES,
    default='here',
    help="'print' the commands, or write a 'jobset' for each run; starts none",
  )
  cluster = parser.add_argument_group('of --launch=jobset')
  cluster.add_argument('--image', help='of a container with this package')
  cluster.add_argument('--queue', help="Kueue's")
  cluster.add_argument('--tpu', help="such as 'tpu-v5p-slice'")
  cluster.add_argument('--tpu_topology', help="such as '2x2x1'")
  cluster.add_argument('--hosts', type=int, default=1, metavar='N')
  cluster.add_argument('--chips_per_host', type=int, default=4, metavar='N')


@dataclasses.dataclass(frozen=True)
class _Run:
  """A run of the sweep.

  Attributes:
    point: of the grid.
    model_dir: where it lies; its name is its digest.
    arguments: of `train`.
    steps: that it is to take.
    flops_per_step: useful ones.
  """

  point: Any
  model_dir: pathlib.Path
  arguments: list[str]
  steps: int
  flops_per_step: int

  @property
  def is_finished(self) -> bool:
    from sparse_experts.sweeps import results

    return results.steps_taken(self.model_dir) >= self.steps


def run(args: argparse.Namespace) -> int | None:
  from sparse_experts.sweeps import results
  from sparse_experts.training import directories

  for name in ('seeds', 'parallel', 'hosts', 'chips_per_host'):
    if getattr(args, name) < 1:
      raise ValueError(
        f'--{name} must be at least 1, not {getattr(args, name)}.'
      )
  if not args.max_gb > 0:
    raise ValueError(f'--max_gb must be above 0, not {args.max_gb}.')
  folder = directories.absolute(args.output)
  if args.launch == 'here' and not _is_local(folder):
    raise ValueError(
      f'--output={args.output}: runs of this machine lie in a local folder; '
      '--launch=jobset starts others.'
    )
  directories.check_new(folder, by='--output')
  runs = _runs(args, folder)
  if args.dry_run:
    return printing.checked(args)
  if args.launch == 'print':
    for each in runs:
      print(shlex.join(['python', '-m', 'sparse_experts', *each.arguments]))
    return None
  if args.launch == 'jobset':
    return _write_jobsets(args, folder, runs)
  failed = _train(args, pathlib.Path(folder), runs)
  lines = [
    results.of(each.model_dir, each.point, each.flops_per_step)
    for each in runs
    if each.is_finished
  ]
  if args.json:
    printing.as_json(lines)
  else:
    print(_table(runs, {}))
    print(f'\nresults:  {folder / results.FILE}')
  if failed:
    raise ValueError(
      f'{len(failed)} of {len(runs)} runs failed; the logs say why: '
      f'{", ".join(failed)}.'
    )
  return None


def _is_local(folder) -> bool:
  from sparse_experts import storage

  return storage.is_local(folder)


def _runs(args: argparse.Namespace, folder) -> list[_Run]:
  """All of the sweep, each parsed as its process will parse it."""
  from sparse_experts import config
  from sparse_experts.data import examples
  from sparse_experts.planning import ledger
  from sparse_experts.sweeps import grid, identity
  from sparse_experts.training import train

  if any(binding.startswith('MODEL_DIR=') for binding in args.bindings):
    raise ValueError('a sweep says MODEL_DIR of its runs; give --output=DIR.')
  settings.parse(args, bindings=['MODEL_DIR=sweep'])
  first = config.value('SEED', int)
  runs = []
  for point in grid.points(args.grid, range(first, first + args.seeds)):
    bindings = [*args.bindings, *point.bindings]
    settings.parse(args, bindings=[*point.bindings, 'MODEL_DIR=sweep'])
    dataset = config.argument(train.train, 'dataset')
    name = identity.digest(
      identity.configuration(config.text()),
      examples.digests(dataset.mixture_or_task_name, dataset.modules),
    )
    model_dir = folder / 'runs' / name
    model = config.argument(train.train, 'model')
    facts = ledger.ledger(model, dataset.feature_lengths)
    runs.append(
      _Run(
        point,
        model_dir,
        [
          'train',
          *(f'--gin_file={file}' for file in args.gin_file),
          *(
            [f'--gin_search_paths={args.gin_search_paths}']
            if args.gin_search_paths
            else []
          ),
          *(f'--gin.{binding}' for binding in bindings),
          f'--gin.MODEL_DIR={model_dir}',
        ],
        config.argument(train.train, 'train_steps'),
        facts['train_flops_per_sequence'] * dataset.batch_size,
      )
    )
  return runs


def _train(
  args: argparse.Namespace, folder: pathlib.Path, runs: list[_Run]
) -> list[str]:
  """Runs what is not finished; returns the logs of those that failed."""
  from sparse_experts.sweeps import pool, results

  by_name = {each.model_dir.name: each for each in runs}
  failed: list[str] = []
  shown = _Shown(runs)

  def waiting() -> Iterator[pool.Job]:
    for each in runs:
      if each.is_finished:
        continue
      if (size := results.gigabytes(folder)) > args.max_gb:
        raise ValueError(
          f'{folder} has {size:.1f} GB, and no run starts above '
          f'--max_gb={args.max_gb:g}: delete runs, or raise it.'
        )
      name = each.model_dir.name
      yield pool.Job(name, each.arguments, folder / 'logs' / f'{name}.txt')

  def collect() -> None:
    finished = [each for each in runs if each.is_finished]
    for each in finished:
      results.slim(each.model_dir)
    results.write(
      folder,
      [results.of(e.model_dir, e.point, e.flops_per_step) for e in finished],
    )

  def ended(job: pool.Job, code: int) -> None:
    if code:
      failed.append(str(job.log))
    collect()

  folder.mkdir(parents=True, exist_ok=True)
  collect()
  pool.run(
    waiting(),
    args.parallel,
    started=lambda job: print(
      f'{by_name[job.name].point.name}: {job.log}', file=sys.stderr
    ),
    ended=ended,
    look=lambda jobs: shown.show({job.name: '' for job in jobs}),
  )
  return failed


class _Shown:
  """The table of a sweep on stderr, anew where something has changed."""

  def __init__(self, runs: list[_Run]):
    self._runs, self._last = runs, ''

  def show(self, running: dict[str, str]) -> None:
    text = _table(self._runs, running)
    if text == self._last:
      return
    if sys.stderr.isatty() and self._last:
      print(
        f'\033[{self._last.count(chr(10)) + 1}A\033[J', end='', file=sys.stderr
      )
    if sys.stderr.isatty():
      print(text, file=sys.stderr)
    self._last = text


def _table(runs: list[_Run], running: dict[str, str]) -> str:
  from sparse_experts import console

  rows = []
  for each in runs:
    step, loss = _progress(each)
    state = (
      'finished'
      if each.is_finished
      else 'running'
      if each.model_dir.name in running
      else 'waiting'
    )
    rows.append(
      (
        each.point.name,
        state,
        f'{step}/{each.steps}',
        loss,
        each.model_dir.name,
      )
    )
  return console.table(('run', '', 'step', 'held-out loss', 'folder'), rows)


def _progress(each: _Run) -> tuple[int, str]:
  """The last step that was logged, and the last held-out loss."""
  from sparse_experts.insight import curves

  try:
    found = curves.read(each.model_dir)
  except FileNotFoundError:
    return 0, ''
  last = max(int(c['loss'].steps[-1]) for c in found.values() if 'loss' in c)
  held_out = found.get('eval', {}).get('loss')
  return last, '' if held_out is None else f'{held_out.values[-1]:.4f}'


def _write_jobsets(args: argparse.Namespace, folder, runs: list[_Run]) -> None:
  from sparse_experts.sweeps import jobset

  given = {
    'image': args.image,
    'queue': args.queue,
    'tpu': args.tpu,
    'tpu_topology': args.tpu_topology,
  }
  if missing := [f'--{name}' for name, value in given.items() if not value]:
    raise ValueError(f'--launch=jobset needs {", ".join(missing)}.')
  of = jobset.Slice(*given.values(), args.hosts, args.chips_per_host)
  for each in runs:
    name = each.model_dir.name
    path = folder / 'jobsets' / f'{name}.yaml'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(jobset.manifest(f'run-{name}', each.arguments, of))
  print(f'jobsets:  {folder / "jobsets"}')
