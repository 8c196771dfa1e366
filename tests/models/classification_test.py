"""Classification: losses and gradients by numpy, and the vision Transformer."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from sparse_experts import moe
from sparse_experts.data.dataset import Dataset
from sparse_experts.layers.attention import Attention
from sparse_experts.layers.mlp import Mlp
from sparse_experts.layers.norm import LayerNorm
from sparse_experts.models.classification import KINDS, Classification
from sparse_experts.models.consistency import Consistency
from sparse_experts.models.decoding import check_decodable
from sparse_experts.models.sums import summary
from sparse_experts.models.transformer import Block, Stack
from sparse_experts.models.vision import VisionTransformer
from sparse_experts.moe.routers.rl_r import RLR
from sparse_experts.planning import ledger

partial = functools.partial

B, V = 6, 4
WEIGHTS = np.array([1, 0.5, 0, 2, 1, 1], np.float32)


def make_module(sparse_layers=0, layers=2, make_router=None, **arguments):
  """A vision Transformer of 2 x 4 patches of 2 x 2."""
  mlp = partial(Mlp, hidden_width=12, activation='gelu')
  block = partial(
    Block,
    make_attention=partial(Attention, num_heads=2, head_width=4, scaled=True),
    make_mlp=mlp,
    make_moe=partial(
      moe.MoE,
      make_router=make_router
      or partial(
        moe.TopK, num_experts=4, k=2, kernel_init=nn.initializers.normal(0.5)
      ),
      make_expert=mlp,
    ),
    make_norm=LayerNorm,
  )
  stack = Stack(
    num_layers=layers,
    make_block=block,
    sparse_layers=sparse_layers,
    make_norm=LayerNorm,
  )
  return VisionTransformer(
    **{
      'encoder': stack,
      'image_shape': (4, 8, 1),
      'patch_size': 2,
      'width': 8,
      'num_outputs': V,
      **arguments,
    }
  )


def make_labels(kind):
  random = np.random.default_rng(1)
  if kind == 'softmax':
    return random.integers(0, V, B).astype(np.int32)
  if kind == 'sigmoid':
    return random.integers(0, 2, (B, V)).astype(np.int32)
  return random.normal(size=(B, V)).astype(np.float32)


def make_batch(kind='softmax', weights=WEIGHTS):
  image = np.random.default_rng(0).normal(size=(B, 4, 8, 1))
  return {
    'input': jnp.asarray(image, jnp.float32),
    'label': jnp.asarray(make_labels(kind)),
    'weight': jnp.asarray(weights),
  }


def make_params(model, batch):
  """Drawn by numpy; all experts differ."""
  boxed = jax.eval_shape(lambda: model.init(jax.random.key(0), batch))
  random = np.random.default_rng(2)

  def draw(leaf):
    return jnp.asarray(0.4 * random.normal(size=leaf.shape), jnp.float32)

  return jax.tree.map(draw, nn.unbox(boxed))


def oracle(kind, outputs, labels, weights, smoothing):
  """(loss, gradient by outputs, mean loss, the other mean), row by row."""
  loss = plain = other = 0.0
  gradient = np.zeros_like(outputs)
  for z, y, w, g in zip(outputs, labels, weights, gradient):
    if kind == 'softmax':
      p = np.exp(z) / np.exp(z).sum()
      q = np.full(V, smoothing / V)
      q[y] += 1 - smoothing
      row, unsmoothed = -(q * np.log(p)).sum(), -np.log(p[y])
      slope, right = p - q, float(z.argmax() == y)
    elif kind == 'sigmoid':
      p = 1 / (1 + np.exp(-z))
      row = unsmoothed = -sum(
        np.log(p[v]) if y[v] else np.log(1 - p[v]) for v in range(V)
      )
      slope, right = p - y, float(y[z.argmax()])
    else:
      row = unsmoothed = ((z - y) ** 2).sum() / V
      slope, right = 2 * (z - y) / V, np.abs(z - y).sum() / V
    loss += w * row / weights.sum()
    plain += w * unsmoothed / weights.sum()
    other += w * right / weights.sum()
    g[:] = w * slope / weights.sum()
  return loss, gradient, plain, other


@pytest.mark.parametrize(
  'kind,smoothing',
  [('softmax', 0.0), ('softmax', 0.2), ('sigmoid', 0.0), ('squared', 0.0)],
)
def test_loss_and_gradient(kind, smoothing):
  model = Classification(
    make_module(), loss_weights={}, kind=kind, label_smoothing=smoothing
  )
  batch = make_batch(kind)
  outputs = np.random.default_rng(3).normal(size=(B, V))
  loss, gradient, plain, other = oracle(
    kind, outputs, make_labels(kind), WEIGHTS.astype(float), smoothing
  )

  def judge(outputs):
    return model.judge(outputs, {}, batch, model.totals(batch))

  outputs = jnp.asarray(outputs, jnp.float32)
  (found, sums), slope = jax.value_and_grad(judge, has_aux=True)(outputs)
  np.testing.assert_allclose(found, loss, rtol=1e-5)
  np.testing.assert_allclose(slope, gradient, rtol=1e-4, atol=1e-6)
  said = summary(sums)
  name = 'absolute_error' if kind == 'squared' else 'accuracy'
  assert said['rows'] == 5.5
  np.testing.assert_allclose(said['loss'], plain, rtol=1e-5)
  np.testing.assert_allclose(said[name], other, rtol=1e-5)


@pytest.mark.parametrize('kind', KINDS)
def test_microbatches_of_other_weights_are_the_batch(kind):
  """Rows 0 to 2 weigh 1.5, the others 4."""
  model = Classification(make_module(), loss_weights={}, kind=kind)
  batch = make_batch(kind)
  outputs = jnp.asarray(np.random.default_rng(3).normal(size=(B, V)))
  totals = model.totals(batch)
  whole, sums = model.judge(outputs, {}, batch, totals)
  half = jax.tree.map(lambda x: x / 2, totals)
  parts = [
    model.judge(outputs[rows], {}, {k: x[rows] for k, x in batch.items()}, half)
    for rows in (slice(0, 3), slice(3, 6))
  ]
  np.testing.assert_allclose(sum(loss for loss, _ in parts) / 2, whole, 1e-6)
  added = jax.tree.map(jnp.add, *(sums for _, sums in parts))
  for name in ('means', 'counts'):
    jax.tree.map(
      partial(np.testing.assert_allclose, rtol=1e-6), added[name], sums[name]
    )


def test_rows_that_fill_up_change_nothing():
  """Neither loss nor routing, of which rows without weight get nothing."""
  model = Classification(make_module(sparse_layers=1))
  batch = make_batch()
  params = make_params(model, batch)
  other = {**batch, 'input': batch['input'].at[2].set(9.0)}
  other['label'] = other['label'].at[2].set(0)
  take = jax.jit(partial(model.loss, train=False))
  some, others = (take(params, each) for each in (batch, other))
  np.testing.assert_array_equal(some[0], others[0])
  # 5 rows of 9 tokens, with two choices each.
  for sums in (some[1], others[1]):
    for layer in sums['layers'].values():
      assert layer['tokens'] == 45
      assert layer['chosen_E'].sum() == 90
  alone = {k: jnp.delete(x, 2, axis=0) for k, x in batch.items()}
  without, _ = take(params, alone)
  np.testing.assert_allclose(without, some[0], rtol=1e-5)


def test_a_reward_is_the_row_s_log_probability():
  model = Classification(make_module(), loss_weights={})
  batch = {**make_batch(), 'label': jnp.zeros(B, jnp.int32)}
  outputs = jnp.log(jnp.tile(jnp.array([[0.5, 0.25, 0.125, 0.125]]), (B, 1)))
  reward, weight = model.rewards(outputs, batch)['encoder']
  assert reward.shape == weight.shape == (B, 9)
  np.testing.assert_allclose(reward, np.log(0.5), rtol=1e-6)
  # The tokens of a row share its weight.
  np.testing.assert_allclose(weight.sum(1), WEIGHTS, rtol=1e-6)
  slope = jax.grad(
    lambda outputs: model.rewards(outputs, batch)['encoder'][0].sum()
  )(outputs)
  assert not slope.any()


def test_a_router_learns_from_it():
  model = Classification(
    make_module(sparse_layers=2, make_router=partial(RLR, num_experts=4)),
    loss_weights={'policy': 1.0},
  )
  batch = make_batch()
  params = make_params(model, batch)

  def loss(params):
    return model.loss(params, batch, jax.random.key(0), train=True)[0]

  slope = jax.jit(jax.grad(loss))(params)
  router = slope['encoder']['layers_1']['moe']['router']
  assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(router))


def test_predictions_are_distributions():
  outputs = jnp.asarray(np.random.default_rng(3).normal(size=(B, V)))
  model = Classification(make_module(), loss_weights={}, kind='sigmoid')
  logits, weights = model.predictions(outputs, make_batch('sigmoid'))
  assert (logits.shape, weights.shape) == ((B, V, 2), (B, V))
  yes = jax.nn.softmax(logits)[..., 1]
  np.testing.assert_allclose(yes, 1 / (1 + np.exp(-outputs)), rtol=1e-5)
  number = dataclasses.replace(model, kind='squared')
  with pytest.raises(ValueError, match='predicts no distribution'):
    number.predictions(outputs, make_batch('squared'))


def test_two_passes_that_should_agree():
  """Consistency wraps it; without draws both passes are the same."""
  model = Classification(make_module(), loss_weights={})
  batch = make_batch()
  params = make_params(model, batch)
  once, _ = model.loss(params, batch, train=False)
  twice, sums = Consistency(model, alpha=5.0).loss(
    params, batch, jax.random.key(0), train=True
  )
  np.testing.assert_allclose(twice, 2 * once, rtol=1e-6)
  np.testing.assert_allclose(sums['aux_losses']['consistency'], 0, atol=1e-6)


def layer_norm(x, p):
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
  return x * p['scale'] + p['bias']


def attention(x_LxD, p):
  y_LxD = np.zeros_like(x_LxD)
  for h in range(2):
    q, k, v = (x_LxD @ p[n]['kernel'][:, h] for n in ('query', 'key', 'value'))
    logits = q @ k.T / np.sqrt(4)
    w = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    y_LxD += w @ v @ p['out']['kernel'][h]
  return y_LxD


def mlp(x, p):
  h = x @ p['wi']['kernel']
  h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
  return h @ p['wo']['kernel']


@pytest.mark.parametrize('pooling', ['class_token', 'mean'])
def test_the_vision_transformer_is_that_of_numpy(pooling):
  module = make_module(layers=1, pooling=pooling)
  batch = make_batch()
  params = make_params(Classification(module), batch)
  outputs, _ = module.apply({'params': params}, batch)
  p = jax.tree.map(lambda x: np.asarray(x, float), params)
  block = p['encoder']['layers_0']
  for image, found in zip(np.asarray(batch['input'], float), outputs):
    tokens = [
      image[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].ravel()
      for i in range(2)
      for j in range(4)
    ]
    x = np.stack(tokens) @ p['patches']['kernel']
    if pooling == 'class_token':
      x = np.concatenate([p['class_token'][None], x])
    x = x + p['positions']
    x = x + attention(
      layer_norm(x, block['attention_norm']), block['attention']
    )
    x = x + mlp(layer_norm(x, block['mlp_norm']), block['mlp'])
    x = layer_norm(x, p['encoder']['norm'])
    read = x[0] if pooling == 'class_token' else x.mean(0)
    expected = read @ p['head']['kernel']
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_what_it_costs_by_hand():
  """Of one example; experts count twice of four."""
  facts = ledger.ledger(Classification(make_module(sparse_layers=2)))
  L, D, F, P = 9, 8, 12, 4
  attention = 4 * D * D * L + 2 * D * L * L
  by_hand = 2 * (
    P * D * 8  # Eight patches.
    + 2 * attention
    + 2 * D * F * L
    + 2 * (2 * D * F) * L  # Experts,
    + 4 * D * L  # and their router.
    + D * V  # One class token.
  )
  assert facts['forward_flops_per_sequence'] == by_hand
  assert facts['components']['patch embedding'] == P * D
  assert facts['components']['positions'] == (L + 1) * D
  assert facts['train_flops_per_token'] == round(3 * by_hand / L)
  assert facts['example'] == '4 x 8 x 1 image'


def test_errors_are_one_line():
  with pytest.raises(ValueError, match="kind must be one of .*'sofmax'"):
    Classification(make_module(), kind='sofmax')
  with pytest.raises(ValueError, match='label_smoothing=0.1'):
    Classification(make_module(), kind='sigmoid', label_smoothing=0.1)
  with pytest.raises(ValueError, match='label_smoothing=1.0'):
    Classification(make_module(), label_smoothing=1.0)
  with pytest.raises(ValueError, match='patch_size=3 must divide the 4 rows'):
    assert make_module(patch_size=3).num_tokens
  with pytest.raises(ValueError, match="pooling must be .* not 'max'"):
    assert make_module(pooling='max').num_tokens
  with pytest.raises(ValueError, match='Classification writes no text'):
    check_decodable(Classification(make_module()))
  digits = Dataset('digits', {}, 4, pack=False)
  with pytest.raises(ValueError, match='has 10 classes, but the head has 4'):
    Classification(make_module()).check_data(digits)
  Classification(make_module(num_outputs=10)).check_data(digits)
