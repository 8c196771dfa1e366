"""Gin files and overrides of a command line, parsed."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any


def parse(
  args: argparse.Namespace, *more_files: str, bindings: Sequence[str] = ()
) -> None:
  """Parses what a command line gives.

  Args:
    args: `gin_file`, and after all files `bindings`.
    more_files: after those of `args`.
    bindings: after those of `args`.
  """
  from sparse_experts import config

  files = [*args.gin_file, *more_files]
  if not files:
    raise ValueError(
      f'{args.command} needs --gin_file=FILE; `python -m sparse_experts list` '
      'names those that come with the package.'
    )
  bindings = [*args.bindings, *bindings]
  config.parse(files, bindings, search_paths(args))


def flops_per_step() -> int:
  """Useful FLOPs of a training step of what is parsed, see `ledger.ledger`."""
  from sparse_experts import config
  from sparse_experts.planning import ledger
  from sparse_experts.training import train

  dataset = config.argument(train.train, 'dataset')
  model = config.argument(train.train, 'model')
  facts = ledger.ledger(model, dataset.feature_lengths)
  return facts['train_flops_per_sequence'] * dataset.batch_size


def trace(args: argparse.Namespace):
  """Where what `parse` has read is from, see `config.trace`."""
  from sparse_experts import config

  return config.trace(args.gin_file, args.bindings, search_paths(args))


def refuse(args: argparse.Namespace, line: str) -> None:
  """Raises `line` where a command was given bindings that it would not read."""
  if args.gin_file or args.bindings:
    raise ValueError(line)


def given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
  """Those of these flags that were given; the gin files have the others."""
  flags = {name: getattr(args, name) for name in names}
  return {
    name: flag
    for name, flag in flags.items()
    if flag is not None and flag is not False
  }


def search_paths(args: argparse.Namespace) -> list[str]:
  """The folders of --gin_search_paths."""
  return [path for path in args.gin_search_paths.split(',') if path]
