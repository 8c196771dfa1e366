"""Tables that a console shows."""

import numpy as np
import pytest

from sparse_experts import console


def layer(load_E):
  return {
    'load_E': np.array(load_E), 'imbalance': 1.5, 'dropped': 0.25, 'dead': 2.0,
  }  # fmt: skip


def test_a_table_of_more_than_sixteen_experts_says_that_there_are_more():
  """Shares 0, 1, ... % of 20 experts, and of a layer with fewer; max of all."""
  layers = {
    'decoder/layers_1': layer(np.arange(20) / 100),
    'decoder/layers_3': layer([0.75, 0.25]) | {'confidence': 0.5},
  }
  head, _, many, few = console.expert_load(layers).splitlines()
  columns = [*map(str, range(16)), '...', 'max/mean', 'dropped', 'dead']
  assert head.split() == ['load', 'of', 'expert,', '%', *columns, 'confidence']
  loads = list(map(str, range(16)))
  assert many.split() == ['decoder/layers_1', *loads, '1.50', '25.0%', '2']
  assert few.split() == [
    *('decoder/layers_3', '75', '25', '1.50', '25.0%', '2', '0.50')
  ]
  # Each under its name.
  for line, cell, column in ((many, '1.50', 'max/mean'), (few, '25 ', ' 1 ')):
    right = lambda text, word: text.index(word) + len(word)
    assert right(line, cell) == right(head, column)


@pytest.mark.parametrize('num_experts', [3, 16])
def test_a_table_of_at_most_sixteen_experts_has_all(num_experts):
  layers = {'decoder/layers_1': layer(np.full(num_experts, 1 / num_experts))}
  head, _, row = console.expert_load(layers).splitlines()
  names = [*map(str, range(num_experts)), 'max/mean']
  assert head.split()[4 : 5 + num_experts] == names
  share = f'{100 / num_experts:.0f}'
  assert row.split()[1 : 2 + num_experts] == [share] * num_experts + ['1.50']
