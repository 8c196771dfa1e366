"""evaluate: held-out loss and task metrics of a checkpoint."""

from __future__ import annotations

import argparse

from sparse_experts.commands import printing, settings


def run(args: argparse.Namespace) -> None:
  from sparse_experts import config
  from sparse_experts.training import evaluate, report

  settings.parse(args)
  run = config.bound(evaluate.evaluate)
  if args.dry_run:
    return printing.ledger(args)
  results = run()
  if args.json:
    return printing.as_json(results)
  rows = {
    **report.scalars(results['metrics']),
    **{f'task/{k}': v for k, v in results['task_metrics'].items()},
  }
  factor = results['capacity_factor']
  print(
    f'{results["task"]}, {results["split"]} split, step {results["step"]}, '
    + ('exact' if factor is None else f'capacity factor {factor:g}')
  )
  print(
    report.table(('metric', ''), [(k, f'{v:.5g}') for k, v in rows.items()])
  )
  if results['metrics']['layers']:
    print('\n' + report.expert_load(results['metrics']['layers']))
