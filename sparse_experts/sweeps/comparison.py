"""Runs side by side: what they differ in, and what that is worth.

Runs that differ in the seed only are one group. Groups are compared seed by
seed, at equal steps, at equal useful FLOPs and at equal seconds.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sparse_experts.insight.curves import Curve
from sparse_experts.sweeps.written_runs import BUDGETS, Run

_LONGEST = 48  # Letters of a group's name.
# Settings that say what is read of data.
_OF_DATA = {
  *('data', 'MIXTURE_OR_TASK_NAME', 'TASK_FEATURE_LENGTHS', 'VOCABULARY'),
  *('EVAL_SPLIT', 'EVAL_BATCHES', 'PACK'),
}


class Group(NamedTuple):
  """Runs that differ in the seed only, in order of seeds."""

  name: str
  runs: list[Run]

  def with_flops(self, flops: int | None) -> Group:
    """The same, whose runs have so many in a step."""
    return Group(self.name, [run._replace(flops=flops) for run in self.runs])


class Difference(NamedTuple):
  """What a group has more than another, seed by seed.

  Attributes:
    metric: what is compared.
    of, minus: names of the groups.
    equal: one of BUDGETS.
    at: how much of it: the most that all runs of both have reached.
    seeds: that both have.
    difference: mean over seeds.
    interval: of 95%, by Student's t with one degree of freedom less than there
      are seeds; None for a single seed.
  """

  metric: str
  of: str
  minus: str
  equal: str
  at: float
  seeds: list[int]
  difference: float
  interval: tuple[float, float] | None


def groups(runs: Sequence[Run]) -> list[Group]:
  """Runs by what they have in common, in the order they are given.

  A group is named by the values that are its own, or, where these are long, by
  the folder of its first run.

  Raises:
    ValueError: two runs are of one group and seed, or some have no held-out
      metrics and others have.
  """
  if len({run.held_out for run in runs}) > 1:
    without = next(run for run in runs if not run.held_out)
    raise ValueError(
      f'{without.model_dir} has no held-out metrics and others have: compare '
      'runs that evaluate (EVAL_PERIOD), or those that do not.'
    )
  found: dict[tuple, list[Run]] = {}
  for run in runs:
    found.setdefault(tuple(sorted(run.settings.items())), []).append(run)
  for alike in found.values():
    alike.sort(key=lambda run: run.seed)
    for run, other in itertools.pairwise(alike):
      if run.seed == other.seed:
        raise ValueError(
          f'{run.model_dir} and {other.model_dir} are of one configuration and '
          f'of one seed, {run.seed}; give one of them.'
        )
  names = _names(list(found.values()))
  return [Group(*named) for named in zip(names, found.values())]


def settings(groups: Sequence[Group]) -> dict[str, list[str | None]]:
  """Values that differ between groups, one for each; None: it has none."""
  of_groups = [group.runs[0].settings for group in groups]
  return _different(of_groups)


def of_other_data(groups: Sequence[Group]) -> bool:
  """Whether groups read different data, so that their losses are no rivals."""
  return not _OF_DATA.isdisjoint(settings(groups))


def machines(groups: Sequence[Group]) -> list[str]:
  """What the runs ran on, each once: seconds of two cannot be compared."""
  return sorted({run.machine for group in groups for run in group.runs})


def unpaired(groups: Sequence[Group]) -> list[str]:
  """Groups that have no seed of the first one's."""
  first, *others = ({run.seed for run in group.runs} for group in groups)
  return [
    group.name for group, seeds in zip(groups[1:], others) if not seeds & first
  ]


def evaluated_otherwise(groups: Sequence[Group]) -> list[str]:
  """Tasks that all runs were evaluated on, and not all in the same way."""
  how = [run.evaluated for group in groups for run in group.runs]
  return [
    name
    for name in how[0]
    if all(name in one for one in how) and len({one[name] for one in how}) > 1
  ]


def metrics(groups: Sequence[Group]) -> list[str]:
  """What all runs have curves of, the loss first.

  Raises:
    ValueError: there is nothing.
  """
  runs = [run for group in groups for run in group.runs]
  otherwise = tuple(f'{name}/' for name in evaluated_otherwise(groups))
  shared = [
    name
    for name in runs[0].metrics
    if all(name in run.metrics for run in runs)
    and not name.startswith(otherwise)
  ]
  if not shared:
    raise ValueError(
      'the runs have no metric in common; compare runs that have logged or '
      'evaluated, of one objective.'
    )
  return sorted(shared, key=lambda name: name != 'loss')


