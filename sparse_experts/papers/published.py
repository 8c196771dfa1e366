"""Counts that papers print, and the recipes they are about.

A table is data: a row names a recipe, what it overrides, the digits the paper
prints, and, where the modules do not give them, why.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# What papers print, and what the ledger calls it.
QUANTITIES = {
  'parameters': 'total_params',
  'active parameters': 'active_params',
  'FLOPs/sequence': 'kaplan_forward_flops_per_sequence',
  'parameters of blocks': 'block_params',
}

_UNITS = {'': 1, 'M': 1e6, 'B': 1e9, 'T': 1e12}
TOLERANCE = 0.02


@dataclasses.dataclass(frozen=True)
class Row:
  """One model of a table.

  Attributes:
    model: its name in the paper.
    recipe: under `gin/models/`, without `.gin`.
    params, active_params, flops, block_params: as printed, '7B' or all digits;
      FLOPs are of a forward pass over one sequence; None: the paper has none.
    bindings: NAME=VALUE, what the recipe is overridden with.
    because: why a number does not reproduce, by its name in QUANTITIES.
  """

  model: str
  recipe: str
  params: str | None = None
  active_params: str | None = None
  flops: str | None = None
  block_params: str | None = None
  bindings: tuple[str, ...] = ()
  because: Mapping[str, str] = dataclasses.field(default_factory=dict)

  @property
  def file(self) -> str:
    return f'gin/models/{self.recipe}.gin'

  @property
  def printed(self) -> dict[str, str]:
    """The printed digits by quantity."""
    values = (
      self.params,
      self.active_params,
      self.flops,
      self.block_params,
    )
    return {name: v for name, v in zip(QUANTITIES, values) if v is not None}


@dataclasses.dataclass(frozen=True)
class Table:
  """A table of a paper."""

  title: str
  rows: tuple[Row, ...]


def number(printed: str) -> float:
  """A printed count as a number.

  Example:
    >>> number('12.5B')
    12500000000.0
  """
  digits, unit = _split(printed)
  return float(digits) * _UNITS[unit]


def agrees(printed: str, computed: float) -> bool:
  """Whether a count rounds to the printed digits or is within 2% of them.

  If all digits are printed, it must be equal.

  Example:
    >>> agrees('7B', 7.42e9), agrees('20B', 14.0e9), agrees('1000', 1001)
    (True, False, False)
  """
  digits, unit = _split(printed)
  decimals = len(digits.partition('.')[2])
  if round(computed / _UNITS[unit], decimals) == float(digits):
    return True
  return unit != '' and abs(computed / number(printed) - 1) <= TOLERANCE


def _split(printed: str) -> tuple[str, str]:
  """Digits and unit."""
  digits = printed.rstrip(''.join(_UNITS))
  return digits, printed[len(digits) :]


def compare(row: Row, facts: Mapping[str, Any]) -> list[dict[str, Any]]:
  """Printed beside computed for every number of a row.

  Args:
    row: of a table.
    facts: the ledger of its model.

  Returns:
    For each number `quantity`, `published` (as printed), `computed`,
    `difference` (relative), `agrees` and `because` (None, or a reason).
  """
  return [
    {
      'quantity': quantity,
      'published': printed,
      'computed': facts[QUANTITIES[quantity]],
      'difference': facts[QUANTITIES[quantity]] / number(printed) - 1,
      'agrees': agrees(printed, facts[QUANTITIES[quantity]]),
      'because': row.because.get(quantity),
    }
    for quantity, printed in row.printed.items()
  ]


def rows_of(
  files: Sequence[str], bindings: Sequence[str]
) -> Iterator[tuple[Table, Row]]:
  """Rows about exactly these gin files and overrides."""
  for table in TABLES.values():
    for row in table.rows:
      if list(files) == [row.file] and sorted(bindings) == sorted(row.bindings):
        yield table, row


def _experts(n: int) -> tuple[str, ...]:
  return (f'NUM_EXPERTS={n}',)


_DENSE = ('SPARSE_LAYERS=0',)
_ROUNDED_DOWN = {
  'parameters': 'the experts alone, of 2 x 1024 x 8192, are more than printed'
}
_GLAM_SMALL = (
  'less than with 32,000 pieces, and far less than with the 256,000 of the text'
)
_STMOE_FLOPS = (
  'more than from 512 inputs and 114 targets, which are right for all others'
)

TABLES: Mapping[str, Table] = {
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
  'switch_table7': Table(
    'Switch Transformers (Fedus et al. 2021), Table 7',
    (
      Row('T5-Base', 'switch/base', '223M', bindings=_DENSE),
      Row('Switch-Base 16', 'switch/base', '1.1B', bindings=_experts(16)),
      Row('Switch-Base 32', 'switch/base', '2.0B', bindings=_experts(32)),
      Row('Switch-Base 64', 'switch/base', '3.8B', bindings=_experts(64)),
      Row('Switch-Base 128', 'switch/base', '7.4B'),
      Row('Switch-Base 256', 'switch/base', '14.7B', bindings=_experts(256)),
    ),
  ),
  'switch_table9': Table(
    'Switch Transformers (Fedus et al. 2021), Table 9',
    (
      Row('T5-Base', 'switch/base', '0.2B', flops='124B', bindings=_DENSE),
      Row('T5-Large', 'switch/large', '0.7B', flops='425B', bindings=_DENSE),
      Row('T5-XXL', 't5_1_1/xxl', '11B', flops='6.3T'),
      Row('Switch-Base', 'switch/base', '7B', flops='124B'),
      Row('Switch-Large', 'switch/large', '26B', flops='425B'),
      Row('Switch-XXL', 'switch/xxl', '395B', flops='6.3T'),
      Row('Switch-C', 'switch/c', '1571B', flops='890B'),
    ),
  ),
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
          'FLOPs/sequence': _STMOE_FLOPS,
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
        because={'FLOPs/sequence': _STMOE_FLOPS},
      ),
      Row('ST-MoE-32B', 'st_moe/32b', '269B', flops='20.2T'),
    ),
  ),
  'glam_table4': Table(
    'GLaM (Du et al. 2021), Table 4',
    (
      Row(
        '0.1B',
        'glam/0.1b',
        '130M',
        '130M',
        because={'parameters': _GLAM_SMALL, 'active parameters': _GLAM_SMALL},
      ),
      Row(
        '0.1B/64E',
        'glam/0.1b_64e',
        '1.9B',
        '145M',
        because={'active parameters': _GLAM_SMALL},
      ),
      Row('1.7B', 'glam/1.7b', '1.7B', '1.700B'),
      Row(
        '1.7B/32E',
        'glam/1.7b_64e',
        '20B',
        '1.878B',
        bindings=_experts(32),
        because={
          'parameters': 'half of the experts of 1.7B/64E, whose 27B is right; '
          'gated experts would be 20B, but then 1.7B/64E 40B'
        },
      ),
      Row('1.7B/64E', 'glam/1.7b_64e', '27B', '1.879B'),
      Row(
        '1.7B/128E', 'glam/1.7b_64e', '53B', '1.881B', bindings=_experts(128)
      ),
      Row(
        '1.7B/256E', 'glam/1.7b_64e', '105B', '1.886B', bindings=_experts(256)
      ),
      Row('8B', 'glam/8b', '8.7B', '8.7B'),
      Row('8B/64E', 'glam/8b_64e', '143B', '9.8B'),
      Row('137B', 'glam/137b', '137B', '137B'),
      Row('64B/64E', 'glam/64b_64e', '1.2T', '96.6B'),
    ),
  ),
  'gshard_models': Table(
    'GShard (Lepikhin et al. 2020), Table 1',
    tuple(
      Row(
        f'MoE({experts}E,{layers}L)',
        f'gshard/{layers}l',
        params,
        bindings=() if experts == 2048 else _experts(experts),
        because={} if layers == 60 else _ROUNDED_DOWN,
      )
      for experts, layers, params in (
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
  'ec_models': Table(
    'Expert Choice (Zhou et al. 2022), Table 1',
    (
      Row(
        '0.1B',
        'glam/0.1b',
        '130M',
        '130M',
        because={'parameters': _GLAM_SMALL, 'active parameters': _GLAM_SMALL},
      ),
      *(
        Row(
          f'0.1B/{experts}E',
          'expert_choice/100m',
          params,
          '145M',
          bindings=() if experts == 64 else _experts(experts),
          because={'active parameters': _GLAM_SMALL},
        )
        for experts, params in (
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
        ('dense', dense, _DENSE),
        ('128E', sparse, ()),
      )
    ),
  ),
  'mixtral': Table(
    'Mixtral of Experts (Jiang et al. 2024), abstract',
    (Row('Mixtral 8x7B', 'mixtral/8x7b', '47B', '13B'),),
  ),
  'olmoe': Table(
    'OLMoE (Muennighoff et al. 2024), section 2',
    (Row('OLMoE-1B-7B', 'olmoe/1b_7b', '6.9B', '1.3B'),),
  ),
  'prmoe_models': Table(
    'DeepSpeed-MoE (Rajbhandari et al. 2022), Table 2',
    (
      Row('350M', 'prmoe/350m_moe', '350M', bindings=_DENSE),
      Row('1.3B', 'prmoe/1.3b_moe', '1.3B', bindings=_DENSE),
      Row('350M+MoE-128', 'prmoe/350m_moe', '13B'),
      Row('1.3B+MoE-128', 'prmoe/1.3b_moe', '52B'),
      Row('350M+PR-MoE-32/64', 'prmoe/350m_prmoe', '4B'),
      Row('1.3B+PR-MoE-64/128', 'prmoe/1.3b_prmoe', '31B'),
      Row('350M+PR-MoE+L21+MoS', 'prmoe/350m_mos', '3.5B'),
      Row('1.3B+PR-MoE+L21+MoS', 'prmoe/1.3b_mos', '27B'),
    ),
  ),
  'deepseek_moe': Table(
    'DeepSeekMoE (Dai et al. 2024), sections 4 and 5',
    (
      Row('DeepSeekMoE 2B', 'deepseek_moe/2b', '2.0B', '0.3B'),
      Row('DeepSeekMoE 16B', 'deepseek_moe/16b', '16.4B', '2.8B'),
    ),
  ),
}
