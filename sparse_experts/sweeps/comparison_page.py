"""Runs side by side as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from etils import epath

from sparse_experts import storage
from sparse_experts.insight import curves, html, plots
from sparse_experts.insight.curves import Curve
from sparse_experts.sweeps import comparison
from sparse_experts.sweeps.comparison import Difference, Group

_X = {
  'steps': 'steps',
  'FLOPs': 'useful FLOPs of training',
  'seconds': 'seconds of training',
}
DIFFERENCES = (
  'of', 'minus', 'at equal', 'namely', 'difference', '95% interval', 'seeds',
)  # fmt: skip


def write(path: epath.PathLike, groups: Sequence[Group]) -> None:
  """Writes the page, which needs no network.

  Args:
    path: of the file; its folder is made if need be.
    groups: of `comparison.groups`.

  Raises:
    ImportError: no matplotlib.
  """
  sections = [
    ('Runs', _runs(groups)),
    ('Configuration', _configuration(groups)),
    *(
      (_words(metric).capitalize(), _metric(metric, groups))
      for metric in comparison.metrics(groups)
    ),
  ]
  lead = html.paragraph(
    'Runs that differ in the seed only are one group. A curve is the mean of '
    'its group; the band reaches from its least to its largest seed. Seconds '
    'are of training alone, as each run measured them: runs side by side slow '
    'each other. FLOPs are those of the products that tokens need, without '
    'padding of experts and without recomputation.'
  )
  text = html.render('Comparison of runs', sections, lead)
  path = epath.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  storage.replace(path, text.encode())


def differences(found: Sequence[Difference]) -> list[tuple[str, ...]]:
  """Rows below DIFFERENCES."""
  return [
    (
      row.of,
      row.minus,
      row.equal,
      f'{row.at:.4g}',
      _signed(row.difference),
      'one seed tells none'
      if row.interval is None
      else ' to '.join(map(_signed, row.interval)),
      f'{len(row.seeds)}',
    )
    for row in found
  ]


def apart(groups: Sequence[Group]) -> str:
  """What is not compared, or should not be, and why; '' where all is."""
  said = []
  if comparison.of_other_data(groups):
    said.append(
      'Groups read different data (see the configuration): where they were '
      'evaluated on different texts, their losses say nothing of each other.'
    )
  machines = comparison.machines(groups)
  if len(machines) > 1:
    named = '; '.join(name or 'not known' for name in machines)
    said.append(
      f'Seconds are not compared: runs are of several machines ({named}).'
    )
  if names := comparison.unpaired(groups):
    said.append(
      f'{", ".join(names)}: no seed is one of {groups[0].name}, so there is no '
      'difference seed by seed.'
    )
  if tasks := comparison.evaluated_otherwise(groups):
    said.append(
      f'{", ".join(tasks)} is not compared: runs were evaluated with other '
      'settings (MODEL_DIR/evaluation/ has them).'
    )
  return ' '.join(said)


def reached(metric: str, group: Group) -> str:
  """The last values of a group: their mean, and their standard deviation."""
  last = [run.metrics[metric].values[-1] for run in group.runs]
  spread = f' ± {np.std(last, ddof=1):.4f}' if len(last) > 1 else ''
  return f'{np.mean(last):.4f}{spread}'


def steps(group: Group) -> str:
  """The last step of its runs, or the least and the largest."""
  last = {
    int(max(curve.steps[-1] for curve in run.metrics.values()))
    for run in group.runs
  }
  return ' to '.join(f'{step:,}' for step in sorted({min(last), max(last)}))


def _runs(groups: Sequence[Group]) -> str:
  metrics = comparison.metrics(groups)
  header = ('group', 'seeds', 'steps', *map(_words, metrics))
  rows = [
    (
      group.name,
      ', '.join(str(run.seed) for run in group.runs),
      steps(group),
      *(reached(metric, group) for metric in metrics),
    )
    for group in groups
  ]
  places = [
    (group.name, run.seed, run.model_dir)
    for group in groups
    for run in group.runs
  ]
  return (
    html.table(header, rows)
    + html.paragraph(
      'The last value of each metric: the mean over seeds, and the standard '
      'deviation.'
    )
    + html.folded(
      'Where they lie', html.table(('group', 'seed', 'folder'), places, True)
    )
  )


def _configuration(groups: Sequence[Group]) -> str:
  different = comparison.settings(groups)
  told = apart(groups)
  note = html.paragraph(told) if told else ''
  if not different:
    return html.paragraph('All runs have one configuration.') + note
  rows = [
    (name, *('—' if value is None else value for value in values))
    for name, values in different.items()
  ]
  return html.table(('', *(group.name for group in groups)), rows) + note


def _metric(metric: str, groups: Sequence[Group]) -> str:
  held_out = 'held-out ' if groups[0].runs[0].held_out else 'training '
  ylabel = held_out + _words(metric) + (', nats' if metric == 'loss' else '')
  figures = []
  for budget in comparison.budgets(groups):
    named = {
      group.name: curves.band(found)
      for group in groups
      if len(found := _curves(group, budget, metric)) == len(group.runs)
    }
    if len(named) == len(groups):
      title = f'{_words(metric).capitalize()} by {budget}'
      figures.append(
        (title, plots.bands(named, xlabel=_X[budget], ylabel=ylabel))
      )
  text = html.figures(figures)
  rows = differences(comparison.differences(metric, groups))
  if not rows:
    return text
  return (
    text
    + html.heading(f'Differences of {_words(metric)}, seed by seed')
    + html.table(DIFFERENCES, rows)
    + html.paragraph(
      'Each group minus the first, at the most that all runs of both have '
      'reached; between two evaluations a value is on the line between them. '
      "The interval is by Student's t, over the seeds that both have."
    )
  )


def _curves(group: Group, budget: str, metric: str) -> list[Curve]:
  """Of those of its runs that can tell."""
  found = [run.by(budget, metric) for run in group.runs]
  return [curve for curve in found if curve is not None]


def _signed(value: float) -> str:
  """Four digits; what rounding has left of nothing is nothing."""
  return f'{round(value, 12):+.4g}'


def _words(metric: str) -> str:
  return metric.replace('_', ' ')