def budgets(groups: Sequence[Group]) -> tuple[str, ...]:
  """Of BUDGETS: not seconds where runs are of different machines."""
  return BUDGETS if len(machines(groups)) == 1 else BUDGETS[:2]


def differences(metric: str, groups: Sequence[Group]) -> list[Difference]:
  """Each group minus the first one, at each budget that can be told.

  A value between two evaluations is on the line between them. What a run had
  reached before its first evaluation is not told.
  """
  first, *others = groups
  return [
    found
    for other in others
    for budget in budgets(groups)
    if (found := _difference(metric, other, first, budget)) is not None
  ]


def paired(
  values: Sequence[float], others: Sequence[float]
) -> tuple[float, tuple[float, float] | None]:
  """Mean of differences in pairs, and its 95% interval.

  Args:
    values, others: of the same seeds, in turn.

  Returns:
    mean, and the interval by Student's t with n - 1 degrees of freedom; None
    for a single pair.

  Example:
    >>> paired([4.0, 5.0], [3.0, 3.0])[0]
    1.5
  """
  from scipy import stats

  differences = np.subtract(values, others)
  mean, n = float(differences.mean()), len(differences)
  if n < 2:
    return mean, None
  half = float(stats.t.ppf(0.975, n - 1) * differences.std(ddof=1) / np.sqrt(n))
  return mean, (mean - half, mean + half)


def _difference(
  metric: str, of: Group, minus: Group, budget: str
) -> Difference | None:
  by_seed = [
    {
      run.seed: curve
      for run in group.runs
      if (curve := run.by(budget, metric)) is not None
    }
    for group in (of, minus)
  ]
  every = [curve for group in by_seed for curve in group.values()]
  seeds = sorted(by_seed[0].keys() & by_seed[1].keys())
  if not seeds or len(every) < len(of.runs) + len(minus.runs):
    return None
  at = float(min(curve.steps[-1] for curve in every))
  if at < max(curve.steps[0] for curve in every):
    return None
  values, others = (
    [float(np.interp(at, *group[seed])) for seed in seeds] for group in by_seed
  )
  mean, interval = paired(values, others)
  return Difference(
    metric, of.name, minus.name, budget, at, seeds, mean, interval
  )


def _names(alike: Sequence[Sequence[Run]]) -> list[str]:
  if len(alike) == 1:
    return ['all']
  different = _different([runs[0].settings for runs in alike])
  names = [
    ' '.join(
      f'{name}={values[i]}'
      for name, values in different.items()
      if values[i] is not None
    )
    for i in range(len(alike))
  ]
  told = all(names) and len(set(names)) == len(names)
  if told and max(map(len, names)) <= _LONGEST:
    return names
  folders = [runs[0].model_dir for runs in alike]
  names = [folder.name for folder in folders]
  return names if len(set(names)) == len(names) else list(map(str, folders))


def _different(
  mappings: Sequence[Mapping[str, str]],
) -> dict[str, list[str | None]]:
  names = functools.reduce(lambda found, x: {**found, **x}, mappings, {})
  rows = {name: [x.get(name) for x in mappings] for name in names}
  return {name: row for name, row in rows.items() if len(set(row)) > 1}


def facts(groups: Sequence[Group]) -> dict[str, Any]:
  """All of it, for --json; a number that is not finite is None."""
  return {
    'settings': settings(groups),
    'groups': [
      {
        'name': group.name,
        'seeds': [run.seed for run in group.runs],
        'runs': [str(run.model_dir) for run in group.runs],
        'step': [int(_last(run.metrics)) for run in group.runs],
        'metrics': {
          name: [_finite(run.metrics[name].values[-1]) for run in group.runs]
          for name in metrics(groups)
        },
      }
      for group in groups
    ],
    'differences': [
      {
        **found._asdict(),
        'difference': _finite(found.difference),
        'interval': found.interval and list(map(_finite, found.interval)),
      }
      for metric in metrics(groups)
      for found in differences(metric, groups)
    ],
  }


def _last(curves: Mapping[str, Curve]) -> int:
  return max(curve.steps[-1] for curve in curves.values())


def _finite(value: float) -> float | None:
  return float(value) if np.isfinite(value) else None
