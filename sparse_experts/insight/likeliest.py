"""What `infer --top` found, to be read: likely tokens in the place of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparse_experts.insight.token_classes import classify, visible

EXPLAINED = (
  'A row below log prob has a token of the targets or, where there are none, '
  'of the prediction, with its probability after those before it, and then the '
  'likeliest tokens in its place.'
)
_END = '</s>'  # As `infer` names every end of a model's.


def places(top: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
  """The token of each place and its likeliest ones, with probabilities.

  Places of sentinels and of the end are left out. Of the likeliest, '(end)' is
  the end of sequence; '▁' is a space, '⏎' a new line, and '#7' the id of a
  token that has no text of its own.

  Args:
    top: of a result of `infer`.

  Example:
    >>> of, by = (
    ...   {'id': i, 'token': x, 'probability': 0.25}
    ...   for i, x in enumerate(('▁of', 'by'))
    ... )
    >>> places([{**of, 'likeliest': [by, of]}])
    [('▁of 25.0%', 'by 25.0%, ▁of 25.0%')]
  """
  return [
    (_share(own), ', '.join(map(_share, own['likeliest'])))
    for own in _of_text(top)
  ]


def summary(results: Sequence[Mapping[str, Any]]) -> str:
  """How many tokens of text are the likeliest, and among the likeliest.

  Args:
    results: of `infer`; those without targets, or without `top`, do not count.
  """
  own = [
    token
    for x in results
    if x.get('targets') and 'top' in x
    for token in _of_text(x['top'])
  ]
  ranked = [[other['id'] for other in t['likeliest']] for t in own]
  if not own:
    return ''
  first = sum(t['id'] == ids[0] for t, ids in zip(own, ranked))
  among = sum(t['id'] in ids for t, ids in zip(own, ranked))
  return (
    f'{first / len(own):.0%} of {len(own)} tokens are the likeliest, '
    f'{among / len(own):.0%} among the {len(ranked[0])} likeliest'
  )


def _of_text(top: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
  return [
    own
    for own in top
    if own['token'] != _END and classify(str(own['token'])) != 'sentinel'
  ]


def _share(token: Mapping[str, Any]) -> str:
  text = visible(str(token['token']))
  if text == _END:
    text = '(end)'
  elif text in ('', '<unk>'):
    text += f'#{token["id"]}'
  return f'{text} {token["probability"]:.1%}'
