"""GShard (Lepikhin et al. 2020), https://arxiv.org/abs/2006.16668."""

from __future__ import annotations

from sparse_experts.papers.published import Row, Table, experts

_ROUNDED_DOWN = {
  'parameters': 'the experts alone, of 2 x 1024 x 8192, are more than printed'
}

TABLES = {
  'gshard_models': Table(
    'GShard (Lepikhin et al. 2020), Table 1',
    tuple(
      Row(
        f'MoE({n}E,{layers}L)',
        f'gshard/{layers}l',
        params,
        bindings=() if n == 2048 else experts(n),
        because={} if layers == 60 else _ROUNDED_DOWN,
      )
      for n, layers, params in (
        (2048, 60, '1T'),
        (2048, 36, '600B'),
        (2048, 12, '200B'),
        (512, 36, '150B'),
        (512, 12, '50B'),
        (128, 36, '37B'),
        (128, 12, '12.5B'),
      )
    ),
  ),
}
