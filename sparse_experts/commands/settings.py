"""Gin files and overrides of a command line, parsed."""

from __future__ import annotations

import argparse


def parse(args: argparse.Namespace, *more_files: str) -> None:
  """Parses `args.gin_file`, then `more_files`, then `args.bindings`."""
  from sparse_experts import config

  files = [*args.gin_file, *more_files]
  if not files:
    raise ValueError(
      f'{args.command} needs --gin_file=FILE; `python -m sparse_experts list` '
      'names those that come with the package.'
    )
  paths = [path for path in args.gin_search_paths.split(',') if path]
  config.parse(files, args.bindings, paths)


def refuse(args: argparse.Namespace, line: str) -> None:
  """Raises `line` where a command was given bindings that it would not read."""
  if args.gin_file or args.bindings:
    raise ValueError(line)
