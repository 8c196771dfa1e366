"""Evaluation of checkpoints: held-out loss, and the task's own metrics."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from sparse_experts import sharding
from sparse_experts.console import scalars
from sparse_experts.data.dataset import Dataset
from sparse_experts.evaluation import task_evaluators
from sparse_experts.models.decoding import GREEDY, BeamSearch, Sampling
from sparse_experts.models.objective import Objective
from sparse_experts.training import checkpoints
from sparse_experts.training.checkpoints import restore_params
from sparse_experts.training.held_out import LossEvaluation
from sparse_experts.training.writers import Writers

POLL_SECONDS = 5.0
_MEANING = 2  # Of what results say; another makes those on file be taken anew.


class Evaluation:
  """A model on a dataset's split; data is read and programs compiled once.

  The loss is taken at the model's evaluation capacity factor. If the task has
  metrics of its own, answers are decoded (without capacity) and given to
  `seqio.Evaluator`; a mixture's tasks each have theirs. Results go to
  TensorBoard, metrics.jsonl and
  MODEL_DIR/evaluation/<task>-<split>-<step>.json, `-ranked` before the step if
  options are ranked.

  Results of a checkpoint are 'task', 'split', 'step', 'checkpoint_saved_at',
  'corpus' (digests of data), 'capacity_factor', 'metrics' (see
  `sums.summary`), 'task_metrics', 'ranking' and 'calibration' of tasks
  whose options are ranked (see `task_evaluators.judged_options`) and 'score',
  the mean of the task's metrics; if it has none, or the model writes no text,
  the objective's headline, such as accuracy, or minus the loss.
  """

  def __init__(
    self,
    model: Objective,
    model_dir: str,
    dataset: Dataset,
    *,
    placement: sharding.Placement = sharding.DATA_PARALLEL,
    max_tokens: int | None = None,
    rank_options: bool = False,
    strategy: Sampling | BeamSearch = GREEDY,
    parameters: str = 'trained',
  ):
    """Reads the split, not yet a checkpoint.

    Args:
      model, dataset: what to evaluate on what.
      model_dir: a run's directory, or one checkpoints/<step> of it.
      placement: as in `train.train`; any reads any checkpoint.
      max_tokens: tokens of an answer, at most; None: the length of targets.
      rank_options: where examples list options, the answer is the most probable
        of them, and results say how well calibrated the model is.
      strategy: how the tokens of other answers are chosen; greedy by default.
      parameters: see `checkpoints.restore_params`; files of 'ema' end so.
    """
    self._model, self._dataset, self._placement = model, dataset, placement
    self._model_dir = model_dir
    self._root = checkpoints.root_of(model_dir)
    self._name = f'{dataset.mixture_or_task_name}-{dataset.split}'
    if rank_options:
      self._name += '-ranked'
    if parameters != 'trained':
      self._name += f'-{parameters}'
    self._parameters = parameters
    with placement.use() as mesh:
      self._loss = LossEvaluation(model, dataset, mesh)
      self._tasks = task_evaluators.TaskMetrics(
        model, dataset, mesh, max_tokens, rank_options, strategy
      )
    self._settings = {
      'meaning': _MEANING,
      'feature_lengths': dict(dataset.feature_lengths),
      'num_batches': dataset.num_batches,
      'batch_size': dataset.batch_size,
      'pack': dataset.pack,
      'capacity_factor': model.capacity_factor_eval,
      'max_tokens': max_tokens,
      'rank_options': rank_options,
      'strategy': repr(strategy),
      'task_ids': dataset.task_ids,
      'corpus': dataset.corpus(),
    }

  def check(self) -> None:
    """Raises where the checkpoint is not there or not of the model."""
    with self._placement.use() as mesh:
      restore_params(
        self._model,
        self._model_dir,
        self._dataset,
        mesh,
        self._parameters,
        dry_run=True,
      )

  def latest(self) -> dict[str, Any]:
    """Results of the latest checkpoint, or of the one that model_dir names."""
    return self._evaluate(self._model_dir)

  def all(
    self,
    *,
    until: int | None = None,
    on_results: Callable[[dict[str, Any]], None] = lambda results: None,
  ) -> dict[str, Any]:
    """Results of every checkpoint of the run.

    Each is evaluated once: what an earlier call with the same settings has
    finished is read from its file, so a call may be stopped at any time and
    made again; Ctrl-C ends it with what is done. A checkpoint that training
    deletes before its turn is left out.

    Args:
      until: go on, as checkpoints appear, to the one of this step; None: those
        that are there.
      on_results: called with the results of each step, in order.

    Returns:
      'steps' (results of each), 'peak' and 'last', which are two of them: the
      peak has the highest score, of equal ones the first, and a score that is
      NaN is the lowest. Also in
      MODEL_DIR/evaluation/<task>-<split>.json.

    Raises:
      FileNotFoundError: no checkpoint, and none to wait for.
    """
    found = []
    try:
      with _interruptible():
        for results in self._each(until):
          found.append(results)
          on_results(results)
    except KeyboardInterrupt:
      if not found:
        raise
    if not found:
      raise FileNotFoundError(
        f'no complete checkpoint in {self._model_dir}; give a MODEL_DIR that '
        'was trained in, or --continuous to wait for it.'
      )
    summary = {
      'steps': found,
      'peak': max(found, key=_comparable),
      'last': found[-1],
    }
    self._write('', summary)
    return summary

  def _each(self, until: int | None) -> Iterator[dict[str, Any]]:
    """Results of each checkpoint, on file or new, in the order of steps."""
    done = -1
    while True:
      for step in checkpoints.steps(self._model_dir):
        if step <= done:
          continue
        done = step
        path = checkpoints.directory_of(self._model_dir) / str(step)
        try:
          results = self._finished(step) or self._evaluate(path)
        except (ValueError, FileNotFoundError):
          if path.exists():
            raise
          continue  # Training has deleted it.
        yield _plain(results)
      if until is None or done >= until:
        return
      time.sleep(POLL_SECONDS)

  def _evaluate(self, path) -> dict[str, Any]:
    """Evaluates the checkpoint at `path` and writes its results."""
    with self._placement.use() as mesh:
      params, step = restore_params(
        self._model, path, self._dataset, mesh, self._parameters
      )
      metrics = self._loss(params)
      of_tasks, rankings, calibration = self._tasks(params)
    results = {
      'task': self._dataset.mixture_or_task_name,
      'split': self._dataset.split,
      'step': step,
      'checkpoint_saved_at': checkpoints.saved_at(self._model_dir, step),
      'corpus': self._settings['corpus'],
      'capacity_factor': self._model.capacity_factor_eval,
      'metrics': metrics,
      'task_metrics': task_evaluators.flat(of_tasks),
      'ranking': rankings,
      'calibration': calibration,
      'score': task_evaluators.score(of_tasks, metrics, self._model.headline),
    }
    writers = Writers(self._root)
    numbers = {name: scalars(numbers) for name, numbers in calibration.items()}
    writers.write(
      f'evaluation/{self._name}',
      step,
      {
        **metrics,
        'task': results['task_metrics'],
        'ranking': rankings,
        'calibration': numbers,
      },
    )
    writers.close()
    self._write(f'-{step}', {**_plain(results), 'settings': self._settings})
    return results

  def _finished(self, step: int) -> dict[str, Any] | None:
    """The results on file, if they are of these settings and parameters."""
    file = self._root / 'evaluation' / f'{self._name}-{step}.json'
    if not file.exists():
      return None
    results = json.loads(file.read_text())
    same = results.pop('settings', None) == self._settings
    saved_at = checkpoints.saved_at(self._model_dir, step)
    same = same and results['checkpoint_saved_at'] == saved_at
    return results if same else None

  def _write(self, suffix: str, results: Mapping[str, Any]) -> None:
    """Writes MODEL_DIR/evaluation/<task>-<split><suffix>.json, or nothing."""
    if jax.process_index() != 0:
      return
    path = self._root / 'evaluation' / f'{self._name}{suffix}.json'
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix('.unfinished')
    unfinished.write_text(json.dumps(results, indent=2) + '\n')
    unfinished.replace(path)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
  """Ctrl-C is a KeyboardInterrupt, also where a command made it its end."""
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, before)


def _comparable(results: Mapping[str, Any]) -> float:
  """A score that orders: comparing with NaN is False either way."""
  return -math.inf if math.isnan(results['score']) else results['score']


def _plain(results: Mapping[str, Any]) -> dict[str, Any]:
  """Without the metrics of each layer."""
  return {**results, 'metrics': scalars(results['metrics'])}
