"""record: the routing of a checkpoint on a task's split, token by token."""

from __future__ import annotations

import argparse

from sparse_experts.commands import printing, settings


def run(args: argparse.Namespace) -> None:
  from sparse_experts import config, console
  from sparse_experts.insight import records, routing, specialisation

  settings.parse(args)
  run = config.bound(records.record)
  found, path = run(dry_run=args.dry_run)
  if args.dry_run:
    return printing.ledger(args)
  layers = {name: routing.summary(x) for name, x in found.layers.items()}
  experts = {name: specialisation.expert_table(found, name) for name in layers}
  if args.json:
    for name, rows in experts.items():
      layers[name]['experts'] = [row._asdict() for row in rows]
    return printing.as_json(
      {'path': str(path), **found.facts, 'layers': layers}
    )
  print(console.expert_load(layers))
  for name, rows in experts.items():
    header = (name, 'load', 'most of all', 'tokens that say most about it')
    cells = [
      (f'{e.expert}', f'{e.load:.0%}', e.label, ' '.join(e.tokens))
      for e in rows
    ]
    print('\n' + console.table(header, cells, words=(0, 2, 3)))
  print(f'\nrecord:  {path}')
