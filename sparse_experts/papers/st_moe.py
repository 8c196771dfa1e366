"""ST-MoE (Zoph et al. 2022), https://arxiv.org/abs/2202.08906."""

from __future__ import annotations

from sparse_experts.papers.published import Row, Table

_FLOPS = (
  'more than from 512 inputs and 114 targets, which are right for all others'
)

TABLES = {
  'stmoe_table11': Table(
    'ST-MoE (Zoph et al. 2022), Table 11',
    (
      Row(
        'Dense-L',
        'st_moe/dense_large',
        '0.8B',
        flops='645B',
        because={
          'parameters': '24 layers would be 0.8B, the printed 27 are 0.9B',
          'FLOPs/sequence': _FLOPS,
        },
      ),
      Row('T5-XXL', 't5_1_1/xxl', '11.1B', flops='6.3T'),
      Row('Switch-XXL', 'switch/xxl', '395B', flops='6.3T'),
      Row('Switch-C', 'switch/c', '1571B', flops='890B'),
      Row(
        'ST-MoE-L',
        'st_moe/large',
        '4.1B',
        flops='645B',
        because={'FLOPs/sequence': _FLOPS},
      ),
      Row('ST-MoE-32B', 'st_moe/32b', '269B', flops='20.2T'),
    ),
  ),
}
