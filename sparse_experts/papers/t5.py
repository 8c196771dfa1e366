"""T5 1.1 (Raffel et al. 2019), https://arxiv.org/abs/1910.10683."""

from __future__ import annotations

from sparse_experts.papers.published import Row, Table

TABLES = {
  't5_checkpoints': Table(
    'T5 1.1, released checkpoints',
    (
      Row('t5.1.1.base', 't5_1_1/base', '250M'),
      Row(
        't5.1.1.large',
        't5_1_1/large',
        '800M',
        because={'parameters': 'printed as about 800 million'},
      ),
      Row('t5.1.1.xxl', 't5_1_1/xxl', '11B'),
    ),
  ),
}
