"""What the experts did with a text: token by token, layer by layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sparse_experts.data import prompts
from sparse_experts.insight import html, routing, specialisation
from sparse_experts.insight.colours import COLOURS
from sparse_experts.insight.records import Records
from sparse_experts.insight.token_classes import visible
from sparse_experts.models.layout import LayerId
from sparse_experts.moe import FATES, Record

READ_AS = (
  'A token has the colour and the number of the expert of its largest gate, '
  f'counted from 0; {len(COLOURS)} colours come round again. Point at one, or '
  'go to it by the tab key, to read all its experts and gates. Dashed: dropped '
  'for lack of room at an expert. Dashed without a colour: no expert took it, '
  'as there was no room or, where experts choose, as none chose it.'
)


@dataclasses.dataclass(frozen=True)
class Choice:
  """An expert of a token in a layer, its gate, and one of `moe.FATES`."""

  expert: int
  gate: float
  fate: str


@dataclasses.dataclass(frozen=True)
class Token:
  """A token that a stack read.

  Attributes:
    piece: its text, see `Records.pieces`.
    position: in its row, from 0.
    layers: by name of a sparse layer, its choices, the largest gate first.
  """

  piece: str
  position: int
  layers: Mapping[str, Sequence[Choice]]


def tokens(records: Records, row: int) -> dict[str, list[Token]]:
  """The tokens of a row by stack, where there are any, without its padding.

  Args:
    records: of texts.
    row: of their batches, which are one below the other.
  """
  found: dict[str, list[Token]] = {}
  for stack in records.tokens:
    layers = {
      name: layer
      for name, layer in records.layers.items()
      if LayerId.parse(name).stack == stack
    }
    if not layers:
      continue
    is_padding_L = routing.is_padding(next(iter(layers.values())))[row]
    read = [
      Token(
        specialisation.piece(
          records, next(iter(layers)), records.tokens[stack][row, at]
        ),
        at,
        {name: _choices(layer, row, at) for name, layer in layers.items()},
      )
      for at in np.flatnonzero(~is_padding_L).tolist()
    ]
    if read:
      found[stack] = read
  return found


def tables(
  records: Records, row: int
) -> list[tuple[list[str], list[list[str]]]]:
  """Header and rows of a table for each stack, a token a row, for terminals."""
  found = []
  for stack, read in tokens(records, row).items():
    header = [
      _reader(records, row, stack),
      *(name.split('/')[-1] for name in read[0].layers),
    ]
    rows = [
      [visible(token.piece) or '▁', *map(_cell, token.layers.values())]
      for token in read
    ]
    found.append((header, rows))
  return found


def view(records: Records, row: int, most: int | None = None) -> str:
  """The text of a row as HTML, once for each sparse layer.

  Args:
    records, row: as of `tokens`.
    most: tokens of a stack at most; None shows all.
  """
  text = ''
  for stack, read in tokens(records, row).items():
    shown = read[:most]
    few = f', the first {len(shown)}' if len(shown) < len(read) else ''
    reader = _reader(records, row, stack)
    text += html.heading(f'{reader}: {len(read)} tokens{few}')
    for layer in read[0].layers:
      text += html.paragraph(layer)
      text += html.tokens([_shown(token, layer) for token in shown])
  return text


def page(records: Records, title: str) -> str:
  """A page of texts that were given.

  Args:
    records: of `records.record` with texts.
    title: of the page.
  """
  texts = records.facts['texts']
  shown = range(min(len(texts), 20))
  sections = [
    (f'Text {row + 1}', _given(texts[row]) + view(records, row))
    for row in shown
  ]
  facts = (
    f'Step {records.facts["step"]}, capacity factor '
    f'{records.facts["capacity_factor"]}; '
    f'{len(shown)} of {len(texts)} texts.'
  )
  return html.render(
    title, sections, html.paragraph(facts) + html.paragraph(READ_AS)
  )


def _reader(records: Records, row: int, stack: str) -> str:
  """A stack, and where its text is from if it was not given."""
  texts = records.facts.get('texts')
  is_asked = stack == 'decoder' and 'encoder' in records.tokens
  if texts and is_asked and 'targets' not in texts[row]:
    return f"{stack} (the model's own answer)"
  return stack


def _choices(layer: Record, row: int, at: int) -> list[Choice]:
  chosen = [
    Choice(int(expert), float(gate), FATES[fate])
    for expert, gate, fate in zip(
      layer.expert_BxLxK[row, at],
      layer.gate_BxLxK[row, at],
      layer.fate_BxLxK[row, at],
    )
    if expert < layer.num_experts
  ]
  return sorted(chosen, key=lambda choice: -choice.gate)


def _given(text: Mapping[str, Any]) -> str:
  """A text as it was given, and how much of it did not fit."""
  found = ''.join(
    html.paragraph(f'{name}:') + html.preformatted(text[name])
    for name in ('inputs', 'targets')
    if name in text
  )
  return found + ''.join(map(html.paragraph, prompts.cuts(text)))


def _cell(choices: Sequence[Choice]) -> str:
  return '  '.join(
    f'{choice.expert} {choice.gate:.2f}{" " if choice.fate == "kept" else "x"}'
    for choice in choices
  )


def _shown(token: Token, layer: str) -> html.Token:
  choices = token.layers[layer]
  kept = [choice.fate == 'kept' for choice in choices]
  said = '; '.join(
    f'expert {choice.expert}, gate {choice.gate:.3f}'
    + ('' if choice.fate == 'kept' else f', dropped ({choice.fate})')
    for choice in choices
  )
  text = visible(token.piece.removeprefix('▁')) or '▁'
  return html.Token(
    text,
    choices[0].expert if choices else None,
    f'{text}, position {token.position}: {said or "no expert"}',
    'all' if choices and all(kept) else 'some' if any(kept) else 'none',
    token.piece.startswith('▁'),
  )
