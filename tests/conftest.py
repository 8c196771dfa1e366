"""Every test: 8 fake devices, strict shapes, compiled programs kept."""

import importlib.metadata
import os
import pathlib
import sys

# Before JAX is imported. Subprocesses inherit it. Without fusion emitters XLA
# compiles in a third of the time; JAX 0.12's cannot, and ends on the flag.
os.environ['XLA_FLAGS'] = ' '.join(
  [
    os.environ.get('XLA_FLAGS', ''),
    '--xla_force_host_platform_device_count=8',
    '--xla_cpu_parallel_codegen_split_count=1',
    *(
      ['--xla_cpu_use_fusion_emitters=false']
      if importlib.metadata.version('jaxlib').startswith('0.10.')
      else []
    ),
  ]
)
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

import jax
import pytest
from durations import (  # noqa: F401 - hooks of every run.
  pytest_addoption,
  pytest_collection_modifyitems,
  pytest_sessionfinish,
  pytest_terminal_summary,
)

CACHE = pathlib.Path(__file__).parent.parent / '.pytest_cache' / 'jax'

jax.config.update('jax_numpy_rank_promotion', 'raise')
# Compiling dominates the tests, which look at numbers and not at speed: compile
# without optimisation, and keep programs between runs and processes.
jax.config.update('jax_disable_most_optimizations', True)
jax.config.update('jax_compilation_cache_dir', str(CACHE))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
os.environ['JAX_COMPILATION_CACHE_DIR'] = str(CACHE)
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'

os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = '1'


@pytest.fixture
def key():
  """A random key."""
  return jax.random.key(0)


@pytest.fixture
def forget_new_tasks():
  """Leaves seqio's registries as they were."""
  import seqio  # Takes seconds, which few tests need.

  from sparse_experts.data import tasks

  before = set(tasks.names())
  yield
  for registry in (seqio.TaskRegistry, seqio.MixtureRegistry):
    for name in set(registry.names()) - before:
      registry.remove(name)


@pytest.fixture
def python_folder(tmp_path, monkeypatch):
  """`tmp_path`, on Python's path; what is imported from it is forgotten.

  Another test's module of the same name would be taken for this one's.
  """
  monkeypatch.syspath_prepend(tmp_path)
  yield tmp_path
  for name, module in list(sys.modules.items()):
    file = vars(module).get('__file__') or ''
    if pathlib.Path(file).is_relative_to(tmp_path):
      del sys.modules[name]
