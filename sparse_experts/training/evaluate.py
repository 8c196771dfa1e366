"""Evaluation of a checkpoint: held-out loss, and the task's own metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from sparse_experts import sharding
from sparse_experts.data.dataset import Dataset
from sparse_experts.models.model import Model
from sparse_experts.training import checkpoints
from sparse_experts.training.answers import Answers
from sparse_experts.training.report import scalars
from sparse_experts.training.restore import restore_params
from sparse_experts.training.train import LossEvaluation
from sparse_experts.training.writers import Writers


def evaluate(
  model: Model,
  model_dir: str,
  dataset: Dataset,
  *,
  mesh: Mapping[str, int] | None = None,
  rules: Mapping[str, sharding.MeshAxes] | None = None,
  max_tokens: int | None = None,
) -> dict[str, Any]:
  """Evaluates the latest checkpoint in `model_dir` on a dataset's split.

  The loss is taken at the model's evaluation capacity factor. If the task has
  metrics of its own, answers are decoded greedily (without capacity) and given
  to `seqio.Evaluator`. Results go to TensorBoard, metrics.jsonl and
  MODEL_DIR/evaluation/<task>-<split>-<step>.json.

  Args:
    model, dataset: what to evaluate on what.
    model_dir: a run's directory, or one checkpoints/<step> of it.
    mesh, rules: as in `train.train`; any mesh reads any checkpoint.
    max_tokens: tokens of an answer, at most; None: the length of targets.

  Returns:
    'step', 'capacity_factor', 'metrics' (see `models.model.summary`),
    'task_metrics'.
  """
  built_mesh = sharding.make_mesh(**(mesh or {}))
  with sharding.use_mesh(built_mesh, rules):
    params, step = restore_params(model, model_dir, dataset, built_mesh)
    metrics = LossEvaluation(model, dataset, built_mesh)(params)
    results = {
      'task': dataset.mixture_or_task_name,
      'split': dataset.split,
      'step': step,
      'capacity_factor': model.capacity_factor_eval,
      'metrics': metrics,
      'task_metrics': _task_metrics(
        model, params, dataset, built_mesh, max_tokens
      ),
    }
  root = checkpoints.root_of(model_dir)
  writers = Writers(root)
  name = f'evaluation/{dataset.mixture_or_task_name}-{dataset.split}'
  writers.write(name, step, {**metrics, 'task': results['task_metrics']})
  writers.close()
  if jax.process_index() == 0:
    path = root / f'{name}-{step}.json'
    path.parent.mkdir(parents=True, exist_ok=True)
    shown = {**results, 'metrics': scalars(metrics)}
    path.write_text(json.dumps(shown, indent=2) + '\n')
  return results


def _task_metrics(model, params, dataset, mesh, max_tokens) -> dict[str, float]:
  """The task's own metrics by seqio.Evaluator; empty where it has none."""
  from sparse_experts.data import converters, host_tensorflow, tasks

  task = tasks.find(dataset.mixture_or_task_name, dataset.modules)
  if not getattr(task, 'predict_metric_fns', ()):
    return {}
  host_tensorflow.load()
  import seqio

  limit = dataset.num_batches and dataset.num_batches * dataset.batch_size
  evaluator = seqio.Evaluator(
    dataset.mixture_or_task_name,
    feature_converter=converters.make(
      model.converter, pack=False, task_ids=dataset.task_ids
    ),
    eval_split=dataset.split,
    sequence_length=dict(dataset.feature_lengths),
    num_examples=limit,
    logger_cls=[],
  )
  answers = Answers(
    model,
    params,
    mesh,
    dataset.batch_size,
    max_tokens=max_tokens or dataset.feature_lengths['targets'],
  )

  def predict(examples):
    indices, features = zip(*examples.as_numpy_iterator())
    tokens_NxT, _ = answers(features, list(indices))
    return list(zip(indices, tokens_NxT.tolist()))

  results, *_ = evaluator.evaluate(
    compute_metrics=True, step=None, predict_fn=predict, score_fn=None
  )
  return {
    name: float(np.asarray(value))
    for name, value in results.result()[dataset.mixture_or_task_name].items()
  }
