"""train: a model, from its latest checkpoint if there is one."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from sparse_experts.commands import printing, settings, show


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    '--profile', metavar='START:STOP', help='trace these steps'
  )
  parser.add_argument(
    '--replay',
    type=int,
    metavar='STEP',
    help='take this step once more, from the checkpoint before it, and write '
    'its metrics and routing; nothing else changes',
  )


def run(args: argparse.Namespace) -> int | None:
  from sparse_experts import config, storage
  from sparse_experts.training import train

  settings.parse(args)
  run = config.bound(train.train)
  profile = _profile(args.profile)
  if args.dry_run:
    run(dry_run=True, replay=args.replay)
    if not args.json:
      print(f'{show.macros(args)}\n')
    return printing.ledger(args)

  if args.replay is not None:
    return _replay(args, run(replay=args.replay))

  def write_config(model_dir):
    storage.replace(model_dir / 'config.gin', config.operative().encode())

  results = run(on_start=write_config, **profile)
  if args.json:
    printing.as_json(results)
  else:
    _print(results, config.value('MODEL_DIR'))
  return 130 if results.get('signal') == 'SIGINT' else None  # As shells count.


def _profile(text: str | None) -> dict[str, tuple[int, int]]:
  if text is None:
    return {}
  start, _, stop = text.partition(':')
  if not (start.isdigit() and stop.isdigit() and int(start) < int(stop)):
    raise ValueError(f'--profile takes START:STOP in steps, not {text!r}.')
  return {'profile': (int(start), int(stop))}


def _replay(args: argparse.Namespace, results: Mapping) -> None:
  """Writes and shows what `training.replaying.replay` found."""
  import jax
  from etils import epath

  from sparse_experts import config, console
  from sparse_experts.insight import records
  from sparse_experts.training import spike, train

  step, metrics = results['step'], results['metrics']
  folder = epath.Path(config.value('MODEL_DIR')) / 'replays'
  paths = {'metrics': folder / f'{step}.json'}
  spike.write(paths['metrics'], {'step': step, 'metrics': metrics})
  if results['record']:
    paths['record'] = folder / f'{step}.npz'
    model = config.argument(train.train, 'model')
    dataset = config.argument(train.train, 'dataset')
    pair = results['batch'], results['record']
    found = records.explained(
      records.collect([pair], model.features.token_ids),
      model,
      dataset,
      step=step,
      capacity_factor=results['capacity_factor'],
    )
    if jax.process_index() == 0:
      found.save(paths['record'])
  if args.json:
    return printing.as_json(
      {
        'step': step,
        'from': results['from'],
        'metrics': metrics,
        **{f'{name}_path': str(path) for name, path in paths.items()},
      }
    )
  rows = [(k, f'{v:.5g}') for k, v in console.scalars(metrics).items()]
  print(f'step {step}, from the checkpoint of step {results["from"]}')
  print(console.table(('metric', ''), rows))
  for name, path in paths.items():
    print(f'{name + ":":9}{path}')


def _print(results: Mapping, model_dir: str) -> None:
  from sparse_experts import console

  before, after = results['eval_before'], results['eval']
  if after is not None:
    print(
      f'held-out loss: {before["loss"]:.3f} at the start of this run, '
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
