"""Expert Choice (Zhou et al. 2022), https://arxiv.org/abs/2202.09368."""

from __future__ import annotations

from sparse_experts.papers.glam import SMALL_VOCABULARY
from sparse_experts.papers.published import Row, Table, experts

TABLES = {
  'ec_models': Table(
    'Expert Choice (Zhou et al. 2022), Table 1',
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
      *(
        Row(
          f'0.1B/{n}E',
          'expert_choice/100m',
          params,
          '145M',
          bindings=() if n == 64 else experts(n),
          because={'active parameters': SMALL_VOCABULARY},
        )
        for n, params in (
          (16, '548M'),
          (32, '1.0B'),
          (64, '1.9B'),
          (128, '3.7B'),
        )
      ),
      Row('8B', 'glam/8b', '8.7B', '8.7B'),
      Row('8B/64E', 'expert_choice/8b_64e', '143B', '9.8B'),
    ),
  ),
}
