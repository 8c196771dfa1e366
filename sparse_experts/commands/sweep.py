"""sweep: a recipe over a grid of values and several seeds, run after run."""

from __future__ import annotations

import argparse
import pathlib
import shlex
import sys
import time
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sparse_experts.commands import printing, settings

if typing.TYPE_CHECKING:
  from sparse_experts.sweeps.run import Run

PREFIXES = ('grid',)  # --grid.NAME=VALUE,VALUE, beside --gin.NAME=VALUE.
LAUNCHES = ('here', 'print', 'jobset', 'collect')
_CLUSTER = ('image', 'queue', 'tpu', 'tpu_topology')  # What a JobSet needs.
_OF_JOBSETS = (*_CLUSTER, 'service_account', 'hosts', 'chips_per_host')


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
    help="start none: 'print' the commands, write a 'jobset' for each run, or "
    "'collect' results of what others have run",
  )
  cluster = parser.add_argument_group('of --launch=jobset')
  cluster.add_argument('--image', help='of a container with this package')
  cluster.add_argument('--queue', help="Kueue's")
  cluster.add_argument('--tpu', help="such as 'tpu-v5p-slice'")
  cluster.add_argument('--tpu_topology', help="such as '2x2x1'")
  cluster.add_argument('--service_account', metavar='NAME', help='of its pods')
  cluster.add_argument('--hosts', type=int, metavar='N', help='(1)')
  cluster.add_argument('--chips_per_host', type=int, metavar='N', help='(4)')


def run(args: argparse.Namespace) -> int | None:
  import jax

  from sparse_experts import storage
  from sparse_experts.sweeps import pool, results
  from sparse_experts.training import directories

  jax.config.update('jax_platforms', 'cpu')  # Chips are for its runs.
  for name in ('seeds', 'parallel', 'hosts', 'chips_per_host'):
    value = getattr(args, name)
    if value is not None and value < 1:
      raise ValueError(f'--{name} must be at least 1, not {value}.')
  if not args.max_gb > 0:
    raise ValueError(f'--max_gb must be above 0, not {args.max_gb}.')
  folder = directories.absolute(args.output)
  if args.launch == 'here' and not storage.is_local(folder):
    raise ValueError(
      f'--output={args.output}: runs of this machine lie in a local folder; '
      '--launch=jobset starts others.'
    )
  directories.check_new(folder, by='--output')
  slice_ = _slice(args)
  runs = _runs(args, folder)
  if args.dry_run:
    return printing.checked(args)
  if args.launch == 'print':
    return _print(args, [each.arguments for each in runs])
  if slice_ is not None:
    return _write_jobsets(args, folder, runs, slice_)
  failed: list[str] = []
  if args.launch == 'here':
    with pool.alone(pathlib.Path(folder)):
      failed = _train(args, pathlib.Path(folder), runs)
  lines = _collect(folder, [each for each in runs if each.is_finished])
  if args.json:
    printing.as_json(lines)
  else:
    print(_table(runs, dict.fromkeys(failed, 'failed'), results.Seen()))
    print(f'\nresults:  {folder / results.FILE}')
  left = [each for each in runs if not each.is_finished]
  if args.launch == 'here' and left:
    names = (f'{each.model_dir.name}.txt' for each in left)
    raise ValueError(
      f'{len(left)} of {len(runs)} runs have not finished; {folder / "logs"} '
      f'says why, in {", ".join(names)}. The same command goes on.'
    )
  return None


def _collect(folder, finished: list[Run]) -> list[dict[str, Any]]:
  """Writes results.jsonl; returns the lines of these runs."""
  from sparse_experts.sweeps import results

  lines = [each.result() for each in finished]
  if others := results.write(folder, lines):
    print(
      f'{others} results of other source code are left out of {results.FILE}; '
      f'their runs stay in {folder / "runs"}.',
      file=sys.stderr,
    )
  return lines


def _runs(args: argparse.Namespace, folder) -> list[Run]:
  """All of the sweep, each parsed as its process will parse it."""
  from sparse_experts import config
  from sparse_experts.data import examples
  from sparse_experts.sweeps import grid, identity
  from sparse_experts.sweeps.run import Run
  from sparse_experts.training import train

  given = {binding.partition('=')[0] for binding in args.bindings}
  if 'MODEL_DIR' in given:
    raise ValueError('a sweep says MODEL_DIR of its runs; give --output=DIR.')
  settings.parse(args, bindings=['MODEL_DIR=sweep'])
  first = config.value('SEED', int)
  seeds = range(first, first + args.seeds)
  runs: dict[str, Run] = {}
  for point in grid.points(args.grid, seeds):
    if twice := given & point.overrides.keys():
      name = min(twice)
      raise ValueError(f'--gin.{name} and --grid.{name}: give one of them.')
    try:
      settings.parse(args, bindings=[*point.bindings, 'MODEL_DIR=sweep'])
      dataset = config.argument(train.train, 'dataset')
      held_out = config.argument(train.train, 'eval_dataset')
      if config.argument(train.train, 'model_dir') != 'sweep':
        raise ValueError(
          'a sweep says where its runs lie: leave train.train.model_dir as '
          '%MODEL_DIR.'
        )
      if config.argument(train.train, 'seed') != point.seed:
        raise ValueError(
          'leave train.train.seed as %SEED; seeds are --seeds=N.'
        )
      flops = settings.flops_per_step()
      steps = config.argument(train.train, 'train_steps')
    except ValueError as error:
      raise ValueError(f'{point.name}: {error}') from error
    data: dict[str, str] = {}
    modules: set[str] = set()
    for each in filter(None, (dataset, held_out)):
      data |= examples.digests(each.mixture_or_task_name, each.modules)
      modules |= set(each.modules)
    text = config.text()
    inputs = identity.inputs(text, data, modules)
    name = identity.digest(text, inputs)
    if name in runs:
      raise ValueError(
        f'{runs[name].point.name} and {point.name} are one run: give values '
        'that differ.'
      )
    model_dir = folder / 'runs' / name
    search_paths = args.gin_search_paths
    arguments = [
      'train',
      *(f'--gin_file={file}' for file in args.gin_file),
      *([f'--gin_search_paths={search_paths}'] if search_paths else []),
      *(f'--gin.{binding}' for binding in [*args.bindings, *point.bindings]),
      f'--gin.MODEL_DIR={model_dir}',
    ]
    runs[name] = Run(point, model_dir, arguments, text, steps, flops, inputs)
  return list(runs.values())


