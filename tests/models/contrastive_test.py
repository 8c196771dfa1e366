"""Contrastive losses by numpy, over microbatches and devices; the towers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from sparse_experts import moe, sharding
from sparse_experts.data.dataset import Dataset
from sparse_experts.layers.attention import Attention
from sparse_experts.layers.embed import TokenEmbed
from sparse_experts.layers.mlp import Mlp
from sparse_experts.models.auxiliary import Totals
from sparse_experts.models.contrastive import KINDS, Contrastive, Rows
from sparse_experts.models.sums import summary
from sparse_experts.models.transformer import Block, Stack
from sparse_experts.models.two_towers import Embeddings, TextTower, TwoTowers
from sparse_experts.models.vision import VisionTransformer
from sparse_experts.planning import ledger, workload
from sparse_experts.training import optimizers

partial = functools.partial

B, L, M, A, V = 8, 6, 4, 5, 40
WEIGHTS = np.array([1, 0, 1, 1, 0.5, 1, 0, 2], np.float32)
INITIAL = {
  'softmax': {},
  'sigmoid': {'initial_scale': 10.0, 'initial_bias': -10.0},
}


def make_stack(layers=2, sparse_layers=2):
  mlp = partial(Mlp, hidden_width=12)
  block = partial(
    Block,
    make_attention=partial(Attention, num_heads=2, head_width=4),
    make_mlp=mlp,
    make_moe=partial(
      moe.MoE,
      make_router=partial(moe.TopK, num_experts=4, k=1),
      make_expert=mlp,
    ),
  )
  return Stack(num_layers=layers, make_block=block, sparse_layers=sparse_layers)


def make_tower(**arguments):
  return TextTower(TokenEmbed(V, 8), make_stack(**arguments))


def make_model(kind='softmax', right=None, **arguments):
  module = TwoTowers(make_tower(), right, A, **INITIAL[kind])
  return Contrastive(module, kind=kind, **arguments)


def make_batch(weights=WEIGHTS):
  """Texts of 1 to L and of 1 to M tokens."""
  random = np.random.default_rng(0)

  def texts(length):
    ids = random.integers(2, V, (B, length))
    lengths = random.integers(1, length + 1, B)
    return jnp.asarray(ids * (np.arange(length) < lengths[:, None]), jnp.int32)

  return {'left': texts(L), 'right': texts(M), 'weight': jnp.asarray(weights)}


def make_params(model, batch):
  """Drawn by numpy; all experts differ."""
  boxed = jax.eval_shape(lambda: model.init(jax.random.key(0), batch))
  random = np.random.default_rng(2)
  return jax.tree.map(
    lambda x: jnp.asarray(0.4 * random.normal(size=x.shape), jnp.float32),
    nn.unbox(boxed),
  )


def make_embeddings(kind, scale=5.0):
  """Of length 1; halves of a pair are more similar than others, not always."""
  random = np.random.default_rng(3)
  left = random.normal(size=(B, A))
  right = left + random.normal(size=(B, A))
  left, right = (
    jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), jnp.float32)
    for x in (left, right)
  )
  bias = None if kind == 'softmax' else jnp.float32(-2.0)
  return Embeddings(left, right, jnp.float32(np.log(scale)), bias)


def oracle(kind, embeddings, weights):
  """(loss, accuracy), pair by pair."""
  left, right, log_scale, *bias = (
    np.asarray(x, float) for x in embeddings if x is not None
  )
  there = [i for i in range(len(left)) if weights[i] > 0]
  loss = hits = 0.0
  for x, y in ((left, right), (right, left)):
    for i in there:
      z = {j: np.exp(log_scale) * x[i] @ y[j] + sum(bias) for j in there}
      if kind == 'softmax':
        row = np.log(sum(np.exp(z[j]) for j in there)) - z[i]
      else:
        row = sum(np.logaddexp(0, -z[j] if i == j else z[j]) for j in there)
      loss += weights[i] * row / 2
      hits += weights[i] * (max(z, key=z.get) == i) / 2
  return loss / weights.sum(), hits / weights.sum()


def slopes(function, arrays, step=1e-5):
  """Central differences of a function of a list of arrays."""
  arrays = [np.array(x, float) for x in arrays]
  found = []
  for x in arrays:
    slope = np.zeros_like(x)
    for i in np.ndindex(x.shape):
      here, values = x[i], []
      for there in (here + step, here - step):
        x[i] = there
        values.append(function(arrays))
      x[i] = here
      slope[i] = (values[0] - values[1]) / (2 * step)
    found.append(slope)
  return found


@pytest.mark.parametrize('kind', KINDS)
def test_loss_and_gradient(kind):
  model, batch = make_model(kind, loss_weights={}), make_batch()
  embeddings = make_embeddings(kind)
  weights = WEIGHTS.astype(float)
  loss, accuracy = oracle(kind, embeddings, weights)
  judge = lambda e: model.judge(e, {}, batch, model.totals(batch))
  (found, sums), slope = jax.value_and_grad(judge, has_aux=True)(embeddings)
  np.testing.assert_allclose(found, loss, rtol=1e-5)
  said = summary(sums)
  assert 0 < accuracy < 1
  np.testing.assert_allclose(said['loss'], loss, rtol=1e-5)
  np.testing.assert_allclose(said['accuracy'], accuracy, rtol=1e-5)
  assert said['rows'] == 6.5
  expected = slopes(
    lambda arrays: oracle(kind, arrays, weights)[0], jax.tree.leaves(embeddings)
  )
  for x, y in zip(jax.tree.leaves(slope), expected, strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


def test_two_orthogonal_pairs_by_hand():
  """Similarities are 1 and 0: z is s + b for the pairs, and b else."""
  eye, s, b = jnp.eye(2), 3.0, -1.0
  batch = {'left': jnp.ones((2, 1)), 'weight': jnp.ones(2)}
  expected = {
    'softmax': np.log(1 + np.exp(-s)),
    'sigmoid': np.log(1 + np.exp(-(s + b))) + np.log(1 + np.exp(b)),
  }
  for kind, bias in (('softmax', None), ('sigmoid', jnp.float32(b))):
    embeddings = Embeddings(eye, eye, jnp.float32(np.log(s)), bias)
    judged = make_model(kind).measure(embeddings, batch, Totals(2.0, {}))
    np.testing.assert_allclose(judged.loss, expected[kind], rtol=1e-6)
    assert float(judged.means['accuracy'].total) == 2.0


def parts_of(model, embeddings, batch, n):
  """Loss and sums of n microbatches of the embeddings, as a step has them."""
  rows = Rows(embeddings.left_BxA, embeddings.right_BxA, batch['weight'])
  rows = jax.tree.map(lambda x: x.reshape(n, -1, *x.shape[1:]), rows)
  totals = jax.tree.map(lambda x: x / n, Totals(batch['weight'].sum(), {}))
  totals = totals.replace(rows=jax.lax.stop_gradient(rows))
  losses, sums = [], []
  for i in range(n):
    own = embeddings._replace(
      left_BxA=rows.left_BxA[i], right_BxA=rows.right_BxA[i]
    )
    part = {'left': own.left_BxA, 'weight': rows.weights_B[i]}
    judged = model.measure(own, part, totals.replace(part=jnp.int32(i)))
    losses.append(judged.loss)
    sums.append((judged.means, judged.counts))
  added = jax.tree.map(lambda *x: sum(x), *sums)
  return sum(losses) / n, added


@pytest.mark.parametrize('kind,n', [('softmax', 4), ('sigmoid', 2)])
def test_microbatches_are_the_batch(kind, n):
  """Rows 0 and 1 weigh half of 2 and 3; the scale counts once."""
  model, batch = make_model(kind), make_batch()
  embeddings = make_embeddings(kind)

  def whole(embeddings):
    judged = model.measure(embeddings, batch, Totals(batch['weight'].sum(), {}))
    return judged.loss, (judged.means, judged.counts)

  (loss, sums), slope = jax.value_and_grad(whole, has_aux=True)(embeddings)
  (loss_n, sums_n), slope_n = jax.value_and_grad(
    lambda e: parts_of(model, e, batch, n), has_aux=True
  )(embeddings)
  close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  close(loss_n, loss)
  jax.tree.map(close, slope_n, slope)
  jax.tree.map(close, sums_n, sums)


def test_devices_and_microbatches_are_one():
  """Each device has a row of each of two microbatches of four."""
  model, batch = make_model(), make_batch()
  embeddings = make_embeddings('softmax')
  both = jax.value_and_grad(
    lambda e, batch: parts_of(model, e, batch, 2), has_aux=True
  )
  expected = both(embeddings, batch)
  placement = sharding.Placement(devices=jax.devices()[:4])
  with placement.use() as mesh:
    split = sharding.batch_sharding(mesh, (B, A))
    embeddings = embeddings._replace(
      left_BxA=jax.device_put(embeddings.left_BxA, split),
      right_BxA=jax.device_put(embeddings.right_BxA, split),
    )
    found = jax.jit(both)(embeddings, batch)
  jax.tree.map(
    partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found, expected
  )


@pytest.mark.parametrize('kind', KINDS)
def test_rows_that_fill_up_change_nothing(kind):
  """Neither loss, gradient nor routing; though they have tokens here."""
  model, batch = make_model(kind), make_batch()
  params = make_params(model, batch)
  other = {**batch, 'left': batch['left'].at[1].set(9)}
  take = jax.jit(
    jax.value_and_grad(partial(model.loss, train=False), has_aux=True)
  )
  some, others = (take(params, each) for each in (batch, other))
  jax.tree.map(np.testing.assert_array_equal, some, others)
  (_, sums), slope = some
  is_there = WEIGHTS > 0
  for side in ('left', 'right'):
    tokens = (np.asarray(batch[side])[is_there] > 0).sum()
    assert sums['layers'][f'{side}/encoder/layers_1']['tokens'] == tokens
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(slope))


def test_a_scale_at_its_limit_can_come_back():
  """CLIP's is 100 at most; SigLIP's has no limit."""
  weights = np.ones(B)
  batch = {'left': jnp.ones((B, 1)), 'weight': jnp.ones(B)}
  near = np.random.default_rng(4).normal(size=(B, A)) * 0.1 + np.eye(A)[0]
  near = jnp.asarray(near / np.linalg.norm(near, axis=1, keepdims=True))

  def take(kind, shift):
    embeddings = make_embeddings(kind, scale=1000.0)
    embeddings = embeddings._replace(
      left_BxA=near, right_BxA=jnp.roll(near, shift, axis=0)
    )
    loss = lambda e: make_model(kind).measure(e, batch, Totals(1.0, {})).loss
    value, slope = jax.value_and_grad(loss)(embeddings)
    return value, slope.log_scale, embeddings

  def at(scale, embeddings):
    return embeddings._replace(log_scale=np.log(scale))

  # The halves of pairs are equal: a larger scale is better, and not had.
  value, slope, embeddings = take('softmax', 0)
  loss = lambda scale: oracle('softmax', at(scale, embeddings), weights)[0]
  np.testing.assert_allclose(value, loss(100), rtol=1e-4)
  assert loss(101) < loss(100) - 1e-4
  assert slope == 0
  # The halves of other pairs are equal: a smaller one is better.
  value, slope, embeddings = take('softmax', 1)
  loss = lambda scale: oracle('softmax', at(scale, embeddings), weights)[0]
  np.testing.assert_allclose(value, loss(100), rtol=1e-4)
  expected = (loss(100 * np.exp(1e-4)) - loss(100 * np.exp(-1e-4))) / 2e-4
  np.testing.assert_allclose(slope, expected, rtol=1e-3)
  value, _, embeddings = take('sigmoid', 1)
  expected, _ = oracle('sigmoid', embeddings, weights)
  np.testing.assert_allclose(value, expected, rtol=1e-4)


def test_towers_begin_as_published():
  batch = make_batch()
  for kind, scale, bias in (('softmax', 1 / 0.07, None), ('sigmoid', 10, -10)):
    model = make_model(kind)
    boxed = jax.jit(model.init)(jax.random.key(0), batch)
    params = nn.unbox(boxed)
    np.testing.assert_allclose(np.exp(params['log_scale']), scale, rtol=1e-6)
    assert params.get('bias') == bias
    assert sharding.names_of(boxed)['log_scale'] == ()


def test_a_scale_does_not_decay():
  names = {'log_scale': (), 'kernel': ('embed', 'kv')}
  params = {'log_scale': jnp.float32(2.0), 'kernel': jnp.ones((3, 2))}
  nothing = jax.tree.map(jnp.zeros_like, params)
  for make in (
    partial(optimizers.adam, weight_decay=0.1),
    partial(optimizers.adafactor, weight_decay_rate=0.1),
  ):
    tx = make(names, learning_rate=0.5)
    updates, _ = tx.update(nothing, tx.init(params), params)
    assert updates['log_scale'] == 0
    assert (updates['kernel'] < 0).all()


def test_a_shared_tower_is_one():
  """Equal texts have equal vectors on both sides; two towers do not agree."""
  batch = make_batch()
  batch['left'] = jnp.pad(batch['right'], ((0, 0), (0, L - M)))
  for right, is_shared in ((None, True), (make_tower(), False)):
    model = make_model(right=right)
    params = make_params(model, batch)
    sides = {'left'} if is_shared else {'left', 'right'}
    assert sides == params.keys() & {'left', 'right'}
    found, auxes = model.apply(params, batch)
    assert list(auxes) == ['left/encoder/layers_1', 'right/encoder/layers_1']
    # Padding to another length changes nothing, with no capacity.
    same = np.allclose(found.left_BxA, found.right_BxA, atol=1e-5)
    assert same == is_shared
    for z_BxA, weight in zip(found.left_BxA, WEIGHTS):
      np.testing.assert_allclose(
        np.linalg.norm(z_BxA), float(weight > 0), atol=1e-6
      )


def test_a_text_is_the_mean_over_its_tokens():
  tower, batch = make_tower(), make_batch()
  batch = {'input': batch['left'], 'weight': batch['weight']}
  variables = nn.unbox(jax.jit(tower.init)(jax.random.key(0), batch))
  found, _ = jax.jit(tower.apply)(variables, batch)
  text = lambda tower, batch: tower.text(batch['input'])[0]
  y_BxLxD = jax.jit(partial(tower.apply, method=text))(variables, batch)
  for b, tokens in enumerate(batch['input']):
    if WEIGHTS[b] == 0:
      assert not found[b].any()
      continue
    mean = np.mean([y_BxLxD[b, i] for i in range(L) if tokens[i] > 0], axis=0)
    np.testing.assert_allclose(found[b], mean, atol=1e-5)


def test_an_image_and_its_text():
  """A vision Transformer without head is a tower."""
  encoder = make_stack(layers=1, sparse_layers=1)
  image = VisionTransformer(encoder, (4, 4, 1), 2, 8, num_outputs=None)
  module = TwoTowers(image, make_tower(), A, features=('image', 'caption'))
  model = Contrastive(module)
  shapes = model.features.shapes({'caption': M}, B)
  assert shapes['left'].shape == (B, 4, 4, 1)
  assert model.features.size({'caption': M}) == '4 x 4 x 1 image, 4 caption'
  random = np.random.default_rng(0)
  batch = {
    **make_batch(),
    'left': jnp.asarray(random.normal(size=(B, 4, 4, 1))),
  }
  params = make_params(model, batch)
  assert 'head' not in params['left']
  _, sums = jax.jit(partial(model.loss, train=False))(params, batch)
  # 6 images of 4 patches and a class token.
  assert sums['layers']['left/encoder/layers_0']['tokens'] == 30


@pytest.mark.parametrize('right', [None, make_tower()], ids=['shared', 'two'])
def test_what_it_costs_by_hand(right):
  """Of a pair, both texts; the workload, of calls, agrees."""
  model = make_model(right=right, capacity_factor_train=None)
  lengths = {'inputs': L, 'targets': M}
  facts = ledger.ledger(model, lengths)
  D, F, E = 8, 12, 4
  block = lambda n: 4 * D * D * n + 2 * D * n * n
  text = lambda n: 2 * block(n) + 2 * (2 * D * F * n) + D * E * n + D * A
  by_hand = 2 * (text(L) + text(M))
  assert facts['forward_flops_per_sequence'] == by_hand
  assert facts['executed_forward_flops_per_sequence'] == by_hand
  assert facts['train_flops_per_token'] == round(3 * by_hand / (L + M))
  towers = 1 if right is None else 2
  assert facts['components']['projections'] == towers * D * A
  assert facts['components']['token embedding'] == towers * V * D
  assert facts['components']['left/encoder experts'] == E * 2 * D * F
  shapes = model.features.shapes(lengths, B)
  _, found = workload.trace(
    model,
    lambda: jax.eval_shape(
      lambda key: model.init(key, shapes), jax.random.key(0)
    ),
  )
  assert found.forward_flops == B * by_hand
  groups = {block.group for block in found.blocks.values() if block.choices}
  assert groups == ({None} if right is None else {(L, L), (M, M)})
  streams = [block.stream for block in found.blocks.values()]
  of_sides = [B * (L + M) * D] if right is None else [B * L * D, B * M * D]
  assert sorted(streams) == sorted(of_sides * 2)


def test_errors_are_one_line():
  towers = make_model().module
  with pytest.raises(ValueError, match="kind must be one of .*'clip'"):
    Contrastive(towers, kind='clip')
  with pytest.raises(ValueError, match='initial_bias=None .* -10.0 in SigLIP'):
    Contrastive(towers, kind='sigmoid')
  with pytest.raises(ValueError, match='initial_bias=-10.0 .* set it to None'):
    Contrastive(make_model('sigmoid').module)
  with pytest.raises(ValueError, match='routers of a shared tower have two'):
    Contrastive(towers, bias_rate=0.001)
  with pytest.raises(ValueError, match='predicts no distribution'):
    make_model().predictions(None, {})
  dataset = Dataset('docs_summary', {'inputs': 8, 'targets': 4}, 4, pack=False)
  with pytest.raises(ValueError, match=f"'inputs' .* has 8100 .* only {V}: "):
    make_model().check_data(dataset)
  enough = TextTower(TokenEmbed(8100, 8), make_stack())
  module = dataclasses.replace(towers, left=enough)
  Contrastive(module).check_data(dataset)
