"""infer: a checkpoint's answers to a task's examples or a file's lines."""

from __future__ import annotations

import argparse

from sparse_experts.commands import printing, settings
from sparse_experts.insight import likeliest

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
  parser.add_argument(
    '--top',
    metavar='K',
    type=int,
    help='also the K likeliest tokens in the place of each of the targets',
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
    top=args.top,
    dry_run=args.dry_run,
  )
  if args.dry_run:
    return printing.ledger(args)
  if args.json:
    return printing.as_json(results)
  for result in results[:SHOWN] if args.output else results:
    print(_result(result))
  if args.top and (found := likeliest.summary(results)):
    print(f'{found}\n')
  if args.routing and results:
    print(_routing(results))
  if args.output:
    print(f'{len(results)} answers in {args.output}')
  if cut := sum('inputs_cut' in result for result in results):
    print(f'{cut} of {len(results)} inputs were cut to TASK_FEATURE_LENGTHS')


def _result(result) -> str:
  """An example and its answer; or the likeliest tokens, one line a place."""
  names = ['inputs', 'prediction', 'targets']
  if 'top' in result and 'targets' in result:
    names.remove('prediction')
  lines = [
    f'{name + ":":12}{_text(result[name])}' for name in names if name in result
  ]
  if 'inputs_cut' in result:
    cut = f'{result["inputs_cut"]} tokens of the inputs did not fit'
    lines.insert(1, f'{"":12}({cut})')
  if 'top' in result:
    places = likeliest.places(result['top'])
    width = max((len(token) for token, _ in places), default=0)
    lines += [f'  {token:{width}}  {others}' for token, others in places]
  elif 'log_prob' in result:
    lines.append(f'{"log prob:":12}{result["log_prob"]:.1f} nats')
  else:
    lines.append(f'{"score:":12}{result["score"]:.2f}')
  return '\n'.join(lines) + '\n'


def _text(text: str | list[int]) -> str:
  """A text in a line, without its end, or token ids."""
  if isinstance(text, str):
    return ' '.join(text.removesuffix('</s>').split())
  return ' '.join(map(str, text))


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
