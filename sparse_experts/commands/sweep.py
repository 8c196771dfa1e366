"""sweep: a recipe over a grid of values and several seeds, run after run."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from sparse_experts.commands import printing, settings

PREFIXES = ('grid',)  # --grid.NAME=VALUE,VALUE, beside --gin.NAME=VALUE.
LAUNCHES = ('here', 'print', 'jobset')
_CLUSTER = ('image', 'queue', 'tpu', 'tpu_topology')  # What a JobSet needs.
# Of a run that has ended, by its exit code.
_STATES = {0: 'finished', 128 + signal.SIGTERM: 'stopped', -15: 'stopped'}


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
  import jax

  from sparse_experts.sweeps import results
  from sparse_experts.training import directories

  jax.config.update('jax_platforms', 'cpu')  # Chips are for its runs.
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
    print(_table(runs, dict.fromkeys(failed, 'failed')))
    print(f'\nresults:  {folder / results.FILE}')
  if failed:
    raise ValueError(
      f'{len(failed)} of {len(runs)} runs failed; {folder / "logs"} says why, '
      f'in {", ".join(f"{name}.txt" for name in failed)}.'
    )
  return None


def _is_local(folder) -> bool:
  from sparse_experts import storage

  return storage.is_local(folder)


def _runs(args: argparse.Namespace, folder) -> list[_Run]:
  """All of the sweep, each parsed as its process will parse it."""
  from sparse_experts import config
  from sparse_experts.data import examples
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
        settings.flops_per_step(),
      )
    )
  return runs


def _train(
  args: argparse.Namespace, folder: pathlib.Path, runs: list[_Run]
) -> list[str]:
  """Runs what is not finished; returns the names of those that failed."""
  from sparse_experts.sweeps import pool, results

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
    finished = [
      each
      for each in runs
      if states.get(each.model_dir.name) != 'running' and each.is_finished
    ]
    for each in finished:
      results.slim(each.model_dir)
    results.write(
      folder,
      [results.of(e.model_dir, e.point, e.flops_per_step) for e in finished],
    )

  def started(job: pool.Job) -> None:
    states[job.name] = 'running'
    live.say(f'{points[job.name]}: {job.log}')

  def ended(job: pool.Job, code: int) -> None:
    states[job.name] = _STATES.get(code, 'failed')
    if code:
      live.say(f'{points[job.name]} {states[job.name]}: {job.log}')
    collect()

  points = {each.model_dir.name: each.point.name for each in runs}
  states: dict[str, str] = {}
  live = _Live()
  folder.mkdir(parents=True, exist_ok=True)
  collect()
  pool.run(
    waiting(),
    args.parallel,
    started=started,
    ended=ended,
    look=lambda: live.show(_table(runs, states)),
  )
  live.clear()
  return [name for name, state in states.items() if state == 'failed']


class _Live:
  """Text on a terminal's stderr that is written anew where it has changed.

  Elsewhere there is none of it, and only what is said.
  """

  def __init__(self):
    self._text = ''

  def show(self, text: str) -> None:
    if not sys.stderr.isatty():
      return
    columns, lines = shutil.get_terminal_size()
    shown = [line[: columns - 1] for line in text.splitlines()]
    if len(shown) > lines - 1:
      shown = [*shown[: lines - 2], f'... {len(shown) - lines + 2} more']
    text = '\n'.join(shown)
    if text != self._text:
      self.clear()
      print(text, file=sys.stderr, flush=True)
      self._text = text

  def clear(self) -> None:
    if self._text:
      lines = self._text.count('\n') + 1
      print(f'\033[{lines}A\033[J', end='', file=sys.stderr, flush=True)
    self._text = ''

  def say(self, line: str) -> None:
    """A line that stays."""
    self.clear()
    print(line, file=sys.stderr, flush=True)


def _table(runs: list[_Run], states: Mapping[str, str]) -> str:
  """Of all runs, those that are running first.

  Args:
    runs: of the sweep.
    states: 'running', 'finished' or 'failed', by name; others wait.
  """
  from sparse_experts import console

  rows = []
  for each in runs:
    step, loss = _progress(each)
    name = each.model_dir.name
    state = states.get(name, 'finished' if each.is_finished else 'waiting')
    steps = f'{step:,} / {each.steps:,}'
    rows.append((each.point.name, state, steps, loss, name))
  rows.sort(key=lambda row: row[1] != 'running')
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

  given = {name: getattr(args, name) for name in _CLUSTER}
  if missing := [f'--{name}' for name, value in given.items() if not value]:
    raise ValueError(f'--launch=jobset needs {", ".join(missing)}.')
  of = jobset.Slice(
    image=args.image,
    queue=args.queue,
    tpu=args.tpu,
    topology=args.tpu_topology,
    hosts=args.hosts,
    chips_per_host=args.chips_per_host,
  )
  for each in runs:
    name = each.model_dir.name
    path = folder / 'jobsets' / f'{name}.yaml'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(jobset.manifest(f'run-{name}', each.arguments, of))
  print(f'jobsets:  {folder / "jobsets"}')
