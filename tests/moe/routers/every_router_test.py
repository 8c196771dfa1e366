"""What every router promises, for each that has a file in gin/routers/.

Routers of one's own are asked too, where a folder DIR has a gin/routers/:

  GIN_SEARCH_PATHS=DIR python -m pytest tests/moe/routers/every_router_test.py
"""

import dataclasses
import functools
import os

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from sparse_experts import config, sharding
from sparse_experts.layers.mlp import Mlp
from sparse_experts.moe import CapacityRule, MoE, einsum, gather
from sparse_experts.moe.assignment import Assignment

NEEDS = {'token_ids', 'task_ids', 'capacity', 'sequences', 'rng', 'step'}

SEARCH_PATHS = [*filter(None, [os.environ.get('GIN_SEARCH_PATHS')])]
NAMES = config.routers(SEARCH_PATHS)
G, S, D, E = 2, 16, 6, 8
KEY = jax.random.key(0)


def factory(name, macro='ROUTER'):
  """The router of a gin file, for E experts, as a layer is given it."""
  files = ['gin/equivalence.gin', f'gin/routers/{name}.gin']
  config.parse(files, [f'NUM_EXPERTS={E}'], SEARCH_PATHS)
  return config.value(macro)


class Routed:
  """A router with parameters, and calls of it that compile once."""

  def __init__(self, name, macro='ROUTER'):
    self.router = factory(name, macro)()
    self.needs = self.router.needs
    rng = np.random.default_rng(0)
    given = {
      'token_ids_GxS': rng.integers(0, 32, (G, S)).astype(np.int32),
      'task_ids_GxS': rng.integers(0, 4, (G, S)).astype(np.int32),
    }
    self.given = {
      argument: jnp.asarray(value)
      for argument, value in given.items()
      if argument.removesuffix('_GxS') in self.needs
    }
    self.static = {'capacity': 3} if 'capacity' in self.needs else {}
    if 'step' in self.needs:
      self.given['step'] = jnp.int32(3)
    self.x = rng.normal(size=(G, S, D)).astype(np.float32)
    shapes = jax.eval_shape(
      lambda: self.router.init(
        {'params': KEY, 'dropout': KEY}, self.x, **self.given, **self.static
      )
    )
    self.names = sharding.names_of(shapes.get('params', {}))
    # All different, those too that start at zero.
    self.params = jax.tree.map(
      lambda leaf: rng.normal(size=leaf.shape).astype(np.float32),
      nn.unbox(shapes).get('params', {}),
    )

    @functools.partial(jax.jit, static_argnames='train')
    def call(params, x, mask, given, key, train):
      return self.router.apply(
        {'params': params},
        x,
        mask_GxS=mask,
        deterministic=not train,
        rngs={'dropout': key},
        **given,
        **self.static,
      )

    self._call = call

  @property
  def factory(self):
    """As the gin file has it, also once another is read."""
    fields = {field.name for field in dataclasses.fields(self.router)}
    fields -= {'parent', 'name'}
    return functools.partial(
      type(self.router), **{name: getattr(self.router, name) for name in fields}
    )

  def __call__(self, x=None, mask=None, train=False, key=KEY, given=None):
    """The assignment and Aux, as numpy arrays."""
    x = self.x if x is None else x
    mask = np.ones((G, S), bool) if mask is None else mask
    result = self._call(
      self.params, x, mask, given or self.given, key, train=train
    )
    return jax.tree.map(np.asarray, result)

  def gradient(self, x, mask):
    """Of gates and losses together, by parameters and tokens."""

    @jax.jit
    def gradient(params, x):
      def objective(params, x):
        assignment, aux = self._call(
          params, x, mask, self.given, KEY, train=True
        )
        leaves = jax.tree.leaves((assignment, aux.losses))
        return sum(
          jnp.sin(leaf).sum()
          for leaf in leaves
          if jnp.issubdtype(leaf.dtype, jnp.floating)
        )

      return jax.grad(objective, (0, 1))(params, x)

    return jax.tree.map(np.asarray, gradient(self.params, x))


