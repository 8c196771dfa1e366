import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from sparse_experts.training import optimizers, schedules

# Every kind of parameter, stacked and not; all sizes differ.
NAMES = {
  'attention': ('layers', 'embed', 'heads', 'kv'),
  'bias': ('layers', 'expert', 'mlp'),
  'embedding': ('vocab', 'embed'),
  'experts': ('layers', 'expert', 'embed', 'mlp'),
  'gain': (),
  'mixed': ('embed', 'relpos_buckets', 'mlp'),
  'norm': ('layers', 'embed'),
  'relpos': ('heads', 'relpos_buckets'),
  'router': ('embed', 'router'),
  'temperature': ('layers', 'expert'),
}
SIZES = {
  'embed': 5,
  'expert': 3,
  'heads': 4,
  'kv': 6,
  'layers': 2,
  'mlp': 7,
  'relpos_buckets': 8,
  'router': 3,
  'vocab': 11,
}
BATCH = ('layers', 'expert')
STEPS = 4

ADAM = functools.partial(optimizers.adam, learning_rate=0.05)
ADAFACTOR = functools.partial(optimizers.adafactor, learning_rate=0.05)


def shape(names):
  return tuple(SIZES[name] for name in names)


def arrays(seed, scale):
  """A tree of arrays in which every slice of a stack has its own scale."""
  rng = np.random.default_rng(seed)

  def array(names):
    batch = [SIZES[name] if name in BATCH else 1 for name in names]
    slices = np.logspace(-2, 2, int(np.prod(batch))).reshape(batch)
    return (scale * slices * rng.normal(size=shape(names))).astype(np.float32)

  return {key: array(names) for key, names in NAMES.items()}


def gradients(seed=1):
  return [arrays(seed + step, scale=3.0) for step in range(STEPS)]


def train(tx, params, grads):
  """Parameters after each step."""
  update = jax.jit(tx.update)
  state, history = tx.init(params), []
  for grad in grads:
    updates, state = update(grad, state, params)
    params = optax.apply_updates(params, updates)
    history.append(params)
  return history


def assert_close(actual, expected, rtol=2e-5):
  assert_one = functools.partial(
    np.testing.assert_allclose, rtol=rtol, atol=1e-7
  )
  jax.tree.map(assert_one, actual, expected)


def adafactor_oracle(
  matrix, grads, *, learning_rate, beta1=None, weight_decay_rate=0
):
  """Adafactor on one [rows, columns] matrix, or on a vector; float64 loops."""
  p, m = matrix.astype(np.float64), np.zeros(matrix.shape)
  v = v_row = v_col = 0.0
  for t, g in enumerate(grads, start=1):
    g = g.astype(np.float64)
    beta2 = 1 - t**-0.8
    square = g**2 + 1e-30
    if p.ndim == 2:
      v_row = beta2 * v_row + (1 - beta2) * square.mean(1)
      v_col = beta2 * v_col + (1 - beta2) * square.mean(0)
      u = g / np.sqrt(np.outer(v_row, v_col) / v_row.mean())
    else:
      v = beta2 * v + (1 - beta2) * square
      u = g / np.sqrt(v)
    u = u / max(1.0, np.sqrt((u**2).mean()))
    u = learning_rate * max(1e-3, np.sqrt((p**2).mean())) * u
    if beta1 is not None:
      u = m = beta1 * m + (1 - beta1) * u
    p = p - u - weight_decay_rate * p
  return p


def oracle_of_stack(names, param, grads, **options):
  """Runs the oracle on each slice; merges column dimensions into one."""
  batch = [i for i, name in enumerate(names) if name in BATCH]
  rows = [i for i, name in enumerate(names) if name == 'embed']
  columns = [
    i for i, n in enumerate(names) if n in ('mlp', 'heads', 'kv', 'vocab')
  ]
  factored = rows and columns and len(batch + rows + columns) == len(names)
  order = batch + rows + columns if factored else list(range(len(names)))
  slices = int(np.prod([param.shape[i] for i in batch]))

  def cut(x):  # -> [slices, rows, columns] or [slices, elements]
    x = x.transpose(order)
    split = [param.shape[i] for i in rows] if factored else []
    return x.reshape(slices, *split, -1)

  p, gs = cut(param), [cut(g) for g in grads]
  stepped = [
    adafactor_oracle(p[i], [g[i] for g in gs], **options) for i in range(slices)
  ]
  moved = np.stack(stepped).reshape([param.shape[i] for i in order])
  return moved.transpose(np.argsort(order))


