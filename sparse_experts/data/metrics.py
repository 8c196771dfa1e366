"""Metrics of tasks: functions of (targets, predictions), in percent.

Numbers are those of T5's `t5/evaluation/metrics.py`, which has Raffel et al.
2020's; where one differs, its function says so.

seqio calls them by those two names. Predictions are the model's texts. A target
is a text too, but for questions with several good answers, where it is a list
of texts, and for examples that belong together, where it is a `Member`. What is
no legal answer counts as wrong.
"""

from __future__ import annotations

import collections
import difflib
import inspect
import re
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Scores = dict[str, float]

_QUOTES = '\u2018\u2019\u00b4'  # Typographic, and the acute accent.
# Parts of tasks' names that an average takes as one: MNLI's two test sets.
_SAME_TASK = {'mnli_mismatched': 'mnli'}


class Member(NamedTuple):
  """The target of one of several examples that share a `group`."""

  group: Any
  target: Any


def accuracy(targets: Sequence[str], predictions: Sequence[str]) -> Scores:
  """Share of predictions equal to their target.

  >>> accuracy(['jax', 'scipy'], ['jax', 'numpy'])
  {'accuracy': 50.0}
  """
  return {'accuracy': _mean(t == p for t, p in _pairs(targets, predictions))}


def f1(
  targets: Sequence[str], predictions: Sequence[str], *, positive: str
) -> Scores:
  """F1 of one of two classes (MRPC, QQP); 0 where nothing is found.

  What is no class of the targets counts as the opposite of its target, as in
  T5.

  Args:
    targets, predictions: classes by name, one of each for an example.
    positive: the class that F1 is of.

  >>> f1(['yes', 'yes', 'no'], ['yes', 'no', 'maybe'], positive='yes')
  {'f1': 50.0}
  """
  classes = set(targets)
  said = [
    positive if t != positive and p not in classes else p
    for t, p in _pairs(targets, predictions)
  ]
  return {'f1': _class_f1(targets, said, positive)}


def macro_f1(
  targets: Sequence[str], predictions: Sequence[str], *, classes: Sequence[str]
) -> Scores:
  """Unweighted mean over classes of their F1 (CB).

  Args:
    targets, predictions: classes by name, one of each for an example.
    classes: all, those too that no target has.
  """
  scores = [_class_f1(targets, predictions, name) for name in classes]
  return {'macro_f1': float(np.mean(scores))}


def matthews(targets: Sequence[str], predictions: Sequence[str]) -> Scores:
  """Matthews's correlation (CoLA); 0 where all predictions are one class.

  All that is no class of the targets is one more class, as in T5.
  """
  from sklearn import metrics

  classes = set(targets)
  said = [p if p in classes else '' for _, p in _pairs(targets, predictions)]
  value = metrics.matthews_corrcoef(list(targets), said)
  return {'matthews': 100 * float(value)}


def pearson(targets: Sequence[str], predictions: Sequence[str]) -> Scores:
  """Pearson's correlation of numbers (STS-B); an answer that is none is -1.

  Equal numbers correlate with nothing, 0, and 'nan' and 'inf' are no numbers;
  T5's result is NaN for both.

  Raises:
    ValueError: a target is no number.
  """
  from scipy import stats

  return {'pearson': _correlation(stats.pearsonr, targets, predictions)}


def spearman(targets: Sequence[str], predictions: Sequence[str]) -> Scores:
  """Spearman's, of ranks, ties by mean ranks; the rest as `pearson`."""
  from scipy import stats

  return {'spearman': _correlation(stats.spearmanr, targets, predictions)}


def squad(
  targets: Sequence[Sequence[str]], predictions: Sequence[str]
) -> Scores:
  """Exact match and F1 over words, the best over all answers.

  Both after SQuAD's normalisation (Rajpurkar et al. 2016, section 6.1): lower
  case, no punctuation, no articles. Where no word is left, F1 is 0 even if both
  are equal, as in SQuAD 1.1's script and T5's; SQuAD 2.0's says 1.

  >>> squad([['The Alps', 'Alps mountains']], ['alps.'])
  {'em': 100.0, 'f1': 100.0}
  """
  return _question_answering(targets, predictions, normalise_squad)


