"""What tasks' own metrics say of a model's answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from sparse_experts.data.dataset import Dataset
from sparse_experts.evaluation import calibration, scoring
from sparse_experts.inference.batch_decoding import Answers
from sparse_experts.models.decoding import (
  GREEDY,
  BeamSearch,
  Sampling,
  is_decodable,
)
from sparse_experts.models.objective import Objective

Metrics = dict[str, dict[str, float]]  # By task.


class TaskMetrics:
  """Metrics of a task, or of each task of a mixture; data is read once.

  They are of text: a model that writes none has those of its objective alone.
  """

  def __init__(
    self,
    model: Objective,
    dataset: Dataset,
    mesh: jax.sharding.Mesh,
    max_tokens: int | None,
    rank_options: bool,
    strategy: Sampling | BeamSearch = GREEDY,
  ):
    """Finds the tasks that have metrics; `evaluate` has the arguments.

    Raises:
      ValueError: options are to be ranked, and no task has any.
    """
    self._judges = []
    for task in _judged(dataset) if is_decodable(model) else ():
      part = dataclasses.replace(dataset, mixture_or_task_name=task.name)
      if rank_options and _has_options(task, part):
        judge = _Ranked(task, model, part, mesh)
      else:
        judge = _Written(task, model, part, mesh, max_tokens, strategy)
      self._judges.append(judge)
    if rank_options and not any(isinstance(j, _Ranked) for j in self._judges):
      raise ValueError(
        f'{dataset.mixture_or_task_name} has no task whose examples list '
        'options; set RANK_OPTIONS = False.'
      )

  def __call__(self, params) -> tuple[Metrics, dict[str, Any], dict[str, Any]]:
    """Metrics by task, and of ranked ones what `judged_options` says more."""
    metrics, rankings, calibrations = {}, {}, {}
    for judge in self._judges:
      name = judge.task.name
      metrics[name], ranking, calibrated = judge(params)
      if ranking is not None:
        rankings[name] = ranking
      if calibrated is not None:
        calibrations[name] = calibrated
    return metrics, rankings, calibrations


def flat(metrics: Metrics) -> dict[str, float]:
  """One task's metrics by name; of several, 'task/metric' and the averages."""
  from sparse_experts.data.metrics import average

  if len(metrics) <= 1:
    return {
      name: v for scores in metrics.values() for name, v in scores.items()
    }
  names = {
    f'{task}/{name}': value
    for task, scores in metrics.items()
    for name, value in scores.items()
  }
  averages = {'average': average(metrics)}
  if any(task.startswith('glam_') for task in metrics):
    from sparse_experts.data.tasks import glam

    averages |= {f'average_{k}': v for k, v in glam.averages(metrics).items()}
  return {**names, **averages}


def score(
  metrics: Metrics, own: Mapping[str, Any], headline: str | None = None
) -> float:
  """The number by which checkpoints are compared; more is better.

  Args:
    metrics: of tasks; their average, if there are any.
    own: metrics of the objective. headline: its `Objective.headline`.
  """
  from sparse_experts.data.metrics import average

  if metrics:
    return average(metrics)
  headline = headline or '-loss'
  value = own[headline.removeprefix('-')]
  return -value if headline.startswith('-') else value


class _Written:
  """The model writes an answer, token by token."""

  def __init__(self, task, model, dataset, mesh, max_tokens, strategy):
    import seqio

    self.task, self._special_tokens = task, model.special_tokens
    self._evaluator = seqio.Evaluator(
      task.name,
      feature_converter=_converter(task, model, dataset),
      eval_split=dataset.split,
      sequence_length=dict(dataset.feature_lengths),
      num_examples=_limit(dataset),
      logger_cls=[],
    )
    self._answers = Answers(
      model,
      None,  # `__call__` has them.
      mesh,
      dataset.batch_size,
      max_tokens=max_tokens or dataset.feature_lengths['targets'],
      strategy=strategy,
    )

  def __call__(self, params):
    self._answers.use(params)

    def predict(examples):
      indices, features = zip(*examples.as_numpy_iterator())
      tokens, _ = self._answers(features, list(indices))
      tokens_BxT = tokens if tokens.ndim == 2 else tokens[:, 0]  # Of beams.
      is_token_BxT = self._special_tokens.is_token(tokens_BxT)
      tokens_BxT = np.where(is_token_BxT, tokens_BxT, 0)  # seqio's padding.
      return list(zip(indices, tokens_BxT.tolist()))

    results, *_ = self._evaluator.evaluate(
      compute_metrics=True, step=None, predict_fn=predict, score_fn=None
    )
    scores = results.result()[self.task.name]
    metrics = {name: float(np.asarray(v)) for name, v in scores.items()}
    return metrics, None, None