@pytest.mark.parametrize(
  'options', [{}, {'beta1': 0.9, 'weight_decay_rate': 0.01}]
)
def test_adafactor_equals_the_oracle(options):
  options = {'learning_rate': 0.1, **options}
  params, grads = arrays(0, scale=0.5), gradients()
  actual = train(optimizers.adafactor(NAMES, **options), params, grads)[-1]
  for key, names in NAMES.items():
    is_number = not set(names) - set(BATCH)  # Which does not decay.
    expected = oracle_of_stack(
      names,
      params[key],
      [grad[key] for grad in grads],
      **{**options, **({'weight_decay_rate': 0} if is_number else {})},
    )
    assert_close(actual[key], expected)


@pytest.mark.parametrize('axis', BATCH)
def test_a_stack_steps_as_its_slices_do(axis):
  stacked = {key: names for key, names in NAMES.items() if axis in names}
  separate = {
    f'{key}/{i}': tuple(name for name in names if name != axis)
    for key, names in stacked.items()
    for i in range(SIZES[axis])
  }

  def slices(tree):
    return {
      f'{key}/{i}': np.take(np.asarray(tree[key]), i, names.index(axis))
      for key, names in stacked.items()
      for i in range(SIZES[axis])
    }

  params, grads = arrays(0, scale=0.5), gradients()
  params = {key: params[key] for key in stacked}
  grads = [{key: grad[key] for key in stacked} for grad in grads]
  together = train(ADAFACTOR(stacked), params, grads)
  apart = train(ADAFACTOR(separate), slices(params), map(slices, grads))
  for one, other in zip(together, apart, strict=True):
    assert_close(slices(one), other, rtol=1e-6)


def test_adafactor_on_one_matrix_equals_optax():
  # Both factor [V, D] once optax is told that no dimension is too small.
  names = {'embedding': ('vocab', 'embed')}
  params = {'embedding': arrays(0, scale=0.5)['embedding']}
  grads = [{'embedding': g['embedding']} for g in gradients()]
  schedule = schedules.rsqrt(warmup_steps=2)
  ours = optimizers.adafactor(
    names, learning_rate=schedule, beta1=0.9, weight_decay_rate=0.01
  )
  theirs = optax.adafactor(
    schedule, min_dim_size_to_factor=0, momentum=0.9, weight_decay_rate=0.01
  )
  assert_close(
    train(ours, params, grads), train(theirs, params, grads), rtol=2e-6
  )


def test_adafactor_options_do_what_they_say():
  # One step from rest: beta2 = 0, so u = sign(g) for a vector, of rms 1.
  params, grads = {'w': jnp.full(4, 5.0)}, {'w': jnp.array([1.0, -2, 3, -4])}

  def step(**options):
    tx = optimizers.adafactor({'w': ('embed',)}, learning_rate=0.1, **options)
    return tx.update(grads, tx.init(params), params)[0]['w']

  sign = np.array([1, -1, 1, -1])
  # Parameter scale 5, rate .1.
  np.testing.assert_allclose(step(), -0.5 * sign, rtol=1e-6)
  np.testing.assert_allclose(
    step(multiply_by_parameter_scale=False), -0.1 * sign, rtol=1e-6
  )
  np.testing.assert_allclose(
    step(clipping_threshold=0.5), -0.25 * sign, rtol=1e-6
  )
  np.testing.assert_allclose(
    step(clipping_threshold=None), -0.5 * sign, rtol=1e-6
  )
  np.testing.assert_allclose(step(epsilon2=8.0), -0.8 * sign, rtol=1e-6)


def test_adafactor_keeps_only_the_moments_it_needs():
  params = jax.tree.map(jnp.asarray, arrays(0, scale=1.0))
  state = optimizers.adafactor(NAMES, learning_rate=0.1).init(params)
  assert jax.tree.map(jnp.shape, state[0].moments) == {
    'attention': {'v_row': (2, 5), 'v_col': (2, 4, 6)},
    'bias': {'v': (2, 3, 7)},
    'embedding': {'v_row': (5,), 'v_col': (11,)},
    'experts': {'v_row': (2, 3, 5), 'v_col': (2, 3, 7)},
    'gain': {'v': ()},
    'mixed': {'v': (5, 8, 7)},
    'norm': {'v': (2, 5)},
    'relpos': {'v': (4, 8)},
    'router': {'v': (5, 3)},
    'temperature': {'v': (2, 3)},
  }


def test_roles_can_be_extended():
  roles = {**optimizers.ROLES, 'fused': 'column'}
  names = {'qkv': ('embed', 'fused')}
  tx = optimizers.adafactor(names, learning_rate=0.1, roles=roles)
  moments = tx.init({'qkv': jnp.zeros((2, 3))})[0].moments
  assert set(moments['qkv']) == {'v_row', 'v_col'}


