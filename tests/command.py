"""The command line for tests: in this process, and in others."""

import contextlib
import io
import os
import pathlib
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from sparse_experts import cli, config, sharding
from sparse_experts.training import checkpoints
from sparse_experts.training import train as runner

TESTS = pathlib.Path(__file__).resolve().parent
TINY = f'--gin_file={TESTS / "tiny.gin"}'
NO_EVALUATION = '--gin.train.train.eval_dataset=None'


class Outcome(NamedTuple):
  """What a user sees of a command that has ended."""

  code: int
  stdout: str
  stderr: str


def run(*arguments: str) -> Outcome:
  """Runs a command in this process; fast, but shares its libraries' state."""
  stdout, stderr = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
    try:
      code = cli.main(arguments)
    except SystemExit as end:  # Of what the command's flags cannot be.
      code = end.code
  return Outcome(code, stdout.getvalue(), stderr.getvalue())


def train(model_dir, *arguments: str) -> Outcome:
  """Trains the tiny model, without evaluation."""
  outcome = run(
    'train', TINY, f'--gin.MODEL_DIR={model_dir}', NO_EVALUATION, *arguments
  )
  assert outcome.code == 0, outcome.stderr
  return outcome


def train_on(devices: Sequence[jax.Device], model_dir, *bindings: str, **mesh):
  """As `train`, on some of this process's devices; returns the results."""
  names = [
    binding.removeprefix('--gin.')
    for binding in (f'--gin.MODEL_DIR={model_dir}', NO_EVALUATION, *bindings)
  ]
  config.parse([TINY.partition('=')[2]], names, [])
  return config.bound(runner.train)(
    placement=sharding.Placement(mesh, devices=devices)
  )


def start(*arguments: str, devices: int = 8, **options) -> subprocess.Popen:
  """Starts Python with arguments in a process that has fake devices."""
  environment = {
    **os.environ,
    'PYTHONPATH': os.pathsep.join(map(str, (TESTS.parent, TESTS))),
    'XLA_FLAGS': re.sub(
      r'(device_count)=\d+', rf'\1={devices}', os.environ['XLA_FLAGS']
    ),
  }
  process = subprocess.Popen(
    [sys.executable, *arguments],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env=environment,
    **options,
  )
  watch = threading.Timer(300, process.kill)  # No test waits for ever.
  watch.daemon = True
  watch.start()
  return process


def saved(model_dir, step: int) -> dict[str, np.ndarray]:
  """Every array of a checkpoint, of parameters and optimizer, by its path."""
  folder = checkpoints.directory_of(model_dir) / str(step)
  handler = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
  arrays = {}
  for item in ('params', 'optimizer'):
    tree = handler.metadata(folder / item).item_metadata.tree
    on_host = jax.tree.map(
      lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree
    )
    args = ocp.args.PyTreeRestore(restore_args=on_host)
    restored = handler.restore(folder / item, args=args)
    for name, array in checkpoints.flatten(restored).items():
      arrays[f'{item}/{name}'] = np.asarray(array)
  return arrays


def assert_same_bits(some, others) -> None:
  """Two results of `saved` are equal, bit for bit."""
  assert some.keys() == others.keys()
  for name, array in some.items():
    assert array.dtype == others[name].dtype, name
    assert array.tobytes() == others[name].tobytes(), name
