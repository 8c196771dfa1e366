"""Inference: a checkpoint's answers to a task's examples or a file's lines."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from etils import epath
from jax.sharding import Mesh

from sparse_experts import sharding
from sparse_experts.data import prompts
from sparse_experts.data.dataset import Dataset
from sparse_experts.data.special_tokens import SpecialTokens
from sparse_experts.inference.batch_decoding import Answers, place
from sparse_experts.inference.resumable import ResumableLines
from sparse_experts.models.decoding import (
  GREEDY,
  BeamSearch,
  Sampling,
  check_decodable,
)
from sparse_experts.models.language_model import answered
from sparse_experts.models.objective import Objective
from sparse_experts.moe.assignment import largest
from sparse_experts.numbers import Count, Seed
from sparse_experts.training import checkpoints, directories
from sparse_experts.training.checkpoints import restore_params

TO_LOOK_AT = 4


def infer(
  model: Objective,
  model_dir: str,
  dataset: Dataset,
  *,
  input: epath.PathLike | None = None,
  output: epath.PathLike | None = None,
  num_examples: Count | None = None,
  max_tokens: Count | None = None,
  strategy: Sampling | BeamSearch = GREEDY,
  seed: Seed = 0,
  score: bool = False,
  routing: bool = False,
  top: Count | None = None,
  parameters: str = 'trained',
  placement: sharding.Placement = sharding.DATA_PARALLEL,
  dry_run: bool = False,
) -> list[dict[str, Any]]:
  """Answers examples without any capacity, each as if it were alone.

  Args:
    model, dataset: who answers what; the dataset must not be packed.
    model_dir: a run's directory, or one checkpoints/<step> of it.
    input: a file of questions, see `data.prompts`, in place of the dataset's
      examples; vocabulary and lengths are the dataset's.
    output: JSON lines go there as they are ready, and a run that was stopped is
      continued. None: MODEL_DIR/inferences/<task>-<split>-<step>.jsonl, anew,
      or of an input inferences/texts/<task>-<digest of it>-<step>.jsonl.
    num_examples: how many, from the first on; None: all of them if an input or
      an output is given, otherwise 4 to look at.
    max_tokens: tokens of an answer, at most; None: the length of targets.
    strategy: how tokens are chosen, see `models.decoding`.
    seed: of sampling, folded with each example's index.
    score: also find the log-probability of the targets.
    routing: also count the choices of each expert in every sparse layer, by the
      tokens of the inputs and of the (best) prediction.
    top: also find so many likeliest tokens in the place of each token of the
      targets, or of the (best) prediction where none are known.
    parameters: see `checkpoints.restore_params`; a file of 'ema' ends so.
    placement: as in `train.train`.
    dry_run: check all, down to the first example, and answer none.

  Returns:
    For each example, as in the file, 'index', 'inputs', 'targets' if known,
    'prediction' as text or, where inputs are, as token ids, 'log_prob' of it
    (nats); of a beam search its 'score' instead, and 'n_best', all its
    predictions and scores. 'inputs_cut' and 'targets_cut': how many tokens of a
    line did not fit; targets that were cut get no 'target_log_prob' and no
    'top'. If asked for, 'target_log_prob' (None without targets), 'routing',
    counts by layer, and 'top': for each token its 'id', 'token', 'probability'
    and 'likeliest', of which each has the same three. A token is '</s>' where
    it is an end of the model's, else its piece of the vocabulary, or its id
    where inputs are ids; its probability is the model's softmax after the
    inputs and the tokens before it.
  """
  if dataset.pack:
    raise ValueError(
      'infer takes examples one by one: use a Dataset of pack=False.'
    )
  check_decodable(model)
  size = model.module.embed.vocab_size
  if top is not None and not 1 <= top <= size:
    raise ValueError(
      f'top={top} is none of 1 to {size}, the tokens there are: give 3, say.'
    )
  if output is not None:
    directories.check_home(output)
  special_tokens = model.special_tokens
  questions = None if input is None else prompts.read(input)
  if questions is not None:
    prompts.check_ids(questions, size)
  if not questions or not all(
    prompts.is_ids(text) for texts in questions for text in texts.values()
  ):
    model.check_data(dataset)
  if num_examples is None and input is None and output is None:
    num_examples = TO_LOOK_AT
  max_tokens = max_tokens or dataset.feature_lengths['targets']
  with placement.use() as mesh:
    params, step = restore_params(
      model, model_dir, dataset, mesh, parameters, dry_run
    )
    if questions is None:
      examples = prompts.of_task(dataset, model.features)
      source, total = {'split': dataset.split}, num_examples
    else:
      examples = prompts.of_file(questions, dataset, model.features)
      digest = hashlib.sha256(repr(questions).encode()).hexdigest()
      source, total = {'questions': digest}, len(questions[:num_examples])
    # Read the first: what is wrong with data shows before anything is written.
    examples = itertools.chain(list(itertools.islice(examples, 1)), examples)
    if dry_run:
      return []
    settings = {
      'step': step,
      'checkpoint_saved_at': checkpoints.saved_at(model_dir, step),
      'task': dataset.mixture_or_task_name,
      'corpus': dataset.corpus(),
      'feature_lengths': dict(dataset.feature_lengths),
      **source,
      'max_tokens': max_tokens,
      'strategy': repr(strategy),
      'seed': seed,
      'score': score,
      'routing': routing,
    }
    version = f'{step}'
    if top is not None:  # Files of before do not say, nor of parameters.
      settings['top'] = top
    if parameters != 'trained':
      settings['parameters'] = parameters
      version += f'-{parameters}'
    if output is None:
      folder, of = checkpoints.root_of(model_dir) / 'inferences', dataset.split
      if questions is not None:
        folder, of = folder / 'texts', source['questions'][:8]
      output = folder / f'{dataset.mixture_or_task_name}-{of}-{version}.jsonl'
      lines = ResumableLines(output, settings, anew=True)
    else:
      lines = ResumableLines(output, settings)
    answers = Answers(
      model,
      params,
      mesh,
      dataset.batch_size,
      max_tokens=max_tokens,
      strategy=strategy,
      seed=seed,
    )
    statistics = _Statistics(
      model, params, mesh, dataset, score=score, routing=routing, top=top or 0
    )
    said = functools.partial(_said, dataset, special_tokens)
    examples = itertools.islice(examples, len(lines.done), num_examples)
    bar = tqdm.tqdm(
      total=total,
      initial=len(lines.done),
      unit='example',
      disable=None if jax.process_index() == 0 else True,  # None: no terminal.
    )
    with bar:
      while part := list(itertools.islice(examples, dataset.batch_size)):
        indices = range(len(lines.done), len(lines.done) + len(part))
        tokens, scores = answers([e.features for e in part], indices)
        best = tokens[:, 0] if isinstance(strategy, BeamSearch) else tokens
        rows = zip(
          indices, part, tokens, scores, statistics(part, best), strict=True
        )
        lines.append(
          [
            {'index': i, **e.texts, **said(e, *answer), **more}
            for i, e, *answer, more in rows
          ]
        )
        bar.update(len(part))
  return lines.done[:num_examples]


def _said(
  dataset: Dataset,
  special_tokens: SpecialTokens,
  example: prompts.Example,
  tokens,
  scores,
) -> dict[str, Any]:
  """What was answered to one example, as its inputs are: text, or token ids."""

  def prediction(tokens_T):
    ids = tokens_T[special_tokens.is_token(tokens_T)]
    if prompts.is_ids(example.texts['inputs']):
      return ids.tolist()
    return dataset.text('targets', ids)

  if tokens.ndim == 1:
    return {'prediction': prediction(tokens), 'log_prob': float(scores)}
  n_best = [
    {'prediction': prediction(tokens_T), 'score': float(score)}
    for tokens_T, score in zip(tokens, scores)
    if np.isfinite(score)
  ]
  return {**n_best[0], 'n_best': n_best}


class _Statistics:
  """Of examples and their answers: what was asked for beside the answers."""

  def __init__(
    self,
    model: Objective,
    params,
    mesh: Mesh,
    dataset: Dataset,
    *,
    score: bool,
    routing: bool,
    top: int,
  ):
    self._params, self._mesh, self._dataset = params, mesh, dataset
    self._special_tokens = model.special_tokens
    answer = functools.partial(answered, special_tokens=model.special_tokens)

    def counts(params, batch, answers_BxT):
      batch = answer(batch, answers_BxT)
      _, auxes = model.apply(params, batch, record=True)  # Exactly.
      records = {layer: aux.record for layer, aux in auxes.items()}
      return {
        layer: jax.nn.one_hot(r.expert_BxLxK, r.num_experts).sum((1, 2))
        for layer, r in records.items()
      }

    def log_probs(params, batch, targets_BxT):
      return model.score(params, answer(batch, targets_BxT))

    def likeliest(params, batch, answers_BxT):
      """Ids and probabilities [B, L, 1 + top], the answer's own first."""
      batch = answer(batch, answers_BxT)
      logits_BxLxV, _ = model.apply(params, batch)  # Exactly.
      log_probs_BxLxV = jax.nn.log_softmax(logits_BxLxV)
      own_BxLx1 = batch['decoder_target_tokens'][..., None]
      ids_BxLxK = jnp.concatenate(
        [own_BxLx1, largest(log_probs_BxLxV, top)], -1
      )
      probs_BxLxK = jnp.exp(
        jnp.take_along_axis(log_probs_BxLxV, ids_BxLxK, axis=-1)
      )
      return ids_BxLxK, probs_BxLxK, batch['decoder_loss_weights']

    jit = functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
    self._counts = jit(counts) if routing else None
    self._log_probs = jit(log_probs) if score else None
    self._likeliest = jit(likeliest) if top else None

  def __call__(
    self, examples: Sequence[prompts.Example], answers_BxT: np.ndarray
  ) -> list[dict[str, Any]]:
    """A dictionary for each of at most a batch of examples."""
    found = [{} for _ in examples]
    if self._log_probs is not None:
      targets = [e.targets for e in examples]
      log_prob_B = self._run(self._log_probs, examples, targets)
      for example, more, log_prob in zip(examples, found, log_prob_B):
        known = len(example.targets) > 0 and 'targets_cut' not in example.texts
        more['target_log_prob'] = float(log_prob) if known else None
    if self._counts is not None:
      counts = self._run(self._counts, examples, answers_BxT)
      for i, more in enumerate(found):
        more['routing'] = {
          layer: counts_BxE[i].astype(int).tolist()
          for layer, counts_BxE in counts.items()
        }
    if self._likeliest is not None:
      of = [
        e.targets if len(e.targets) else answer_T
        for e, answer_T in zip(examples, answers_BxT)
      ]
      rows = self._run(self._likeliest, examples, of)
      for example, more, *row in zip(examples, found, *rows):
        if 'targets_cut' not in example.texts:
          more['top'] = self._top(example, *row)
    return found

  def _top(
    self,
    example: prompts.Example,
    ids_LxK: np.ndarray,
    probs_LxK: np.ndarray,
    weights_L: np.ndarray,
  ) -> list[dict[str, Any]]:
    """What is said of each token of an answer, see `infer`."""
    told_L = weights_L > 0
    names = {int(i): int(i) for i in ids_LxK[told_L].ravel()}
    if not prompts.is_ids(example.texts['inputs']):
      names = self._dataset.pieces('targets', list(names))
    names |= {i: '</s>' for i in self._special_tokens.eos if i in names}
    tokens = [
      [
        {'id': i, 'token': names[i], 'probability': p}
        for i, p in zip(ids, probs)
      ]
      for ids, probs in zip(
        ids_LxK[told_L].tolist(), probs_LxK[told_L].tolist()
      )
    ]
    return [{**own, 'likeliest': likeliest} for own, *likeliest in tokens]

  def _run(self, function, examples, tokens):
    """The function of a batch and of what answers its examples, padded."""
    length = max(self._dataset.feature_lengths['targets'], *map(len, tokens))
    rows = [
      {
        **e.features,
        'answers': np.pad(
          np.asarray(tokens_T, np.int32),
          (0, length - len(tokens_T)),
          constant_values=self._special_tokens.pad,
        ),
      }
      for e, tokens_T in zip(examples, tokens)
    ]
    batch = place(rows, self._mesh, self._dataset.batch_size)
    answers_BxT = batch.pop('answers')
    return jax.device_get(function(self._params, batch, answers_BxT))