def boxed():
  return {
    key: nn.LogicallyPartitioned(jnp.zeros(shape(names)), names)
    for key, names in NAMES.items()
  }


def specs(tx):
  return nn.get_partition_spec(jax.eval_shape(tx.init, boxed()))


def test_adafactor_state_carries_logical_names():
  tx = optimizers.adafactor(
    NAMES, learning_rate=schedules.rsqrt(), beta1=0.9, max_grad_norm=1.0
  )
  _, second, schedule, momentum = specs(tx)
  assert second.step == schedule.count == P()
  assert second.moments['experts'] == {
    'v_row': P('layers', 'expert', 'embed'),
    'v_col': P('layers', 'expert', 'mlp'),
  }
  assert second.moments['attention'] == {
    'v_row': P('layers', 'embed'),
    'v_col': P('layers', 'heads', 'kv'),
  }
  assert second.moments['router'] == {'v': P('embed', 'router')}
  assert momentum.ema == {key: P(*names) for key, names in NAMES.items()}


def test_adam_state_carries_logical_names():
  tx = optimizers.adam(
    NAMES, learning_rate=schedules.rsqrt(), weight_decay=0.1, max_grad_norm=1.0
  )
  adam = specs(tx)[1][0]
  expected = {key: P(*names) for key, names in NAMES.items()}
  assert adam.mu == adam.nu == expected


@pytest.mark.parametrize('build', [optimizers.adam, optimizers.adafactor])
def test_state_of_plain_parameters_has_the_same_shapes_unboxed(build):
  tx = build(NAMES, learning_rate=schedules.rsqrt(), max_grad_norm=1.0)
  box = lambda x: isinstance(x, nn.LogicallyPartitioned)
  state = jax.eval_shape(tx.init, boxed())
  unbox = functools.partial(
    jax.tree.map, lambda x: x.value if box(x) else x, is_leaf=box
  )
  plain = jax.eval_shape(tx.init, unbox(boxed()))
  assert plain == unbox(plain) == unbox(state) != state


def test_adam_equals_its_equations():
  params, grads = arrays(0, scale=0.5), gradients()
  tx = optimizers.adam(
    NAMES, learning_rate=0.1, b1=0.8, b2=0.9, eps=0.5, weight_decay=0.3
  )
  actual = train(tx, params, grads)[-1]
  for key, names in NAMES.items():
    decay = 0.3 if set(names) - set(BATCH) else 0.0  # Not of single numbers.
    p, m, v = params[key].astype(np.float64), 0.0, 0.0
    for t, grad in enumerate(grads, start=1):
      g = grad[key].astype(np.float64)
      m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
      m_hat, v_hat = m / (1 - 0.8**t), v / (1 - 0.9**t)
      p = p - 0.1 * (m_hat / (np.sqrt(v_hat) + 0.5) + decay * p)
    assert_close(actual[key], p)


def test_adam_decays_only_when_told_to():
  # Without memory a step is g / (|g| + eps) = 3 / (3 + 1), times the rate.
  params, grads = {'w': jnp.full(2, 8.0)}, {'w': jnp.full(2, 3.0)}
  tx = ADAM({'w': ('embed',)}, learning_rate=0.1, b1=0.0, b2=0.0, eps=1.0)
  updates, _ = tx.update(grads, tx.init(params), params)
  np.testing.assert_allclose(updates['w'], -0.075, rtol=1e-6)


@pytest.mark.parametrize('build', [ADAM, ADAFACTOR])
def test_reduces_a_quadratic_without_recompiling(build):
  names = {'w': ('embed', 'mlp'), 'b': ('mlp',)}
  target = {'w': jnp.arange(6.0).reshape(2, 3), 'b': jnp.ones(3)}
  loss = lambda params: sum(
    jnp.sum((params[key] - target[key]) ** 2) for key in params
  )
  tx, traces = build(names), []

  @jax.jit
  def step(params, state):
    traces.append(1)
    updates, state = tx.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state

  params = jax.tree.map(jnp.ones_like, target)
  before, state = loss(params), tx.init(params)
  for _ in range(100):
    params, state = step(params, state)
  assert loss(params) < 0.1 * before
  assert len(traces) == 1


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize('build', [ADAM, ADAFACTOR])
def test_computes_in_float32_whatever_it_is_given(build, dtype):
  # 3 and 1 + 1/128 are bfloat16 numbers, their squares are not.
  grads = {'w': jnp.array([[3.0, 1 + 1 / 128]])}
  params = {'w': jnp.array([[0.5, -2.0]])}
  tx = build({'w': ('embed', 'mlp')}, max_grad_norm=1.0)
  cast = functools.partial(jax.tree.map, lambda x: x.astype(dtype))
  updates, state = tx.update(cast(grads), tx.init(cast(params)), cast(params))
  expected, expected_state = tx.update(grads, tx.init(params), params)
  assert jax.tree.map(jnp.array_equal, state, expected_state) == jax.tree.map(
    lambda _: True, state
  )
  assert updates['w'].dtype == jnp.float32
  np.testing.assert_array_equal(updates['w'], expected['w'])
  for leaf in jax.tree.leaves(state):
    assert leaf.dtype in (jnp.float32, jnp.int32)


