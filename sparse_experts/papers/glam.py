"""GLaM (Du et al. 2021), https://arxiv.org/abs/2112.06905."""

from __future__ import annotations

from sparse_experts.papers.published import Row, Table, experts

SMALL_VOCABULARY = (
  'less than with 32,000 pieces, and far less than with the 256,000 of the text'
)

TABLES = {
  'glam_table4': Table(
    'GLaM (Du et al. 2021), Table 4',
    (
      Row(
        '0.1B',
        'glam/0.1b',
        '130M',
        '130M',
        because=dict.fromkeys(
          ('parameters', 'active parameters'), SMALL_VOCABULARY
        ),
      ),
      Row(
        '0.1B/64E',
        'glam/0.1b_64e',
        '1.9B',
        '145M',
        because={'active parameters': SMALL_VOCABULARY},
      ),
      Row('1.7B', 'glam/1.7b', '1.7B', '1.700B'),
      Row(
        '1.7B/32E',
        'glam/1.7b_64e',
        '20B',
        '1.878B',
        bindings=experts(32),
        because={
          'parameters': 'half of the experts of 1.7B/64E, whose 27B is right; '
          'gated experts would be 20B, but then 1.7B/64E 40B'
        },
      ),
      Row('1.7B/64E', 'glam/1.7b_64e', '27B', '1.879B'),
      Row('1.7B/128E', 'glam/1.7b_64e', '53B', '1.881B', bindings=experts(128)),
      Row(
        '1.7B/256E', 'glam/1.7b_64e', '105B', '1.886B', bindings=experts(256)
      ),
      Row('8B', 'glam/8b', '8.7B', '8.7B'),
      Row('8B/64E', 'glam/8b_64e', '143B', '9.8B'),
      Row('137B', 'glam/137b', '137B', '137B'),
      Row('64B/64E', 'glam/64b_64e', '1.2T', '96.6B'),
    ),
  ),
}
