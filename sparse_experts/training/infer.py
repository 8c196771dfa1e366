"""Inference: a checkpoint's answers to a task's examples."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from typing import Any

import jax

from sparse_experts import sharding
from sparse_experts.data.dataset import Dataset
from sparse_experts.models.model import Model
from sparse_experts.training import checkpoints
from sparse_experts.training.answers import Answers
from sparse_experts.training.restore import restore_params


def infer(
  model: Model,
  model_dir: str,
  dataset: Dataset,
  *,
  num_examples: int = 4,
  max_tokens: int | None = None,
  temperature: float = 0.0,
  seed: int = 0,
  mesh: Mapping[str, int] | None = None,
  rules: Mapping[str, sharding.MeshAxes] | None = None,
) -> list[dict[str, Any]]:
  """Answers the first examples of a dataset's split, without any capacity.

  Args:
    model, dataset: who answers what; the dataset must not be packed.
    model_dir: a run's directory, or one checkpoints/<step> of it.
    num_examples: how many.
    max_tokens: tokens of an answer, at most; None: the length of targets.
    temperature: 0 is greedy, see `decoding.sample`.
    seed: of sampling, folded with each example's index.
    mesh, rules: as in `train.train`.

  Returns:
    For each example 'inputs', 'targets', 'prediction' as text, 'log_prob'
    (nats, of the prediction). Also written, one JSON object a line, to
    MODEL_DIR/inferences/<task>-<split>-<step>.jsonl.
  """
  if dataset.pack:
    raise ValueError(
      'infer takes examples one by one: use a Dataset of pack=False.'
    )
  built_mesh = sharding.make_mesh(**(mesh or {}))
  with sharding.use_mesh(built_mesh, rules):
    params, step = restore_params(model, model_dir, dataset, built_mesh)
    rows = (
      {name: x[i] for name, x in batch.items()}
      for batch in dataset.evaluation(model.converter)
      for i in range(dataset.batch_size)
      if batch['decoder_loss_weights'][i].any()
    )
    examples = list(itertools.islice(rows, num_examples))
    answers = Answers(
      model,
      params,
      built_mesh,
      dataset.batch_size,
      max_tokens=max_tokens or dataset.feature_lengths['targets'],
      temperature=temperature,
      seed=seed,
    )
    tokens_NxT, score_N = answers(examples, range(len(examples)))
  results = []
  for example, tokens_T, score in zip(examples, tokens_NxT, score_N):
    inputs, targets = _inputs_and_targets(example)
    results.append(
      {
        'inputs': dataset.text('inputs', inputs) if inputs is not None else '',
        'targets': dataset.text('targets', targets),
        'prediction': dataset.text('targets', tokens_T),
        'log_prob': float(score),
      }
    )
  if jax.process_index() == 0:
    folder = checkpoints.root_of(model_dir) / 'inferences'
    folder.mkdir(parents=True, exist_ok=True)
    name = f'{dataset.mixture_or_task_name}-{dataset.split}-{step}.jsonl'
    lines = [json.dumps(result) + '\n' for result in results]
    (folder / name).write_text(''.join(lines))
  return results


def _inputs_and_targets(example):
  """Token ids of what is asked and of the reference answer."""
  targets = example['decoder_target_tokens']
  if 'encoder_input_tokens' in example:
    return example['encoder_input_tokens'], targets
  wanted = example['decoder_loss_weights'] > 0
  if 'decoder_causal_attention' not in example:
    return None, targets[wanted]
  return targets[~wanted], targets[wanted]