@pytest.mark.parametrize('build', [ADAM, ADAFACTOR])
def test_zero_gradients_do_nothing(build):
  params = arrays(0, scale=1.0)
  zeros = [jax.tree.map(np.zeros_like, params)] * 2
  assert_close(
    train(build(NAMES, max_grad_norm=1.0), params, zeros)[-1], params
  )


def test_a_row_without_gradient_beside_large_gradients():
  # v_row = (1e-30, 1e18 and more): their quotient is no float32.
  names, params = {'w': ('embed', 'mlp')}, {'w': jnp.ones((2, 3))}
  grads = {'w': jnp.array([[0.0, 0, 0], [1e9, -3e9, 0]])}
  (after,) = train(ADAFACTOR(names), params, [grads])
  np.testing.assert_array_equal(after['w'][0], 1.0)
  assert np.isfinite(after['w']).all()
  assert after['w'][1, 0] < 1 < after['w'][1, 1]


@pytest.mark.parametrize('build', [ADAM, ADAFACTOR])
def test_gradients_are_clipped_by_their_global_norm(build):
  # Norm of (3, 4) is 5, five times the limit: the same as gradients / 5.
  names = {'a': ('embed',), 'b': ('mlp',)}
  params = {'a': jnp.ones(1), 'b': jnp.ones(1)}
  large, small = (
    {'a': jnp.array([3.0 * c]), 'b': jnp.array([4.0 * c])} for c in (1, 0.2)
  )
  # Small gradients after the first make a step depend on the first one's size.
  after = [jax.tree.map(lambda g: 0.1 * g, small)] * 2
  clipped = train(build(names, max_grad_norm=1.0), params, [large, *after])
  assert_close(clipped, train(build(names), params, [small, *after]))
  unclipped = train(build(names), params, [large, *after])
  assert abs(unclipped[-1]['a'] - clipped[-1]['a']) > 1e-4


@pytest.mark.parametrize(
  ('build', 'option', 'value'),
  [
    (build, option, value)
    for build, options in [
      (ADAM, ['b1', 'b2', 'eps', 'weight_decay', 'max_grad_norm']),
      (
        ADAFACTOR,
        [
          'beta1',
          'clipping_threshold',
          'decay_rate',
          'epsilon1',
          'epsilon2',
          'learning_rate',
          'max_grad_norm',
          'weight_decay_rate',
        ],
      ),
    ]
    for option in options
    for value in (-0.1, float('nan'), float('inf'))
  ],
)
def test_bad_arguments_are_named_in_one_line(build, option, value):
  with pytest.raises(ValueError) as error:
    build({'w': ('embed',)}, **{option: value})
  shown = 'value' if option == 'learning_rate' else option
  assert f'{shown}={value}' in str(error.value)
  assert '\n' not in str(error.value)


def test_a_name_without_a_role_is_an_error_that_names_it():
  names = {'block': {'wi': ('embed', 'mpl')}}
  with pytest.raises(ValueError, match=r"block/wi: axis 'mpl' has role None"):
    ADAFACTOR(names)
  with pytest.raises(ValueError, match=r"axis 'mpl' has role col;"):
    ADAFACTOR(names, roles={**optimizers.ROLES, 'mpl': 'col'})


@pytest.mark.parametrize(
  'params',
  [
    {'wi': jnp.zeros((2, 3)), 'wo': jnp.zeros(3)},
    {'wi': jnp.zeros((4, 2, 3))},
    {},
  ],
)
def test_names_that_do_not_match_the_parameters_are_an_error(params):
  tx = ADAFACTOR({'wi': ('embed', 'mlp')})
  with pytest.raises(ValueError, match='one name per dimension') as error:
    tx.init(params)
  assert '\n' not in str(error.value)
