"""The token view: a text token by token, and colours that can be told apart."""

import dataclasses
import itertools

import numpy as np
import pytest

from sparse_experts.commands import record
from sparse_experts.insight import html, specialisation, token_view
from sparse_experts.insight.colours import COLOURS, ink
from sparse_experts.insight.records import Records
from sparse_experts.insight.token_view import Choice, Token
from sparse_experts.moe import FATES, Record

KEPT, CUT, NONE, PAD = (
  FATES.index(fate) for fate in ('kept', 'capacity', 'no choice', 'padding')
)
LAYER = 'decoder/layers_1'
# Twelve experts, two choices a token: both kept, the larger gate second; one of
# two dropped; the only one dropped; none made; padding.
RECORDS = Records(
  layers={
    LAYER: Record(
      expert_BxLxK=np.array([[[3, 11], [1, 2], [4, 12], [12, 12], [12, 12]]]),
      gate_BxLxK=np.array(
        [[[0.25, 0.75], [0.5, 0.375], [1, 0], [0, 0], [0, 0]]], np.float32
      ),
      position_BxLxK=np.zeros((1, 5, 2), int),
      fate_BxLxK=np.array(
        [[[KEPT] * 2, [KEPT, CUT], [CUT, NONE], [NONE] * 2, [PAD] * 2]]
      ),
      num_experts=12,
      group_size=5,
    )
  },
  tokens={'encoder': np.array([[5]]), 'decoder': np.array([[5, 6, 7, 8, 0]])},
  pieces={'decoder': {5: '▁<b>', 6: 'a', 7: '\n', 8: '▁'}},
)
READ = [
  Token(
    '▁<b>', 0, {LAYER: [Choice(11, 0.75, 'kept'), Choice(3, 0.25, 'kept')]}
  ),
  Token(
    'a', 1, {LAYER: [Choice(1, 0.5, 'kept'), Choice(2, 0.375, 'capacity')]}
  ),
  Token('\n', 2, {LAYER: [Choice(4, 1.0, 'capacity')]}),
  Token('▁', 3, {LAYER: []}),
]


def test_tokens_by_hand():
  """Without padding, the largest gate first; no stack without experts."""
  assert token_view.tokens(RECORDS, 0) == {'decoder': READ}


def test_a_view_shows_experts_and_what_was_dropped():
  text = token_view.view(RECORDS, 0)
  found = text.split('<span ')[1:]
  assert [part.partition('"')[2].partition('"')[0] for part in found] == [
    f'token of{11 % len(COLOURS)}',
    'token of1 cut',
    'token of4 lost',
    'token lost',
  ]
  assert [part.partition('>')[2].partition('</span>')[0] for part in found] == [
    '&lt;b&gt;<small>11</small>',
    'a<small>1</small>',
    '⏎<small>4</small>',
    '▁<small>-</small>',
  ]
  assert (
    'aria-label="a, position 1: expert 1, gate 0.500; expert 2, gate 0.375, '
    'dropped (capacity)"'
  ) in text
  assert text.count('tabindex="0"') == 4  # The keyboard comes to each.
  assert 'decoder: 4 tokens, the first 2' in token_view.view(RECORDS, 0, 2)


def test_a_table_of_a_text():
  assert token_view.tables(RECORDS, 0) == [
    (
      ['decoder', 'layers_1'],
      [
        ['▁<b>', '11 0.75   3 0.25 '],
        ['a', '1 0.50   2 0.38x'],
        ['⏎', '4 1.00x'],
        ['▁', ''],
      ],
    )
  ]


def test_a_page_shows_a_text_as_it_was_given():
  """Its spaces and backticks, which in sentences of ours are code."""
  texts = [{'inputs': '  a `b`\n<i>', 'targets_cut': 2}]
  facts = {'texts': texts, 'step': 1, 'capacity_factor': 2.0}
  page = token_view.page(dataclasses.replace(RECORDS, facts=facts), 'title')
  assert '<pre tabindex="0">  a `b`\n&lt;i&gt;</pre>' in page
  assert '<code>' not in page
  assert '>2 tokens of the text did not fit<' in page


def test_a_terminal_shows_newlines_of_an_experts_tokens():
  rows = specialisation.expert_table(RECORDS, LAYER)
  assert any('\n' in row.tokens for row in rows)
  shown = ''.join(row[-1] for row in record.cells(rows))
  assert '\n' not in shown and '⏎' in shown


def linear(colour):
  """Of '#rrggbb', linear RGB (sRGB, IEC 61966-2-1)."""
  c = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
  return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def contrast(one, other):
  """WCAG 2.1's contrast ratio."""
  dark, light = sorted(
    linear(c) @ [0.2126, 0.7152, 0.0722] for c in (one, other)
  )
  return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize('colour', COLOURS)
def test_colours_are_seen_and_letters_read_on_them(colour):
  assert contrast(colour, ink(colour)) >= 4.5  # WCAG's AA of text.
  for page in ('#fdfdfc', '#16181a'):
    assert f'--paper: {page}' in html.render('', [], '')
    assert contrast(colour, page) >= 2


# Linear RGB as one sees it without red, green or blue cones: Machado et al.,
# 2009, https://doi.org/10.1109/TVCG.2009.113, Table 1, severity 1.
SEEN = {
  'all cones': np.eye(3),
  'protanopia': [
    [0.152286, 1.052583, -0.204868],
    [0.114503, 0.786281, 0.099216],
    [-0.003882, -0.048116, 1.051998],
  ],
  'deuteranopia': [
    [0.367322, 0.860646, -0.227968],
    [0.280085, 0.672501, 0.047413],
    [-0.011820, 0.042940, 0.968881],
  ],
  'tritanopia': [
    [1.255528, -0.076749, -0.178779],
    [-0.078411, 0.930809, 0.147602],
    [0.004733, 0.691367, 0.303900],
  ],
}


@pytest.mark.parametrize('cones', SEEN)
def test_the_colour_blind_tell_colours_apart(cones):
  """By CIE 1976's distance, of which 2.3 can just be seen: 15 at least."""
  to_xyz = [
    [0.4124, 0.3576, 0.1805],
    [0.2126, 0.7152, 0.0722],
    [0.0193, 0.1192, 0.9505],
  ]

  def lab(colour):
    seen = np.clip(np.array(SEEN[cones]) @ linear(colour), 0, 1)
    x, y, z = np.cbrt(np.array(to_xyz) @ seen / [0.9505, 1, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])

  labs = {colour: lab(colour) for colour in COLOURS}
  for one, other in itertools.combinations(COLOURS, 2):
    assert np.linalg.norm(labs[one] - labs[other]) >= 15, (one, other)
