"""infer: a checkpoint's answers to a task's examples or a file's lines."""

from __future__ import annotations

import argparse

from sparse_experts.commands import printing, settings

SHOWN = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    '--input',
    metavar='FILE',
    help="questions, one a line; of FILE.jsonl objects with 'inputs'",
  )
  parser.add_argument(
    '--output',
    metavar='FILE.jsonl',
    help='answers go there; a run that was stopped is continued',
  )
  parser.add_argument(
    '--score', action='store_true', help='also the log-probability of targets'
  )
  parser.add_argument(
    '--routing', action='store_true', help="also each expert's choices"
  )


def run(args: argparse.Namespace) -> None:
  from sparse_experts import config
  from sparse_experts.inference import infer

  settings.parse(args)
  run = config.bound(infer.infer)
  results = run(
    input=args.input,
    output=args.output,
    score=args.score,
    routing=args.routing,
    dry_run=args.dry_run,
  )
  if args.dry_run:
    return printing.ledger(args)
  if args.json:
    return printing.as_json(results)
  for result in results[:SHOWN] if args.output else results:
    for name in ('inputs', 'prediction', 'targets'):
      if name in result:
        text = result[name]
        words = text.split() if isinstance(text, str) else map(str, text)
        print(f'{name + ":":12}{" ".join(words)}')
    if 'log_prob' in result:
      print(f'{"log prob:":12}{result["log_prob"]:.1f} nats\n')
    else:
      print(f'{"score:":12}{result["score"]:.2f}\n')
  if args.routing and results:
    print(_routing(results))
  if args.output:
    print(f'{len(results)} answers in {args.output}')


def _routing(results) -> str:
  """The share of choices that went to each expert, over all results."""
  from sparse_experts import console

  layers = results[0]['routing']
  rows = []
  for layer in layers:
    columns = zip(*(result['routing'][layer] for result in results))
    counts = [sum(column) for column in columns]
    shares = [f'{100 * count / max(1, sum(counts)):.0f}' for count in counts]
    rows.append((layer, ' '.join(shares)))
  return console.table(('load of experts, %', ''), rows) + '\n'
