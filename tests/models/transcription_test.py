"""Transcription: CTC by all alignments, errors by hand, and its encoder."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from sparse_experts import moe
from sparse_experts.data.dataset import Dataset
from sparse_experts.evaluation import task_evaluators
from sparse_experts.layers.attention import Attention
from sparse_experts.layers.mlp import Mlp
from sparse_experts.models import ctc
from sparse_experts.models.consistency import Consistency
from sparse_experts.models.decoding import check_decodable
from sparse_experts.models.speech import SpeechEncoder
from sparse_experts.models.sums import summary
from sparse_experts.models.transcription import Transcription
from sparse_experts.models.transformer import Block, Stack
from sparse_experts.planning import ledger

partial = functools.partial

V = 4  # Three labels, and the blank.
BLANK = 3
# Rows of at most five tokens: repeated labels; none; one alignment; no
# alignment, as 1 1 2 needs four tokens; no frame, as rows that fill up.
LABELS = np.array(
  [[0, 0, 2], [0, 0, 0], [2, 1, 0], [1, 1, 2], [0, 0, 0], [1, 0, 1]], np.int32
)
LABEL_LENGTHS = np.array([3, 0, 3, 3, 0, 2], np.int32)
TOKENS = np.array([5, 4, 3, 3, 0, 5], np.int32)
WEIGHTS = np.array([1, 2, 0.5, 1, 0, 1], np.float32)
FITS = np.array([1, 1, 1, 0, 1, 1], bool)
MASK = np.arange(5) < TOKENS[:, None]


def make_logits(L=5):
  return np.random.default_rng(0).normal(size=(len(LABELS), L, V))


def read(path):
  """What a path reads as, by its definition."""
  return [label for label, _ in itertools.groupby(path) if label != BLANK]


def log_prob_of_all_paths(logits_LxV, labels):
  """The sum over V^L paths, one by one; -inf where there is none."""
  log_p_LxV = logits_LxV - np.log(np.exp(logits_LxV).sum(-1, keepdims=True))
  total = 0.0
  for path in itertools.product(range(V), repeat=len(logits_LxV)):
    if read(path) == list(labels):
      total += np.exp(sum(log_p_LxV[t, v] for t, v in enumerate(path)))
  return np.log(total) if total else -np.inf


def rows_of_all_paths(logits):
  return [
    log_prob_of_all_paths(z[:tokens], labels[:length])
    for z, tokens, labels, length in zip(logits, TOKENS, LABELS, LABEL_LENGTHS)
  ]


def ours(logits):
  return ctc.log_prob(jnp.asarray(logits), MASK, LABELS, LABEL_LENGTHS)


def test_probability_is_the_sum_over_all_alignments():
  expected = np.array(rows_of_all_paths(make_logits()))
  assert np.isneginf(expected[~FITS]).all()
  found = np.asarray(ours(make_logits()))
  np.testing.assert_allclose(found[FITS], expected[FITS], rtol=1e-5, atol=1e-6)
  assert (found[~FITS] < -1e4).all()


def test_its_gradient_is_that_of_differences():
  logits, step = make_logits(), 1e-6
  rows = np.flatnonzero(FITS)
  expected = np.zeros_like(logits)
  for b in rows:
    for at in np.ndindex(logits.shape[1:]):
      sides = []
      for sign in (1, -1):
        moved = logits[b].copy()
        moved[at] += sign * step
        sides.append(
          log_prob_of_all_paths(
            moved[: TOKENS[b]], LABELS[b, : LABEL_LENGTHS[b]]
          )
        )
      expected[b][at] = (sides[0] - sides[1]) / (2 * step)
  slope = jax.grad(lambda z: ours(z)[rows].sum())(
    jnp.asarray(logits, jnp.float32)
  )
  np.testing.assert_allclose(slope, expected, rtol=1e-3, atol=1e-5)


def test_probabilities_of_all_readings_add_up_to_one():
  logits = jnp.asarray(make_logits(4)[:1])
  readings = {
    tuple(read(path)) for path in itertools.product(range(V), repeat=4)
  }
  labels = np.zeros((len(readings), 4), np.int32)
  lengths = np.array([len(reading) for reading in readings])
  for row, reading in zip(labels, readings):
    row[: len(reading)] = reading
  B = len(readings)
  logits = jnp.broadcast_to(logits, (B, 4, V))
  found = ctc.log_prob(logits, jnp.ones((B, 4), bool), labels, lengths)
  np.testing.assert_allclose(jnp.exp(found).sum(), 1, rtol=1e-5)


def test_tokens_needed_by_search():
  """The shortest of all paths that read so."""
  for labels, length, found in zip(
    LABELS, LABEL_LENGTHS, ctc.tokens_needed(LABELS, LABEL_LENGTHS)
  ):
    assert found == next(
      n
      for n in range(6)
      for path in itertools.product(range(V), repeat=n)
      if read(path) == list(labels[:length])
    )


def test_the_best_path_by_hand():
  """_ is the blank. Tokens beyond the fifth, fourth are padding."""
  paths = np.array([[0, 0, 3, 0, 2, 2], [3, 1, 1, 3, 1, 1], [3] * 6])
  mask = np.arange(6) < np.array([5, 4, 6])[:, None]
  path, is_read = ctc.best_path(jax.nn.one_hot(paths, V), mask)
  np.testing.assert_array_equal(path, paths)
  by_hand = [[1, 0, 0, 1, 1, 0], [0, 1, 0, 0, 0, 0], [0] * 6]
  np.testing.assert_array_equal(is_read, np.array(by_hand, bool))


def distance(some, others):
  """By recursion over both ends."""

  @functools.cache
  def at(i, j):
    if not i or not j:
      return i + j
    swap = at(i - 1, j - 1) + (some[i - 1] != others[j - 1])
    return min(swap, at(i - 1, j) + 1, at(i, j - 1) + 1)

  return at(len(some), len(others))


def test_edit_distance_is_that_of_the_recursion():
  random = np.random.default_rng(1)
  path = random.integers(0, 3, (60, 7))
  is_read = random.random((60, 7)) < np.linspace(0, 1, 60)[:, None]
  labels = random.integers(0, 3, (60, 5))
  lengths = random.integers(0, 6, 60)
  path[-1, :5], is_read[-1], lengths[-1] = labels[-1], np.arange(7) < 5, 5
  expected = [
    distance(tuple(p[r]), tuple(y[:n]))
    for p, r, y, n in zip(path, is_read, labels, lengths)
  ]
  assert set(expected) >= {0, 1, 2, 3, 4, 5, 6}
  found = ctc.edit_distance(
    jnp.asarray(path), jnp.asarray(is_read), labels, lengths
  )
  np.testing.assert_array_equal(found, expected)


def make_module(num_layers=2, sparse_layers=0, **arguments):
  mlp = partial(Mlp, hidden_width=12, activation='gelu')
  block = partial(
    Block,
    make_attention=partial(Attention, num_heads=2, head_width=4, scaled=True),
    make_mlp=mlp,
    make_moe=partial(
      moe.MoE,
      make_router=partial(
        moe.TopK, num_experts=4, k=2, kernel_init=nn.initializers.normal(0.5)
      ),
      make_expert=mlp,
    ),
  )
  stack = Stack(
    num_layers=num_layers, make_block=block, sparse_layers=sparse_layers
  )
  return SpeechEncoder(
    **{
      'encoder': stack,
      'bands': 3,
      'frames_per_token': 2,
      'width': 8,
      'num_labels': V - 1,
      **arguments,
    }
  )


# Of 10 frames, one of row 5's last token is missing.
FRAME_LENGTHS = np.array([10, 8, 6, 6, 0, 9], np.int32)


def make_batch():
  frames = np.random.default_rng(2).normal(size=(len(LABELS), 10, 3))
  return {
    'frames': jnp.asarray(frames, jnp.float32),
    'frame_lengths': jnp.asarray(FRAME_LENGTHS),
    'labels': jnp.asarray(LABELS),
    'label_lengths': jnp.asarray(LABEL_LENGTHS),
    'weight': jnp.asarray(WEIGHTS),
  }


def make_params(model, batch):
  """Drawn by numpy; all experts differ."""
  boxed = jax.eval_shape(lambda: model.init(jax.random.key(0), batch))
  random = np.random.default_rng(3)

  def draw(leaf):
    return jnp.asarray(0.4 * random.normal(size=leaf.shape), jnp.float32)

  return jax.tree.map(draw, nn.unbox(boxed))


def test_loss_means_and_counts():
  """Loss per label, of rows that have an alignment; errors of all rows."""
  model = Transcription(make_module(), loss_weights={})
  batch, logits = make_batch(), make_logits()
  np.testing.assert_array_equal(model.module.is_token(batch), MASK)
  log_probs = np.array(rows_of_all_paths(logits))
  total = -(WEIGHTS * np.where(FITS, log_probs, 0)).sum()
  errors = [
    distance(read(z[:n].argmax(-1)), tuple(y[:m]))
    for z, n, y, m in zip(logits, TOKENS, LABELS, LABEL_LENGTHS)
  ]
  loss, sums = model.judge(jnp.asarray(logits), {}, batch, model.totals(batch))
  said = summary(sums)
  # Labels: 3 + 2 x 0 + 0.5 x 3 + 2 of rows that fit, and 3 of the one that
  # does not.
  np.testing.assert_allclose(loss, total / 6.5, rtol=1e-5)
  np.testing.assert_allclose(said['loss'], total / 6.5, rtol=1e-5)
  np.testing.assert_allclose(
    said['symbol_error_rate'], (WEIGHTS * errors).sum() / 9.5, rtol=1e-6
  )
  exact = (WEIGHTS * (np.array(errors) == 0)).sum() / 5.5
  np.testing.assert_allclose(said['exact'], exact, rtol=1e-6)
  assert (said['rows'], said['labels'], said['infeasible']) == (5.5, 9.5, 1)


def test_perfect_logits_make_no_error():
  """a a a reads a; so 0 0 2 is written 0 _ 0 2 2."""
  model = Transcription(make_module(), loss_weights={})
  batch = {name: x[:1] for name, x in make_batch().items()}
  path = jnp.array([[0, BLANK, 0, 2, 2]])
  logits = 20.0 * jax.nn.one_hot(path, V)
  _, sums = model.judge(logits, {}, batch, model.totals(batch))
  said = summary(sums)
  assert (said['symbol_error_rate'], said['exact']) == (0, 1)
  assert said['loss'] < 1e-6


def test_microbatches_of_other_weights_are_the_batch():
  """Of rows 0 to 2 weigh 4.5 labels, of the others 2."""
  model = Transcription(make_module(), loss_weights={})
  batch, logits = make_batch(), jnp.asarray(make_logits())
  totals = model.totals(batch)
  whole, sums = model.judge(logits, {}, batch, totals)
  half = jax.tree.map(lambda x: x / 2, totals)
  parts = [
    model.judge(logits[rows], {}, {k: x[rows] for k, x in batch.items()}, half)
    for rows in (slice(0, 3), slice(3, 6))
  ]
  np.testing.assert_allclose(sum(loss for loss, _ in parts) / 2, whole, 1e-6)
  added = jax.tree.map(jnp.add, *(sums for _, sums in parts))
  for name in ('means', 'counts'):
    jax.tree.map(
      partial(np.testing.assert_allclose, rtol=1e-6), added[name], sums[name]
    )


def test_padding_changes_nothing():
  """Neither what stands in it nor how much there is, nor rows that fill up."""
  model = Transcription(make_module(num_layers=1, sparse_layers=1))
  batch = make_batch()
  params = make_params(model, batch)
  take = jax.jit(partial(model.loss, train=False))
  loss, sums = take(params, batch)
  assert np.isfinite(loss)
  # 5 + 4 + 3 + 3 + 0 + 5 tokens, with two choices each.
  for layer in sums['layers'].values():
    assert layer['tokens'] == 20
    assert layer['chosen_E'].sum() == 40
  is_padding = np.arange(10) >= FRAME_LENGTHS[:, None]
  assert is_padding[5, 9]
  strange = {
    **batch,
    'frames': jnp.where(is_padding[..., None], jnp.nan, batch['frames']),
    'labels': jnp.where(np.arange(3) < LABEL_LENGTHS[:, None], LABELS, 1),
  }
  np.testing.assert_array_equal(take(params, strange)[0], loss)
  longer = {
    **batch,
    'frames': jnp.pad(batch['frames'], ((0, 0), (0, 6), (0, 0))),
    'labels': jnp.pad(batch['labels'], ((0, 0), (0, 2))),
  }
  found, more = take(params, longer)
  np.testing.assert_allclose(found, loss, rtol=1e-5)
  jax.tree.map(
    partial(np.testing.assert_allclose, rtol=1e-5), more['means'], sums['means']
  )
  fewer = {name: jnp.delete(x, 4, axis=0) for name, x in batch.items()}
  found, _ = take(params, fewer)
  np.testing.assert_allclose(found, loss, rtol=1e-5)


def test_gradients_are_finite_where_no_path_is():
  model = Transcription(make_module(num_layers=0), loss_weights={})
  batch = {name: x[3:5] for name, x in make_batch().items()}
  params = make_params(model, batch)
  slope = jax.jit(jax.grad(lambda p: model.loss(p, batch, train=False)[0]))(
    params
  )
  assert all((leaf == 0).all() for leaf in jax.tree.leaves(slope))


def test_what_is_around_the_stack_is_that_of_numpy():
  """Frames side by side, a matrix, positions; no block; a norm, and a head."""
  module = make_module(num_layers=0, frames_per_token=4)
  batch = make_batch()
  params = make_params(Transcription(module), batch)
  logits, _ = module.apply({'params': params}, batch)
  assert logits.shape == (6, 3, V)
  p = jax.tree.map(lambda x: np.asarray(x, float), params)
  for b, token in itertools.product(range(6), range(3)):
    side = np.zeros(12)
    for i in range(4):
      if 4 * token + i < FRAME_LENGTHS[b]:
        side[3 * i : 3 * i + 3] = batch['frames'][b, 4 * token + i]
    x = side @ p['frames']['kernel']
    for i in range(4):
      x[i] += np.sin(token / 10000 ** (2 * i / 8))
      x[4 + i] += np.cos(token / 10000 ** (2 * i / 8))
    x *= p['encoder']['norm']['scale'] / np.sqrt((x**2).mean() + 1e-6)
    np.testing.assert_allclose(
      logits[b, token], x @ p['head']['kernel'], rtol=1e-4, atol=1e-5
    )


def test_a_reward_is_the_row_s_log_probability_per_label():
  model = Transcription(make_module(), loss_weights={})
  batch, logits = make_batch(), jnp.asarray(make_logits())
  reward, weight = model.rewards(logits, batch)['encoder']
  log_probs = np.array(rows_of_all_paths(make_logits()))
  for b in (0, 2, 5):
    expected = np.full(5, log_probs[b] / LABEL_LENGTHS[b])
    np.testing.assert_allclose(reward[b], expected, rtol=1e-5)
  # A row's tokens share the weight of its labels, padding has none.
  np.testing.assert_allclose(weight.sum(1), [3, 0, 1.5, 0, 0, 2], rtol=1e-6)
  assert not weight[~MASK].any()
  assert np.isfinite(reward).all()
  found, shared = model.predictions(logits, batch)
  np.testing.assert_array_equal(shared, weight)
  np.testing.assert_allclose(shared.sum(), model.weight(batch), rtol=1e-6)
  assert found.shape == (*shared.shape, V)
  slope = jax.grad(lambda z: model.rewards(z, batch)['encoder'][0].sum())
  assert not slope(logits).any()


def test_two_passes_that_should_agree():
  """Consistency wraps it; without draws both passes are the same."""
  model = Transcription(make_module(num_layers=0), loss_weights={})
  batch = make_batch()
  params = make_params(model, batch)
  once, _ = model.loss(params, batch, train=False)
  twice, sums = Consistency(model, alpha=5.0).loss(
    params, batch, jax.random.key(0), train=True
  )
  np.testing.assert_allclose(twice, 2 * once, rtol=1e-6)
  np.testing.assert_allclose(sums['aux_losses']['consistency'], 0, atol=1e-6)


def test_what_it_costs_by_hand():
  """Of one example of 10 frames and 5 tokens."""
  facts = ledger.ledger(
    Transcription(make_module()), {'frames': 10, 'labels': 3}
  )
  L, D, F = 5, 8, 12
  attention = 4 * D * D * L + 2 * D * L * L
  products = 6 * D * L + 2 * (attention + 2 * D * F * L) + D * V * L
  assert facts['forward_flops_per_sequence'] == 2 * products
  assert facts['components']['frame embedding'] == 6 * D
  assert facts['components']['head'] == D * V
  assert facts['example'] == '10 frames, 3 labels'


def test_fewer_errors_are_better():
  model = Transcription(make_module())
  some, more = (
    task_evaluators.score(
      {}, {'symbol_error_rate': rate, 'loss': 1.0}, model.headline
    )
    for rate in (0.25, 0.5)
  )
  assert (some, more) == (-0.25, -0.5)


def test_errors_are_one_line():
  model = Transcription(make_module())
  dataset = Dataset('made_spectrograms', {'frames': 184, 'labels': 8}, 4)
  with pytest.raises(ValueError, match='10 labels, but the head writes 3 and'):
    model.check_data(dataset)
  Transcription(make_module(num_labels=10)).check_data(dataset)
  with pytest.raises(ValueError, match='Transcription writes no text'):
    check_decodable(model)
  with pytest.raises(ValueError, match='width=7'):
    odd = Transcription(make_module(num_layers=0, width=7))
    jax.eval_shape(lambda: odd.init(jax.random.key(0), make_batch()))
  with pytest.raises(ValueError, match='frames_per_token=0'):
    none = Transcription(make_module(num_layers=0, frames_per_token=0))
    jax.eval_shape(lambda: none.init(jax.random.key(0), make_batch()))