routed = functools.cache(Routed)


@pytest.fixture(params=NAMES)
def name(request):
  return request.param


def assert_same(left, right):
  jax.tree.map(np.testing.assert_array_equal, left, right)


def of_tokens(assignment, index):
  """What an assignment says of some tokens of every group."""
  return jax.tree.map(lambda leaf: leaf[:, index], assignment)


def padded():
  mask = np.random.default_rng(1).random((G, S)) < 0.7
  assert not mask.all()
  return mask


def test_its_file_provides_what_it_says(name):
  encoder, decoder = routed(name), Routed(name, 'DECODER_ROUTER')
  weights = config.value('LOSS_WEIGHTS')
  losses = set()
  for each in (encoder, decoder):
    assert each.router.num_experts == E
    assert set(each.needs) <= NEEDS
    _, aux = each()
    losses |= set(aux.losses)
    if aux.decisions:  # `Model` makes these of them.
      losses |= {'policy', 'value'}
    assert all(loss.shape == () for loss in aux.losses.values())
  assert decoder.router.is_causal
  assert set(weights) <= losses


def test_it_draws_only_where_it_says(name):
  router = routed(name)
  call = functools.partial(
    router.router.apply,
    {'params': router.params},
    router.x,
    **router.given,
    **router.static,
  )
  jax.eval_shape(functools.partial(call, deterministic=True))
  train = functools.partial(call, deterministic=False)
  if 'rng' in router.needs:
    with pytest.raises(flax.errors.InvalidRngError, match='dropout'):
      jax.eval_shape(train)
  else:
    jax.eval_shape(train)


@pytest.mark.parametrize('train', [False, True])
def test_an_assignment_is_well_formed(name, train):
  for mask in (None, padded()):
    assignment, _ = routed(name)(mask=mask, train=train)
    real = np.ones((G, S), bool) if mask is None else mask
    if not isinstance(assignment, Assignment):
      for weights in (assignment.dispatch_GxSxExC, assignment.combine_GxSxExC):
        assert np.isfinite(weights).all() and (weights[~real] == 0).all()
      continue
    experts, places = assignment.expert_GxSxK, assignment.position_GxSxK
    chosen = assignment.chosen()
    assert experts.dtype == places.dtype == np.int32
    assert (experts >= 0).all() and (experts <= E).all()
    assert not chosen[~real].any()
    assert chosen.any()
    assert np.isfinite(assignment.gate_GxSxK).all()
    assert (assignment.gate_GxSxK[~chosen] == 0).all()
    for g in range(G):
      slots = {
        (experts[g, s, k], places[g, s, k])
        for s, k in zip(*chosen[g].nonzero())
      }
      assert len(slots) == chosen[g].sum()  # A slot holds at most one token.
      for s in range(S):
        mine = experts[g, s][chosen[g, s]]
        assert len(set(mine)) == len(mine)


@pytest.mark.parametrize('train', [False, True])
def test_padding_leaks_nothing(name, train):
  router, mask = routed(name), padded()
  holes = np.where(mask[..., None], router.x, np.nan)
  others = np.where(mask[..., None], router.x, 7)
  assert_same(
    router(holes, mask, train=train), router(others, mask, train=train)
  )


def test_groups_do_not_meet(name):
  router = routed(name)
  other = router.x.copy()
  other[1] = np.random.default_rng(5).normal(size=(S, D))
  for train in (False, True):
    before, _ = router(train=train)
    after, _ = router(other, train=train)
    assert_same(*(jax.tree.map(lambda a: a[0], x) for x in (before, after)))


