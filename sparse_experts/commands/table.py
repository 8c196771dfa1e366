"""table: one of a paper's, published beside computed."""

from __future__ import annotations

import argparse
from typing import Any

from sparse_experts.commands import printing, settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    '--paper', metavar='TABLE', help="which, such as 'switch_table9'"
  )


def run(args: argparse.Namespace) -> None:
  from sparse_experts.papers import published

  settings.refuse(
    args, 'table takes --paper=TABLE alone; its rows name recipes.'
  )
  tables = published.tables()
  if args.paper not in tables:
    raise ValueError(
      f'--paper must be one of {", ".join(tables)}, not {args.paper!r}.'
    )
  table = tables[args.paper]
  rows = list(map(computed, table.rows))
  if args.json:
    return printing.as_json(
      {'table': args.paper, 'title': table.title, 'rows': rows}
    )
  print(table.title)
  printing.compared(
    'model', [(row['model'], value) for row in rows for value in row['values']]
  )


def computed(row) -> dict[str, Any]:
  """A row of a `published.Table`, and what the ledger makes of its recipe."""
  from sparse_experts import config
  from sparse_experts.papers import published
  from sparse_experts.planning import ledger

  config.parse([row.file], row.bindings, [])
  model, lengths = config.value('MODEL'), config.value('TASK_FEATURE_LENGTHS')
  return {
    'model': row.model,
    'recipe': row.file,
    'bindings': list(row.bindings),
    'values': published.compare(row, ledger.ledger(model, lengths)),
  }
