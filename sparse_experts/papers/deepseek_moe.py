"""DeepSeekMoE (Dai et al. 2024), https://arxiv.org/abs/2401.06066."""

from __future__ import annotations

from sparse_experts.papers.published import Row, Table

TABLES = {
  'deepseek_moe': Table(
    'DeepSeekMoE (Dai et al. 2024), sections 4 and 5',
    (
      Row('DeepSeekMoE 2B', 'deepseek_moe/2b', '2.0B', '0.3B'),
      Row('DeepSeekMoE 16B', 'deepseek_moe/16b', '16.4B', '2.8B'),
    ),
  ),
}