@pytest.mark.parametrize('train', [False, True])
def test_a_causal_router_does_not_look_ahead(name, train):
  router = routed(name)
  if not router.router.is_causal:
    pytest.skip('says that it does')
  rng = np.random.default_rng(2)
  for first in (1, S // 2, S - 1):  # Of the tokens that change.
    other, given = router.x.copy(), dict(router.given)
    other[:, first:] = rng.normal(size=other[:, first:].shape, scale=3)
    for argument in ('token_ids_GxS', 'task_ids_GxS'):
      if argument in given:
        given[argument] = given[argument].at[:, first:].set(1)
    before, _ = router(train=train)
    after, _ = router(other, train=train, given=given)
    assert_same(of_tokens(before, slice(first)), of_tokens(after, slice(first)))


def test_exchangeable_experts_are_known_by_their_parameters(name):
  router = routed(name)
  if not router.router.exchangeable:
    pytest.skip('says that they are not')
  order = np.random.default_rng(4).permutation(E)

  def renumbered(leaf, names):
    for axis, axis_name in enumerate(names):
      if axis_name == 'router':
        leaf = leaf.take(order, axis)
    return leaf

  def weights(params):
    """Of every token, for every expert: [G, S, E, ...]."""
    assignment, _ = router._call(
      params, router.x, padded(), router.given, KEY, train=False
    )
    if not isinstance(assignment, Assignment):
      return np.asarray(assignment.combine_GxSxExC)
    onehot_GxSxKxE = jax.nn.one_hot(assignment.expert_GxSxK, E)
    return np.einsum('GSK,GSKE->GSE', assignment.gate_GxSxK, onehot_GxSxKxE)

  before = weights(router.params)
  after = weights(jax.tree.map(renumbered, router.params, router.names))
  np.testing.assert_allclose(after, before[:, :, order], atol=1e-6)
  assert (after != before).any() or name == 'thor'  # A mean over all.


def test_what_does_not_drop_does_not(name):
  router = routed(name)
  if router.router.drops:
    pytest.skip('says that it may')
  assignment, _ = router(train=True)
  if not isinstance(assignment, Assignment):
    pytest.skip('has slots of its own')
  capacity = -(-S * router.router.k // E)
  assert assignment.kept(capacity).sum(-1).min() >= 1


def test_bfloat16_tokens_are_routed_in_float32(name):
  router = routed(name)
  x = jnp.asarray(router.x, jnp.bfloat16)
  for train in (False, True):
    assert_same(
      router(x, train=train), router(x.astype(jnp.float32), train=train)
    )


def test_extreme_tokens_give_finite_numbers_and_gradients(name):
  router = routed(name)
  x = router.x.copy()
  x[0, :4] *= 1e4
  x[1, :4] = 0
  leaves = jax.tree.leaves(
    (router(x, train=True), router.gradient(x, padded()))
  )
  assert all(np.isfinite(leaf).all() for leaf in leaves)


def test_a_layer_of_it_compiles_once_and_leaves_the_device_alone(name):
  router = routed(name)
  hard = isinstance(router()[0], Assignment)
  layer = MoE(
    make_router=router.factory,
    make_expert=functools.partial(Mlp, hidden_width=4),
    capacity_rule=CapacityRule(minimum=1),
    dispatch=gather if hard else einsum,
  )
  rng = np.random.default_rng(3)
  expert = {
    'wi': {'kernel': rng.normal(size=(E, D, 4)).astype(np.float32)},
    'wo': {'kernel': rng.normal(size=(E, 4, D)).astype(np.float32)},
  }
  params = {'expert': expert}
  if router.params:
    params['router'] = router.params
  given = {
    argument.replace('_GxS', '_BxL'): value
    for argument, value in router.given.items()
  }

  @jax.jit
  def run(params, x, given, key):
    return layer.apply(
      {'params': params},
      x,
      capacity_factor=1.0,
      deterministic=False,
      rngs={'dropout': key},
      **given,
    )

  arguments = [
    jax.device_put((params, x, given, key))
    for x, key in ((router.x, KEY), (2 * router.x, jax.random.key(1)))
  ]
  with jax.transfer_guard('disallow'):
    for each in arguments:
      _, aux = run(*each)
  assert run._cache_size() == 1
  # Whoever multiplies tokens with a matrix has logits, and so the z-loss.
  learned = set(router.params or ()) - {'value_kernel', 'value_bias'}
  if learned and name not in ('dselect_k', 'soft_moe'):
    assert aux.losses['router_z'] > 0
