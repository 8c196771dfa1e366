"""Mixtral of Experts (Jiang et al. 2024), https://arxiv.org/abs/2401.04088."""

from __future__ import annotations

from sparse_experts.papers.published import Row, Table

TABLES = {
  'mixtral': Table(
    'Mixtral of Experts (Jiang et al. 2024), abstract',
    (Row('Mixtral 8x7B', 'mixtral/8x7b', '47B', '13B'),),
  ),
}
