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
  flags = settings.given(args, 'input', 'output', 'score', 'routing', 'top')
  results = run(**flags, dry_run=args.dry_run)
  if args.dry_run:
    return printing.ledger(args)
  if args.json:
    return printing.as_json(results)
  for result in results[:SHOWN] if args.output else results:
    print(_result(result))
  if found := likeliest.summary(results):
    print(f'{found}\n')
  if results and 'routing' in results[0]:
    print(_routing(results))
  if args.output:
    print(f'{len(results)} answers in {args.output}')
  for name, so in (('inputs', ''), ('targets', ' and are not scored')):
    if cut := sum(f'{name}_cut' in result for result in results):
      print(
        f'{cut} of {len(results)} {name} were cut to TASK_FEATURE_LENGTHS{so}'
      )


def _result(result) -> str:
  """An example and its answer; or the likeliest tokens, one line a place."""
  from sparse_experts.data import prompts

  names = ['inputs', 'prediction', 'targets']
  if 'top' in result and result.get('targets'):
    names.remove('prediction')
  lines = [
    f'{name + ":":12}{_text(result[name])}' for name in names if name in result
  ]
  lines[1:1] = [f'{"":12}({cut})' for cut in prompts.cuts(result)]
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
