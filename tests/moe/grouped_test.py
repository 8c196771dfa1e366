"""Dropless dispatch: its product against numpy, its numbers on every mesh."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from flax import linen as nn
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec
from programs import primitives

from sparse_experts import moe, sharding
from sparse_experts.layers.linear import Linear
from sparse_experts.layers.mlp import Mlp
from sparse_experts.moe import grouped, metrics, row_exchange
from sparse_experts.moe.experts import Experts
from sparse_experts.moe.grouped_matmul import grouped_matmul

partial = functools.partial


# The product. 1,100 rows are 18 blocks of 64, more than one product of 16
# blocks takes.

T, E, D, F = 1100, 3, 2, 3


@functools.cache
def product_and_gradients(implementation):
  @jax.jit
  def run(x, w, dy, sizes):
    y, pull_back = jax.vjp(
      lambda x, w: grouped_matmul(x, w, sizes, implementation), x, w
    )
    return y, *pull_back(dy)

  return run


@pytest.mark.parametrize('implementation', ['auto', 'padded', 'ragged'])
@settings(max_examples=20, deadline=None)
@given(ends=st.lists(st.integers(0, T), min_size=E, max_size=E).map(sorted))
@example(ends=[0, T, T])
@example(ends=[T, T, T])
@example(ends=[0, 0, 0])
@example(ends=[1, 1, 1099])
def test_grouped_matmul_is_numpy(implementation, ends):
  rng = np.random.default_rng(0)
  x, dy = rng.normal(size=(T, D)), rng.normal(size=(T, F))
  w = rng.normal(size=(E, D, F))
  y, dx, dw = np.zeros((T, F)), np.zeros((T, D)), np.zeros((E, D, F))
  for e, (begin, end) in enumerate(zip([0, *ends], ends)):
    rows = slice(begin, end)
    y[rows], dx[rows] = x[rows] @ w[e], dy[rows] @ w[e].T
    dw[e] = x[rows].T @ dy[rows]
  sizes = np.diff(ends, prepend=0).astype(np.int32)
  found = product_and_gradients(implementation)(
    *(np.float32(array) for array in (x, w, dy)), sizes
  )
  for ours, theirs in zip(found, (y, dx, dw)):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_few_rows_and_many_experts():
  x, w = np.array([[1.0], [2.0], [3.0]]), np.arange(7.0).reshape(7, 1, 1)
  y = grouped_matmul(
    jnp.float32(x), jnp.float32(w), jnp.array([0, 0, 1, 0, 0, 2, 0])
  )
  np.testing.assert_array_equal(y[:, 0], [1 * 2, 2 * 5, 3 * 5])


def test_only_the_branch_of_the_platform_is_in_the_program():
  x, w, sizes = jnp.ones((64, D)), jnp.ones((E, D, F)), jnp.ones(E, jnp.int32)
  lowered = {
    platform: jax.jit(grouped_matmul)
    .trace(x, w, sizes)
    .lower(lowering_platforms=(platform,))
    .as_text()
    for platform in ('cpu', 'tpu', 'cuda')
  }
  loops = {name: 'stablehlo.while' in text for name, text in lowered.items()}
  assert loops == {'cpu': True, 'tpu': False, 'cuda': False}
  ragged = {name: 'ragged_dot' in text for name, text in lowered.items()}
  assert ragged == {'cpu': False, 'tpu': True, 'cuda': True}


# The dispatcher in a layer.

NUM_EXPERTS, WIDTH, HIDDEN = 8, 6, 8


def make_layer(*, dispatch=moe.gather, exact=moe.all_experts, make_expert=Mlp):
  return moe.MoE(
    make_router=partial(
      moe.TopK,
      num_experts=NUM_EXPERTS,
      k=2,
      kernel_init=nn.initializers.normal(0.5),
    ),
    make_expert=partial(make_expert, hidden_width=HIDDEN),
    capacity_rule=moe.CapacityRule(minimum=1),
    dispatch=dispatch,
    exact_dispatch=exact,
  )


def arguments(gated=False):
  """Parameters, tokens, cotangent; experts and tokens all different."""
  rng = np.random.default_rng(0)
  names = ['wi_0', 'wi_1', 'wo'] if gated else ['wi', 'wo']
  expert = {
    name: {
      'kernel': rng.normal(
        size=(NUM_EXPERTS, HIDDEN, WIDTH)
        if name == 'wo'
        else (NUM_EXPERTS, WIDTH, HIDDEN)
      ).astype(np.float32)
    }
    for name in names
  }
  router = {'kernel': rng.normal(size=(WIDTH, NUM_EXPERTS)).astype(np.float32)}
  x, cotangent = rng.normal(size=(2, 8, 8, WIDTH)).astype(np.float32)
  return {'router': router, 'expert': expert}, x, cotangent


def outputs_and_gradients(layer, factor=None, mask=None):
  """Of parameters and tokens."""

  def objective(params, x, cotangent):
    y, aux = layer.apply(
      {'params': params}, x, mask_BxL=mask, capacity_factor=factor
    )
    return (y * cotangent).astype(jnp.float32).sum(), (y, aux.metrics)

  return jax.grad(objective, argnums=(0, 1), has_aux=True)


def same(ours, theirs):
  """Equal gradients, outputs and counts."""
  jax.tree.map(
    partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), ours, theirs
  )
  gradients, (y, _) = ours
  for leaf in jax.tree.leaves((gradients, y)):
    assert np.abs(leaf).max() > 0.01  # There is something to compare.


def run_all(cases, gated=False):
  """Gradients and outputs under each dispatcher and capacity factor."""
  mask = np.random.default_rng(1).random((8, 8)) < 0.8
  expert = partial(Mlp, gated=gated, activation='silu' if gated else 'relu')

  @jax.jit
  def run(*arguments):
    return [
      outputs_and_gradients(
        make_layer(dispatch=dispatch, exact=dispatch, make_expert=expert),
        factor,
        mask,
      )(*arguments)
      for dispatch, factor in cases
    ]

  return mask, run(*arguments(gated))


def test_the_numbers_of_the_other_dispatchers():
  _, (first, *others) = run_all(
    [(grouped, 0.75), (moe.gather, 0.75), (moe.einsum, 0.75)]
  )
  for other in others:
    same(first, other)
  mask, (exact, *others) = run_all(
    [
      (grouped, None),
      (partial(grouped, chunks=4), None),
      (moe.all_experts, None),
    ]
  )
  for other in others:
    same(exact, other)
  kept, all_kept = (result[1][1]['kept_E'].sum() for result in (first, exact))
  assert kept < all_kept == 2 * mask.sum()


def test_gated_experts():
  _, results = run_all([(grouped, 0.75), (moe.gather, 0.75)], gated=True)
  same(*results)


def test_no_gradient_is_a_scatter_add():
  params, x, cotangent = arguments()
  for axes in ((1, 1, 1), (1, 8, 1)):
    mesh = sharding.make_mesh(*axes, devices=jax.devices()[: np.prod(axes)])
    with sharding.use_mesh(mesh):
      for exchange in ('ragged', 'gather') if mesh.size > 1 else ('ragged',):
        gradient = outputs_and_gradients(
          make_layer(exact=partial(grouped, exchange=exchange))
        )
        names = primitives(gradient, params, x, cotangent)
        assert {'gather', 'shard-map', 'dot-general'} <= names
        assert 'scatter-add' not in names


def test_bfloat16_in_and_out():
  params, x, cotangent = arguments()
  shapes = jax.eval_shape(
    outputs_and_gradients(make_layer(exact=grouped)),
    params,
    *(jnp.bfloat16(array) for array in (x, cotangent)),
  )
  (dparams, dx), (y, _) = shapes
  assert dx.dtype == y.dtype == jnp.bfloat16
  assert {leaf.dtype for leaf in jax.tree.leaves(dparams)} == {
    jnp.float32.dtype
  }


@functools.cache
def on_one_device():
  return jax.jit(outputs_and_gradients(make_layer()))(*arguments())


def compile_on(axes, rules=None, dispatch=grouped, **options):
  """The gradient on a mesh, and its arguments there."""
  layer = make_layer(exact=partial(dispatch, **options))
  params, x, cotangent = arguments()
  mesh = sharding.make_mesh(*axes, devices=jax.devices()[: np.prod(axes)])
  with sharding.use_mesh(mesh, rules):
    boxed = jax.eval_shape(lambda: layer.init(jax.random.key(0), x))['params']
    rows = sharding.batch_sharding(mesh, x.shape)
    placed = jax.device_put(
      (params, x, cotangent), (sharding.shardings(boxed, mesh), rows, rows)
    )
    gradient = jax.jit(outputs_and_gradients(layer))
    return gradient.lower(*placed).compile(), placed


@pytest.mark.parametrize(
  'axes, options',
  [
    ((8, 1, 1), {}),
    ((1, 8, 1), {}),
    ((2, 4, 1), {'exchange': 'all_to_all', 'chunks': 2}),
    ((1, 4, 2), {'exchange': 'gather'}),
    ((2, 2, 2), {}),
  ],
  ids=str,
)
def test_eight_devices_equal_one(axes, options):
  compiled, placed = compile_on(axes, **options)
  same(compiled(*placed), on_one_device())
  lines = re.findall(
    r'= (\S+|\(.*\)) (all-to-all|all-gather|reduce-scatter)', compiled.as_text()
  )
  found = collections.Counter(name for _, name in lines)
  if axes[1] == 1:
    assert not found
  elif options.get('exchange') == 'gather':
    # Tokens, gates, experts, and the gradient of outputs; back, outputs, their
    # drops, and gradients of tokens and gates.
    assert found['all-gather'] == 4 and found['all-to-all'] == 0
    assert 3 <= found['reduce-scatter'] <= 4
  else:
    # Out and back, forward and backward; counts are gathered, weights never.
    chunks = options.get('chunks', 1)
    assert found['all-to-all'] == 4 * chunks
    assert found['all-gather'] == chunks
    assert all(
      shape.startswith('s32') for shape, name in lines if name == 'all-gather'
    )


@pytest.mark.parametrize('dispatch', [grouped, moe.gather])
@pytest.mark.parametrize(
  'axes, rules, exchanges',
  [
    # Experts along `data`, where no other axis is for them.
    ((4, 1, 2), {'expert': 'data', 'expert_group': 'expert'}, 4),
    ((4, 1, 1), {'expert': 'data', 'group': 'data', 'expert_group': None}, 4),
    # All experts on every device.
    ((2, 2, 1), {'expert': None, 'expert_group': ('data', 'expert')}, 0),
  ],
  ids=str,
)
def test_experts_live_where_the_rules_say(axes, rules, exchanges, dispatch):
  compiled, placed = compile_on(axes, rules, dispatch)
  same(compiled(*placed), on_one_device())
  found = re.findall(r' all-to-all(?:-start)?\(', compiled.as_text())
  assert len(found) == exchanges
  kernel = placed[0]['expert']['wi']['kernel']
  assert kernel.sharding.spec[0] == rules['expert']


def test_rules_by_which_there_is_no_axis_to_exchange_along():
  with pytest.raises(ValueError, match=r"'expert' over \('data', 'expert'\)"):
    compile_on((2, 4, 1), {'expert': ('data', 'expert'), 'expert_group': None})
  with pytest.raises(ValueError, match=r"groups are split.*over \('data',\)"):
    compile_on((2, 4, 1), {'batch': 'data', 'group': 'data'})


@pytest.mark.parametrize('receive_rows', [64, 10])
def test_runs_land_where_ragged_all_to_all_would_put_them(receive_rows):
  # XLA:CPU has none, so what its documentation says is done here by numpy: each
  # device i copies size[j] rows from start[j] to landing[j] on device j.
  P, N = 4, 16
  rng = np.random.default_rng(0)
  x = rng.normal(size=(P * N, 3)).astype(np.float32)
  sizes = rng.multinomial(N, np.ones(2 * P) / (2 * P), size=P).astype(np.int32)

  @jax.jit
  @partial(
    jax.shard_map,
    in_specs=PartitionSpec('expert'),
    out_specs=PartitionSpec('expert'),
    check_vma=False,
  )
  def run(x_NxD, sizes_1xE):
    traffic = row_exchange.traffic(
      sizes_1xE[0],
      'expert',
      peer_rows=N,
      receive_rows=receive_rows,
      ragged=True,
    )
    there = row_exchange.send(x_NxD, traffic)
    back = row_exchange.send_back(there, traffic, N)
    return jax.tree.map(
      lambda a: a[None], (traffic.out, traffic.into, there, back)
    )

  mesh = sharding.make_mesh(1, P, 1, devices=jax.devices()[:P])
  with sharding.use_mesh(mesh):
    out, into, there, back = jax.device_get(run(x, sizes))

  def simulate(x_PxIxD, num_rows, runs, sizes_received):
    y_PxOxD = np.zeros((P, num_rows, 3), np.float32)
    for i, j in np.ndindex(P, P):
      start, size = runs.start_P[i, j], runs.size_P[i, j]
      landing = runs.landing_P[i, j]
      assert size == sizes_received[j, i] and landing + size <= num_rows
      y_PxOxD[j, landing : landing + size] = x_PxIxD[i, start : start + size]
    return y_PxOxD

  x = x.reshape(P, N, 3)
  expected = simulate(x, receive_rows, out, into.size_P)
  np.testing.assert_array_equal(there, expected)
  np.testing.assert_array_equal(back, simulate(there, N, into, out.size_P))
  came_back = (back == x).all(-1)
  assert came_back.all() == (receive_rows == 64)
  assert (back[~came_back] == 0).all()


# Two devices, two experts on each, two groups of four tokens: experts of group
# 0 are 0 0 0 2, of group 1 they are 1 0 3 0. Device 0 is offered three rows by
# itself and three by device 1, those of expert 0 (tokens 1 and 3) before that
# of expert 1 (token 0). With a buffer_factor of 1:
#   ragged: device 0 has room for four, the three of its own and token 1.
#   all_to_all: two rows fit between two devices: token 2 of group 0 and token 0
#     of group 1 stay at home.
#   gather: device 0 has room for four, sorted by expert, then by group: those
#     of group 0 and token 1.
CHOICES = np.array([[0, 0, 0, 2], [1, 0, 3, 0]])
LOST = {
  'ragged': ('receiver', [(1, 0), (1, 3)]),
  'all_to_all': ('sender', [(0, 2), (1, 0)]),
  'gather': ('receiver', [(1, 0), (1, 3)]),
}


def test_rows_without_room_are_dropped_and_counted():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 4, WIDTH)).astype(np.float32)
  gate = rng.uniform(0.5, 1, size=(2, 4, 1)).astype(np.float32)
  params = {
    'wi': {'kernel': rng.normal(size=(4, WIDTH, HIDDEN)).astype(np.float32)},
    'wo': {'kernel': rng.normal(size=(4, HIDDEN, WIDTH)).astype(np.float32)},
  }
  mesh = sharding.make_mesh(1, 2, 1, devices=jax.devices()[:2])

  def gradient(dispatch, choices, mesh=None):
    @jax.jit
    @partial(jax.grad, argnums=(0, 1, 2), has_aux=True)
    def run(params, x, gate):
      assignment = moe.Assignment(
        expert_GxSxK=jnp.asarray(choices[..., None]),
        gate_GxSxK=gate,
        position_GxSxK=jnp.zeros((2, 4, 1), jnp.int32),
        num_experts=4,
      )
      experts = Experts(params, None, Mlp(HIDDEN))
      y, lost = dispatch(experts, x, assignment, None), None
      if mesh is not None:
        y, lost = y
      counts = metrics.counts(assignment, None, None, lost)
      return (jnp.sin(y)).sum(), (y, counts)

    if mesh is None:
      return run(params, x, gate)
    with sharding.use_mesh(mesh):
      return run(params, x, gate)

  for exchange, (who, lost) in LOST.items():
    dispatch = partial(grouped, exchange=exchange, buffer_factor=1.0)
    ours, (y, counts) = gradient(dispatch, CHOICES, mesh)
    rest = CHOICES.copy()
    for at in lost:
      rest[at] = 4
      assert (y[at] == 0).all() and (ours[1][at] == 0).all()
      assert ours[2][at] == 0
    theirs, (y_rest, counts_rest) = gradient(moe.all_experts, rest)
    same((ours, (y, None)), (theirs, (y_rest, None)))
    other = {'sender': 'receiver', 'receiver': 'sender'}[who]
    assert counts[f'dropped_{who}'] == 2 and counts[f'dropped_{other}'] == 0
    np.testing.assert_array_equal(counts['chosen_E'], [5, 1, 1, 1])
    for name in ('kept_E', 'gate_mass_E', 'left_out'):
      np.testing.assert_allclose(counts[name], counts_rest[name], rtol=1e-6)
    summary = metrics.summary(jax.device_get(counts))
    assert summary['dropped'] == summary[f'dropped_{who}'] == 2 / 8
    assert summary[f'dropped_{other}'] == 0


def test_a_layer_reports_what_was_lost():
  layer = make_layer(exact=partial(grouped, buffer_factor=0.5))
  params, x, _ = arguments()
  with sharding.use_mesh(sharding.make_mesh(1, 8, 1)):
    _, aux = jax.jit(layer.apply)({'params': params}, x)
  # 16 choices a device, room for 8: at most half of 128 are kept.
  kept, lost = aux.metrics['kept_E'].sum(), aux.metrics['dropped_receiver']
  assert kept + lost == 128 and lost >= 64
  assert aux.metrics['dropped_sender'] == 0


def test_in_a_scanned_and_rematerialised_model():
  batch = tiny_models.make_batch(encoder=False, rows=2)
  results = []
  for dispatch in (moe.gather, grouped):
    model = tiny_models.make_model(
      encoder=False,
      k=2,
      scan=True,
      remat='full',
      dispatch=dispatch,
      capacity_factor_train=8.0,  # E: nothing is dropped.
    )
    params = tiny_models.make_params(model, batch)
    gradient = jax.grad(
      lambda params, model=model: model.loss(
        params, batch, jax.random.key(0), train=True
      )[0]
    )
    results.append(jax.jit(gradient)(params))
  jax.tree.map(
    partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), *results
  )
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(results[1]))


class BiasedMlp(nn.Module):
  hidden_width: int

  @nn.compact
  def __call__(self, x, *, deterministic=True):
    shape = (1, x.shape[-1])
    bias = self.param(
      'bias', sharding.named(nn.initializers.zeros, 'length', 'embed'), shape
    )
    return Linear(shape[1:], ('embed', 'mlp'), name='w')(x) + bias


def test_what_cannot_be_done_is_refused():
  params, x, _ = arguments()

  def refused(match, make_expert=Mlp, **options):
    layer = make_layer(
      exact=partial(grouped, **options), make_expert=make_expert
    )
    with pytest.raises(ValueError, match=match) as error:
      jax.eval_shape(layer.init, jax.random.key(0), x)
    assert '\n' not in str(error.value)

  refused(
    'this expert cannot be grouped: BiasedMlp declares parameter "bias" in "/" '
    'by itself, .*exact_dispatch=all_experts',
    make_expert=BiasedMlp,
  )
  refused(
    "ragged, all_to_all, gather, not 'carrier pigeon'",
    exchange='carrier pigeon',
  )
  refused('buffer_factor must be positive or None, not 0', buffer_factor=0)
  refused('chunks=7 does not divide the 64 tokens of a device', chunks=7)
  refused("'ragged', 'megablox', 'padded', not 'hand'", implementation='hand')
  refused(
    'megablox takes a multiple of 128 rows, not 2',
    implementation='megablox',
    chunks=64,
  )
  with pytest.raises(ValueError, match=r'not \(4, 2\), \(3, 5, 2\), \(3,\)'):
    grouped_matmul(jnp.ones((4, 2)), jnp.ones((3, 5, 2)), jnp.ones(3, int))
