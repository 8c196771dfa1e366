"""SIGKILL at random moments of a run that saves each step costs it nothing."""

import json
import os

import command
import pytest

STEPS = 15
# In fives; 50 take some minutes.
KILLS = int(os.environ.get('SPARSE_EXPERTS_KILLS', '5'))

# Its children find everything imported, and nothing begun.
KILLING = """
import json, os, pathlib, random, signal, sys, time
import clu.metric_writers, flax.linen, jax, optax, orbax.checkpoint
import seqio, tensorflow, tensorflow_text, tiny_tasks
from sparse_experts import cli, config
from sparse_experts.training import train
directory, seed, *arguments = sys.argv[1:]
random.seed(int(seed))
folder, killed, moments, runs = pathlib.Path(directory), 0, [], 0

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

def steps(model_dir):
  names = [path.name for path in model_dir.glob('checkpoints/*')]
  return sorted(int(name) for name in names if name.isdigit())

def live(pid, model_dir):
  # A fifth die anywhere on the way to a step, others when they save.
  before, early = steps(model_dir), random.random() < 0.2
  ends = time.monotonic() + random.uniform(0, 5)
  while time.monotonic() < ends if early else steps(model_dir) == before:
    time.sleep(0.005)
    found, status = os.waitpid(pid, os.WNOHANG)
    if found:
      return status
  time.sleep(random.uniform(0, 0.6))
  os.kill(pid, signal.SIGKILL)
  return os.waitpid(pid, 0)[1]

while killed < 5:
  model_dir, ended = folder / str(runs), False
  while killed < 5 and not ended:
    status = live(begin(model_dir), model_dir)
    ended = status != signal.SIGKILL
    if ended:
      assert status == 0, (folder / 'said.txt').read_text()[-3000:]
    else:
      killed += 1
      moments.append(steps(model_dir)[-1:])
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


ARGUMENTS = (
  *(command.TINY, command.NO_EVALUATION, '--gin.CHECKPOINT_PERIOD=1'),
  *('--gin.LOG_PERIOD=1', f'--gin.TRAIN_STEPS={STEPS}'),
  '--gin.BALANCE_OVER=last_step',  # Its counts are state, too.
)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """MODEL_DIR of a run in one go."""
  model_dir = tmp_path_factory.mktemp('whole')
  outcome = command.run('train', f'--gin.MODEL_DIR={model_dir}', *ARGUMENTS)
  assert outcome.code == 0, outcome.stderr
  return model_dir


@pytest.mark.slow
@pytest.mark.parametrize('seed', range(KILLS // 5))
def test_killed_at_five_random_moments(seed, whole, tmp_path):
  process = command.start('-c', KILLING, str(tmp_path), str(seed), *ARGUMENTS)
  stdout, stderr = process.communicate()
  assert process.returncode == 0, stderr
  found = json.loads(stdout.splitlines()[-1])
  assert len(found['moments']) == 5
  for i in range(found['runs']):
    model_dir = tmp_path / str(i)
    command.assert_same_bits(
      command.saved(whole, STEPS), command.saved(model_dir, STEPS)
    )
    assert curve(whole) == curve(model_dir)
    # Three steps are kept, and nothing half-written.
    kept = [path.name for path in model_dir.glob('checkpoints/*')]
    assert sorted(kept) == ['13', '14', '15']
    names = {path.name for path in model_dir.iterdir()}
    assert names == {path.name for path in whole.iterdir()}
