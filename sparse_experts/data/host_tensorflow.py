"""TensorFlow as a data library of the host: quiet, and off the accelerators."""

import os
import types


def load() -> types.ModuleType:
  """Imports TensorFlow so that it leaves the accelerators to JAX.

  The import takes about five seconds, which is why it happens in functions and
  not where a module of this project is imported.

  Returns:
    The `tensorflow` module.

  Raises:
    RuntimeError: TensorFlow has initialised its devices before this call, with
      a GPU or TPU among them (from TensorFlow itself).

  >>> load().config.get_visible_devices('GPU')
  []
  """
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  import tensorflow as tf

  # TensorFlow reserves nearly all of a GPU's memory on first use.
  tf.config.set_visible_devices([], 'GPU')
  tf.config.set_visible_devices([], 'TPU')
  return tf
