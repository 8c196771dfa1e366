"""What every expert promises, and that what is none is refused."""

import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tiny_experts
from flax import linen as nn
from tiny_experts import KINDS, NormAndBias, Plain

from sparse_experts import moe, sharding
from sparse_experts.layers.mlp import Mlp
from sparse_experts.moe.assignment import ungated
from sparse_experts.moe.experts import Experts, init

G, S, D, E = 2, 4, 4, 3
KEY = jax.random.key(0)
DISPATCHERS = {
  name: getattr(moe, name)
  for name in ('gather', 'einsum', 'grouped', 'all_experts')
}


def drawn(expert, num_experts=E, width=D):
  """Boxed shapes of stacked parameters, and numbers that are all different."""
  boxed = jax.eval_shape(init(expert, num_experts, width), KEY)
  rng = np.random.default_rng(0)
  numbers = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), boxed)
  return boxed, nn.unbox(numbers)


def assigned():
  """Two choices of each token, in which expert 1 has most; one has none."""
  assignment = ungated(
    jnp.asarray(
      [
        [[0, 1], [1, 2], [1, 0], [2, 1]],
        [[1, 0], [E, E], [1, 2], [1, E]],
      ],
      jnp.int32,
    ),
    E,
  )
  gate = np.random.default_rng(1).uniform(0.5, 1, (G, S, 2))
  return assignment.replace(gate_GxSxK=jnp.asarray(gate, jnp.float32))


@functools.cache
def reference(expert, definition):
  """y and the gradient of sum(y * cotangent), row by row in numpy."""
  _, params = drawn(expert)
  rng = np.random.default_rng(2)
  x, cotangent = rng.normal(size=(2, G, S, D))
  flat = {
    '/'.join(path): value
    for path, value in flax.traverse_util.flatten_dict(params).items()
  }
  choices = np.asarray(assigned().expert_GxSxK)
  gates = np.asarray(assigned().gate_GxSxK, np.float64)

  def run(arrays):
    y = np.zeros(x.shape)
    stacked = {name: a for name, a in arrays.items() if name != 'x'}
    for g, s, k in np.argwhere(choices < E):
      mine = {name: a[choices[g, s, k]] for name, a in stacked.items()}
      mine = flax.traverse_util.unflatten_dict(mine, sep='/')
      y[g, s] += gates[g, s, k] * definition(arrays['x'][g, s], mine)
    return y

  arrays = {'x': x, **flat}
  gradient = oracle.gradient(lambda a: (run(a) * cotangent).sum(), arrays)
  return arrays, cotangent, run(arrays), gradient


def check_against_numpy(expert, definition, dispatchers):
  arrays, cotangent, y, gradient = reference(expert, definition)
  x, *_ = (arrays := {n: np.float32(a) for n, a in arrays.items()}).values()
  params = flax.traverse_util.unflatten_dict(
    {n: a for n, a in arrays.items() if n != 'x'}, sep='/'
  )

  def objective(dispatch, params, x):
    y = dispatch(Experts(params, None, expert), x, assigned(), None)
    return (y * cotangent.astype(np.float32)).sum(), y

  @jax.jit
  def run(params, x):
    return {
      name: jax.grad(
        functools.partial(objective, dispatch), (0, 1), has_aux=True
      )(params, x)
      for name, dispatch in dispatchers.items()
    }

  for name, ((dparams, dx), ours) in run(params, x).items():
    found = flax.traverse_util.flatten_dict(dparams, sep='/')
    found |= {'x': dx, 'y': ours}
    assert found.keys() == {*gradient, 'y'}
    for leaf, theirs in {**gradient, 'y': y}.items():
      np.testing.assert_allclose(
        found[leaf], theirs, rtol=1e-3, atol=1e-4, err_msg=f'{name}: {leaf}'
      )
      assert np.abs(theirs).max() > 0.01


@pytest.mark.parametrize('name', KINDS)
def test_dispatchers_give_the_outputs_and_gradients_of_numpy(name):
  check_against_numpy(*KINDS[name], DISPATCHERS)


def test_parameters_of_its_own_run_where_experts_run_one_by_one():
  others = {n: d for n, d in DISPATCHERS.items() if n != 'grouped'}
  check_against_numpy(Plain(), tiny_experts.plain, others)
  with pytest.raises(ValueError) as error:
    check_against_numpy(Plain(), tiny_experts.plain, DISPATCHERS)
  assert str(error.value).splitlines()[0] == (
    'this expert cannot be grouped: Plain declares parameter "wi" in "/" by '
    'itself, and not by layers.parameters; declare it so, or set '
    'dispatch=gather and exact_dispatch=all_experts (in gin layer.MoE.dispatch '
    '= @gather.gather and layer.MoE.exact_dispatch = '
    '@all_experts.all_experts).'
  )


