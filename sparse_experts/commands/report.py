"""report: one HTML page about a run."""

from __future__ import annotations

import argparse
import pathlib
import sys

from sparse_experts.commands import printing, settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('model_dir', metavar='MODEL_DIR', help='of the run')
  parser.add_argument(
    '--figures',
    metavar='DIR',
    help='a new folder: also write each figure there, as PDF, SVG and PNG',
  )


def run(args: argparse.Namespace) -> None:
  from sparse_experts.insight import curves, report_page
  from sparse_experts.training import directories

  settings.refuse(
    args, 'report takes MODEL_DIR alone; its config.gin has the rest.'
  )
  root = directories.absolute(args.model_dir)
  if args.figures is not None:
    directories.check_new(args.figures, by='--figures')
    folder = directories.absolute(args.figures)
    if folder.exists() and any(folder.iterdir()):
      raise ValueError(
        f'{args.figures} is not empty, and figures of another run there would '
        'be taken for those of this one; choose another folder by --figures.'
      )
  if args.dry_run:
    curves.read(root)
    return printing.checked(args)
  path = report_page.write(
    args.model_dir, _ledger(args.model_dir), args.figures
  )
  paths = {'path': str(path)}
  if args.figures is not None:
    paths['figures'] = args.figures
  if args.json:
    return printing.as_json(paths)
  print(f'report:  {path}')
  if args.figures is not None:
    print(f'figures: {args.figures}')


def _ledger(model_dir: str):
  """Of the model that config.gin describes; None where there is none."""
  from sparse_experts import config
  from sparse_experts.config import overrides
  from sparse_experts.planning import ledger

  file = pathlib.Path(model_dir) / 'config.gin'
  if not file.exists():
    return None
  try:
    config.parse([str(file)], [], [])
    return ledger.ledger(
      config.value('MODEL'), config.value('TASK_FEATURE_LENGTHS')
    )
  except ValueError as error:  # Modules that are not here, another version.
    print(f'no parameters: {overrides.first_line(error)}', file=sys.stderr)
    return None
