"""Switch Transformers (Fedus et al. 2021), https://arxiv.org/abs/2101.03961."""

from __future__ import annotations

from sparse_experts.papers.published import DENSE, Row, Table, experts

TABLES = {
  'switch_table7': Table(
    'Switch Transformers (Fedus et al. 2021), Table 7',
    (
      Row('T5-Base', 'switch/base', '223M', bindings=DENSE),
      Row('Switch-Base 16', 'switch/base', '1.1B', bindings=experts(16)),
      Row('Switch-Base 32', 'switch/base', '2.0B', bindings=experts(32)),
      Row('Switch-Base 64', 'switch/base', '3.8B', bindings=experts(64)),
      Row('Switch-Base 128', 'switch/base', '7.4B'),
      Row('Switch-Base 256', 'switch/base', '14.7B', bindings=experts(256)),
    ),
  ),
  'switch_table9': Table(
    'Switch Transformers (Fedus et al. 2021), Table 9',
    (
      Row('T5-Base', 'switch/base', '0.2B', flops='124B', bindings=DENSE),
      Row('T5-Large', 'switch/large', '0.7B', flops='425B', bindings=DENSE),
      Row('T5-XXL', 't5_1_1/xxl', '11B', flops='6.3T'),
      Row('Switch-Base', 'switch/base', '7B', flops='124B'),
      Row('Switch-Large', 'switch/large', '26B', flops='425B'),
      Row('Switch-XXL', 'switch/xxl', '395B', flops='6.3T'),
      Row('Switch-C', 'switch/c', '1571B', flops='890B'),
    ),
  ),
}
