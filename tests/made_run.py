"""A run as its files say it went, without a model."""

import json


def write(folder, losses, seed=0, steps=(0, 10, 20), **values):
  """A run of steps that take 1 / NUM_EXPERTS seconds each."""
  folder.mkdir(parents=True)
  bindings = {'MODEL_DIR': repr(str(folder)), 'SEED': seed, **values}
  (folder / 'config.gin').write_text(
    ''.join(f'{name} = {value}\n' for name, value in bindings.items())
  )
  each = 1 / float(values.get('NUM_EXPERTS', 1))
  lines = [
    {'step': step, 'name': 'eval', 'loss': loss, 'targets': 64.0}
    for step, loss in zip(steps, losses)
  ]
  lines.append({'step': steps[-1], 'name': 'train', 'seconds_per_step': each})
  text = ''.join(json.dumps(line) + '\n' for line in lines)
  (folder / 'metrics.jsonl').write_text(text)
  return folder
