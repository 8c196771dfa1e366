"""infer: a checkpoint's answers to a task's examples."""

from __future__ import annotations

import argparse

from sparse_experts.commands import printing, settings


def run(args: argparse.Namespace) -> None:
  from sparse_experts import config
  from sparse_experts.training import infer

  settings.parse(args)
  run = config.bound(infer.infer)
  if args.dry_run:
    return printing.ledger(args)
  results = run()
  if args.json:
    return printing.as_json(results)
  for result in results:
    for name in ('inputs', 'prediction', 'targets'):
      print(f'{name + ":":12}{" ".join(result[name].split())}')
    print(f'{"log prob:":12}{result["log_prob"]:.1f} nats\n')
