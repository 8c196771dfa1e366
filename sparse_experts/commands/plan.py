"""plan: meshes for a model on a pod, or a model for a budget."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Sequence

from sparse_experts.commands import printing, settings

_DEFAULTS = 'gin/runs/precompile.gin'
_FAMILY = 'gin/models/clark/15m.gin'
_GIB = 2**30


def _number(said: str, right: Callable[[float], bool]):
  """Of a flag: a finite number for which `right` holds."""

  def number(text: str) -> float:
    value = float(text)
    if not (right(value) and value < math.inf):
      raise ValueError
    return value

  number.__name__ = said  # argparse's error has it.
  return number


_POSITIVE = _number('number above 0', lambda value: value > 0)
_RATIO = _number('number of at least 1', lambda value: value >= 1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    '--topology',
    required=True,
    metavar='NAME',
    help="the chips, such as 'v5p:8x16x16', or with --chips 'v5p'",
  )
  parser.add_argument(
    '--hours', type=_POSITIVE, metavar='H', help='a budget: propose a model'
  )
  parser.add_argument(
    '--chips', type=int, metavar='N', help='of a budget, where they are no pod'
  )
  parser.add_argument(
    '--efficiency',
    type=_POSITIVE,
    default=0.4,
    metavar='SHARE',
    help="of the chips' peak that a budget counts on (0.4)",
  )
  parser.add_argument(
    '--watts', type=_POSITIVE, metavar='W', help='of a chip, for energy'
  )
  parser.add_argument(
    '--pue',
    type=_RATIO,
    default=1.1,
    metavar='RATIO',
    help="the data centre's power over the chips' (1.1)",
  )
  parser.add_argument(
    '--verify', type=int, default=0, metavar='N', help='compile the best N'
  )


def run(args: argparse.Namespace) -> None:
  import jax

  from sparse_experts import config
  from sparse_experts.planning import plan, precompile

  jax.config.update('jax_platforms', 'cpu')
  chip, num_devices = _chips(args)
  facts, bindings = {}, list(args.bindings)
  if args.hours is not None:
    if args.gin_file:
      raise ValueError('plan takes --gin_file or --hours: a model or a budget.')
    facts, proposed = _budget(args, chip, num_devices)
    args.gin_file, bindings = [_FAMILY], [*proposed, *bindings]
  elif not args.gin_file:
    raise ValueError(
      'plan needs a model, --gin_file=FILE, or a budget, --hours=H.'
    )
  paths = settings.search_paths(args)
  files = [_DEFAULTS, *args.gin_file]
  config.parse(files, bindings, paths)
  described = config.bound(precompile.Run)()
  if args.dry_run:
    return printing.checked(args)
  if -1 in described.placement.sizes.values():  # None was given.
    candidates, rejected = plan.plan(described, chip, num_devices)
  else:
    candidates, rejected = [plan.predict(described, chip, num_devices)], []
  facts |= {
    'topology': args.topology,
    'chips': num_devices // chip.devices_per_chip,
    'recipe': args.gin_file,
    'bindings': bindings,
    'batch_size': described.batch_size,
    'lengths': dict(described.feature_lengths),
    'sequence': described.size('train'),
    'candidates': list(map(_candidate, candidates)),
    'rejected': [dataclasses.asdict(mesh) for mesh in rejected],
  }
  if args.hours is not None and candidates:
    seconds = num_devices * chip.flops_bf16 * candidates[0].time.seconds
    tokens = described.batch_size * described.feature_lengths['targets']
    useful = 6 * facts['proposal']['params'] * tokens
    facts['budget']['efficiency_at_most'] = useful / seconds
  if not args.json:
    print(_text(facts, chip), flush=True)
  for entry in facts['candidates'][: args.verify]:
    config.parse(files, [*bindings, *entry['gin']], paths)
    verified = precompile.precompile(
      config.bound(precompile.Run)(), args.topology
    )
    entry['verified'] = verified
    if not args.json:
      print(_verified(entry), flush=True)
  if args.json:
    printing.as_json(facts)


def _chips(args: argparse.Namespace):
  """The chip, and the number of devices."""
  from sparse_experts.planning import chips

  if args.chips is None:
    return chips.parse_topology(args.topology)
  chip = chips.CHIPS.get(args.topology)
  if chip is None or args.chips < 1 or args.verify:
    raise ValueError(
      f'--chips={args.chips} goes with a kind of chip, --topology='
      f'{"|".join(chips.CHIPS)}, and not with --verify; a pod is named as '
      "'v5p:4x4x4', without --chips."
    )
  chips.check_number(args.chips)
  return chip, args.chips * chip.devices_per_chip


def _budget(args: argparse.Namespace, chip, num_devices: int):
  """Facts of the proposals, and the bindings of the one to take."""
  from sparse_experts.planning import budget

  asked = budget.Budget(chip, num_devices, args.hours, args.efficiency)
  found, taken = budget.proposals(asked)
  watts = args.watts or chip.watts
  facts = {
    'budget': {
      'hours': args.hours,
      'efficiency': args.efficiency,
      'flops': asked.flops,
      'watts': watts,
      'pue': args.pue,
      'kwh': None if watts is None else asked.kwh(watts, args.pue),
    },
    'proposals': list(map(dataclasses.asdict, found)),
    'proposal': dataclasses.asdict(taken),
  }
  return facts, budget.gin_bindings(taken, num_devices)


def _candidate(candidate) -> dict:
  """A candidate as plain facts, with the bindings that make it so."""
  facts = dataclasses.asdict(candidate)
  facts['memory']['peak'] = candidate.memory.peak
  facts['time'] |= {
    'seconds': candidate.time.seconds,
    'bound': candidate.time.bound,
  }
  # A decoder alone has both.
  macros = {'encoder': 'GROUP_SIZE', 'decoder': 'DECODER_GROUP_SIZE'}
  sizes = {}
  for stack, size in candidate.group_sizes.items():
    sizes.setdefault(macros[stack.rpartition('/')[2]], set()).add(size)
  facts['gin'] = [
    f'MESH={candidate.mesh}',
    *(["RULES={'embed': 'data'}"] if candidate.fsdp else []),
    f"REMAT='{candidate.remat}'",
    f'MICROBATCHES={candidate.microbatches}',
    # Towers that share a macro take no other size than their own sequence.
    *(f'{name}={of.pop()}' for name, of in sizes.items() if len(of) == 1),
  ]
  return facts


def _text(facts: dict, chip) -> str:
  from sparse_experts import console

  lines = _budget_lines(facts) if 'budget' in facts else []
  lines += [
    f'{" ".join(facts["recipe"])} on {facts["chips"]} chips {chip.name} of '
    f'{chip.hbm_bytes / _GIB:.1f} GiB, batches of {facts["batch_size"]} '
    f'sequences of {facts["sequence"]}',
    '',
  ]
  rows = []
  for entry in facts['candidates']:
    time = entry['time']
    rows.append(
      (
        _mesh(entry),
        entry['remat'],
        str(entry['microbatches']),
        ', '.join(map(str, entry['group_sizes'].values())) or '-',
        f'{entry["memory"]["peak"] / _GIB:.1f}',
        f'{time["seconds"] * 1e3:.1f}',
        time['bound'],
      )
    )
  heading = (
    *('data x expert x model', 'remat', 'microbatches', 'tokens of a group'),
    *('GiB', 'ms at least', 'bound by'),
  )
  lines.append(console.table(heading, rows) if rows else 'No mesh fits.')
  if facts['rejected']:
    lines += ['', 'Rejected:']
  lines += [
    f'  {_mesh(entry)}: {entry["because"]}' for entry in facts['rejected']
  ]
  if rows:
    best = facts['candidates'][0]['gin']
    more = facts['bindings'] if 'budget' in facts else []
    if 'budget' in facts:
      most = facts['budget']['efficiency_at_most']
      lines += [
        '',
        f'The first of them reaches {most:.0%} of the peak at most.',
      ]
    lines += ['', 'The first of them in gin:']
    lines += [f'  {" = ".join(line.split("=", 1))}' for line in [*more, *best]]
  return '\n'.join(lines)


def _budget_lines(facts: dict) -> list[str]:
  from sparse_experts import console

  budget, taken = facts['budget'], facts['proposal']
  rows = [
    (
      f'{p["experts"]}{"*" if p == taken else ""}',
      f'{p["params"] / 1e9:.2f}',
      f'{p["total_params"] / 1e9:.1f}',
      f'{p["effective_params"] / 1e9:.1f}',
      f'{p["tokens"] / 1e9:.0f}',
      f'{p["loss"]:.3f}',
      f'{p["state_bytes"] / _GIB:.2f}',
      '' if p['fits'] else 'does not fit',
    )
    for p in facts['proposals']
  ]
  energy = 'energy: state --watts=W of a chip; none is published'
  if budget['kwh'] is not None:
    energy = (
      f'energy: {budget["kwh"]:,.0f} kWh, at {budget["watts"]:g} W a chip and '
      f'a PUE of {budget["pue"]:g}'
    )
  heading = (
    *('experts', 'N (1e9)', 'with all', 'worth dense', 'tokens (1e9)'),
    *('loss', 'GiB a device', ''),
  )
  return [
    f'{budget["flops"]:.3g} FLOPs: {budget["hours"]:g} hours at '
    f'{budget["efficiency"]:.0%} of the peak; {energy}',
    '',
    console.table(heading, rows),
    f'* taken: {taken["num_layers"]} layers of width {taken["width"]}',
    '',
  ]


def _verified(entry: dict) -> str:
  facts = entry['verified']
  predicted, compiled = entry['memory']['peak'], facts['hbm_bytes']['peak']
  optimal = facts['optimal_seconds']
  return (
    f'{_mesh(entry)}: predicted {predicted / _GIB:.2f} GiB, compiler '
    f'{compiled / _GIB:.2f} GiB ({predicted / compiled - 1:+.1%})'
    f'{"" if facts["fits"] else ", does not fit"}; at least '
    f'{entry["time"]["seconds"] * 1e3:.1f} ms, XLA estimates '
    + ('n/a' if optimal is None else f'{optimal * 1e3:.1f} ms')
  )


def _mesh(entry: dict) -> str:
  sizes: Sequence[int] = entry['mesh'].values()
  return ' x '.join(map(str, sizes)) + (' fsdp' if entry['fsdp'] else '')
