"""bench: time a sparse layer, a training step or decoding."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator, Sequence
from typing import Any

from sparse_experts.commands import printing, settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    'what', choices=('layer', 'step', 'decode'), help='what to time'
  )
  parser.add_argument(
    '--topology',
    metavar='NAME',
    help="layer, step: compile for these TPU chips, such as 'v5p:4x4x4'",
  )
  parser.add_argument(
    '--profile', action='store_true', help='step: say where the time goes, too'
  )


def run(args: argparse.Namespace) -> None:
  from sparse_experts import config
  from sparse_experts.bench import layer as layer_bench

  if args.profile and (args.what != 'step' or args.topology):
    raise ValueError('--profile is for bench step, timed on this machine.')
  if args.what == 'decode':
    return _decode(args)
  if args.what == 'step':
    return _step(args)
  on_pod = args.topology is not None
  default = 'gin/bench/pod_layer.gin' if on_pod else 'gin/bench/layer.gin'
  args.gin_file = args.gin_file or [default]
  settings.parse(args)
  if on_pod:
    bench = functools.partial(
      config.bound(layer_bench.compiled_layer, given=('topology',)),
      topology=args.topology,
    )
  else:
    bench = config.bound(layer_bench.layer)
  bench(dry_run=True)  # Before the heading of what it will print.
  if args.dry_run:
    return printing.checked(args)
  rows = bench(on_row=(lambda row: None) if args.json else _printer(on_pod))
  if args.json:
    printing.as_json(rows)


def _decode(args: argparse.Namespace) -> None:
  from sparse_experts import config, console
  from sparse_experts.bench import decode as decode_bench
  from sparse_experts.models.objective import Objective

  if args.topology is not None:
    raise ValueError(
      '--topology is for bench layer and step; decoding is timed here.'
    )
  args.gin_file = ['gin/bench/decode.gin', *args.gin_file]
  settings.parse(args)

  def models():
    for experts in _twins(args):
      model = config.value('MODEL', Objective)
      yield 'dense' if experts is None else f'{experts} experts', model

  bench = config.bound(decode_bench.measure, given=('models',))
  bench(models=models(), dry_run=True)
  if args.dry_run:
    return printing.checked(args)
  widths = (12, 6, 11, 9, 7, 13, 16)
  heading = ('model', 'batch', 'tokens/s', 'ms/step', 'ratio', '(quartiles)')
  max_tokens = config.value('MAX_TOKENS')

  def show(row):
    low, high = row['ratio_iqr']
    cells = (
      *(row['model'], row['batch'], f'{row["tokens_per_second"]:,.0f}'),
      f'{row["seconds"] / max_tokens * 1e3:.2f}',
      *(f'{row["ratio"]:.2f}x', f'({low:.2f} - {high:.2f})'),
      f'{row["flops_per_token"] / 1e6:.3f}',
    )
    print(console.line(cells, widths), flush=True)

  if not args.json:
    print(console.line((*heading, 'MFLOP per token'), widths), flush=True)
  rows = bench(models=models(), **({} if args.json else {'on_row': show}))
  if args.json:
    printing.as_json(rows)


def _step(args: argparse.Namespace) -> None:
  from sparse_experts import config, console
  from sparse_experts.bench import step as step_bench
  from sparse_experts.planning import precompile

  files = ['gin/models/switch/base.gin', 'gin/bench/step.gin']
  args.gin_file = [*files, *args.gin_file]
  settings.parse(args)

  def runs():
    for experts in _twins(args):
      yield experts, config.bound(precompile.Run)()

  if args.topology is not None:
    bench = functools.partial(step_bench.compiled, topology=args.topology)
    widths, heading, cells = _COMPILED_STEP
  else:
    bench = functools.partial(
      config.bound(step_bench.measure, given=('runs', 'with_parts')),
      with_parts=args.profile,
    )
    widths, heading, cells = _TIMED_STEP
  bench(runs=runs(), dry_run=True)
  if args.dry_run:
    return printing.checked(args)

  def show(row):
    if not args.json:
      print(console.line(cells(row), widths), flush=True)

  if not args.json:
    print(console.line(heading, widths), flush=True)
  rows = bench(runs=runs(), on_row=show)
  if args.json:
    printing.as_json(rows)
  elif args.profile:
    print('\n' + _parts_table(rows))


def _timed_step(row: dict[str, Any]) -> tuple[str, ...]:
  low, high = row['rate_iqr']
  return (
    *(row['model'], f'{row["seconds"]:.3f}'),
    f'{row["useful_flops"] / 1e9:.1f}',
    f'{row["machine_flops_per_second"] / 1e9:.0f}',
    *(f'{row["rate"]:.2f}', f'({low:.2f} - {high:.2f})'),
  )


# Of each column its width, then its title; and the cells of a row.
_TIMED_STEP = (
  (12, 10, 15, 16, 6, 13),
  (
    *('model', 'seconds', 'useful GFLOP', 'machine GFLOP/s', 'rate'),
    '(quartiles)',
  ),
  _timed_step,
)


def _compiled_step(row: dict[str, Any]) -> tuple[str, ...]:
  flops, seconds = row['flops'], row['optimal_seconds']
  return (
    *(row['model'], f'{row["useful_flops"] / 1e9:.1f}'),
    f'{flops["executed"] / flops["useful"]:.2f}x',
    f'{row["hbm_bytes"]["peak"] / 2**30:.2f} GiB'
    + ('' if row['fits'] else ', too much'),
    'n/a' if seconds is None else f'{seconds * 1e3:.2f}',
  )


_COMPILED_STEP = (
  (12, 15, 10, 20, 10),
  ('model', 'useful GFLOP', 'executed', 'memory', 'XLA ms'),
  _compiled_step,
)


def _parts_table(rows: Sequence[dict[str, Any]]) -> str:
  """The share of each part, a line each, by model."""
  from sparse_experts import console

  names = dict.fromkeys(part for row in rows for part in row['parts'])
  widths = (20, *[11] * len(rows))
  lines = [('part of the time', *(row['model'] for row in rows))]
  for name in names:
    shares = (row['parts'].get(name, 0) for row in rows)
    lines.append((name, *(f'{share:.1%}' for share in shares)))
  return '\n'.join(console.line(line, widths) for line in lines)


def _twins(args: argparse.Namespace) -> Iterator[int | None]:
  """None with the dense twin parsed, then each of EXPERTS with so many.

  What a model is made of is read from the files as it is made.
  """
  from sparse_experts import config
  from sparse_experts.numbers import Count

  given = list(args.bindings)
  for experts in (None, *config.value('EXPERTS', Sequence[Count])):
    dense = experts is None
    sparse = 'SPARSE_LAYERS=0' if dense else f'NUM_EXPERTS={experts}'
    args.bindings = [*given, sparse]
    settings.parse(args)
    yield experts
  args.bindings = given


def _printer(on_pod: bool):
  """Prints rows of `bench` as they come, below a heading."""
  from sparse_experts import console

  widths = (12, 7, 3, 11, 7, 9, 7, 13, 8, 8, 7, 10)
  heading = (
    *('dispatcher', 'experts', 'k', 'forward ms', 'ratio', 'train ms'),
    *('ratio', '(quartiles)', 'TFLOP/s', 'dropped', 'FLOPs', 'memory'),
  )
  if on_pod:
    widths = (12, 7, 3, 8, 10, 10, 10, 0)
    heading = (
      *('dispatcher', 'experts', 'k', 'FLOPs', 'bytes', 'memory', 'XLA ms'),
      'collectives',
    )
  print(console.line(heading, widths))

  def show(row):
    first = (row['dispatcher'], row['experts'], row['k'])
    flops = f'{row["executed_flops_ratio"]:.2f}x'
    memory = f'{row["temp_bytes"] / 2**30:.2f} GiB'
    if on_pod:
      seconds = row['optimal_seconds']
      rest = (
        flops,
        f'{row["bytes_accessed"] / 2**30:.2f} GiB',
        memory,
        'n/a' if seconds is None else f'{seconds * 1e3:.2f}',
        ', '.join(
          f'{entry["count"]} {name} ({entry["bytes"] / 2**20:.0f} MiB)'
          for name, entry in row['collectives'].items()
        ),
      )
    else:
      low, high = row['train_ratio_iqr']
      rest = (
        f'{row["forward_ms"]:.1f}',
        f'{row["forward_ratio"]:.2f}x',
        f'{row["train_ms"]:.1f}',
        f'{row["train_ratio"]:.2f}x',
        f'({low:.2f} - {high:.2f})',
        f'{row["tflops"]:.3g}',
        f'{row["dropped"]:.1%}',
        flops,
        memory,
      )
    print(console.line((*first, *rest), widths), flush=True)

  return show
