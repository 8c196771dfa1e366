"""How blocks and sparse layers are named, by hand; paths there and back."""

import itertools
import random

import jax.numpy as jnp
import pytest

from sparse_experts.models import layout
from sparse_experts.models.layout import BlockPath, LayerId, Split

NAMES = {
  'encoder/layers_1': LayerId('encoder', 1),
  'decoder/query_3': LayerId('decoder', 3, 'query'),
  'tower/image/layers_10': LayerId('tower/image', 10),
  'value_0': LayerId('', 0, 'value'),
  'decoder/shared_key_12': LayerId('decoder', 12, 'shared_key'),
}


@pytest.mark.parametrize('name', NAMES)
def test_names_of_layers_there_and_back(name):
  assert LayerId.parse(name) == NAMES[name]
  assert str(NAMES[name]) == name


@pytest.mark.parametrize('name', ['decoder', 'a/3', 'layers_', '_3', 'x_y'])
def test_what_names_no_layer_is_refused(name):
  with pytest.raises(ValueError, match=f"'{name}' names no layer; .*layers_3"):
    LayerId.parse(name)


def test_layers_in_order():
  # Encoders first, then by number and not by digit, then by kind.
  ordered = [
    LayerId('encoder', 9),
    LayerId('encoder', 10),
    LayerId('text_encoder', 0),
    LayerId('decoder', 1, 'key'),
    LayerId('decoder', 1),
    LayerId('decoder', 1, 'query'),
    LayerId('decoder', 2, 'key'),
  ]
  shuffled = list(ordered)
  random.Random(0).shuffle(shuffled)
  assert shuffled != ordered
  assert sorted(shuffled) == ordered
  for one, other in itertools.combinations(ordered, 2):
    assert one < other and other > one and one != other


PATHS = {
  'decoder/layers_3/moe/router/kernel': BlockPath(
    ('decoder',), 3, ('moe', 'router', 'kernel')
  ),
  'decoder/period/layers_0/norm': BlockPath(('decoder',), 0, ('norm',), True),
  'layers_12': BlockPath((), 12),
  'period/layers_1': BlockPath((), 1, (), True),
}


@pytest.mark.parametrize('path', PATHS)
def test_paths_there_and_back(path):
  parts = tuple(path.split('/'))
  at = layout.split_path(parts)
  assert at == PATHS[path]
  assert at.path == parts
  assert layout.block_of(parts) == parts[: len(parts) - len(at.rest)]
  assert layout.is_scanned(parts) == at.scanned


@pytest.mark.parametrize(
  'path', ['decoder/norm/scale', 'embed', 'x/sparse_layers_3', 'a/layers_', '']
)
def test_paths_outside_blocks(path):
  assert layout.split_path(path.split('/')) is None
  assert layout.block_of(path.split('/')) == ()


def test_every_block_has_one_place_in_a_scan():
  # d d s d s d s x: one before, three times two, one after.
  split = layout.split_period('ddsdsdsx')
  assert split == Split(prefix=1, period=2, repeats=3)
  turns = [split.turn(i) for i in range(8)]
  assert turns == [None, (0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), None]
  for i, turn in enumerate(turns):
    assert turn is None or split.index(*turn) == i


def test_the_layers_of_a_parameter():
  repeated = {'layers_0': {'x': jnp.ones(3)}, 'layers_1': {'x': jnp.ones(3)}}
  params = {'decoder': {'layers_0': {}, 'period': repeated, 'layers_7': {}}}

  def names(path):
    return [str(at) for at in layout.layers_at(params, path.split('/'))]

  assert names('decoder/layers_7/moe/router/b') == ['decoder/layers_7']
  # One block before, two in a turn.
  assert names('decoder/period/layers_1/attention/key/router/b') == [
    'decoder/key_2', 'decoder/key_4', 'decoder/key_6',
  ]  # fmt: skip


@pytest.mark.parametrize('every', [-1, 5])
def test_sparse_layers_that_name_no_layer_are_refused(every):
  with pytest.raises(ValueError, match=f'sparse_layers={every} m'):
    layout.kinds(4, every)
  assert layout.kinds(4, 4) == (False, False, False, True)
