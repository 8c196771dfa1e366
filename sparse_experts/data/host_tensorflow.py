"""TensorFlow as a data library of the host: quiet, and off the accelerators."""

import contextlib
import os
import sys
import types
from collections.abc import Iterator


def load() -> types.ModuleType:
  """Imports TensorFlow so that it leaves the accelerators to JAX.

  The import takes about five seconds, which is why it happens in functions and
  not where a module of this project is imported. It is quiet unless
  TF_CPP_MIN_LOG_LEVEL is set to less than 3.

  Returns:
    The `tensorflow` module.

  Raises:
    RuntimeError: TensorFlow has initialised its devices before this call, with
      a GPU or TPU among them (from TensorFlow itself).

  >>> load().config.get_visible_devices('GPU')
  []
  """
  if 'tensorflow' in sys.modules:
    return _configured()
  quiet = os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3') == '3'
  with _without_stderr() if quiet else contextlib.nullcontext():
    return _configured()


def _configured() -> types.ModuleType:
  import tensorflow as tf

  # TensorFlow reserves nearly all of a GPU's memory on first use.
  tf.config.set_visible_devices([], 'GPU')
  tf.config.set_visible_devices([], 'TPU')
  return tf


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
  """Drops what C++ writes: while it is loaded, its log levels do not hold."""
  sys.stderr.flush()
  kept = os.dup(2)
  with open(os.devnull, 'w') as nowhere:
    os.dup2(nowhere.fileno(), 2)
  try:
    yield
  finally:
    os.dup2(kept, 2)
    os.close(kept)
