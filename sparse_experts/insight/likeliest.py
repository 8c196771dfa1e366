"""What `infer --top` found, to be read: likely tokens in the place of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparse_experts.insight.token_classes import classify


def places(top: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
  """The token of each place and its likeliest ones, with probabilities.

  Places of sentinels and of the end are left out; '␣' is white space alone.
  Of the likeliest, '(end)' is the end of sequence.

  Args:
    top: of a result of `infer`.

  Example:
    >>> of, by = ({'token': x, 'probability': 0.25} for x in ('▁of', '▁by'))
    >>> places([{**of, 'likeliest': [by, of]}])
    [('of 25.0%', 'by 25.0%, of 25.0%')]
  """
  return [
    (_share(own), ', '.join(map(_share, own['likeliest'])))
    for own in _of_text(top)
  ]


def summary(results: Sequence[Mapping[str, Any]]) -> str:
  """How many tokens of text are the likeliest, and among the likeliest.

  Args:
    results: of `infer`, with `top`; those without targets do not count.
  """
  own = [t for x in results if 'targets' in x for t in _of_text(x['top'])]
  ranked = [[other['token'] for other in t['likeliest']] for t in own]
  if not own:
    return ''
  first = sum(t['token'] == names[0] for t, names in zip(own, ranked))
  among = sum(t['token'] in names for t, names in zip(own, ranked))
  return (
    f'{first / len(own):.0%} of {len(own)} tokens are the likeliest, '
    f'{among / len(own):.0%} among the {len(ranked[0])} likeliest'
  )


def _of_text(top: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
  kinds = ('sentinel', 'control')
  return [own for own in top if classify(str(own['token'])) not in kinds]


def _share(token: Mapping[str, Any]) -> str:
  text = str(token['token']).replace('</s>', '(end)').replace('▁', ' ')
  text = text.strip() or '␣'
  return f'{text} {token["probability"]:.1%}'