def test_parameters_have_names_and_the_size_that_one_expert_would_give_them():
  # A kernel's variance is 1 / fan-in, which counts no experts: its first axis
  # after E, two where the heads are put together.
  width, many = 32, 16
  experts = {n: e for n, (e, _) in KINDS.items() if n != 'heads'}
  boxed = jax.jit(
    lambda: {n: init(e, many, width)(KEY) for n, e in experts.items()}
  )()
  leaves = jax.tree_util.tree_leaves_with_path(
    boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)
  )
  assert len(leaves) > 20
  for path, leaf in leaves:
    assert leaf.names[0] == 'expert' and len(leaf.names) == leaf.value.ndim
    assert set(leaf.names) <= set(sharding.RULES)
    kind, value = path[-2].key, np.asarray(leaf.value)
    assert len(value) == many
    if value.ndim == 3:
      flat = value.reshape(many, -1)
      assert len(np.unique(flat, axis=0)) == many, kind
      deviation = np.sqrt(2 / value.size)
      np.testing.assert_allclose(
        value.var() * value.shape[1], 1, atol=5 * deviation, err_msg=kind
      )
    else:
      assert (value == (1 if path[-1].key == 'scale' else 0)).all()


def layer_of(expert, exact):
  return moe.MoE(
    make_router=functools.partial(
      moe.TopK, num_experts=8, k=2, kernel_init=nn.initializers.normal(0.5)
    ),
    make_expert=expert,
    exact_dispatch=exact,
  )


@pytest.mark.parametrize(
  'axes, exchange',
  [((1, 8, 1), 'ragged'), ((2, 2, 2), 'gather')],
  ids=str,
)
def test_eight_devices_equal_one(axes, exchange):
  x, cotangent = np.random.default_rng(0).normal(size=(2, 8, 4, D))

  def gradient(dispatch, params, x):
    def objective(params, x):
      y, _ = layer_of(NormAndBias, dispatch).apply({'params': params}, x)
      return (y * cotangent).sum(), y

    return jax.grad(objective, (0, 1), has_aux=True)(params, x)

  layer = layer_of(NormAndBias, moe.grouped)
  boxed = jax.eval_shape(layer.init, KEY, x)['params']
  rng = np.random.default_rng(1)
  params = jax.tree.map(
    lambda leaf: rng.normal(size=leaf.shape).astype(np.float32),
    nn.unbox(boxed),
  )
  one = jax.jit(functools.partial(gradient, moe.all_experts))(params, x)
  with sharding.use_mesh(mesh := sharding.make_mesh(*axes)):
    placed = jax.device_put(
      (params, x),
      (sharding.shardings(boxed, mesh), sharding.batch_sharding(mesh, x.shape)),
    )
    dispatch = functools.partial(moe.grouped, exchange=exchange)
    eight = jax.jit(functools.partial(gradient, dispatch))(*placed)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4),
    eight,
    one,
  )
  assert all(np.abs(leaf).max() > 0.01 for leaf in jax.tree.leaves(one))


def masks(dispatch, num_experts=4, mesh=None):
  """Which hidden units each of 16 rows keeps, boolean [16, 64].

  Two rows of a group meet the same expert. Matrices are the identity and tokens
  are ones, so a unit that is kept gives 2.
  """
  eye = np.broadcast_to(np.eye(64, dtype=np.float32), (num_experts, 64, 64))
  params = {'wi': {'kernel': eye}, 'wo': {'kernel': eye}}
  choice = jnp.arange(16, dtype=jnp.int32).reshape(4, 4, 1) // 2 % num_experts

  @jax.jit
  def run(params, x):
    assignment = ungated(choice, num_experts)
    y = []
    for deterministic in (False, True):
      experts = Experts(
        params, KEY, Mlp(64, dropout_rate=0.5), deterministic=deterministic
      )
      y.append(dispatch(experts, x, assignment, None))
    return y

  arguments = (params, np.ones((4, 4, 64), np.float32))
  if mesh is None:
    y, still = run(*arguments)
  else:
    with sharding.use_mesh(sharding.make_mesh(*mesh, jax.devices()[:4])):
      y, still = run(*arguments)
  assert (np.asarray(still) == 1).all()
  assert set(np.unique(y)) == {0, 2}
  return np.asarray(y).reshape(16, 64) == 2


@pytest.mark.parametrize(
  'dispatch, mesh',
  [
    *(
      pytest.param(dispatch, None, id=name)
      for name, dispatch in DISPATCHERS.items()
    ),
    pytest.param(functools.partial(moe.grouped, chunks=2), None, id='chunks'),
    pytest.param(
      functools.partial(moe.grouped, exchange='all_to_all'),
      (2, 2, 1),
      id='exchange',
    ),
  ],
)
def test_dropout_differs_between_experts_and_rows(dispatch, mesh):
  kept = masks(dispatch, mesh=mesh)
  # 64 fair coins are the same for two of 16 rows in 1 of 10^17 cases. Two rows
  # agree in 32 of them, with a deviation of 4.
  agree = (kept[:, None] == kept[None]).sum(-1)
  others = agree[~np.eye(16, dtype=bool)]
  assert others.min() > 12 and others.max() < 52
  assert 0.4 < kept.mean() < 0.6  # 0.5, with a deviation of 0.016.
