"""Routing, losses, gradients and layers as flaxformer computes them.

See data/README.md. Its conventions are arguments here. Its scatter routers with
`ignore_padding_tokens` are left out: there padding still takes places, and
counts in f of the load-balancing loss, as choices of experts 0 to k - 1.
"""

import functools
import re

import jax
import numpy as np
import pytest
from paths import DATA

from sparse_experts.layers.mlp import Mlp
from sparse_experts.moe import CapacityRule, MoE, TopK, route

CONVENTIONS = {
  'gates': 'all',
  'balance_counts': 'all',
  'losses_over': 'positions',
}
PRIORITIES = {'0': 'choice', '1': 'confidence'}


def load(name):
  """The arrays of each case by name; those that cases share are one too."""
  cases = {}
  for key, array in np.load(DATA / f'flaxformer_{name}.npz').items():
    case, array_name = key.split('/', 1)
    cases.setdefault(case, {})[array_name] = array
  return cases


def values_and_gradients(logits, mask, capacity, cotangent, *, k, priority):
  """The assignment, and values and gradients of combine, aux and z."""
  routed = functools.partial(
    route, k=k, priority=priority, mask_GxS=mask, **CONVENTIONS
  )

  def objectives(logits):
    assignment, aux = routed(logits)
    weights = assignment.gate_GxSxK * assignment.kept(capacity)
    weighted = (weights * cotangent).sum()
    return weighted, aux.losses['load_balance'], aux.losses['router_z']

  _, balance, z = objectives(logits)
  combine, aux, z_grad = jax.jacrev(objectives)(logits)
  gradients = {'combine': combine, 'aux': aux, 'z': z_grad}
  return routed(logits)[0], balance, z, gradients


def masked_form(assignment, values, capacity):
  """Values [G, S, K] of kept choices laid out as [G, S, E, C]."""
  G, S, _ = values.shape
  form = np.zeros((G, S, assignment.num_experts, capacity), values.dtype)
  for g, s, j in np.argwhere(assignment.kept(capacity)):
    slot = assignment.expert_GxSxK[g, s, j], assignment.position_GxSxK[g, s, j]
    form[g, s, *slot] = values[g, s, j]
  return form


def choices_form(assignment, slots):
  """Values [G, S, E, C] at the slots of kept choices, as [G, S, K]."""
  form = np.zeros(assignment.position_GxSxK.shape, slots.dtype)
  for g, s, j in np.argwhere(assignment.kept(slots.shape[-1])):
    slot = assignment.expert_GxSxK[g, s, j], assignment.position_GxSxK[g, s, j]
    form[g, s, j] = slots[g, s, *slot]
  return form


close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize('bpr', ['0', '1'])
@pytest.mark.parametrize('k', [1, 2])
@pytest.mark.parametrize('name', ['routing_a', 'routing_d', 'routing_f'])
def test_routing(name, k, bpr):
  cases = load(name)
  logits = cases.pop('shared')['logits']
  mask = (
    (logits != 0).any(-1)
    if name == 'routing_f'
    else np.ones(logits.shape[:2], bool)
  )
  run = jax.jit(
    functools.partial(values_and_gradients, k=k, priority=PRIORITIES[bpr])
  )
  selected = {c: a for c, a in cases.items() if f'_k{k}_bpr{bpr}_' in c}
  assert len(selected) >= 3
  assignment, *_ = run(logits, mask, 1, np.zeros((*mask.shape, k), np.float32))
  assignment = jax.tree.map(np.asarray, assignment)
  gate = assignment.gate_GxSxK
  compared = set()
  for case, expected in selected.items():
    capacity = int(re.search(r'C(\d+)', case)[1])
    kept = assignment.kept(capacity)
    if case.startswith('scatter'):
      indices = np.stack(
        [assignment.expert_GxSxK, assignment.position_GxSxK], axis=-1
      )
      np.testing.assert_array_equal(indices, expected['dispatch_indices'])
      close(gate * kept, expected['combine_weights'])
      cotangent = expected.get('combine_cotangent')
    else:
      np.testing.assert_array_equal(
        masked_form(assignment, kept, capacity), expected['dispatch_mask']
      )
      close(masked_form(assignment, gate, capacity), expected['combine_array'])
      cotangent = expected.get('combine_cotangent')
      if cotangent is not None:
        cotangent = choices_form(assignment, cotangent)
    if cotangent is None:
      cotangent = np.zeros(gate.shape, np.float32)
    _, balance, z, gradients = run(logits, mask, capacity, cotangent)
    close(balance, expected['auxiliary_loss'])
    close(z, expected['router_z_loss'])
    for of, gradient in gradients.items():
      if f'grad_logits_{of}' in expected:
        close(gradient, expected[f'grad_logits_{of}'], err_msg=f'{case} {of}')
        compared.add(of)
  assert compared == {'combine', 'aux', 'z'}


LAYERS = load('layer')


@pytest.mark.parametrize('case', [c for c in LAYERS if c.startswith('masked')])
def test_layer(case):
  k, bpr, factor, activation, *group = re.fullmatch(
    r'masked_k(.)_bpr(.)_cf(.*?)_([a-z]+)(_group16)?', case
  ).groups()
  k, expected = int(k), LAYERS[case]
  shared = LAYERS['group16' if group[0] else 'plain']
  layer = MoE(
    make_router=functools.partial(
      TopK, num_experts=4, k=k, priority=PRIORITIES[bpr], **CONVENTIONS
    ),
    make_expert=functools.partial(Mlp, hidden_width=32, activation=activation),
    group_size=16 if group[0] else None,
    capacity_rule=CapacityRule(
      per_choice=False, rounding='round', minimum=1, clip=False
    ),
  )

  def parameters(arrays, prefix):
    def kernel(path):
      return {'kernel': arrays[f'{prefix}/{path}/kernel']}

    return {
      'router': kernel('router/router_weights/w'),
      'expert': {name: kernel(f'expert/{name}') for name in ('wi', 'wo')},
    }

  @jax.jit
  @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
  def run(params, x):
    y, aux = layer.apply({'params': params}, x, capacity_factor=float(factor))
    return (y * shared['out_cotangent']).sum(), (y, aux)

  (grad_params, grad_x), (y, aux) = run(
    parameters(shared, 'params'), shared['inputs']
  )
  close(y, expected['outputs'], atol=1e-5)
  close(grad_x, expected['grad_inputs'], atol=1e-5)
  jax.tree.map(
    functools.partial(close, rtol=1e-4, atol=1e-4),
    grad_params,
    parameters(expected, 'grad_params'),
  )
  close(aux.losses['load_balance'], expected['metric_auxiliary_loss'])
  close(aux.losses['router_z'], expected['metric_router_z_loss'])
  sums = aux.metrics
  slots = expected['num_groups'] * 4 * expected['expert_capacity']
  assert sums['slots'] == slots
  kept = sums['kept_E'].sum()
  for value, name in [
    (kept / slots, 'expert_usage'),
    (sums['left_out'] / sums['tokens'], 'fraction_tokens_left_behind'),
    (sums['gate_mass_E'].sum() / kept, 'router_confidence'),
  ]:
    close(value, expected[f'metric_{name}'])
