"""DeepSpeed-MoE (Rajbhandari et al. 2022), https://arxiv.org/abs/2201.05596."""

from __future__ import annotations

from sparse_experts.papers.published import DENSE, Row, Table

TABLES = {
  'prmoe_models': Table(
    'DeepSpeed-MoE (Rajbhandari et al. 2022), Table 2',
    (
      Row('350M', 'prmoe/350m_moe', '350M', bindings=DENSE),
      Row('1.3B', 'prmoe/1.3b_moe', '1.3B', bindings=DENSE),
      Row('350M+MoE-128', 'prmoe/350m_moe', '13B'),
      Row('1.3B+MoE-128', 'prmoe/1.3b_moe', '52B'),
      Row('350M+PR-MoE-32/64', 'prmoe/350m_prmoe', '4B'),
      Row('1.3B+PR-MoE-64/128', 'prmoe/1.3b_prmoe', '31B'),
      Row('350M+PR-MoE+L21+MoS', 'prmoe/350m_mos', '3.5B'),
      Row('1.3B+PR-MoE+L21+MoS', 'prmoe/1.3b_mos', '27B'),
    ),
  ),
}
