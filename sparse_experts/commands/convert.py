"""convert: a checkpoint from or to T5X, Hugging Face, or our own format."""

from __future__ import annotations

import argparse
import functools

from sparse_experts.commands import printing, settings


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
  parser.add_argument(
    '--experts',
    type=_indices,
    metavar='J,J,...',
    help='experts of the input, by index, that the output has',
  )


def run(args: argparse.Namespace) -> None:
  from sparse_experts.convert import convert
  from sparse_experts.surgery.selection import select

  change = None
  if args.experts is not None:
    change = functools.partial(select, experts=args.experts)

  report = convert(
    args.input,
    args.output,
    source=args.source,
    target=args.to,
    gin_files=args.gin_file,
    bindings=args.bindings,
    search_paths=settings.search_paths(args),
    change=change,
    dry_run=args.dry_run,
  )
  if args.json:
    return printing.as_json(report)
  for name, fact in report.items():
    if isinstance(fact, list):
      fact = ', '.join(fact) or 'nothing'
    print(f'{name + ":":12}{fact}')


def _indices(text: str) -> list[int]:
  try:
    return [int(index) for index in text.split(',')] if text else []
  except ValueError as error:
    raise argparse.ArgumentTypeError(
      f'indices such as 0,2,5, not {text!r}'
    ) from error
