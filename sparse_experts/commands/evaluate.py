"""evaluate: held-out loss and task metrics of a checkpoint, or of all."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from sparse_experts.commands import printing, settings

PICTURES = ('.png', '.pdf', '.svg')


def add_arguments(parser: argparse.ArgumentParser) -> None:
  which = parser.add_mutually_exclusive_group()
  which.add_argument(
    '--all_checkpoints', action='store_true', help='of MODEL_DIR, one by one'
  )
  which.add_argument(
    '--continuous',
    action='store_true',
    help='as they appear too, until the one of TRAIN_STEPS',
  )
  parser.add_argument(
    '--reliability',
    metavar='FILE.png',
    help='with RANK_OPTIONS: draw how often a confidence is right',
  )


def run(args: argparse.Namespace) -> None:
  from sparse_experts import config
  from sparse_experts.evaluation import evaluate
  from sparse_experts.training import directories

  settings.parse(args)
  make_evaluation = config.bound(evaluate.Evaluation)
  if args.reliability and not config.value('RANK_OPTIONS'):
    raise ValueError('--reliability needs --gin.RANK_OPTIONS=True.')
  if args.reliability and not args.reliability.endswith(PICTURES):
    raise ValueError(
      f'--reliability takes a {", a ".join(PICTURES)}, not {args.reliability}.'
    )
  if args.reliability:
    directories.check_home(args.reliability)
  every = args.all_checkpoints or args.continuous
  evaluation = make_evaluation()
  if args.dry_run:
    if not args.continuous:  # That waits for checkpoints.
      evaluation.check()
    return printing.ledger(args)
  if every:
    until = config.value('TRAIN_STEPS') if args.continuous else None
    show = (lambda results: None) if args.json else _step_printer()
    results = evaluation.all(until=until, on_results=show)
    last = results['last']
  else:
    results = last = evaluation.latest()
  if args.reliability:
    _draw(last, args.reliability)
  if args.json:
    printing.as_json(results)
  elif every:
    _print_all(results)
  else:
    _print(results)


def _print(results: Mapping[str, Any]) -> None:
  from sparse_experts import console

  rows = {
    **console.scalars(results['metrics']),
    **{f'task/{k}': v for k, v in results['task_metrics'].items()},
    **{
      f'{task}/{name}': value
      for task, numbers in results['calibration'].items()
      for name, value in console.scalars(numbers).items()
      if name != 'accuracy'
    },
  }
  factor = results['capacity_factor']
  print(
    f'{results["task"]}, {results["split"]} split, step {results["step"]}, '
    + ('exact' if factor is None else f'capacity factor {factor:g}')
  )
  print(
    console.table(('metric', ''), [(k, f'{v:.5g}') for k, v in rows.items()])
  )
  _print_ties(results)
  if results['metrics']['layers']:
    print('\n' + console.expert_load(results['metrics']['layers']))


def _print_ties(results: Mapping[str, Any]) -> None:
  """Where the first option was taken for want of a better one."""
  for task, ranking in results['ranking'].items():
    if ranking['ties']:
      print(
        f'{task}: {ranking["ties"]} of {ranking["examples"]} examples have '
        'several most probable options; the first of them was taken.'
      )


def _step_printer():
  """Says what each checkpoint reached, as they are evaluated."""

  def show(results):
    print(
      f'step {results["step"]}  loss {results["metrics"]["loss"]:.4f}  '
      f'score {results["score"]:.5g}',
      flush=True,
    )
    _print_ties(results)

  return show


def _print_all(results: Mapping[str, Any]) -> None:
  from sparse_experts import console

  names = list(results['last']['task_metrics'])
  rows = [
    (
      str(at['step']),
      f'{at["metrics"]["loss"]:.4f}',
      *(f'{at["task_metrics"][name]:.2f}' for name in names),
      'peak' if at['step'] == results['peak']['step'] else '',
    )
    for at in results['steps']
  ]
  last = results['last']
  print(f'\n{last["task"]}, {last["split"]} split')
  print(console.table(('step', 'loss', *names, ''), rows))


def _draw(results: Mapping[str, Any], path: str) -> None:
  """A diagram of each task's calibration: FILE.png, or FILE-TASK.png."""
  import pathlib

  from sparse_experts.evaluation import calibration

  file = pathlib.Path(path)
  found = results['calibration']
  for task, numbers in found.items():
    name = file if len(found) == 1 else file.with_stem(f'{file.stem}-{task}')
    calibration.plot(numbers['bins'], name)
