"""Unified scaling laws (Clark et al. 2022), https://arxiv.org/abs/2202.01169."""

from __future__ import annotations

from sparse_experts.papers.published import DENSE, Row, Table

TABLES = {
  'clark_models': Table(
    'Unified scaling laws (Clark et al. 2022), published data',
    tuple(
      Row(
        f'{size} {kind}',
        f'clark/{size.lower()}',
        block_params=params,
        bindings=bindings,
      )
      for size, dense, sparse in (
        ('15M', '16527360', '815738880'),
        ('25M', '27279360', '1092894720'),
        ('55M', '57369600', '2138547200'),
        ('130M', '132163584', '5026818048'),
        ('370M', '368123904', '14751571968'),
        ('1.3B', '1308819456', '52448919552'),
      )
      for kind, params, bindings in (
        ('dense', dense, DENSE),
        ('128E', sparse, ()),
      )
    ),
  ),
}
