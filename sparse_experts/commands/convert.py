"""convert: a checkpoint from or to T5X, Hugging Face, or our own format."""

from __future__ import annotations

import argparse

from sparse_experts.commands import printing


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    '--from',
    dest='source',
    metavar='FORMAT',
    help='t5x, hf or native; without, what the input looks like',
  )
  parser.add_argument(
    '--input', metavar='PATH', required=True, help='a checkpoint or MODEL_DIR'
  )
  parser.add_argument(
    '--to', default='native', metavar='FORMAT', help='t5x, hf or native'
  )
  parser.add_argument(
    '--output', metavar='PATH', required=True, help='a new folder'
  )


def run(args: argparse.Namespace) -> None:
  from sparse_experts.convert import convert

  report = convert(
    args.input,
    args.output,
    source=args.source,
    target=args.to,
    gin_files=args.gin_file,
    bindings=args.bindings,
    search_paths=[path for path in args.gin_search_paths.split(',') if path],
    dry_run=args.dry_run,
  )
  if args.json:
    return printing.as_json(report)
  for name, fact in report.items():
    if isinstance(fact, list):
      fact = ', '.join(fact) or 'nothing'
    print(f'{name + ":":12}{fact}')
