"""What several commands print."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping


def as_json(facts) -> None:
  """One JSON value on stdout; numpy arrays become lists."""
  print(json.dumps(_plain(facts)))


def checked(args: argparse.Namespace) -> None:
  """What a dry run says that has nothing to count."""
  if args.json:
    return as_json({'checked': True})
  print('checked; nothing was run or written')


def ledger(args: argparse.Namespace, activations: bool = False) -> None:
  """Parameters and arithmetic of the model the parsed gin files describe."""
  from sparse_experts import config
  from sparse_experts.models.objective import Objective
  from sparse_experts.numbers import Count
  from sparse_experts.papers import published
  from sparse_experts.planning import ledger, memory

  lengths = None
  if config.defined('TASK_FEATURE_LENGTHS'):
    of = Mapping[str, Count] | None
    lengths = config.value('TASK_FEATURE_LENGTHS', of)
  model = config.value('MODEL', Objective)
  facts = ledger.ledger(model, lengths)
  if activations:
    facts['activation_bytes_per_token'] = memory.activations_per_token(
      model, facts['feature_lengths']
    )
  values = [
    {'paper': table.title, 'model': row.model, **value}
    for table, row in published.rows_of(args.gin_file, args.bindings)
    for value in published.compare(row, facts)
  ]
  if args.json:
    return as_json({**facts, **({'published': values} if values else {})})
  print(ledger.text(facts))
  if values:
    print()
    compared('paper', [(value['paper'], value) for value in values])


def compared(title: str, named_values: Iterable[tuple[str, Mapping]]) -> None:
  """Comparisons of `papers.published`, and why some numbers do not agree."""
  from sparse_experts import console

  rows, reasons = [], {}
  for name, value in named_values:
    rows.append(
      (
        name,
        value['quantity'],
        value['published'],
        f'{value["computed"]:,}',
        f'{value["difference"]:+.1%}',
        '' if value['agrees'] else '*',
      )
    )
    if value['because']:
      models = reasons.setdefault((value['quantity'], value['because']), [])
      models.append(name)
  heading = (title, '', 'published', 'computed', 'difference', '')
  print(console.table(heading, rows))
  for (quantity, reason), models in reasons.items():
    print(f'* {quantity} of {", ".join(models)}: {reason}.')


def _plain(tree):
  if isinstance(tree, dict):
    return {_key(name): _plain(value) for name, value in tree.items()}
  if isinstance(tree, (list, tuple)):
    return [_plain(item) for item in tree]
  return tree.tolist() if hasattr(tree, 'tolist') else tree


def _key(name):
  """JSON has no tuples for keys, gin files may."""
  return str(name) if isinstance(name, tuple) else name
