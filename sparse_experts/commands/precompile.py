"""precompile: compile a step for TPU chips that are not here."""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import os
import pathlib
import sys

from sparse_experts.commands import printing, settings

_DEFAULTS = 'gin/runs/precompile.gin'


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    '--topology',
    metavar='NAME',
    help="the chips, such as 'v5p:8x16x16'",
  )
  parser.add_argument(
    '--slices', type=int, default=1, metavar='N', help='so many of them'
  )
  parser.add_argument(
    '--step',
    default='train',
    metavar='WHAT',
    help="'train'; 'gradients', without the optimizer; or 'decode', which "
    'answers a batch',
  )
  kept = parser.add_mutually_exclusive_group()
  kept.add_argument(
    '--write_ledger',
    metavar='FILE.json',
    help='keep FLOPs, collectives and memory, without writing machine code',
  )
  kept.add_argument(
    '--check_ledgers',
    metavar='PATH',
    help='compile those of a file or folder anew, and compare them to 2%%',
  )


def run(args: argparse.Namespace) -> None:
  import jax

  from sparse_experts import config
  from sparse_experts.planning import chips, precompile

  jax.config.update('jax_platforms', 'cpu')
  # A program is compiled to see what compiling it takes.
  jax.config.update('jax_enable_compilation_cache', False)
  if args.check_ledgers:
    return _check_ledgers(args)
  mesh_file = parse(args)
  described = config.bound(precompile.Run)()
  if args.dry_run:
    _, num_devices = chips.parse_topology(args.topology, args.slices)
    precompile.check(described, num_devices, args.step)
    return printing.checked(args)
  if args.write_ledger:
    return _write_ledger(args)
  if not args.json:
    print(_settings(described, mesh_file, args.step), flush=True)
  facts = precompile.precompile(
    described, args.topology, slices=args.slices, what=args.step
  )
  if args.json:
    printing.as_json(facts)
  else:
    print(_text(facts, args.step))


def parse(args: argparse.Namespace) -> str | None:
  """Parses the gin files; returns that of the mesh, if it was needed."""
  from sparse_experts import config

  if not args.gin_file:
    raise ValueError(
      'precompile needs --gin_file=FILE, such as gin/models/switch/base.gin.'
    )
  if not args.topology:
    raise ValueError(
      "precompile needs --topology=NAME, the chips, such as 'v5p:8x16x16'."
    )
  paths = settings.search_paths(args)
  files = [_DEFAULTS, *args.gin_file]
  config.parse(files, args.bindings, paths)
  if config.defined('MODEL_DIR'):  # A run.
    return None
  mesh_file = mesh_file_of(args.gin_file[0], args.topology)
  if not (config.root() / mesh_file).exists():
    return None
  config.parse([*files, mesh_file], args.bindings, paths)
  return mesh_file


def _write_ledger(args: argparse.Namespace) -> None:
  from sparse_experts.planning import program_ledger

  ledger = program_ledger.Ledger(
    args.gin_file,
    args.bindings,
    args.topology,
    args.slices,
    args.step,
    versions=program_ledger.versions(),
    quantities={},
  )
  found = _quantities(ledger, _planned(ledger, args), args)
  path = pathlib.Path(args.write_ledger)
  dataclasses.replace(ledger, quantities=found).write(path)
  if args.json:
    return printing.as_json(found)
  for name, number in found.items():
    print(f'{name:26}{number:>22,.0f}')


def _check_ledgers(args: argparse.Namespace) -> None:
  """Compares programs of today with those that are kept.

  Raises:
    ValueError: one differs; the line names it, and what differs most.
  """
  from sparse_experts.planning import program_ledger

  if args.topology or args.dry_run:
    raise ValueError(
      '--check_ledgers compiles what its files say, and goes with neither '
      '--topology nor --dry_run.'
    )
  settings.refuse(
    args,
    '--check_ledgers compiles what its files say: --gin_file and --gin.NAME go '
    'with --write_ledger.',
  )
  path = pathlib.Path(args.check_ledgers)
  files = sorted(path.glob('*.json')) if path.is_dir() else [path]
  if not files:
    raise ValueError(f'{path} has no ledger; --write_ledger makes one.')
  kept = [program_ledger.read(file) for file in files]
  changes, failed = {}, []

  def planned_of(file: pathlib.Path, ledger: program_ledger.Ledger):
    try:
      return _planned(ledger, args)
    except ValueError as error:
      raise ValueError(f'{file}: {error}') from error

  # A compiler keeps one core busy until it writes machine code.
  pool = concurrent.futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1))
  try:
    programs = pool.map(planned_of, files, kept)
    for file, ledger, planned in zip(files, kept, programs):
      found = _quantities(ledger, planned, args)
      apart = program_ledger.differences(ledger.quantities, found)
      changes[file.stem] = dict(apart)
      if not args.json:
        name, most = apart[0]
        print(f'{file.stem:28}{name} {most:+.2%}', flush=True)
      if fault := program_ledger.fault(ledger, found):
        failed.append(f'{file}: {fault}')
  finally:
    pool.shutdown(cancel_futures=True)
  if args.json:
    printing.as_json(changes)
  if failed:
    raise ValueError(
      f'{len(failed)} of {len(files)} programs are not what is kept; '
      f'--write_ledger keeps what is meant. {"; ".join(failed)}.'
    )