def trivia_qa(
  targets: Sequence[Sequence[str]], predictions: Sequence[str]
) -> Scores:
  """As `squad`, with the normalisation of TriviaQA (Joshi et al. 2017).

  Punctuation, which includes typographic quotes, becomes spaces.
  """
  return _question_answering(targets, predictions, normalise_trivia_qa)


def multirc(targets: Sequence[Member], predictions: Sequence[str]) -> Scores:
  """F1 over all answers (F1a), and questions with all answers right (EM).

  MultiRC (Khashabi et al. 2018). The group is the question, the target 'True'
  or 'False'.
  """
  score = f1([t.target for t in targets], predictions, positive='True')
  questions = collections.defaultdict(list)
  for (group, target), prediction in _pairs(targets, predictions):
    questions[group].append(target == prediction)
  return {'f1a': score['f1'], 'em': _mean(map(all, questions.values()))}


def squad_by_group(
  targets: Sequence[Member], predictions: Sequence[str]
) -> Scores:
  """As `squad`, once a group: ReCoRD's examples repeat, one for each answer."""
  firsts = {}
  for (group, answers), prediction in _pairs(targets, predictions):
    firsts.setdefault(group, (answers, prediction))
  answers, predictions = zip(*firsts.values())
  return squad(answers, predictions)


def rouge(targets: Sequence[str], predictions: Sequence[str]) -> Scores:
  """Mean F1 of ROUGE-1, -2 and -L of summaries (Lin 2004), without stemming.

  ROUGE-L of a summary, section 3.2 there, joins what a sentence of the target
  has in common with each of the prediction. Sentences end with ' . ' or a
  newline, as in T5; its `rouge` reports the median of means of random samples,
  which differs from run to run, its `rouge_mean` the mean, as here.

  >>> rouge(['sort it . stop it'], ['stop it . sort it'])
  {'rouge1': 100.0, 'rouge2': 66.66666666666666, 'rougeLsum': 100.0}
  """
  # Slow to import, and only an evaluation needs it.
  from rouge_score import rouge_scorer

  kinds = ['rouge1', 'rouge2', 'rougeLsum']
  scorer = rouge_scorer.RougeScorer(kinds)
  scores = [
    scorer.score(*(text.replace(' . ', ' .\n') for text in pair))
    for pair in _pairs(targets, predictions)
  ]
  return {kind: _mean(s[kind].fmeasure for s in scores) for kind in kinds}


def bleu(targets: Sequence[str], predictions: Sequence[str]) -> Scores:
  """BLEU of the corpus by sacreBLEU, international tokens (Post 2018)."""
  import sacrebleu

  _pairs(targets, predictions)
  score = sacrebleu.corpus_bleu(
    list(predictions), [list(targets)], tokenize='intl'
  )
  return {'bleu': score.score}


# Metrics by name.


def named(metric: str | Callable) -> Callable:
  """The metric of a name, of which targets are texts; or what is one already.

  Raises:
    ValueError: there is none, or it asks for more than texts.
  """
  if callable(metric):
    return metric
  known = {
    name: function
    for name, function in globals().items()
    if inspect.isfunction(function)
    and list(inspect.signature(function).parameters)[:2]
    == ['targets', 'predictions']
    and name[0] != '_'
  }
  if metric not in known:
    close = difflib.get_close_matches(str(metric), known, n=1)
    meant = f'did you mean {close[0]!r}? ' if close else ''
    raise ValueError(
      f'METRICS has {metric!r}; {meant}known are {", ".join(known)}.'
    )
  targets, _, *more = inspect.signature(known[metric]).parameters.values()
  if more:
    raise ValueError(
      f'METRICS: {metric!r} needs {more[0].name!r}: write METRICS = '
      f'(@metrics.{metric},) in a gin file, and metrics.{metric}.'
      f'{more[0].name} = ..., after `from sparse_experts.data import metrics`.'
    )
  if targets.annotation != 'Sequence[str]':
    raise ValueError(
      f'METRICS: {metric!r} judges several answers or groups of examples, and '
      'a row here has one text: take another, or write a Benchmark, see '
      'docs/own_data.md.'
    )
  return known[metric]


