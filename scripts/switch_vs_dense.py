"""Switch against its dense twin at equal steps, data order and arithmetic.

Trains gin/quickstart.gin and gin/quickstart_dense.gin with several seeds, and
writes docs/results/switch_vs_dense.{md,csv,svg}. A seed fixes the order of the
data and the initial parameters; both models see the same batches.

  pip install -e '.[notebooks]'
  python scripts/switch_vs_dense.py            # some 20 minutes on two cores

Runs that are complete are not run again; delete --runs to start anew.
"""

import argparse
import csv
import json
import pathlib
import statistics
import subprocess
import sys

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt

from sparse_experts.data import corpus

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / 'docs' / 'results'
MODELS = {
  'Switch, 8 experts': 'gin/quickstart.gin',
  'dense twin': 'gin/quickstart_dense.gin',
}


def command(gin_file, model_dir, seed, steps, period, action='train'):
  return [
    sys.executable,
    '-m',
    'sparse_experts',
    action,
    f'--gin_file={gin_file}',
    f'--gin.MODEL_DIR={model_dir}',
    f'--gin.SEED={seed}',
    f'--gin.TRAIN_STEPS={steps}',
    f'--gin.DECAY_STEPS={steps}',
    '--gin.EVAL_BATCHES=40',
    f'--gin.EVAL_PERIOD={period}',
    f'--gin.CHECKPOINT_PERIOD={steps}',
  ]


def held_out(model_dir):
  """Held-out loss by step, in nats, of what has been trained."""
  path = model_dir / 'metrics.jsonl'
  lines = path.read_text().splitlines() if path.exists() else []
  metrics = map(json.loads, lines)
  return {m['step']: m['loss'] for m in metrics if m['name'] == 'eval'}


def train(folders, seed, steps, period):
  """Trains what is not complete yet, the models side by side."""
  running = [
    subprocess.Popen(
      command(MODELS[name], folder, seed, steps, period), cwd=ROOT
    )
    for name, folder in folders.items()
    if steps not in held_out(folder)
  ]
  codes = [process.wait() for process in running]
  if any(codes):
    sys.exit('error: a run failed; its message is above.')


def ledger(gin_file):
  output = subprocess.run(
    [*command(gin_file, '-', 0, 1, 1, 'inspect'), '--json'],
    check=True,
    cwd=ROOT,
    capture_output=True,
  ).stdout
  return json.loads(output)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--steps', type=int, default=400)
  parser.add_argument('--period', type=int, default=100)
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument('--runs', default='runs/switch_vs_dense')
  args = parser.parse_args()
  curves = {name: [] for name in MODELS}
  for seed in range(args.seeds):
    folders = {
      name: (ROOT / args.runs).absolute() / f'{name.split()[0]}-{seed}'
      for name in MODELS
    }
    train(folders, seed, args.steps, args.period)
    for name, folder in folders.items():
      losses = held_out(folder)
      curves[name].append(
        {step: losses[step] for step in losses if step <= args.steps}
      )
  RESULTS.mkdir(exist_ok=True)
  steps = sorted(curves['dense twin'][0])
  write_csv(curves, steps)
  plot(curves, steps)
  write_page(curves, steps, args)


def write_csv(curves, steps):
  with (RESULTS / 'switch_vs_dense.csv').open('w', newline='') as file:
    writer = csv.writer(file)
    writer.writerow(['model', 'seed', 'step', 'held_out_loss_nats'])
    for name, runs in curves.items():
      for seed, losses in enumerate(runs):
        writer.writerows(
          [name, seed, step, f'{losses[step]:.4f}'] for step in steps
        )


def plot(curves, steps):
  """A figure without a ground, in tones that show on white and on black."""
  tone = '#808080'
  style = {
    'axes.edgecolor': tone,
    'axes.labelcolor': tone,
    'font.size': 9,
    'legend.labelcolor': tone,
    'svg.fonttype': 'none',
    'svg.hashsalt': 'switch_vs_dense',  # The same bytes for the same curves.
    'xtick.color': tone,
    'ytick.color': tone,
  }
  with plt.rc_context(style):
    figure, axes = plt.subplots(figsize=(5, 3), layout='constrained')
    shown = [step for step in steps if step > 0]
    for (name, runs), color, marker in zip(
      curves.items(), ('#1F8FE0', '#E0701F'), 'os'
    ):
      for losses in runs:
        axes.plot(shown, [losses[s] for s in shown], color=color, alpha=0.4)
      means = [statistics.mean(r[s] for r in runs) for s in shown]
      axes.plot(shown, means, color=color, marker=marker, label=name)
    axes.set(xlabel='step', ylabel='held-out loss, nats per target token')
    axes.set_xticks(shown)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(
      RESULTS / 'switch_vs_dense.svg',
      transparent=True,
      metadata={'Date': None},
    )


def write_page(curves, steps, args):
  switch, dense = curves.values()
  rows = []
  for step in steps:
    gaps = [d[step] - s[step] for s, d in zip(switch, dense)]
    rows.append(
      f'| {step} | {spread(switch, step)} | {spread(dense, step)} | '
      f'{statistics.mean(gaps):+.3f} | {min(gaps):+.3f} to {max(gaps):+.3f} |'
    )
  counts = {name: ledger(gin_file) for name, gin_file in MODELS.items()}
  parameters = '\n'.join(
    f'| {name} | {facts["total_params"]:,} | {facts["active_params"]:,} | '
    f'{facts["train_flops_per_token"]:,} |'
    for name, facts in counts.items()
  )
  switch_parts = counts['Switch, 8 experts']['components']
  routers = sum(n for part, n in switch_parts.items() if 'routers' in part)
  (RESULTS / 'switch_vs_dense.md').write_text(f"""\
# Switch against its dense twin

`python scripts/switch_vs_dense.py --steps={args.steps} --seeds={args.seeds}`

Both models are trained by span corruption on the documentation corpus (small,
digest {corpus.load().digest}). Losses are on the validation split, in nats per
target token; Switch runs at its evaluation capacity factor of 2. A seed fixes
initialisation and data order, and within a seed both models see the same
batches.

| model | parameters | active | train FLOPs per token |
|---|---|---|---|
{parameters}

The routers' {routers:,} parameters are all that Switch adds to what a token \
meets.

| step | Switch, 8 experts | dense twin | Switch ahead by, mean | over seeds |
|---|---|---|---|---|
{chr(10).join(rows)}

Numbers are means over {args.seeds} seeds, with the standard deviation in
brackets.

![held-out loss by step](switch_vs_dense.svg)

[switch_vs_dense.csv](switch_vs_dense.csv) has all points, and
[small_switch.md](small_switch.md) says what made Switch win.
""")


def spread(runs, step):
  losses = [run[step] for run in runs]
  deviation = statistics.stdev(losses) if len(losses) > 1 else 0.0
  return f'{statistics.mean(losses):.3f} ({deviation:.3f})'


if __name__ == '__main__':
  main()