def _planned(ledger, args: argparse.Namespace):
  """The program of a ledger, by another process."""
  from sparse_experts.planning import topology

  paths = [f'--gin_search_paths={args.gin_search_paths}']
  command = [sys.executable, '-m', 'sparse_experts', 'precompile']
  return topology.planned([*command, *ledger.arguments, *paths])


def _quantities(ledger, planned, args: argparse.Namespace) -> dict[str, float]:
  from sparse_experts import config
  from sparse_experts.planning import chips, precompile, program_ledger

  parse(argparse.Namespace(**{**vars(args), **vars(ledger)}))
  _, num_devices = chips.parse_topology(ledger.topology, ledger.slices)
  described = config.bound(precompile.Run)()
  return program_ledger.quantities(described, num_devices, ledger.step, planned)


def mesh_file_of(recipe: str, topology: str) -> str:
  """Where the mesh of a recipe on a topology is, if there is one.

  Example:
    >>> mesh_file_of('gin/models/switch/c.gin', 'v5p:8x16x16')
    'gin/meshes/switch/c_v5p_8x16x16.gin'
  """
  path = pathlib.Path(recipe)
  name = f'{path.stem}_{topology.replace(":", "_")}.gin'
  return f'gin/meshes/{path.parent.name}/{name}'


def _settings(described, mesh_file: str | None, what: str) -> str:
  mesh = ', '.join(
    f'{axis} {size}' for axis, size in described.placement.sizes.items()
  )
  lines = {
    'from': mesh_file or 'the recipe and the gin files given',
    'mesh': mesh,
    'batch': f'{described.batch_size} sequences of {described.size(what)}',
  }
  if what != 'decode':
    lines['batch'] += f', in {described.microbatches} microbatches'
    lines['remat'] = described.remat
  if what == 'train':
    lines['optimizer'] = described.optimizer.__name__
  for name in ('rules', 'optimizer_rules'):
    if rules := getattr(described.placement, name):
      lines[name.replace('_', ' ')] = str(rules)
  return '\n'.join(f'{name:18}{text}' for name, text in lines.items())


def _text(facts, what: str) -> str:
  hbm, flops = facts['hbm_bytes'], facts['flops']
  rest = hbm['peak'] - hbm['parameters'] - hbm['optimizer']
  kept = 'cache' if what == 'decode' else 'gradients'
  size = lambda name, n: f'  {name:16}{n / 2**30:10.2f} GiB'
  roofline = facts['roofline']
  bound = max(roofline, key=roofline.get)
  names = {'compute': 'compute', 'hbm': 'HBM', 'ici': 'ICI'}
  optimal = facts['optimal_seconds']
  time = 'n/a' if optimal is None else f'{optimal * 1e3:.1f} ms'
  return '\n'.join(
    [
      f'\n{facts["topology"]}, {facts["chips"]} chips; of one device:',
      'memory',
      size('parameters', hbm['parameters']),
      size('optimizer', hbm['optimizer']),
      size('the rest', rest) + f'  activations, {kept}, program',
      size('peak', hbm['peak']),
      size('limit', hbm['limit'])
      + f'  {"fits" if facts["fits"] else "does not fit"}',
      size('accessed', facts['bytes_accessed']),
      'FLOPs',
      f'  {"useful":16}{flops["useful"]:10.3e}',
      f'  {"executed":16}{flops["executed"]:10.3e}'
      f'      {flops["executed"] / flops["useful"]:.2f} of the useful',
      'collectives',
      *(
        f'  {entry["kind"]:16}{entry["bytes"] / 2**30:10.2f} GiB  '
        f'in {entry["count"]}'
        for entry in facts['collectives']
      ),
      'time at least',
      *(
        f'  {names[name]:16}{seconds * 1e3:10.1f} ms'
        + ('   the bound' if name == bound else '')
        for name, seconds in roofline.items()
      ),
      f'  {"XLA estimates":16}{time:>13}',
      f'compiled in {facts["compile_seconds"]:.0f} s, with '
      f'{facts["host_peak_bytes"] / 2**30:.1f} GiB of memory',
    ]
  )
