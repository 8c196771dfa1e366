"""train: a model, from its latest checkpoint if there is one."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from sparse_experts.commands import printing, settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    '--profile', metavar='START:STOP', help='trace these steps'
  )


def run(args: argparse.Namespace) -> None:
  from sparse_experts import config
  from sparse_experts.moe import expert_check
  from sparse_experts.training import train

  settings.parse(args)
  run = config.bound(train.train)
  profile = _profile(args.profile)
  if args.dry_run:
    with expert_check.checking():
      return printing.ledger(args)

  def write_config(model_dir):
    (model_dir / 'config.gin').write_text(config.operative())

  results = run(on_start=write_config, **profile)
  if args.json:
    printing.as_json(results)
  else:
    _print(results, config.value('MODEL_DIR'))


def _profile(text: str | None) -> dict[str, tuple[int, int]]:
  if text is None:
    return {}
  start, _, stop = text.partition(':')
  if not (start.isdigit() and stop.isdigit() and int(start) < int(stop)):
    raise ValueError(f'--profile takes START:STOP in steps, not {text!r}.')
  return {'profile': (int(start), int(stop))}


def _print(results: Mapping, model_dir: str) -> None:
  from sparse_experts import console

  before, after = results['eval_before'], results['eval']
  if after is not None:
    print(
      f'held-out loss: {before["loss"]:.3f} nats at the start of this run, '
      f'{after["loss"]:.3f} at step {results["eval_step"]}'
    )
    if after['layers']:
      print('\n' + console.expert_load(after['layers']))
  print(
    f'\ncheckpoint:   {model_dir}/checkpoints/{results["step"]}\n'
    f'TensorBoard:  {model_dir}/tensorboard\n'
    f'metrics:      {model_dir}/metrics.jsonl\n'
    f'config:       {model_dir}/config.gin'
  )
