"""What is trained, by parameter and by expert: all else keeps every bit."""

import functools
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_models
from flax import linen as nn
from flax import traverse_util
from paths import ROOT

from sparse_experts import config, sharding
from sparse_experts.models import layout
from sparse_experts.moe.routers.deepseek import BIAS, DeepSeek
from sparse_experts.training import optimizers, state, step, subsets

partial = functools.partial

# Weight decay, momentum and clipping would each move what is frozen.
OPTIMIZERS = {
  'adafactor': partial(
    optimizers.adafactor, beta1=0.9, weight_decay_rate=0.01, max_grad_norm=0.5
  ),
  'adamw': partial(optimizers.adam, weight_decay=0.01, max_grad_norm=0.5),
}
NEW = (1, 2)  # The experts that are trained, of four.
STEPS = 20


def flat(tree):
  """Arrays of numpy by path."""
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): np.array(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def expert_axes(boxed):
  """The axis over experts of each array, by its path; None where none is."""
  leaves = jax.tree_util.tree_leaves_with_path(
    boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
  )
  axes = {}
  for path, leaf in leaves:
    found = [
      axis
      for axis, name in enumerate(getattr(leaf, 'names', ()))
      if name in ('expert', 'router')
    ]
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    axes[name] = found[0] if found else None
  return axes


# A step.


def make_model(scan):
  """A decoder of two sparse blocks, with balance biases."""
  router = partial(
    DeepSeek, num_experts=4, k=2, scores='sigmoid', balance_bias=True
  )
  return tiny_models.make_model(
    encoder=False,
    layers=2,
    sparse_layers=1,
    scan=scan,
    width=8,
    hidden_width=8,
    make_router=router,
    bias_rate=0.1,
  )


def begin(model, batch, optimizer, mesh):
  """A state whose optimizer has moved everything before, and its boxes."""
  boxed, tx = state.abstract(model, batch, optimizer)
  params = tiny_models.make_params(model, batch)
  random = np.random.default_rng(1)
  fresh = jax.eval_shape(tx.init, params)
  used = jax.tree.map(
    lambda leaf: (
      jnp.asarray(random.uniform(0.5, 1, leaf.shape), jnp.float32)
      if leaf.shape
      else jnp.zeros((), leaf.dtype)
    ),
    fresh,
  )
  placed = state.shardings(boxed, mesh)
  now = state.TrainState(jnp.int32(0), params, used, jnp.int32(0))
  return jax.device_put(now, placed), boxed, placed, tx


@pytest.mark.parametrize('devices', [1, 8])
@pytest.mark.parametrize('scan', [False, True])
@pytest.mark.parametrize('name', OPTIMIZERS)
def test_frozen_experts_keep_every_bit(name, scan, devices):
  model = make_model(scan)
  batch = tiny_models.make_batch(encoder=False)
  optimizer = partial(
    subsets.only,
    learning_rate=0.01,
    optimizer=OPTIMIZERS[name],
    trained={'experts': NEW, 'routers': NEW, 'attention': True},
  )
  mesh = sharding.make_mesh(
    data=2 if devices == 8 else 1,
    expert=4 if devices == 8 else 1,
    devices=jax.devices()[:devices],
  )
  with sharding.use_mesh(mesh):
    now, boxed, placed, tx = begin(model, batch, optimizer, mesh)
    for path, leaf in traverse_util.flatten_dict(now.params, sep='/').items():
      if devices == 8 and '/expert/' in path:
        assert 'expert' in leaf.sharding.spec, path
    before = [flat(tree) for tree in (now.params, now.opt_state)]
    take_step = step.jit_train_step(model, tx, mesh, placed, batch_size=8)
    for _ in range(STEPS):
      now, sums = take_step(now, batch, jax.random.key(0))
      assert sums['skipped'] == 0
  after = [flat(tree) for tree in (now.params, now.opt_state)]
  axes = [expert_axes(tree) for tree in (boxed.params, boxed.opt_state)]
  sliced = 0
  for old, new, axis_of in zip(before, after, axes, strict=True):
    assert old.keys() == new.keys() == axis_of.keys()
    for path, axis in axis_of.items():
      if axis is None:
        frozen = axis_of is axes[0] and '/attention/' not in path
        same = old[path].tobytes() == new[path].tobytes()
        assert same == frozen, path
        continue
      sliced += 1
      for j in range(4):
        one, other = (x[path].take(j, axis) for x in (old, new))
        if j in NEW:
          assert (one != other).any(), (path, j)
        else:
          assert one.tobytes() == other.tobytes(), (path, j)
  assert sliced > 6
  assert any(BIAS in path for path, axis in axes[0].items() if axis is not None)


def test_a_step_counts_and_moves_only_what_is_trained():
  """Descent by the whole gradient: the way is as long as its norm says.

  The optimizer is wrapped, and halves the way.
  """
  model = make_model(scan=False)
  batch = tiny_models.make_batch(encoder=False)
  names = sharding.names_of(
    jax.eval_shape(partial(model.init, shapes=batch), jax.random.key(0))
  )
  tx = subsets.only(
    names,
    learning_rate=1.0,
    optimizer=lambda names, learning_rate: optax.sgd(learning_rate),
    trained={'experts': NEW, 'decoder/layers_1/mlp_norm/.*': True},
  )

  def halved(grads, state, params):
    updates, state = whole(grads, state, params)
    return jax.tree.map(lambda update: update / 2, updates), state

  whole, tx = tx.update, tx._replace(update=halved)
  params = tiny_models.make_params(model, batch)
  now = state.TrainState(jnp.int32(0), params, tx.init(params), jnp.int32(0))
  take_step = jax.jit(
    partial(step.train_step, model=model, optimizer=tx, key=jax.random.key(0))
  )
  new, sums = take_step(now, batch)
  way = jax.tree.map(jnp.subtract, new.params, params)
  moved = {path for path, leaf in flat(way).items() if leaf.any()}
  assert moved == {
    path
    for path in flat(params)
    if '/expert/' in path or 'layers_1/mlp_norm' in path
  }
  np.testing.assert_allclose(
    optax.tree.norm(way), sums['gradient_norm'] / 2, rtol=1e-4
  )


# An optimizer.


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_experts_move_as_if_alone(name):
  """Two of four experts, as an optimizer of two does it."""
  names = {'wi': ('layers', 'expert', 'embed', 'mlp'), 'norm': ('embed',)}
  random = np.random.default_rng(0)
  shapes = {'wi': (2, 4, 3, 5), 'norm': (3,)}

  def draw():
    return {
      key: jnp.asarray(random.normal(size=shape), jnp.float32)
      for key, shape in shapes.items()
    }

  def alone(tree):
    return {'wi': tree['wi'][:, list(NEW)]}

  params, grads = draw(), [draw() for _ in range(3)]
  make = partial(OPTIMIZERS[name], learning_rate=0.1)
  expected, tx = alone(params), make({'wi': names['wi']})
  opt_state = tx.init(expected)
  for grad in grads:
    updates, opt_state = jax.jit(tx.update)(alone(grad), opt_state, expected)
    expected = optax.apply_updates(expected, updates)
  tx = subsets.only(
    names,
    learning_rate=0.1,
    optimizer=OPTIMIZERS[name],
    trained={'wi': NEW},
  )
  opt_state = tx.init(params)
  for grad in grads:
    # What is frozen may have any gradient.
    grad['wi'] = grad['wi'].at[:, 0].set(jnp.nan)
    grad['norm'] = grad['norm'] * jnp.inf
    updates, opt_state = jax.jit(tx.update)(grad, opt_state, params)
    params = optax.apply_updates(params, updates)
  np.testing.assert_allclose(alone(params)['wi'], expected['wi'], rtol=1e-6)


NAMES = {
  'embed': {'table': ('vocab', 'embed')},
  'layers_0': {
    'mlp': {'wi': ('embed', 'mlp')},
    'norm': {'scale': ('embed',)},
  },
  'layers_1': {
    'moe': {
      'expert': {'wi': ('expert', 'embed', 'mlp')},
      'router': {'kernel': ('embed', 'router'), 'scale': ()},
      'shared_expert': {'wi': ('embed', 'mlp')},
    }
  },
}
NAMES = {'decoder': NAMES}
SIZES = {'vocab': 7, 'embed': 2, 'mlp': 3, 'expert': 4, 'router': 4}


def params_of(names):
  return jax.tree.map(
    lambda axes: jax.ShapeDtypeStruct([SIZES[a] for a in axes], jnp.float32),
    names,
    is_leaf=lambda leaf: isinstance(leaf, tuple),
  )


def trained_of(trained, optimizer=OPTIMIZERS['adamw']):
  """Path in the decoder -> True, or the experts that are trained."""
  tx = subsets.only(
    NAMES, learning_rate=0.1, optimizer=optimizer, trained=trained
  )
  params = params_of(NAMES)
  jax.eval_shape(tx.update, params, jax.eval_shape(tx.init, params), params)
  found = {}
  for path, mask in flat(subsets.masks(tx, params)).items():
    if mask.any():
      experts = tuple(np.flatnonzero(mask).tolist())
      found[path.removeprefix('decoder/')] = mask.all() or experts
  return found


EXPERT, ROUTER = 'layers_1/moe/expert/wi', 'layers_1/moe/router/kernel'
SHARED = 'layers_1/moe/shared_expert/wi'
SCALE = 'layers_1/moe/router/scale'
DENSE = {
  'embed/table': True, 'layers_0/mlp/wi': True, 'layers_0/norm/scale': True,
}  # fmt: skip


@pytest.mark.parametrize(
  'trained,expected',
  [
    ('experts', {EXPERT: True}),
    ('routers', {ROUTER: True, SCALE: True}),
    ('moe', {EXPERT: True, ROUTER: True, SCALE: True, SHARED: True}),
    ({'non_moe': True, 'experts': (3, 1)}, {**DENSE, EXPERT: (1, 3)}),
    ({'experts': (0,), '.*/expert/wi': (2,)}, {EXPERT: (0, 2)}),
    ({'experts': (0,), '.*/expert/wi': True}, {EXPERT: True}),
    # A table's order says nothing.
    ({'.*/expert/wi': True, 'experts': (0,)}, {EXPERT: True}),
    ({'experts': (0, 1, 2, 3)}, {EXPERT: True}),
    (
      {'moe': (0, 2), '.*/(shared_expert|router)/(wi|scale)': True},
      {EXPERT: (0, 2), ROUTER: (0, 2), SCALE: True, SHARED: True},
    ),
  ],
)
def test_what_a_table_trains(trained, expected):
  assert trained_of(trained) == expected


@pytest.mark.parametrize(
  'trained,message',
  [
    ({'experts': (1, 4)}, 'expert 4 of .*expert/wi, which has experts 0 to 3'),
    ({'moe': (1,)}, r'router/scale, whose axes \(\) are not over experts'),
    ({'non_moe': (1,)}, r"axes \('vocab', 'embed'\) are not over experts"),
    ({'all': True, 'expert': (1,)}, "'expert' matches no parameter"),
    ({'experts': False}, "'experts' .* not False; leave out"),
    ({'experts': 1}, r"'experts' .* such as \(4, 5\), not 1"),
    ({'experts': ()}, r"'experts' .* not \(\)"),
    ({'experts': (-1,)}, r"'experts' .* not \(-1,\)"),
    ({'experts': (True, False)}, "'experts' .* not"),
    ({}, 'trains nothing'),
    (3, 'trained=3 must be a pattern of paths'),
    ({3: True}, 'must be a pattern of paths'),
  ],
)
def test_what_no_table_says(trained, message):
  with pytest.raises(ValueError, match=message) as error:
    trained_of(trained)
  assert '\n' not in str(error.value)


ROLES = {**optimizers.ROLES, 'expert': 'column'}


@pytest.mark.parametrize(
  'optimizer',
  [
    partial(optimizers.adafactor, roles=ROLES),
    lambda names, learning_rate: optax.GradientTransformation(
      lambda params: jnp.zeros(4), lambda grads, old, params: (grads, old)
    ),
  ],
)
def test_a_state_that_mixes_experts_is_refused(optimizer):
  with pytest.raises(
    ValueError, match='mixes what is trained with what is not'
  ):
    trained_of({'experts': (1,)}, optimizer)
  assert trained_of('experts', optimizer) == {EXPERT: True}


@pytest.fixture(scope='module')
def boxed_of():
  """scan -> parameters of seven blocks; it repeats two of them three times."""
  batch = tiny_models.make_batch(encoder=False)

  def boxed(scan):
    model = tiny_models.make_model(encoder=False, layers=7, scan=scan)
    return jax.eval_shape(partial(model.init, shapes=batch), jax.random.key(0))

  return {scan: boxed(scan) for scan in (False, True)}


def broadcast_masks(boxed, trained):
  """Masks, each of its parameter's shape."""
  tx = subsets.only(
    sharding.names_of(boxed),
    learning_rate=0.1,
    optimizer=OPTIMIZERS['adamw'],
    trained=trained,
  )
  params = nn.unbox(boxed)
  return jax.tree.map(
    lambda mask, leaf: np.broadcast_to(mask, leaf.shape),
    subsets.masks(tx, params),
    params,
  )


@pytest.mark.parametrize(
  'trained',
  [
    'decoder/layers_[23]/.*',
    {'decoder/layers_1/moe/.*': (0, 3), 'decoder/layers_3/.*': True},
    {'.*layers_0/.*': True, 'decoder/layers_[4-6]/.*/expert/.*': (2,)},
  ],
)
def test_layers_are_the_same_ones_with_scan(trained, boxed_of):
  plain = broadcast_masks(boxed_of[False], trained)['decoder']
  scanned = broadcast_masks(boxed_of[True], trained)['decoder']
  unrolled = layout.unroll(scanned, layout.kinds(7, 2))
  assert all(jax.tree.leaves(jax.tree.map(np.array_equal, plain, unrolled)))
  trained_blocks = {
    name for name, block in plain.items()
    if any(leaf.any() for leaf in jax.tree.leaves(block))
  }  # fmt: skip
  assert 2 <= len(trained_blocks) < 7


def test_a_pattern_of_stored_paths(boxed_of):
  """Position 0 of the period is blocks 0, 2 and 4."""
  masks = broadcast_masks(boxed_of[True], 'decoder/period/layers_0/.*')
  unrolled = layout.unroll(masks['decoder'], layout.kinds(7, 2))
  assert {
    name
    for name, block in unrolled.items()
    if any(leaf.any() for leaf in jax.tree.leaves(block))
  } == {'layers_0', 'layers_2', 'layers_4'}
  with pytest.raises(ValueError, match='matches no parameter'):
    broadcast_masks(boxed_of[False], 'decoder/period/layers_0/.*')


@pytest.mark.slow
@pytest.mark.parametrize('scan', [False, True])
def test_gradients_of_what_is_frozen_are_not_computed(scan):
  """Without those of the blocks, a third of a step and the logits remain."""
  batch = tiny_models.make_batch(encoder=False)
  model = tiny_models.make_model(encoder=False, scan=scan, hidden_width=64)

  def flops(trained):
    optimizer = partial(
      subsets.only,
      learning_rate=0.1,
      optimizer=OPTIMIZERS['adamw'],
      trained=trained,
    )
    boxed, tx = state.abstract(model, batch, optimizer)
    one = jax.jit(
      partial(step.train_step, model=model, optimizer=tx, key=jax.random.key(0))
    )
    program = one.lower(nn.unbox(boxed), batch).compile()
    return program.cost_analysis()['flops']

  assert flops('.*logits.*') < flops('all') / 2


def test_a_gin_file_trains_experts():
  """And so does what a run writes of it."""
  table = {'non_moe': True, 'experts': (1, 2)}
  files = [f'{ROOT}/tests/tiny.gin', f'{ROOT}/gin/finetune/subset.gin']
  bindings = ['MODEL_DIR=x', 'INITIAL_CHECKPOINT=y', f'TRAINED={table}']
  config.parse(files, bindings, [])
  texts = [config.text()]
  for text in texts * 2:
    with tempfile.NamedTemporaryFile('w', suffix='.gin') as file:
      file.write(text)
      file.flush()
      config.parse([file.name], [], [])
    tx = config.value('OPTIMIZER')(NAMES, learning_rate=0.1)
    found = flat(tx.trained(params_of(NAMES)))
    experts = found[f'decoder/{EXPERT}'][:, 0, 0]
    assert experts.tolist() == [False, True, True, False]
    assert found['decoder/layers_0/mlp/wi'].all()
