"""The sparse layer against the oracle, and what it promises of its tokens."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from tiny_layer import (
  B,
  D,
  E,
  L,
  arrays,
  make_layer,
  mask_of,
  tokens,
  variables,
)

from sparse_experts.layers.mlp import Mlp
from sparse_experts.moe import MoE, TopK, einsum, gather

CASES = {
  'switch': {'k': 1, 'activation': 'relu', 'capacity_factor': 1.0},
  'gshard': {
    'k': 2,
    'gates': 'chosen',
    'policy_eval': 'threshold',
    'capacity_factor': 0.5,
    'dispatch': einsum,
    'masked': True,
  },
  'st_moe': {
    'k': 2,
    'gates': 'chosen',
    'activation': 'gelu',
    'gated': True,
    'capacity_factor': 0.75,
    'group_size': 3,
  },
  'v_moe': {
    'k': 2,
    'priority': 'confidence',
    'balance_counts': 'all',
    'capacity_factor': 0.75,
    'group_size': B * L,
    'masked': True,
    'losses_over': 'positions',
  },
  'top_3_without_capacity': {
    'k': 3,
    'gates': 'chosen',
    'priority': 'token',
    'activation': 'silu',
    'gated': True,
    'capacity_factor': None,
    'masked': True,
  },
}


@pytest.mark.parametrize('case', CASES)
def test_outputs_losses_and_gradients_are_the_oracle(case):
  options = dict(CASES[case])
  factor = options.pop('capacity_factor')
  mask = mask_of() if options.pop('masked', False) else None
  layer = make_layer(**options)
  inputs = arrays(options.get('gated', False))
  cotangent = np.random.default_rng(1).normal(size=(B, L, D))

  # The oracle, with the decisions held fixed.
  S = options.get('group_size') or L
  k, over = options['k'], options.get('gates', 'all')
  capacity = None
  if factor is not None:
    capacity = oracle.capacity(
      str(factor),
      tokens=S,
      num_experts=E,
      k=k,
      per_choice=True,
      rounding='ceil',
      minimum=1,
      clip=True,
    )
  mask_GxS = None if mask is None else mask.reshape(-1, S)

  def logits_of(inputs):
    return inputs['x'].reshape(-1, S, D) @ inputs['router']

  decisions = oracle.decide(
    logits_of(inputs),
    k=k,
    mask=mask_GxS,
    over=over,
    policy=options.get('policy_eval', 'all'),
    priority=options.get('priority', 'choice'),
  )
  dropped = (decisions.taken & ~decisions.kept(capacity)).any()
  assert dropped == (factor is not None)

  def outputs(inputs):
    weights = {n: w for n, w in inputs.items() if n.startswith('w')}
    y = oracle.layer(
      inputs['x'].reshape(-1, S, D),
      logits_of(inputs),
      weights,
      decisions,
      over=over,
      capacity=capacity,
      activation=options.get('activation', 'gelu'),
    )
    balance, z = oracle.losses(
      logits_of(inputs),
      decisions.ranked,
      mask=mask_GxS,
      counts=options.get('balance_counts', 'first'),
      over=options.get('losses_over', 'tokens'),
    )
    return y.reshape(B, L, D), balance, z

  def total(y, balance, z):
    return (y * cotangent).sum() + 3 * balance + 0.5 * z

  # f of the balance loss counts decisions, which are held fixed too.
  expected = oracle.gradient(lambda inputs: total(*outputs(inputs)), inputs)

  @jax.jit
  @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
  def run(variables, x):
    y, aux = layer.apply(variables, x, mask_BxL=mask, capacity_factor=factor)
    results = y, aux.losses['load_balance'], aux.losses['router_z']
    return total(*results), results

  (grads, grad_x), results = run(variables(inputs), tokens(inputs))
  for ours, theirs in zip(results, outputs(inputs)):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
  ours = {'x': grad_x, 'router': grads['params']['router']['kernel']}
  for name, kernel in grads['params']['expert'].items():
    ours[name] = kernel['kernel']
  assert ours.keys() == expected.keys()
  for name, gradient in ours.items():
    assert np.abs(gradient).max() > 0.1
    np.testing.assert_allclose(
      gradient, expected[name], rtol=1e-3, atol=1e-4, err_msg=name
    )


def test_relabelled_experts_give_the_same_output():
  layer = make_layer(k=2)
  inputs = arrays()
  order = [2, 0, 3, 1]
  relabelled = {
    'x': inputs['x'],
    'router': inputs['router'][:, order],
    **{name: inputs[name][order] for name in ('wi', 'wo')},
  }
  run = jax.jit(functools.partial(layer.apply, capacity_factor=0.75))
  (y, aux), (y_relabelled, aux_relabelled) = (
    run(variables(arrays), tokens(arrays)) for arrays in (inputs, relabelled)
  )
  np.testing.assert_allclose(y, y_relabelled, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(
    aux.metrics['kept_E'][np.array(order)], aux_relabelled.metrics['kept_E']
  )


@pytest.mark.parametrize('dispatch', [gather, einsum, None])
def test_nothing_comes_out_of_padding(dispatch):
  layer = make_layer(k=2, dispatch=dispatch or gather)
  factor = 0.75 if dispatch else None
  inputs, mask = arrays(), mask_of()

  @jax.jit
  @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
  def run(variables, x):
    y, aux = layer.apply(variables, x, mask_BxL=mask, capacity_factor=factor)
    total = (y**2).sum() + sum(aux.losses.values())
    return total, (y, aux)

  results = [
    run(
      variables(inputs),
      jnp.where(mask[..., None], tokens(inputs), padding),
    )
    for padding in (0.0, 1e30, jnp.nan)
  ]
  jax.tree.map(np.testing.assert_array_equal, results[1], results[0])
  jax.tree.map(np.testing.assert_array_equal, results[2], results[0])
  (_, dx), (y, aux) = results[0]
  assert (y[~mask] == 0).all() and (dx[~mask] == 0).all()
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(results[0]))
  assert aux.metrics['padding'] == (~mask).sum()


@pytest.mark.parametrize(
  'k, priority',
  list(itertools.product([1, 2], ['choice', 'token', 'confidence'])),
)
def test_outputs_are_as_causal_as_declared(k, priority):
  layer = make_layer(k=k, priority=priority)
  early = L // 2

  @functools.partial(jax.jit, static_argnums=1)
  def leak(x_pairs, factor):
    """How far early outputs move when later tokens become others."""
    apply = functools.partial(
      layer.apply, variables(arrays()), capacity_factor=factor
    )
    first, second = (apply(x)[0] for x in x_pairs)
    return jnp.abs(first - second)[:, :early].max()

  def leaks(factor):
    largest = 0
    for seed in range(10):
      x, changed = tokens(arrays(seed=seed)), tokens(arrays(seed=seed + 50))
      changed = jnp.concatenate([x[:, :early], changed[:, early:]], axis=1)
      largest = max(largest, leak((x, changed), factor))
    return largest > 1e-5

  is_causal = TopK(E, k=k, priority=priority).is_causal
  assert leaks(0.75) == (not is_causal)
  if not is_causal:
    assert not leaks(None)


def test_a_decoder_refuses_a_router_that_is_not_causal():
  inputs = arrays()

  def apply(**router):
    layer = make_layer(**router)
    return jax.eval_shape(
      functools.partial(layer.apply, capacity_factor=1.0, require_causal=True),
      variables(inputs),
      tokens(inputs),
    )

  for router in ({'k': 1}, {'k': 2, 'priority': 'token'}):
    apply(**router)
  for router in ({'k': 2}, {'k': 1, 'priority': 'confidence'}):
    with pytest.raises(ValueError) as error:
      apply(**router)
    assert str(error.value) == (
      'TopK lets later tokens decide the fate of earlier ones, which a decoder '
      "must not: take a causal one (of top-k, k=1 or priority='token'), or say "
      'allow_non_causal_routing=True.'
    )


def test_bfloat16_in_and_out():
  layer = make_layer(k=2)
  inputs = arrays()
  x = tokens(inputs).astype(jnp.bfloat16)
  run = jax.jit(functools.partial(layer.apply, capacity_factor=0.75))
  y, aux = run(variables(inputs), x)
  exact, exact_aux = run(variables(inputs), x.astype(jnp.float32))
  assert (y.dtype, exact.dtype) == (jnp.bfloat16, jnp.float32)
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(aux))
  jax.tree.map(np.testing.assert_array_equal, aux, exact_aux)
  np.testing.assert_allclose(y.astype(jnp.float32), exact, rtol=0.05, atol=0.05)


def test_experts_start_different_and_as_wide_as_dense_ones():
  # Variance of a kernel is 1 / fan-in, 1 / 64 for wi and 1 / 32 for wo, however
  # many experts are stacked: an initialiser that took E for an input axis would
  # make it E times smaller. 2048 entries an expert: deviation 3% of each.
  for num_experts in (2, 16):
    layer = MoE(
      make_router=functools.partial(TopK, num_experts=num_experts),
      make_expert=functools.partial(Mlp, hidden_width=32),
    )
    init = jax.jit(layer.init)
    params = init(jax.random.key(0), jnp.ones((1, 2, 64)))['params']
    for name, fan_in in [('wi', 64), ('wo', 32)]:
      kernel = params['expert'][name]['kernel']
      assert kernel.names[0] == 'expert'
      variances = kernel.value.reshape(num_experts, -1).var(1)
      np.testing.assert_allclose(variances * fan_in, 1, rtol=0.2)
      np.testing.assert_allclose(variances.mean() * fan_in, 1, rtol=0.06)
      flat = np.asarray(kernel.value.reshape(num_experts, -1))
      similarity = np.corrcoef(flat) - np.eye(num_experts)
      assert np.abs(similarity).max() < 0.15
    assert params['router']['kernel'].value.shape == (64, num_experts)


@pytest.mark.parametrize('group_size', [0, 4, 5, 9, 24])
def test_groups_that_do_not_fit_are_refused(group_size):
  # Of two sequences of six tokens: 4 would straddle them, 24 are too many.
  inputs = arrays()
  with pytest.raises(
    ValueError, match=f'group_size={group_size} does not fit 2 sequences of 6'
  ):
    make_layer(group_size=group_size).apply(
      variables(inputs), tokens(inputs), capacity_factor=1.0
    )
