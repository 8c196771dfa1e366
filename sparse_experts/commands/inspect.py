"""inspect: count parameters and arithmetic, or read a checkpoint."""

from __future__ import annotations

import argparse

from sparse_experts.commands import printing, settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    '--checkpoint', metavar='DIR', help='a MODEL_DIR or a step of it'
  )


def run(args: argparse.Namespace) -> None:
  if args.checkpoint is not None:
    settings.refuse(args, 'inspect takes --checkpoint or --gin_file, not both.')
    return _checkpoint(args)
  settings.parse(args)
  printing.ledger(args, activations=True)


def _checkpoint(args: argparse.Namespace) -> None:
  from sparse_experts.training import checkpoints, checksums

  path, step = checkpoints.find(args.checkpoint)
  params, _ = checkpoints.load_params(path)  # Which verifies them.
  verified = checksums.there(path)
  if verified:
    checkpoints.verify(path, 'optimizer', 'data')
  leaves = checkpoints.flatten(params)
  facts = {
    'step': step,
    'checksums': 'verified' if verified else 'not verified',
    'total_params': int(sum(leaf.size for leaf in leaves.values())),
    'params_sha256': checkpoints.digest(params),
    'tree': {name: list(leaf.shape) for name, leaf in sorted(leaves.items())},
  }
  if args.json:
    return printing.as_json(facts)
  for name, shape in facts.pop('tree').items():
    print(f'{name}  {" x ".join(map(str, shape))}')
  for name, fact in facts.items():
    print(f'{name}: {fact}')