class _Ranked:
  """The model answers by the most probable option, which ends as targets do."""

  def __init__(self, task, model, dataset, mesh):
    self.task = task
    source = _source(task, dataset)
    self._examples = list(source.as_numpy_iterator())
    if not self._examples:
      raise ValueError(
        f'{task.name} has no example in split {dataset.split!r}; choose '
        'another split.'
      )
    convert = _converter(task, model, dataset)
    questions = convert(source, dict(dataset.feature_lengths))
    self._questions = list(questions.as_numpy_iterator())
    feature = task.output_features['targets']
    end = [feature.vocabulary.eos_id] * feature.add_eos

    def tokens(text):
      return [*feature.vocabulary.encode(text.decode()), *end]

    def before(example):
      """What preprocessors put before the target's text, as a sentinel."""
      targets = example['targets'].tolist()
      text = tokens(example['targets_pretokenized'])
      return targets[: targets.index(text[0])] if text else targets

    self._options = [
      [[*before(example), *tokens(option)] for option in example['options']]
      for example in self._examples
    ]
    self._scores = scoring.OptionScores(
      model,
      mesh,
      dataset.batch_size,
      length=dataset.feature_lengths['targets'],
      per_token=bool(self._examples[0]['normalise']),
    )

  def __call__(self, params):
    scores = self._scores(params, self._questions, self._options)
    return judged_options(self.task, self._examples, scores)


def judged_options(task, examples, log_likelihoods):
  """What a ranking of options is worth.

  Args:
    task: the seqio task, whose metrics are taken.
    examples: its examples as seqio gives them: 'targets_pretokenized', bytes,
      'options', a list of such, and maybe 'label', the index of the right one,
      below 0 where that is not one.
    log_likelihoods: of each example's options, [W] each, in nats.

  Returns:
    The task's metrics; the numbers of 'examples' and of 'ties', examples whose
    most probable options are several, of which the first is taken: where that
    is all of them, metrics say how often the first option is right; and
    `calibration.measures`, or None where no one option is right.

  Raises:
    ValueError: a log-likelihood is not finite.
  """
  chosen, is_tied = zip(
    *(
      scoring.choose(scores, f'example {i} of {task.name}')
      for i, scores in enumerate(log_likelihoods)
    )
  )
  ranking = {'examples': len(chosen), 'ties': sum(is_tied)}
  judge = task.postprocess_fn
  targets, predictions = [], []
  for example, choice in zip(examples, chosen):
    target = example['targets_pretokenized'].decode()
    option = example['options'][choice].decode()
    targets.append(judge(target, example=example, is_target=True))
    predictions.append(judge(option, example=example, is_target=False))
  metrics = {}
  for metric in task.predict_metric_fns:
    metrics |= metric(targets, predictions)
  labels = [example.get('label', -1) for example in examples]
  if min(labels) < 0:  # Several options are right, or nobody knows.
    return metrics, ranking, None
  p_BxW = calibration.probabilities(log_likelihoods)
  return metrics, ranking, calibration.measures(p_BxW, np.array(labels))


def _judged(dataset: Dataset):
  """The tasks that have the split, and metrics."""
  from sparse_experts.data import host_tensorflow, tasks

  host_tensorflow.load()
  import seqio

  found = tasks.find(dataset.mixture_or_task_name, dataset.modules)
  return [
    task
    for task in seqio.get_subtasks(found)
    if task.predict_metric_fns and dataset.split in task.splits
  ]


def _converter(task, model, dataset):
  """To the rows of a task, which has its number where it is of a mixture."""
  task_id = None
  if dataset.task_ids == 'mixture':
    task_id = dataset.task_names().index(task.name)
  return model.features.seqio_converter(
    task_ids=bool(dataset.task_ids), task_id=task_id
  )


def _has_options(task, dataset) -> bool:
  """Whether examples list options and say how to rank them."""
  return 'normalise' in _source(task, dataset).element_spec


def _source(task, dataset):
  """The examples of an evaluation, as the task has them."""
  examples = task.get_dataset(
    dict(dataset.feature_lengths),
    split=dataset.split,
    shuffle=False,
    try_in_mem_cache=False,
  )
  return examples.take(_limit(dataset) or -1)


def _limit(dataset: Dataset) -> int | None:
  return dataset.num_batches and dataset.num_batches * dataset.batch_size
