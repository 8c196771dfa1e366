"""Parameters from a checkpoint onto a mesh, for runners that do not train."""

from __future__ import annotations

from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from sparse_experts import sharding
from sparse_experts.data.dataset import Dataset
from sparse_experts.models.model import Model
from sparse_experts.training import checkpoints


def restore_params(
  model: Model, model_dir: epath.PathLike, dataset: Dataset, mesh: Mesh
) -> tuple[Any, int]:
  """Unboxed parameters of the latest step in `model_dir`, and that step.

  Raises:
    FileNotFoundError: no checkpoint. ValueError: of another architecture.
  """
  shapes = dataset.shapes(model.converter)
  boxed = jax.eval_shape(lambda: model.init(jax.random.key(0), shapes))
  placed = sharding.shardings(boxed, mesh)
  return checkpoints.load_params(model_dir, boxed, placed)
