"""Distillation: losses and gradients by numpy, and what it leaves alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from sparse_experts.layers.attention import Attention
from sparse_experts.layers.mlp import Mlp
from sparse_experts.models.classification import Classification
from sparse_experts.models.consistency import Consistency
from sparse_experts.models.decoding import check_decodable
from sparse_experts.models.distillation import Distillation, Taught
from sparse_experts.models.sums import summary
from sparse_experts.models.transformer import Block, Stack
from sparse_experts.models.vision import VisionTransformer
from sparse_experts.planning import ledger

partial = functools.partial
V = 5


def classifier(kind='softmax', num_outputs=V, patch_size=2, **arguments):
  block = partial(
    Block,
    make_attention=partial(Attention, num_heads=2, head_width=4),
    make_mlp=partial(Mlp, hidden_width=8),
  )
  module = VisionTransformer(
    encoder=Stack(num_layers=1, make_block=block),
    image_shape=(4, 4, 1),
    patch_size=patch_size,
    width=8,
    num_outputs=num_outputs,
  )
  return Classification(module, kind=kind, **arguments)


def language(**arguments):
  return tiny_models.make_model(encoder=False, layers=2, **arguments)


def distil(student, teacher, **arguments):
  return Distillation(student, teacher, '/no/run', **arguments)


# By numpy.


def log_softmax(z):
  z = z - z.max()
  return z - np.log(np.exp(z).sum())


def onehot(label, size):
  return np.eye(size)[label]


def example(name):
  """Objective, batch, and every distribution: index, target, weight.

  The index is that of its logits in what the module returns; of several classes
  the logits of no and yes are (0, z).
  """
  random = np.random.default_rng(0)
  if name == 'language':
    tokens = random.integers(2, V, (2, 3))
    weights = np.array([[1, 1, 0], [0, 2, 1]], np.float32)
    batch = {
      'decoder_target_tokens': tokens,
      'decoder_input_tokens': tokens,
      'decoder_loss_weights': weights,
    }
    items = [(i, tokens[i], weights[i]) for i in np.ndindex(2, 3)]
    return language(z_loss=0.0), batch, (2, 3, V), items
  weights = np.array([1, 0, 2, 0.5], np.float32)
  batch = {'input': np.zeros((4, 4, 4, 1), np.float32), 'weight': weights}
  if name == 'softmax':
    batch['label'] = random.integers(0, V, 4)
    items = [((i,), batch['label'][i], weights[i]) for i in range(4)]
  else:
    batch['label'] = random.integers(0, 2, (4, V))
    items = [(i, batch['label'][i], weights[i[0]]) for i in np.ndindex(4, V)]
  return classifier(name), batch, (4, V), items


def expected(name, student, teacher, items, total, share, T):
  """Loss, its gradient of the student's logits, soft loss and agreement."""
  loss = soft = agree = 0.0
  grad = np.zeros(student.shape)
  for index, label, weight in items:
    z, t = student[index], teacher[index]
    if name == 'sigmoid':
      z, t = np.array([0, z]), np.array([0, t])
    p, log_q = np.exp(log_softmax(t / T)), log_softmax(z / T)
    hard, of_soft = -log_softmax(z)[label], -(T**2) * (p * log_q).sum()
    loss += weight / total * ((1 - share) * hard + share * of_soft)
    soft += weight / total * of_soft
    agree += weight * (z.argmax() == t.argmax())
    # d/dz of -T^2 p log softmax(z / T) is T (q - p).
    g = (1 - share) * (np.exp(log_softmax(z)) - onehot(label, z.size))
    g = weight / total * (g + share * T * (np.exp(log_q) - p))
    grad[index] += g[1] if name == 'sigmoid' else g
  return loss, grad, soft, agree / sum(weight for _, _, weight in items)


