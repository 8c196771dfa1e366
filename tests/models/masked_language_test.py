"""Masked language: losses and gradients by numpy, and the heads it is of."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from sparse_experts import config, moe
from sparse_experts.layers.attention import Attention, RelativeBias
from sparse_experts.layers.embed import TokenEmbed
from sparse_experts.layers.mlp import Mlp
from sparse_experts.models.consistency import Consistency
from sparse_experts.models.decoding import check_decodable
from sparse_experts.models.masked_language import MaskedLanguage
from sparse_experts.models.sums import summary
from sparse_experts.models.text_encoder import TextEncoder
from sparse_experts.models.text_heads import Head, TextHeads
from sparse_experts.models.transformer import Block, Stack
from sparse_experts.moe.routers.rl_r import RLR
from sparse_experts.planning import ledger

partial = functools.partial

B, L, D, V = 4, 6, 8, 20
HEADS = {
  'masked': Head('masked', weight=2.0),
  'next': Head('softmax', 3, reads='first', weight=0.5),
  'topics': Head('sigmoid', 4, reads='mean'),
  'grade': Head('squared', 1, reads='mean', weight=3.0),
  'tags': Head('softmax', 5, reads='tokens', weight=0.25),
}


def make_model(
  heads,
  sparse_layers=0,
  make_router=None,
  vocab_size=V,
  bias=True,
  **arguments,
):
  ffn = partial(Mlp, hidden_width=12)
  block = partial(
    Block,
    make_attention=partial(Attention, num_heads=2, head_width=4),
    make_mlp=ffn,
    make_moe=partial(
      moe.MoE,
      make_router=make_router
      or partial(
        moe.TopK, num_experts=4, k=2, kernel_init=nn.initializers.normal(0.5)
      ),
      make_expert=ffn,
    ),
  )
  stack = Stack(
    num_layers=2,
    make_block=block,
    sparse_layers=sparse_layers,
    make_shared_bias=partial(RelativeBias, num_heads=2) if bias else None,
  )
  module = TextHeads(TokenEmbed(vocab_size, D), stack, heads=heads)
  return MaskedLanguage(module, **arguments)


def make_batch():
  """Rows of 6, 4, 2 and no tokens, of which 2, 1, 1 and 0 are to be found."""
  random = np.random.default_rng(0)
  lengths = np.array([6, 4, 2, 0])
  mask = np.arange(L) < lengths[:, None]
  weights = np.zeros((B, L), np.float32)
  weights[[0, 0, 1, 2], [1, 4, 2, 0]] = 1
  return {
    'tokens': np.where(mask, random.integers(3, V, (B, L)), 0).astype(np.int32),
    'targets': np.where(mask, random.integers(3, V, (B, L)), 0).astype(
      np.int32
    ),
    'weights': weights,
    'next': random.integers(0, 3, B).astype(np.int32),
    'topics': random.integers(0, 2, (B, 4)).astype(np.int32),
    'grade': random.normal(size=B).astype(np.float32),
    'tags': random.integers(0, 5, (B, L)).astype(np.int32),
  }


def make_params(model, batch):
  """Drawn by numpy; all experts differ."""
  boxed = jax.eval_shape(lambda: model.init(jax.random.key(0), batch))
  random = np.random.default_rng(2)

  def draw(leaf):
    return jnp.asarray(0.4 * random.normal(size=leaf.shape), jnp.float32)

  return jax.tree.map(draw, nn.unbox(boxed))


def make_outputs():
  random = np.random.default_rng(3)
  shapes = {
    'masked': (B, L, V),
    'next': (B, 3),
    'topics': (B, 4),
    'grade': (B, 1),
    'tags': (B, L, 5),
  }
  return {name: random.normal(size=shape) for name, shape in shapes.items()}


def softmax_loss(z, y):
  """(loss, gradient by z, right) of one label."""
  p = np.exp(z) / np.exp(z).sum()
  return -np.log(p[y]), p - np.eye(len(z))[y], float(z.argmax() == y)


def label_losses(name, z, batch, b):
  """(place of z, loss, gradient, right or error) of what row b counts for."""
  tokens = [i for i in range(L) if batch['tokens'][b, i] != 0]
  if name == 'masked':
    for i in range(L):
      if batch['weights'][b, i]:
        yield (b, i), *softmax_loss(z[b, i], batch['targets'][b, i])
  elif name == 'tags':
    for i in tokens:
      yield (b, i), *softmax_loss(z[b, i], batch['tags'][b, i])
  elif not tokens:
    return
  elif name == 'next':
    yield (b,), *softmax_loss(z[b], batch['next'][b])
  elif name == 'topics':
    p, y = 1 / (1 + np.exp(-z[b])), batch['topics'][b]
    loss = -(y * np.log(p) + (1 - y) * np.log(1 - p)).sum()
    yield (b,), loss, p - y, float(y[z[b].argmax()])
  else:
    error = z[b] - batch['grade'][b]
    yield (b,), error[0] ** 2, 2 * error, abs(error[0])


def oracle(outputs, batch):
  """(loss, gradient by outputs, means), label by label."""
  loss, means, gradient = 0.0, {}, {}
  for name, head in HEADS.items():
    z = outputs[name]
    found = [
      label for b in range(B) for label in label_losses(name, z, batch, b)
    ]
    gradient[name] = np.zeros_like(z)
    for place, _, slope, _ in found:
      gradient[name][place] = head.weight * slope / len(found)
    of_head = np.mean([label[1] for label in found])
    loss += head.weight * of_head
    other = 'absolute_error' if name == 'grade' else 'accuracy'
    means[f'{name}/loss'] = of_head
    means[f'{name}/{other}'] = np.mean([label[3] for label in found])
    means[f'{name}/targets'] = len(found)
  return loss, gradient, {**means, 'loss': loss}


def as_float32(tree):
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def test_loss_and_gradient():
  model, batch = make_model(HEADS, loss_weights={}), make_batch()
  outputs = make_outputs()
  loss, gradient, means = oracle(outputs, batch)

  def judge(outputs):
    return model.judge(outputs, {}, batch, model.totals(batch))

  (found, sums), slope = jax.value_and_grad(judge, has_aux=True)(
    as_float32(outputs)
  )
  np.testing.assert_allclose(found, loss, rtol=1e-5)
  for name in HEADS:
    np.testing.assert_allclose(
      slope[name], gradient[name], rtol=1e-4, atol=1e-6
    )
  said = summary(sums)
  assert set(said) == {*means, 'layers'}
  for name, mean in means.items():
    np.testing.assert_allclose(said[name], mean, rtol=1e-5, err_msg=name)


def test_microbatches_of_other_weights_are_the_batch():
  """Rows 0 and 1 have 3 of 4 masks, 10 of 12 tokens, and 2 of 3 that count."""
  model, batch = make_model(HEADS, loss_weights={}), make_batch()
  outputs = as_float32(make_outputs())
  totals = model.totals(batch)
  assert {name: float(x) for name, x in totals.weights.items()} == {
    'masked': 4,
    'next': 3,
    'topics': 3,
    'grade': 3,
    'tags': 12,
  }
  whole, sums = model.judge(outputs, {}, batch, totals)
  half = jax.tree.map(lambda x: x / 2, totals)
  parts = []
  for rows in (slice(0, 2), slice(2, 4)):
    of_rows = {k: x[rows] for k, x in outputs.items()}
    of_batch = {k: x[rows] for k, x in batch.items()}
    parts.append(model.judge(of_rows, {}, of_batch, half))
  np.testing.assert_allclose(sum(loss for loss, _ in parts) / 2, whole, 1e-6)
  added = jax.tree.map(jnp.add, *(sums for _, sums in parts))
  for name in ('means', 'counts'):
    jax.tree.map(
      partial(np.testing.assert_allclose, rtol=1e-6), added[name], sums[name]
    )
  np.testing.assert_allclose(summary(added)['loss'], whole, rtol=1e-6)


def test_heads_read_what_they_say():
  """The table of each token, the first token, a mean without padding."""
  model, batch = make_model(HEADS), make_batch()
  params = make_params(model, batch)
  outputs, _ = model.apply(params, batch)
  text = TextEncoder(model.module.embed, model.module.encoder)
  y, _ = text.apply(
    {'params': {k: params[k] for k in ('embed', 'encoder')}}, batch['tokens']
  )
  y = np.asarray(y, float)
  kernels = {k: np.asarray(p['kernel']) for k, p in params['head'].items()}
  assert set(kernels) == set(HEADS) - {'masked'}
  means = np.stack(
    [y[b, :n].mean(0) if n else np.zeros(D) for b, n in enumerate([6, 4, 2, 0])]
  )
  table = np.asarray(params['embed']['embedding'])
  expected = {
    'masked': y @ table.T / np.sqrt(D),
    'next': y[:, 0] @ kernels['next'],
    'topics': means @ kernels['topics'],
    'grade': means @ kernels['grade'],
    'tags': y @ kernels['tags'],
  }
  for name, x in expected.items():
    np.testing.assert_allclose(outputs[name], x, rtol=1e-4, atol=1e-5)


def test_the_encoder_sees_all_of_a_text_and_nothing_else():
  model = make_model({'masked': HEADS['masked']}, sparse_layers=1)
  tokens = jnp.array([[3, 4, 5, 6, 7, 0], [8, 9, 3, 0, 0, 0]])
  params = make_params(model, {'tokens': tokens})
  encoder = TextEncoder(model.module.embed, model.module.encoder)
  text = jax.jit(
    lambda tokens, segments=None: encoder.apply(
      {'params': params}, tokens, segment_ids_BxL=segments
    )
  )
  whole, auxes = text(tokens)
  assert set(auxes) == {'layers_0', 'layers_1'}
  # 5 and 3 tokens, with two choices each.
  for aux in auxes.values():
    assert aux.metrics['chosen_E'].sum() == 16
  # The last token changes the first; padding changes none.
  other, _ = text(tokens.at[0, 4].set(12))
  assert np.abs(other - whole)[0, 0].max() > 1e-3
  alone, _ = text(tokens[1:, :3])
  np.testing.assert_allclose(whole[1, :3], alone[0], rtol=1e-4, atol=1e-5)
  # Segments that share a row are texts of their own, but for their positions.
  packed, _ = text(
    jnp.array([[3, 4, 5, 8, 9, 3]]), jnp.array([[1, 1, 1, 2, 2, 2]])
  )
  np.testing.assert_allclose(packed[0, 3:], alone[0], rtol=1e-4, atol=1e-5)


def test_a_reward_is_the_log_probability_of_what_was_masked():
  model, batch = make_model(HEADS), make_batch()
  outputs = make_outputs()
  reward, weight = model.rewards(as_float32(outputs), batch)['encoder']
  np.testing.assert_array_equal(weight, batch['weights'])
  for b, i in np.argwhere(batch['weights']):
    loss, _, _ = softmax_loss(outputs['masked'][b, i], batch['targets'][b, i])
    np.testing.assert_allclose(reward[b, i], -loss, rtol=1e-5)
  of_rows = make_model({'next': HEADS['next']})
  reward, weight = of_rows.rewards(as_float32(outputs), batch)['encoder']
  np.testing.assert_allclose(weight.sum(1), [1, 1, 1, 0], rtol=1e-6)
  loss, _, _ = softmax_loss(outputs['next'][0], batch['next'][0])
  np.testing.assert_allclose(reward[0], -loss * np.ones(L), rtol=1e-5)


def test_a_router_learns_from_it():
  model = make_model(
    HEADS,
    sparse_layers=2,
    make_router=partial(RLR, num_experts=4),
    loss_weights={'policy': 1.0},
  )
  batch = make_batch()
  params = make_params(model, batch)

  def loss(params):
    return model.loss(params, batch, jax.random.key(0), train=True)[0]

  slope = jax.jit(jax.grad(loss))(params)
  router = slope['encoder']['layers_1']['moe']['router']
  assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(router))


def test_predictions_are_those_of_the_main_head():
  """The masked one, in whatever order a file has the table."""
  batch, outputs = make_batch(), make_outputs()
  for heads in (HEADS, dict(reversed(HEADS.items()))):
    model = make_model(heads)
    logits, weights = model.predictions(outputs, batch)
    assert logits is outputs['masked']
    np.testing.assert_array_equal(weights, batch['weights'])
    assert model.weight(batch) == 4
  model = make_model({name: HEADS[name] for name in ('tags', 'next')})
  logits, _ = model.predictions(outputs, batch)
  assert logits is outputs['next'] and model.weight(batch) == 3
  model = make_model({'grade': HEADS['grade']})
  with pytest.raises(ValueError, match='predicts no distribution'):
    model.predictions(outputs, batch)


def test_two_passes_that_should_agree():
  """Consistency wraps it; without draws both passes are the same."""
  model, batch = make_model(HEADS, loss_weights={}), make_batch()
  params = make_params(model, batch)
  once, _ = model.loss(params, batch, train=False)
  twice, sums = Consistency(model, alpha=5.0).loss(
    params, batch, jax.random.key(0), train=True
  )
  np.testing.assert_allclose(twice, 2 * once, rtol=1e-6)
  np.testing.assert_allclose(sums['aux_losses']['consistency'], 0, atol=1e-6)


def test_what_it_costs_by_hand():
  """Of one example of 512 tokens; experts count twice of four."""
  heads = {name: HEADS[name] for name in ('masked', 'next', 'tags')}
  facts = ledger.ledger(make_model(heads, sparse_layers=2, bias=False))
  length, F = 512, 12
  attention = 4 * D * D * length + 2 * D * length**2
  by_hand = 2 * (
    2 * attention
    + 2 * D * F * length
    + 2 * (2 * D * F) * length  # Experts,
    + 4 * D * length  # and their router.
    + D * V * length  # The table, read backwards,
    + 3 * D  # the first token,
    + 5 * D * length  # and each.
  )
  assert facts['forward_flops_per_sequence'] == by_hand
  assert facts['components']['head'] == 3 * D + 5 * D
  assert facts['example'] == '512 tokens'


def test_heads_of_gin_are_the_same_after_a_round_trip():
  config.parse(['gin/small/masked_language.gin'], [], [])
  heads = config.model().module.heads
  assert dict(heads) == {
    'masked': Head('masked'),
    'domain': Head('softmax', 24, reads='mean'),
  }
  assert dict(config.model_of(config.text()).module.heads) == dict(heads)


def test_errors_are_one_line():
  with pytest.raises(ValueError, match="kind of a head .* not 'mask'"):
    Head('mask')
  with pytest.raises(ValueError, match="reads of a head .* not 'last'"):
    Head('softmax', 2, reads='last')
  with pytest.raises(ValueError, match="num_outputs=7 and reads='tokens'"):
    Head('masked', 7)
  with pytest.raises(ValueError, match="'softmax' needs num_outputs"):
    Head('softmax')
  with pytest.raises(ValueError, match=r"of which \['a', 'b'\] are"):
    make_model({'a': Head('masked'), 'b': Head('masked')})
  with pytest.raises(ValueError, match='there must be a head'):
    make_model({})
  with pytest.raises(ValueError, match='MaskedLanguage writes no text'):
    check_decodable(make_model(HEADS))
