"""record: the routing of a checkpoint, token by token: of a split, or texts."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

from sparse_experts.commands import printing, settings
from sparse_experts.insight import token_classes

SHOWN = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    '--text', metavar='TEXT', help="a text in place of the task's split"
  )
  parser.add_argument(
    '--input',
    metavar='FILE',
    help="texts, one a line; of FILE.jsonl objects with 'inputs'",
  )


def run(args: argparse.Namespace) -> None:
  from sparse_experts import config, console
  from sparse_experts.insight import records, routing, specialisation

  texts = _texts(args)
  settings.parse(args)
  run = config.bound(records.record)
  found, path = run(
    **({} if texts is None else {'texts': texts}), dry_run=args.dry_run
  )
  if args.dry_run:
    return printing.ledger(args)
  layers = {name: routing.summary(x) for name, x in found.layers.items()}
  facts = {'path': str(path), **found.facts, 'layers': layers}
  if 'texts' in found.facts:
    return _show_texts(found, path, facts, args.json)
  experts = {name: specialisation.expert_table(found, name) for name in layers}
  if args.json:
    for name, rows in experts.items():
      layers[name]['experts'] = [row._asdict() for row in rows]
    return printing.as_json(facts)
  print(console.expert_load(layers))
  for name, rows in experts.items():
    header = (name, 'load', 'most of all', 'tokens that say most about it')
    print('\n' + console.table(header, cells(rows), words=(0, 2, 3)))
  print(f'\nrecord:  {path}')


def cells(rows: Sequence[Any]) -> list[tuple[str, ...]]:
  """Of `specialisation.expert_table` what a terminal shows, a row each."""
  return [
    (
      f'{e.expert}',
      f'{e.load:.0%}',
      e.label,
      ' '.join(token_classes.visible(token) or '▁' for token in e.tokens),
    )
    for e in rows
  ]


def _texts(args: argparse.Namespace):
  """What was given in place of a split; None: nothing."""
  from sparse_experts.data import prompts

  if args.text is None:
    return None if args.input is None else prompts.read(args.input)
  if args.input is not None:
    raise ValueError('record takes --text or --input, not both.')
  if not args.text.strip():
    raise ValueError('--text is blank; give a text to read.')
  try:
    args.text.encode()
  except UnicodeEncodeError as error:  # Bytes that are no text.
    raise ValueError(
      f'--text is not UTF-8 from character {error.start + 1} on: convert it.'
    ) from error
  return [{'inputs': args.text}]


def _show_texts(found, path, facts, as_json: bool) -> None:
  """Writes the page of texts, and prints what it shows."""
  import jax

  from sparse_experts import console, storage
  from sparse_experts.data import prompts
  from sparse_experts.insight import token_view

  page = path.with_suffix('.html')
  if jax.process_index() == 0:
    title = f'What experts do with a text: {path.parents[2].name}'
    storage.replace(page, token_view.page(found, title).encode())
  texts = found.facts['texts']
  if as_json:
    tokens = [
      {
        stack: list(map(dataclasses.asdict, read))
        for stack, read in token_view.tokens(found, row).items()
      }
      for row in range(len(texts))
    ]
    return printing.as_json({**facts, 'page': str(page), 'tokens': tokens})
  for row, text in enumerate(texts[:SHOWN]):
    print(
      ' '.join([f'text {row + 1}', *(f'({x})' for x in prompts.cuts(text))])
    )
    for header, rows in token_view.tables(found, row):
      print(console.table(header, rows), end='\n\n')
  print('expert and gate of each choice; x: dropped for lack of room')
  if len(texts) > SHOWN:
    print(f'{len(texts) - SHOWN} more texts are in the record')
  if cut := sum(bool(prompts.cuts(text)) for text in texts):
    print(f'{cut} of {len(texts)} texts were cut to TASK_FEATURE_LENGTHS')
  print(f'\nrecord:  {path}\npage:    {page}')
