"""What balancing does to the load of experts, on the documentation corpus.

Trains a small Switch encoder-decoder with each balancing method and without
any, and writes docs/results/balance.md: largest over mean load of the experts
after as many steps, the mean over sparse layers, in training and on held-out
text (where routers that are balanced by construction choose greedily).

  python scripts/balance.py                    # some 15 minutes on two cores

Runs that are complete are not run again; delete --runs to start anew.
"""

import argparse
import concurrent.futures
import json
import pathlib
import statistics
import subprocess
import sys

from sparse_experts.data import corpus

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = ROOT / 'docs' / 'results' / 'balance.md'
SMALL = {
  'EMBED_DIM': 64,
  'MLP_DIM': 128,
  'HEAD_DIM': 16,
  'SPARSE_LAYERS': 2,
  'initializers.normal.stddev': 0.02,  # Of routers.
  'TASK_FEATURE_LENGTHS': {'inputs': 128, 'targets': 29},
}
NONE = {'LOSS_WEIGHTS': {}}

# Method: (file of gin/routers/, what is overridden, what it is compared with).
METHODS = {
  'top-1, nothing': ('switch', NONE, None),
  'top-1, load-balancing loss (Switch)': ('switch', {}, 'top-1, nothing'),
  'top-2, bias from load (loss-free)': (
    'loss_free',
    {},
    'top-2, bias held at zero',
  ),
  'top-2, bias held at zero': (
    'loss_free',
    {'language.Language.bias_rate': 0.0},
    None,
  ),
  'noisy top-k, importance and load losses': (
    'noisy_top_k',
    {},
    'noisy top-k, nothing',
  ),
  'noisy top-k, nothing': ('noisy_top_k', NONE, None),
  'V-MoE top-2, importance and load losses': ('v_moe', {}, 'V-MoE, nothing'),
  'V-MoE, nothing': ('v_moe', NONE, None),
  'linear assignment (BASE)': ('base', {}, 'top-1, nothing'),
  'Sinkhorn (S-BASE)': ('s_base', {}, 'top-1, nothing'),
  'hash of the token': ('hash', {}, 'top-1, nothing'),
  'balanced hash of the token': ('hash_balanced', {}, 'hash of the token'),
}


def measure(label, router, overrides, runs, steps):
  """Imbalance in training and on held-out text, and held-out loss."""
  folder = runs / ''.join(c if c.isalnum() else '_' for c in label)
  found = folder / 'results.json'
  if not found.exists():
    settings = {
      **SMALL,
      **overrides,
      'TRAIN_STEPS': steps,
      'MODEL_DIR': str(folder),
      'CHECKPOINT_PERIOD': steps,
      'EVAL_PERIOD': steps,
    }
    output = subprocess.run(
      [
        *(sys.executable, '-m', 'sparse_experts', 'train', '--json'),
        '--gin_file=gin/quickstart.gin',
        f'--gin_file=gin/routers/{router}.gin',
        *(f'--gin.{name}={value!r}' for name, value in settings.items()),
      ],
      check=True,
      cwd=ROOT,
      capture_output=True,
    ).stdout
    found.write_bytes(output)
  results = json.loads(found.read_text())

  def imbalance(metrics):
    layers = metrics['layers'].values()
    return statistics.mean(layer['imbalance'] for layer in layers)

  return (
    imbalance(results['train']),
    imbalance(results['eval']),
    results['eval']['loss'],
  )


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--steps', type=int, default=300)
  parser.add_argument('--runs', default='runs/balance')
  args = parser.parse_args()

  def run(label):
    router, overrides, _ = METHODS[label]
    found = measure(label, router, overrides, ROOT / args.runs, args.steps)
    print(label, found, flush=True)
    return found

  with concurrent.futures.ThreadPoolExecutor(2) as pool:  # Of processes.
    measured = dict(zip(METHODS, pool.map(run, METHODS)))
  rows = []
  for label, (router, _, without) in METHODS.items():
    train, held_out, loss = measured[label]
    before = f'{measured[without][0]:.2f}' if without else ''
    rows.append(
      f'| {label} | {router} | {train:.2f} | {before} | {held_out:.2f} | '
      f'{loss:.3f} |'
    )
  PAGE.write_text(f"""\
# Balance of the load

`python scripts/balance.py --steps={args.steps}`

A small encoder-decoder with 8 experts in every second block is trained by span
corruption on the documentation corpus (small, digest {corpus.load().digest}),
for {args.steps} steps of 16 x 128 tokens, with one seed.
Imbalance is the largest load of a layer's experts divided by their mean load,
before any capacity, as a mean over sparse layers; 1 is balance. The column
"without" has the same router in training without its balancing method. Noisy
top-k is balanced in training either way, because noise alone chooses four of
eight experts at first; held-out text, which is routed without noise, shows the
effect of its losses.

| method | file | imbalance | without | held out | held-out loss, nats |
|---|---|---|---|---|---|
{chr(10).join(rows)}
""")


if __name__ == '__main__':
  main()
