"""SIGKILL at random moments of a run that saves each step costs it nothing."""

import json
import os

import command
import pytest

STEPS = 30
# As many in a quarter of the time would do less; 50 take three minutes.
KILLS = int(os.environ.get('SPARSE_EXPERTS_KILLS', '12'))

# Its children find everything imported, and nothing begun.
KILLING = """
import json, os, pathlib, random, signal, sys, time
import clu.metric_writers, flax.linen, jax, optax, orbax.checkpoint
import seqio, tensorflow, tensorflow_text, tiny_tasks
from sparse_experts import cli, config
from sparse_experts.training import train
directory, kills, steps, *arguments = sys.argv[1:]
random.seed(0)
folder, killed, moments = pathlib.Path(directory), 0, []
runs, longest = 0, 8.0

def begin(model_dir):
  if pid := os.fork():
    return pid
  sys.stdout = sys.stderr = open(folder / 'said.txt', 'a')
  code = 1
  try:
    code = cli.main(['train', f'--gin.MODEL_DIR={model_dir}', *arguments])
  finally:
    sys.stderr.flush()
    os._exit(code)

while killed < int(kills):
  model_dir, ended = folder / str(runs), False
  while killed < int(kills) and not ended:
    begun, pid = time.monotonic(), begin(model_dir)
    life = random.uniform(0, longest)
    while not ended and time.monotonic() < begun + life:
      time.sleep(0.001)
      found, status = os.waitpid(pid, os.WNOHANG)
      ended = found == pid
    if ended:
      assert status == 0, (folder / 'said.txt').read_text()[-3000:]
      longest = time.monotonic() - begun
    else:
      os.kill(pid, signal.SIGKILL)
      os.waitpid(pid, 0)
      killed += 1
      there = [p.name for p in model_dir.glob('checkpoints/*')]
      moments.append((round(life, 2), sorted(there)[-2:]))
  runs += ended
if not ended:
  _, status = os.waitpid(begin(model_dir), 0)
  assert status == 0, (folder / 'said.txt').read_text()[-3000:]
  runs += 1
print(json.dumps({'runs': runs, 'moments': moments}))
"""


def curve(model_dir) -> list[tuple[str, int, float]]:
  lines = (model_dir / 'metrics.jsonl').read_text().splitlines()
  return [(m['name'], m['step'], m['loss']) for m in map(json.loads, lines)]


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
  arguments = (
    *(command.TINY, command.NO_EVALUATION, '--gin.CHECKPOINT_PERIOD=1'),
    *('--gin.LOG_PERIOD=1', f'--gin.TRAIN_STEPS={STEPS}'),
    '--gin.BALANCE_OVER=last_step',  # Its counts are state, too.
  )
  process = command.start(
    *('-c', KILLING, str(tmp_path), str(KILLS), str(STEPS), *arguments),
    devices=8,
  )
  stdout, stderr = process.communicate()
  assert process.returncode == 0, stderr
  found = json.loads(stdout.splitlines()[-1])
  print(found)
  whole = tmp_path / 'whole'
  outcome = command.run('train', f'--gin.MODEL_DIR={whole}', *arguments)
  assert outcome.code == 0, outcome.stderr
  for i in range(found['runs']):
    command.assert_same_bits(
      command.saved(whole, STEPS), command.saved(tmp_path / str(i), STEPS)
    )
    assert curve(whole) == curve(tmp_path / str(i))
    # Three steps are kept, and nothing half-written.
    kept = [path.name for path in (tmp_path / str(i)).glob('checkpoints/*')]
    assert sorted(kept) == ['28', '29', '30']
    assert not (tmp_path / str(i) / 'lease.json').exists()
  assert len(found['moments']) == KILLS