# Averages over tasks.


def average(scores: Mapping[str, Mapping[str, float]]) -> float:
  """Mean over tasks of the mean over a task's metrics, as GLUE is averaged.

  MNLI is one task, of two test sets.

  >>> average({'rte': {'accuracy': 60}, 'cb': {'macro_f1': 70, 'accuracy': 90}})
  70.0
  """
  tasks = collections.defaultdict(list)
  for name, measured in scores.items():
    for part, whole in _SAME_TASK.items():
      name = name.replace(part, whole)
    tasks[name].append(np.mean(list(measured.values())))
  return float(np.mean([np.mean(means) for means in tasks.values()]))


# Texts.


def normalise_squad(text: str) -> str:
  """Lower case, no ASCII punctuation, no articles, single spaces.

  >>> normalise_squad('The  U.S. "army"')
  'us army'
  """
  return _normalise(text, string.punctuation, '')


def normalise_trivia_qa(text: str) -> str:
  """As `normalise_squad`, but punctuation becomes a space.

  >>> normalise_trivia_qa('The well-known ‘army’')
  'well known army'
  """
  return _normalise(text, string.punctuation + _QUOTES, ' ')


def _normalise(text: str, punctuation: str, replacement: str) -> str:
  text = text.lower().translate(
    dict.fromkeys(map(ord, punctuation), replacement)
  )
  return ' '.join(re.sub(r'\b(a|an|the)\b', ' ', text).split())


def _question_answering(targets, predictions, normalise: Callable) -> Scores:
  exact, overlap = [], []
  for answers, prediction in _pairs(targets, predictions):
    prediction = normalise(prediction)
    answers = [normalise(answer) for answer in answers]
    exact.append(prediction in answers)
    overlap.append(max(_word_f1(answer, prediction) for answer in answers))
  return {'em': _mean(exact), 'f1': _mean(overlap)}


def _class_f1(targets, predictions, name: str) -> float:
  pairs = _pairs(targets, predictions)
  found = sum(t == p == name for t, p in pairs)
  named = sum((t == name) + (p == name) for t, p in pairs)
  return 100 * 2 * found / named if named else 0.0


def _word_f1(target: str, prediction: str) -> float:
  asked, given = target.split(), prediction.split()
  common = collections.Counter(asked) & collections.Counter(given)
  return 2 * common.total() / max(1, len(asked) + len(given))


def _correlation(function: Callable, targets, predictions) -> float:
  pairs = _pairs(targets, predictions)
  for target, _ in pairs:
    if _number(target) is None:
      raise ValueError(
        f'correlations are of numbers, but the target {target!r} is none: take '
        'another metric for such a task.'
      )
  numbers = [[_number(text) for text in texts] for texts in zip(*pairs)]
  numbers = [[-1.0 if n is None else n for n in each] for each in numbers]
  if any(len(set(values)) == 1 for values in numbers):
    return 0.0  # A constant correlates with nothing.
  return 100 * float(function(*numbers)[0])


def _number(text: str) -> float | None:
  try:
    value = float(text)
  except ValueError:
    return None
  return value if np.isfinite(value) else None


def _pairs(targets: Sequence, predictions: Sequence) -> list[tuple]:
  pairs = list(zip(targets, predictions, strict=True))
  if not pairs:
    raise ValueError('a metric needs at least one example; there is none.')
  return pairs


def _mean(values: Iterable[float]) -> float:
  return 100 * float(np.mean(list(values)))
