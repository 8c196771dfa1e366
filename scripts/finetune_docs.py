"""Fine-tunes a small Switch and its dense twin on documentation.

Pre-trains gin/quickstart.gin and gin/quickstart_dense.gin, fine-tunes each on
docs_domain and docs_summary, evaluates all checkpoints, and writes
docs/results/finetune_docs.{md,json} with two baselines: the most frequent
package of the training split, and the first 25 words of the input.

  python scripts/finetune_docs.py --seeds=1   # 15 minutes at most on two cores

Runs that are complete are not run again; delete --runs to start anew.
"""

import argparse
import itertools
import json
import pathlib
import resource
import statistics
import subprocess
import sys

from sparse_experts.data import corpus, metrics, tasks

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / 'docs' / 'results'
MODELS = {
  'Switch, 8 experts': 'gin/quickstart.gin',
  'dense twin': 'gin/quickstart_dense.gin',
}
BATCH_SIZE = 16  # Of gin/finetune/docs.gin.
# Of each task how it is answered: what evaluation is told, and what is shown.
TASKS = {
  'docs_domain': {
    'ranked': (['--gin.RANK_OPTIONS=True'], ('accuracy',)),
    'written': ([], ('accuracy',)),
  },
  'docs_summary': {'written': ([], ('rouge1', 'rouge2', 'rougeLsum'))},
}


def side_by_side(args, command, folders, *gin_files, **bindings):
  """Results by model of a command; both run at a time, one a core.

  Args:
    args: of this script.
    command: and its flags.
    folders: by model, the bindings of its folders.
    gin_files, bindings: of both.
  """
  running = {}
  for name, file in MODELS.items():
    values = {**folders[name], **bindings}
    arguments = [
      *(f'--gin_file={path}' for path in (file, *gin_files)),
      *(f'--gin.{macro}={value}' for macro, value in values.items()),
    ]
    running[name] = subprocess.Popen(
      [sys.executable, '-m', 'sparse_experts', *command, '--json', *arguments],
      cwd=ROOT,
      stdout=subprocess.PIPE,
      text=True,
    )
  before = core_seconds(args) - _children()
  outputs = {name: run.communicate()[0] for name, run in running.items()}
  spent = pathlib.Path(args.runs) / 'core_seconds'
  spent.write_text(f'{before + _children()}\n')
  if any(run.returncode for run in running.values()):
    sys.exit('error: a run failed; its message is above.')
  return {name: json.loads(output) for name, output in outputs.items()}


