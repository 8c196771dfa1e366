"""Capacities of known models, by hand and by exact fractions."""

import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_experts.moe import CapacityRule

MESH_TF = CapacityRule(per_choice=False, rounding='floor', minimum=4, clip=True)
FLAXFORMER = CapacityRule(
  per_choice=False, rounding='round', minimum=4, clip=False
)
VMOE = CapacityRule(
  per_choice=True, rounding='ceil', minimum=1, clip=False, multiple_of=4
)


@pytest.mark.parametrize(
  'rule, factor, tokens, num_experts, k, slots',
  [
    # Switch-Base, as released: 128 experts, groups of 8192 tokens; in training
    # 1.25 * 8192 / 128 = 80, in evaluation 2 * 8192 / 128 = 128.
    (FLAXFORMER, 1.25, 8192, 128, 1, 80),
    (FLAXFORMER, 2.0, 8192, 128, 1, 128),
    # Switch-Large: groups of 4096.
    (FLAXFORMER, 1.25, 4096, 128, 1, 40),
    # In Mesh TF's own groups of 1024.
    (MESH_TF, 1.25, 1024, 128, 1, 10),
    # Top-2 with 64 experts, 1.25 * 4096 / 64 = 80: k is left out.
    (MESH_TF, 1.25, 4096, 64, 2, 80),
    (FLAXFORMER, 1.25, 4096, 64, 2, 80),
    # GShard, Algorithm 1: C = 2 S / E, both choices at factor 1.
    (CapacityRule(), 1.0, 2048, 128, 2, 32),
    # V-MoE counts both choices: 1.05 * 2 * 4096 / 32 = 268.8, and then 272.
    (VMOE, 1.05, 4096, 32, 2, 272),
    # 1.25 * 100 / 64 = 1.95: below the least capacity of 4, V-MoE's multiple.
    (MESH_TF, 1.25, 100, 64, 1, 4),
    (FLAXFORMER, 1.25, 100, 64, 1, 4),
    (VMOE, 1.25, 100, 64, 1, 4),
    # Three tokens need no more than three slots, and flaxformer has four.
    (MESH_TF, 1.25, 3, 64, 1, 3),
    (FLAXFORMER, 1.25, 3, 64, 1, 4),
    # 1.25 * 36 / 10 = 4.5 goes down to the even 4, and 5.5 up to 6.
    (FLAXFORMER, 1.25, 36, 10, 1, 4),
    (FLAXFORMER, 1.25, 44, 10, 1, 6),
    # 4.5 again.
    (MESH_TF, 1.25, 36, 10, 1, 4),
    (VMOE, 1.25, 36, 10, 1, 8),
    # In floats 1.1 * 100 / 10 is above 11, and 1.15 * 100 below 115.
    (CapacityRule(minimum=1), 1.1, 100, 10, 1, 11),
    (MESH_TF, 1.15, 100, 1, 1, 100),
    (CapacityRule(rounding='floor', clip=False), 1.15, 100, 1, 1, 115),
    # Integers are factors too.
    (VMOE, 2, 64, 8, 1, 16),
  ],
)
def test_capacity_of_known_configurations(
  rule, factor, tokens, num_experts, k, slots
):
  assert rule(factor, tokens=tokens, num_experts=num_experts, k=k) == slots


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
  factor=st.decimals('0.01', '8', places=2).map(str),
  sizes=st.fixed_dictionaries(
    {
      'tokens': st.integers(1, 300),
      'num_experts': st.integers(1, 64),
      'k': st.integers(1, 3),
    }
  ),
  rule=st.fixed_dictionaries(
    {
      'per_choice': st.booleans(),
      'rounding': st.sampled_from(['floor', 'round', 'ceil']),
      'minimum': st.integers(1, 4),
      'clip': st.booleans(),
      'multiple_of': st.integers(1, 5),
    }
  ),
)
def test_capacity_is_the_oracle(factor, sizes, rule):
  slots = CapacityRule(**rule)(float(factor), **sizes)
  assert slots == oracle.capacity(factor, **sizes, **rule)


@pytest.mark.parametrize('factor', [0, -1.0, float('nan')])
def test_a_factor_is_above_zero(factor):
  with pytest.raises(ValueError, match='capacity_factor must be above 0, got'):
    CapacityRule()(factor, tokens=8, num_experts=2, k=1)


def test_unknown_rounding_is_named():
  with pytest.raises(
    ValueError, match="rounding must be one of floor, round, ceil, not 'up'"
  ):
    CapacityRule(rounding='up')


def test_v_moe_and_praxis_round_up_to_four():
  # 784 / 32 * 1.05 = 25.7; 1024 * 2 / 64 = 32 is a multiple; floor(31.97).
  v_moe = CapacityRule(minimum=1, multiple_of=4, clip=False)
  assert v_moe(1.05, tokens=784, num_experts=32, k=1) == 28
  praxis = CapacityRule(
    per_choice=False, rounding='floor', minimum=1, multiple_of=4, clip=False
  )
  assert praxis(2.0, tokens=1024, num_experts=64, k=2) == 32
  assert praxis(2.0, tokens=1023, num_experts=64, k=2) == 32
  # No more than there are tokens, where that is the rule.
  assert CapacityRule(multiple_of=4)(2.0, tokens=6, num_experts=2, k=1) == 6


@pytest.mark.parametrize('rule', [{'minimum': 0}, {'multiple_of': 0}])
def test_an_expert_has_a_slot(rule):
  with pytest.raises(ValueError, match='must be at least 1, got'):
    CapacityRule(**rule)