def _train(
  args: argparse.Namespace, folder: pathlib.Path, runs: list[Run]
) -> list[str]:
  """Runs what is not finished; returns the names of those that failed."""
  from etils import epath

  from sparse_experts import console, storage
  from sparse_experts.sweeps import pool, results
  from sparse_experts.training import lease

  def waiting() -> Iterator[pool.Job]:
    for each in runs:
      if each.is_finished:
        continue
      if results.gigabytes(folder) > args.max_gb:
        full.append(results.gigabytes(folder))
        return
      name = each.model_dir.name
      while lease.is_held_here(each.model_dir):  # By a sweep that was killed.
        live.say(f'{each.point.name}: its process of before is saving')
        time.sleep(5)
      config = folder / 'configs' / f'{name}.gin'
      config.parent.mkdir(exist_ok=True)
      storage.replace(epath.Path(config), each.config.encode())
      arguments = ['train', f'--gin_file={config}']
      arguments.append(f'--gin.MODEL_DIR={each.model_dir}')
      yield pool.Job(name, arguments, folder / 'logs' / f'{name}.txt')

  def collect() -> None:
    finished = [
      each
      for each in runs
      if states.get(each.model_dir.name) != 'running' and each.is_finished
    ]
    for each in finished:
      results.slim(each.model_dir)
    _collect(folder, finished)

  def started(job: pool.Job) -> None:
    states[job.name] = 'running'
    live.say(f'{points[job.name]}: {job.log}')

  def ended(job: pool.Job, code: int) -> None:
    states[job.name] = 'failed' if code else 'ended'
    if code:
      live.say(f'{points[job.name]} ended with {code}: {job.log}')
    collect()

  points = {each.model_dir.name: each.point.name for each in runs}
  states: dict[str, str] = {}
  full: list[float] = []
  live, seen = console.Live(), results.Seen()
  collect()
  pool.run(
    waiting(),
    args.parallel,
    started=started,
    ended=ended,
    look=lambda: live.show(lambda: _table(runs, states, seen)),
  )
  live.clear()
  if full:
    raise ValueError(
      f'{folder} has {full[0]:.1f} GB, and no run starts above --max_gb='
      f'{args.max_gb:g}: delete runs, or raise it.'
    )
  return [name for name, state in states.items() if state == 'failed']


def _table(runs: Sequence[Run], states: Mapping[str, str], seen) -> str:
  """Of all runs, those that are running first.

  Args:
    runs: of the sweep.
    states: 'running', 'failed' or 'ended', by name; others wait.
    seen: of the table before.
  """
  from sparse_experts import console

  rows = []
  for each in runs:
    name = each.model_dir.name
    state = states.get(name, 'waiting')
    if state != 'running' and each.is_finished:
      state = 'finished'
    try:
      step, loss = seen.of(each.model_dir)
    except (OSError, ValueError):  # Just being written; a table ends no sweep.
      step, loss = 0, ''
    steps = f'{step:,} / {each.steps:,}'
    rows.append((each.point.name, state, steps, loss, name))
  rows.sort(key=lambda row: row[1] != 'running')
  return console.table(('run', '', 'step', 'held-out loss', 'folder'), rows)


def _print(args: argparse.Namespace, commands: list[list[str]]) -> None:
  commands = [['python', '-m', 'sparse_experts', *words] for words in commands]
  if args.json:
    return printing.as_json(commands)
  for words in commands:
    print(shlex.join(words))


def _slice(args: argparse.Namespace):
  """What a JobSet is to run on; None of other launches."""
  from sparse_experts.sweeps import jobset

  given = {name: getattr(args, name) for name in _CLUSTER}
  if args.launch != 'jobset':
    if unused := [f'--{name}' for name in _OF_JOBSETS if getattr(args, name)]:
      raise ValueError(f'{", ".join(unused)}: for --launch=jobset only.')
    return None
  if missing := [f'--{name}' for name, value in given.items() if not value]:
    raise ValueError(f'--launch=jobset needs {", ".join(missing)}.')
  return jobset.Slice(
    image=args.image,
    queue=args.queue,
    tpu=args.tpu,
    topology=args.tpu_topology,
    hosts=args.hosts or 1,
    chips_per_host=args.chips_per_host or 4,
    service_account=args.service_account,
  )


def _write_jobsets(
  args: argparse.Namespace, folder, runs: list[Run], of
) -> None:
  from sparse_experts.sweeps import jobset

  named = {each.model_dir.name: each.arguments for each in runs}
  paths = jobset.write(folder, named, of)
  if args.json:
    return printing.as_json([str(path) for path in paths])
  print(f'jobsets:  {folder / "jobsets"}')