@pytest.mark.parametrize('share,T', [(0.25, 1.0), (0.6, 2.5), (1.0, 0.5)])
@pytest.mark.parametrize('name', ['language', 'softmax', 'sigmoid'])
def test_loss_and_gradient_are_numpys(name, share, T):
  objective, batch, shape, items = example(name)
  model = distil(objective, objective, teacher_share=share, temperature=T)
  random = np.random.default_rng(1)
  student, teacher = 3 * random.normal(size=(2, *shape)).astype(np.float32)
  batch = {name: jnp.asarray(x) for name, x in batch.items()}
  totals = model.totals(batch)

  def judge(student):
    return model.judge(Taught(student, teacher), {}, batch, totals)

  (loss, sums), grad = jax.value_and_grad(judge, has_aux=True)(student)
  found = summary(sums)
  total = float(totals.weight)
  want, want_grad, soft, agreement = expected(
    name, student, teacher, items, total, share, T
  )
  np.testing.assert_allclose(loss, want, rtol=1e-5)
  np.testing.assert_allclose(sums['own_loss'], want, rtol=1e-5)
  np.testing.assert_allclose(grad, want_grad, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(found['soft_loss'], soft, rtol=1e-5)
  np.testing.assert_allclose(found['teacher_agreement'], agreement, rtol=1e-6)
  # The loss that is compared between models is the one of labels.
  alone = expected(name, student, teacher, items, total, 0.0, 1.0)[0]
  np.testing.assert_allclose(found['loss'], alone, rtol=1e-5)


def test_the_labels_part_is_all_that_the_student_alone_has():
  """Its z-loss is of it, as of label smoothing, and is shared with it."""
  objective = language(z_loss=0.1)
  _, batch, shape, _ = example('language')
  batch = {name: jnp.asarray(x) for name, x in batch.items()}
  logits = np.random.default_rng(1).normal(size=(2, *shape))
  student, teacher = (jnp.asarray(x, jnp.float32) for x in logits)
  totals = objective.totals(batch)
  alone, _ = objective.judge(student, {}, batch, totals)
  taught = Taught(student, teacher)
  loss, sums = distil(objective, objective).judge(taught, {}, batch, totals)
  soft = summary(sums)['soft_loss']
  np.testing.assert_allclose(loss, 0.75 * alone + 0.25 * soft, rtol=1e-6)


# The two models.


@pytest.fixture(scope='module')
def taught():
  """A sparse student and a sparse teacher, which would drop out if it could."""
  student = language(num_experts=4, loss_weights={'load_balance': 3.0})
  teacher = language(num_experts=2, width=8, dropout_rate=0.5)
  batch = tiny_models.make_batch(encoder=False)
  params = {
    **tiny_models.make_params(student, batch),
    'teacher': tiny_models.make_params(teacher, batch),
  }
  return distil(student, teacher), params, batch


def test_auxiliary_losses_are_not_mixed_and_no_gradient_meets_the_teacher(
  taught,
):
  model, params, batch = taught

  @jax.jit
  def run(params, key):
    def loss(params):
      return model.loss(params, batch, key, train=True)

    logits, _ = model.teacher.outputs(params['teacher'], batch, train=False)
    outputs, _ = model.outputs(params, batch, key, train=True)
    return jax.value_and_grad(loss, has_aux=True)(params), outputs, logits

  ((loss, sums), grads), outputs, logits = run(params, jax.random.key(1))
  assert sums['aux_losses']['load_balance'] > 0.1
  np.testing.assert_allclose(
    loss, sums['own_loss'] + 3.0 * sums['aux_losses']['load_balance'], rtol=1e-6
  )
  # Layers are the student's, of 4 experts.
  assert sums['layers']['decoder/layers_1']['chosen_E'].shape == (4,)
  # The teacher draws nothing.
  np.testing.assert_array_equal(outputs.teacher, logits)
  assert not any(leaf.any() for leaf in jax.tree.leaves(grads.pop('teacher')))
  assert all(leaf.any() for leaf in jax.tree.leaves(grads))


def test_without_training_the_student_is_alone(taught):
  model, params, batch = taught
  own = {name: x for name, x in params.items() if name != 'teacher'}

  @jax.jit
  def run(params, own):
    return [
      objective.loss(given, batch, train=False)
      for objective, given in (
        (model.objective, own),
        (model, own),
        (model, params),
      )
    ]

  (expected, sums), *others = run(params, own)
  for loss, found in others:
    np.testing.assert_array_equal(loss, expected)
    assert found['means'].keys() == sums['means'].keys()
  check_decodable(model)
  with pytest.raises(ValueError, match="have no 'teacher', but decoder, embed"):
    model.loss(own, batch, jax.random.key(0), train=True)


def test_two_passes_around_a_teacher_are_two_students(taught):
  """Consistency around it: twice the loss of a student that draws nothing."""
  model, params, batch = taught
  twice = Consistency(model, alpha=1.0)
  assert twice.frozen == model.frozen
  key = jax.random.key(0)
  (one, sums), (two, sums_2) = jax.jit(
    lambda params: [
      objective.loss(params, batch, key, train=True)
      for objective in (model, twice)
    ]
  )(params)
  np.testing.assert_allclose(two, 2 * one, rtol=1e-6)
  np.testing.assert_allclose(sums_2['own_loss'], 2 * sums['own_loss'], 1e-6)
  outside = distil(Consistency(model.objective, 1.0), model.teacher)
  with pytest.raises(ValueError, match='put it around the other wrapper'):
    jax.eval_shape(
      lambda params: outside.loss(params, batch, key, train=True), params
    )


def test_the_ledger_adds_a_teachers_forward_pass(taught):
  model, _, _ = taught
  lengths = {'targets': 8}
  both, student, teacher = (
    ledger.ledger(of, lengths) for of in (model, model.objective, model.teacher)
  )
  assert student['frozen_params'] == 0
  assert both['frozen_params'] == teacher['total_params']
  assert both['total_params'] == student['total_params']
  assert both['train_flops_per_sequence'] == (
    3 * student['forward_flops_per_sequence']
    + teacher['forward_flops_per_sequence']
  )
  assert f'{teacher["total_params"]:,}' in ledger.text(both)


# What is refused.


@pytest.mark.parametrize(
  'arguments,error',
  [
    ({'teacher_share': 1.5}, r'teacher_share=1.5 must be between 0'),
    ({'temperature': 0.0}, r'temperature=0.0 must be above 0'),
  ],
)
def test_numbers_out_of_range_are_refused(arguments, error):
  with pytest.raises(ValueError, match=error):
    distil(language(), language(), **arguments)


def test_a_teacher_of_other_batches_is_refused():
  with pytest.raises(ValueError, match='the teacher reads .* the student'):
    distil(language(), tiny_models.make_model(encoder=True))
  distil(classifier(patch_size=2), classifier(patch_size=4))


def test_a_second_teacher_is_refused():
  with pytest.raises(ValueError, match='has a teacher already'):
    distil(distil(language(), language()), language())


def test_another_vocabulary_is_refused():
  model = distil(classifier(num_outputs=5), classifier(num_outputs=7))
  outputs = Taught(jnp.zeros((4, 5)), jnp.zeros((4, 7)))
  _, batch, _, _ = example('softmax')
  with pytest.raises(ValueError, match='one of 5 .* the teacher one of 7'):
    model.judge(outputs, {}, batch, model.totals(batch))


def test_numbers_cannot_be_distilled():
  model = distil(classifier('squared'), classifier('squared'))
  outputs = Taught(jnp.zeros((4, V)), jnp.zeros((4, V)))
  _, batch, _, _ = example('sigmoid')
  with pytest.raises(ValueError, match='predicts no distribution'):
    model.judge(outputs, {}, batch, model.totals(batch))
