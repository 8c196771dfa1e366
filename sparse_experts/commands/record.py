"""record: the routing of a checkpoint on a task's split, token by token."""

from __future__ import annotations

import argparse

from sparse_experts.commands import printing, settings


def run(args: argparse.Namespace) -> None:
  from sparse_experts import config, console
  from sparse_experts.insight import records, routing

  settings.parse(args)
  run = config.bound(records.record)
  found, path = run(dry_run=args.dry_run)
  if args.dry_run:
    return printing.ledger(args)
  layers = {name: routing.summary(x) for name, x in found.layers.items()}
  if args.json:
    return printing.as_json(
      {'path': str(path), **found.facts, 'layers': layers}
    )
  print(console.expert_load(layers))
  print(f'\nrecord:  {path}')
