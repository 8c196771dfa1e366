"""Sentence-level and task-level gating against the oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from sparse_experts.layers.mlp import Mlp
from sparse_experts.moe import MoE
from sparse_experts.moe.routers.sentence import Sentence
from sparse_experts.moe.routers.task_gating import TaskGating

G, S, D, E, T = 4, 5, 3, 4, 3
# Rows of five, three, one and no tokens.
MASK = np.arange(S)[None] < np.array([5, 3, 1, 0])[:, None]
TASKS = np.array([[0, 0, 2, 2, 2], [1, 1, 3, 0, 0], [2] * 5, [0] * 5])


def arrays(**shapes):
  random = np.random.default_rng(0)
  return {name: random.normal(size=shape) for name, shape in shapes.items()}


def check(router, params_of, inputs, logits_of, one_of_each, mask, **given):
  """Compares assignment, losses and gradients with the oracle.

  Args:
    params_of: float32 parameters of the inputs' arrays.
    logits_of: float64 logits [G, S, E] of them.
    one_of_each: logits [1, n, E] of them that losses are means over.
  """
  k, over = router.k, router.gates
  cotangent = np.random.default_rng(1).normal(size=(G, S, k))
  decide = functools.partial(oracle.decide, k=k, over=over, priority='token')
  decisions = decide(logits_of(inputs), mask=mask)
  ranked = decide(one_of_each(inputs)).ranked

  def outputs(inputs):
    gates = oracle.gates(logits_of(inputs), decisions.ranked, over)
    losses = oracle.losses(one_of_each(inputs), ranked)
    return gates * decisions.taken, *losses

  def total(gates, balance, z):
    return (gates * cotangent).sum() + 3 * balance + 0.5 * z

  @jax.jit
  @functools.partial(jax.grad, has_aux=True)
  def run(inputs):
    assignment, aux = router.apply(
      {'params': params_of(inputs)},
      jnp.where(MASK[..., None], inputs['x'], jnp.nan),
      mask_GxS=jnp.asarray(MASK),
      **given,
    )
    results = (
      assignment.gate_GxSxK,
      aux.losses['load_balance'],
      aux.losses['router_z'],
    )
    return total(*results), (assignment, results)

  x32 = {name: jnp.asarray(x, jnp.float32) for name, x in inputs.items()}
  grads, (assignment, results) = run(x32)
  np.testing.assert_array_equal(
    assignment.expert_GxSxK, np.where(decisions.taken, decisions.ranked, E)
  )
  np.testing.assert_array_equal(assignment.position_GxSxK, decisions.place)
  for ours, theirs in zip(results, outputs(inputs)):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
  expected = oracle.gradient(lambda inputs: total(*outputs(inputs)), inputs)
  for name, gradient in expected.items():
    np.testing.assert_allclose(
      grads[name], gradient, rtol=1e-3, atol=1e-5, err_msg=name
    )
  return assignment, grads


@pytest.mark.parametrize('k, gates', [(1, 'all'), (2, 'chosen')])
def test_sentences(k, gates):
  inputs = arrays(x=(G, S, D), kernel=(D, E))
  assignment, grads = check(
    Sentence(E, k=k, gates=gates),
    lambda inputs: {'kernel': inputs['kernel']},
    inputs,
    logits_of=lambda inputs: np.repeat(mean(inputs), S, axis=1),
    # Three sequences have tokens.
    one_of_each=lambda inputs: mean(inputs)[:3].swapaxes(0, 1),
    mask=MASK,
  )
  assert min(np.abs(g).max() for g in grads.values()) > 1e-2
  assert (np.asarray(grads['x'])[~MASK] == 0).all()
  # The same for all tokens, and not for all sequences.
  expert = np.asarray(assignment.expert_GxSxK)
  rows = [set(map(tuple, expert[g][MASK[g]])) for g in range(3)]
  assert all(len(row) == 1 for row in rows) and len(set.union(*rows)) > 1


def mean(inputs):
  """Logits [G, 1, E] of the mean of each row's real tokens, 0 if none."""
  rows = [
    x[m].mean(0) if m.any() else np.zeros(D) for x, m in zip(inputs['x'], MASK)
  ]
  return (np.stack(rows) @ inputs['kernel'])[:, None]


@pytest.mark.parametrize('k, gates', [(1, 'all'), (2, 'chosen')])
def test_tasks(k, gates):
  inputs = arrays(x=(G, S, D), embedding=(T, D), kernel=(D, E))
  known = MASK & (TASKS < T)  # Task 3 is none of three.
  assert not known[MASK].all()

  def logits_of(inputs):
    table = np.zeros((T + 1, E))
    table[:T] = inputs['embedding'] @ inputs['kernel']
    return table[TASKS]

  assignment, grads = check(
    TaskGating(E, k=k, gates=gates, num_tasks=T),
    lambda inputs: {name: inputs[name] for name in ('embedding', 'kernel')},
    inputs,
    logits_of,
    one_of_each=lambda inputs: logits_of(inputs)[known][None],
    mask=known,
    task_ids_GxS=jnp.asarray(TASKS),
  )
  # Nothing of the tokens counts, and all of the tasks does.
  assert (grads['x'] == 0).all()
  assert min(np.abs(grads[n]).max() for n in ('embedding', 'kernel')) > 1e-2
  expert = np.asarray(assignment.expert_GxSxK)
  for task in range(T):
    assert len(set(map(tuple, expert[known & (task == TASKS)]))) == 1


def test_one_task_a_row_is_balanced_over_the_batch():
  # Two rows, tasks 0 and 1 with logits (a, 0) and (0, a), a = log 3, so
  # probabilities (3/4, 1/4) and (1/4, 3/4). Over both: f = P = (1/2, 1/2), and
  # the loss is 2 (1/4 + 1/4) = 1, the least there is. By row: f = (1, 0),
  # P = (3/4, 1/4) gives 2 * 3/4 for either.
  a = np.log(3)
  params = {'embedding': jnp.eye(2) * a, 'kernel': jnp.eye(2)}
  tasks = jnp.array([[0] * 3, [1] * 3])
  _, aux = jax.jit(TaskGating(2, num_tasks=2).apply)(
    {'params': params}, jnp.ones((2, 3, 2)), task_ids_GxS=tasks
  )
  np.testing.assert_allclose(aux.losses['load_balance'], 1, rtol=1e-6)
  # Sentences: the same two as means of their tokens.
  x = jnp.array([[[a, 1], [a, -1]], [[2, 2 * a], [-2, 0]]])
  _, aux = jax.jit(Sentence(2).apply)({'params': {'kernel': jnp.eye(2)}}, x)
  np.testing.assert_allclose(aux.losses['load_balance'], 1, rtol=1e-6)


def test_what_they_declare():
  assert Sentence.needs == ('sequences',) and not Sentence.is_causal
  assert TaskGating.needs == ('task_ids',) and TaskGating.is_causal
  with pytest.raises(ValueError, match='TaskGating needs num_tasks'):
    TaskGating(2).apply({}, jnp.ones((1, 1, 1)), task_ids_GxS=jnp.ones((1, 1)))


def test_a_sentence_router_refuses_groups_that_are_no_sequences():
  layer = MoE(
    make_router=functools.partial(Sentence, num_experts=2),
    make_expert=functools.partial(Mlp, hidden_width=2),
    group_size=4,
  )
  with pytest.raises(ValueError, match='whole sequences: set group_size=None'):
    layer.apply({}, jnp.ones((2, 8, 3)), capacity_factor=1.0)