def one_seed(seed, args):
  """Results by task, way and model, and losses of pre-training."""
  runs = pathlib.Path(args.runs).absolute()

  def folders(task, **also):
    return {
      name: {
        macro: runs / f'{name.split()[0].strip(",").lower()}-{what}-{seed}'
        for macro, what in {'MODEL_DIR': task, **also}.items()
      }
      for name in MODELS
    }

  found = {}
  pretrained = folders('pretrained')
  steps = {
    'SEED': seed,
    'TRAIN_STEPS': args.pretrain_steps,
    'DECAY_STEPS': args.pretrain_steps,
  }
  side_by_side(args, ['train'], pretrained, **steps)
  for split in ('validation', 'out_of_domain'):
    results = side_by_side(
      args, ['evaluate'], pretrained, **steps, EVAL_SPLIT=split
    )
    found[split] = {
      name: result['metrics']['loss'] for name, result in results.items()
    }
  steps = {
    'SEED': seed,
    'TRAIN_STEPS': args.steps,
    'DECAY_STEPS': args.steps,
    'CHECKPOINT_PERIOD': max(1, args.steps // 2),
    'EVAL_BATCHES': args.eval_batches,
  }
  for task, ways in TASKS.items():
    files = (f'gin/tasks/{task}.gin', 'gin/finetune/docs.gin')
    there = folders(task, INITIAL_CHECKPOINT='pretrained')
    side_by_side(args, ['train'], there, *files, **steps)
    for way, (flags, _) in ways.items():
      every = ['evaluate', '--all_checkpoints', *flags]
      found[f'{task}, {way}'] = side_by_side(
        args, every, there, *files, **steps
      )
  return found


def core_seconds(args):
  """Processor time of all commands in the folder of runs, to this day."""
  file = pathlib.Path(args.runs) / 'core_seconds'
  return float(file.read_text()) if file.exists() else 0.0


def _children():
  used = resource.getrusage(resource.RUSAGE_CHILDREN)
  return used.ru_utime + used.ru_stime


def baselines(examples):
  """Scores of the majority class and of the lead, on what models answer."""
  counts = corpus.load().counts['train']
  majority = max(counts, key=counts.get)
  domains = [target for _, target in texts('docs_domain', examples)]
  summaries = texts('docs_summary', examples)
  lead = [
    ' '.join(given.removeprefix('summarize: ').split()[:25])
    for given, _ in summaries
  ]
  return {
    'docs_domain': metrics.accuracy(domains, [majority] * len(domains)),
    'docs_summary': metrics.rouge([target for _, target in summaries], lead),
  }


def texts(task, examples):
  """Inputs and targets of the first validation examples, in order."""
  data = tasks.find(task).get_dataset(
    None, split='validation', shuffle=False, try_in_mem_cache=False
  )
  return [
    (e['inputs_pretokenized'].decode(), e['targets_pretokenized'].decode())
    for e in data.take(examples).as_numpy_iterator()
  ]


def spread(values):
  deviation = statistics.stdev(values) if len(values) > 1 else 0.0
  return f'{statistics.mean(values):.2f} ({deviation:.2f})'


def table(seeds, base):
  """Rows of the page: each metric at the peak and at the last step."""
  lines = []
  for task, ways in TASKS.items():
    for way, (_, names) in ways.items():
      for metric, when in itertools.product(names, ('peak', 'last')):
        cells = [
          spread(
            [
              s[f'{task}, {way}'][model][when]['task_metrics'][metric]
              for s in seeds
            ]
          )
          for model in MODELS
        ]
        lines.append(
          f'| {task}, {way} | {metric} | {when} | {" | ".join(cells)} | '
          f'{base[task][metric]:.2f} |'
        )
  return lines


def page(seeds, base, args):
  losses = '\n'.join(
    f'| {split} | '
    + ' | '.join(spread([s[split][model] for s in seeds]) for model in MODELS)
    + ' |'
    for split in ('validation', 'out_of_domain')
  )
  calibrated = '\n'.join(
    f'| {model} | '
    + ' | '.join(
      spread(
        [
          s['docs_domain, ranked'][model]['last']['calibration']['docs_domain'][
            number
          ]
          for s in seeds
        ]
      )
      for number in (
        *('confidence', 'expected_calibration_error'),
        *('rms_calibration_error', 'brier_score'),
      )
    )
    + ' |'
    for model in MODELS
  )
  return f"""\
# Fine-tuning on documentation

`python scripts/finetune_docs.py --seeds={args.seeds} \
--pretrain_steps={args.pretrain_steps} --steps={args.steps} \
--eval_batches={args.eval_batches}` takes \
{core_seconds(args) / args.seeds / 60:.0f} minutes of one core for a seed.

The corpus is the documentation corpus (small, digest {corpus.load().digest}).
Models are pre-trained by span corruption and then fine-tuned by
`gin/finetune/docs.gin`. Numbers are means over seeds, with the standard
deviation in brackets, in percent. In `docs_domain` the answer is the package
that a text is from. It is the most probable of 24, or it is written greedily;
the baseline is the most frequent package. The answer of `docs_summary` is
written greedily; its baseline is the first 25 words of the input. The peak is
the best of the evaluated checkpoints, as papers report it, on the validation
split by which it is chosen; "last" is the last checkpoint. Evaluations
read the first {args.eval_batches * BATCH_SIZE} examples of the split.

| task | metric | | Switch, 8 experts | dense twin | baseline |
|---|---|---|---|---|---|
{chr(10).join(table(seeds, base))}

This is the calibration on `docs_domain`, at the last step:

| model | confidence | ECE | RMS | Brier |
|---|---|---|---|---|
{calibrated}

This is the loss of span corruption before fine-tuning, in nats per target
token, in domain and on a package that no model was trained on:

| split | Switch, 8 experts | dense twin |
|---|---|---|
{losses}
"""


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--seeds', type=int, default=1)
  parser.add_argument('--pretrain_steps', type=int, default=400)
  parser.add_argument('--steps', type=int, default=200)
  parser.add_argument('--eval_batches', type=int, default=8)
  parser.add_argument('--runs', default='runs/finetune_docs')
  parser.add_argument('--results', default=str(RESULTS))
  args = parser.parse_args()
  seeds = [one_seed(seed, args) for seed in range(args.seeds)]
  base = baselines(args.eval_batches * BATCH_SIZE)
  text = page(seeds, base, args)
  results = pathlib.Path(args.results)
  results.mkdir(parents=True, exist_ok=True)
  (results / 'finetune_docs.md').write_text(text)
  (results / 'finetune_docs.json').write_text(
    json.dumps({'seeds': seeds, 'baselines': base}, indent=1) + '\n'
  )
  print(text)


if __name__ == '__main__':
  main()
