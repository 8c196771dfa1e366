"""OLMoE (Muennighoff et al. 2024), https://arxiv.org/abs/2409.02060."""

from __future__ import annotations

from sparse_experts.papers.published import Row, Table

TABLES = {
  'olmoe': Table(
    'OLMoE (Muennighoff et al. 2024), section 2',
    (Row('OLMoE-1B-7B', 'olmoe/1b_7b', '6.9B', '1.3B'),),
  ),
}
