"""Every router recipe, against what its original computed.

`data/originals/NOTE.md` says what the originals are, how they were run, and
what of theirs is not followed.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paths import DATA, ROOT

from sparse_experts import config
from sparse_experts.models.balance_bias import update_biases
from sparse_experts.models.consistency import _symmetric_kl
from sparse_experts.moe.assignment import positions
from sparse_experts.moe.routers.deepseek import BIAS
from sparse_experts.moe.routers.sinkhorn import log_plan

ORIGINALS = DATA / 'originals'


def load(path):
  """The arrays of each case of an original, by (original, recipe, case)."""
  cases = {}
  for key, array in np.load(path).items():
    recipe, case, name = key.split('/', 2)
    cases.setdefault((path.stem, recipe, case), {})[name] = array
  return cases


CASES = {}
for _path in sorted(ORIGINALS.glob('*.npz')):
  CASES.update(load(_path))

# Where a case is not the recipe's own: the argument that says so.
ARGUMENTS = {
  # There, a model that was loaded knows no temperature.
  ('evomoe', 'dense_to_sparse', 'eval'): {'gates': 'softmax'},
  ('evomoe', 'dense_to_sparse', 'soft_softmax_gates'): {'gates': 'softmax'},
  # Closer to the optimum, which the original's assignment here is.
  ('fairseq_base', 'base', 'train'): {'epsilon': 1e-3},
  ('megatron', 's_base', 'plain'): {'gates': 'sigmoid'},
  ('mesh_tensorflow', 'st_moe', 'padded'): {'losses_over': 'positions'},
  ('mesh_tensorflow', 'top_n', 'padded'): {'losses_over': 'positions'},
  ('praxis', 'gshard', 'padded'): {'losses_over': 'positions'},
  ('vmoe', 'v_moe', 'noisy_prioritised'): {'priority': 'confidence'},
}

# Losses of originals that are not ours, for the note's reasons.
NOT_FOLLOWED = {
  # f and P count padding; the loss is multiplied by the share of the rest.
  ('mesh_tensorflow', 'switch', 'padded', 'load_balance'),
  ('mesh_tensorflow', 'batch_prioritised', 'padded', 'load_balance'),
  ('mesh_tensorflow', 'no_token_left_behind', 'padded', 'load_balance'),
  # Groups weigh alike there, by their tokens here.
  ('praxis', 'gshard', 'padded_per_token', 'load_balance'),
  # Every attempt counts, whether it is made or not.
  ('mesh_tensorflow', 'no_token_left_behind', 'plain', 'load_balance'),
}

close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6)


def under(case, prefix):
  """The arrays whose names begin with prefix/, by the rest of the name."""
  return {
    name.removeprefix(f'{prefix}/'): array
    for name, array in case.items()
    if name.startswith(f'{prefix}/')
  }


def recipe(name, num_experts, arguments=None):
  """ROUTER of gin/routers/NAME.gin, with other arguments, and LOSS_WEIGHTS."""
  files = ['gin/equivalence.gin', f'gin/routers/{name}.gin']
  config.parse(files, [f'NUM_EXPERTS={num_experts}'], [])
  router = config.value('ROUTER')()
  return router.clone(**(arguments or {})), config.value('LOSS_WEIGHTS')


def run(router, case, monkeypatch):
  """What a router decides and loses on a case, and the gradients.

  Returns:
    Choices before any capacity, gates and places, [G, S, E], 0 and -1 where a
    token does not meet an expert; losses; and of each, and of 'combine', the
    sum of all gates times the cosine of 0, 1, 2, ..., the gradient by
    parameters and by tokens.
  """
  E = router.num_experts
  params, given = under(case, 'params'), under(case, 'given')
  if 'logits' in case:
    params['kernel'] = np.eye(E, dtype=np.float32)
  x_GxSxD = case.get('x', case.get('logits'))
  if x_GxSxD is None:
    x_GxSxD = np.ones((*given['token_ids_GxS'].shape, 1), np.float32)
  if 'step' in case:
    given['step'] = case['step']
  capacity = int(case['capacity']) if 'capacity' in case else None
  if 'capacity' in router.needs:
    given['capacity'] = capacity

  # The numbers that the original drew, in the order they are asked for.
  draws = list(under(case, 'draws').values())

  def draw(key, shape, **bounds):
    del key, bounds
    assert draws[0].shape == shape
    return jnp.asarray(draws.pop(0))

  if draws:
    for distribution in ('normal', 'uniform', 'gumbel'):
      monkeypatch.setattr(jax.random, distribution, draw)

  shape = (*x_GxSxD.shape[:2], E)
  cotangent_GxSxE = np.cos(np.arange(np.prod(shape))).reshape(shape)

  def objectives(params, x_GxSxD):
    assignment, aux = router.apply(
      {'params': params},
      x_GxSxD,
      mask_GxS=case.get('mask'),
      deterministic='train' not in case,
      rngs={'dropout': jax.random.key(0)},
      **given,
    )
    meets_GxSxKxE = jax.nn.one_hot(assignment.expert_GxSxK, E)
    meets_GxSxKxE *= assignment.kept(capacity)[..., None]

    def by_expert(of_choice_GxSxK):
      return jnp.einsum('GSKE,GSK->GSE', meets_GxSxKxE, of_choice_GxSxK)

    gate_GxSxE = by_expert(assignment.gate_GxSxK)
    position_GxSxE = by_expert(assignment.position_GxSxK + 1.0) - 1
    values = {'combine': (gate_GxSxE * cotangent_GxSxE).sum(), **aux.losses}
    chosen_GxSxE = jax.nn.one_hot(assignment.expert_GxSxK, E).sum(2)
    return values, (chosen_GxSxE, gate_GxSxE, position_GxSxE, aux.losses)

  compute = jax.jit(jax.jacrev(objectives, (0, 1), has_aux=True))
  gradients, decided = compute(params, x_GxSxD)
  assert not draws
  return *decided, gradients


@pytest.mark.parametrize(
  'name',
  [
    name
    for name, case in CASES.items()
    if {'gate', 'chosen', 'loss/load_balance'} & case.keys()
    and 'uniform' not in case
  ],
  ids='-'.join,
)
def test_a_router_decides_and_loses_what_its_original_does(name, monkeypatch):
  case, arguments = CASES[name], ARGUMENTS.get(name, {})
  if 'table' in case:
    table = case['table']
    arguments = {'table': lambda *_: table, 'vocab_size': len(table)}
  E = case.get('gate', case.get('logits')).shape[-1]
  router, weights = recipe(name[1], E, arguments)
  chosen_GxSxE, gate_GxSxE, position_GxSxE, losses, gradients = run(
    router, case, monkeypatch
  )
  if 'chosen' in case:
    np.testing.assert_array_equal(chosen_GxSxE, case['chosen'])
  if 'chosen_E' in case:
    np.testing.assert_array_equal(chosen_GxSxE.sum((0, 1)), case['chosen_E'])
  if 'gate' in case:
    close(gate_GxSxE, case['gate'])
  if 'place' in case:
    np.testing.assert_array_equal(position_GxSxE, case['place'])
  scale = weights if 'weighted' in case else {}
  for loss, value in under(case, 'loss').items():
    if (*name, loss) in NOT_FOLLOWED:
      assert abs(losses[loss] - value) > 1e-2
      continue
    close(losses[loss], value / scale.get(loss, 1), err_msg=loss)
  for key, gradient in under(case, 'grad').items():
    of, _, parameter = key.partition('/')
    if (*name, of) in NOT_FOLLOWED:
      continue
    by_params, by_x = gradients[of]
    ours = by_params[parameter] if parameter else by_x
    close(ours, gradient / scale.get(of, 1), err_msg=key)


def test_who_is_selected_at_random():
  """DeepSpeed's: lines are served in the order of a uniform draw."""
  case = CASES['deepspeed', 'switch', 'random_token_selection']
  E = case['gate'].shape[-1]
  router, _ = recipe('switch', E)
  params = {'kernel': np.eye(E, dtype=np.float32)}
  assignment, _ = router.apply({'params': params}, case['logits'])
  draw_GxSxK = np.take_along_axis(
    case['uniform'], np.asarray(assignment.expert_GxSxK), -1
  )
  assignment = assignment.replace(
    position_GxSxK=positions(
      assignment.expert_GxSxK,
      E,
      priority='confidence',
      confidence_GxS=draw_GxSxK[..., 0],
    )
  )
  kept_GxSxK = assignment.kept(int(case['capacity']))
  gate_GxSxE = np.zeros_like(case['gate'])
  np.put_along_axis(
    gate_GxSxE,
    np.asarray(assignment.expert_GxSxK),
    np.asarray(assignment.gate_GxSxK * kept_GxSxK),
    -1,
  )
  close(gate_GxSxE, case['gate'])


@pytest.mark.parametrize(
  'name, second',
  [('st_moe', 1), ('top_n', 1), ('olmoe', 1), ('mixtral', 2), ('gshard', 2)],
)
def test_choices_are_by_what_the_recipe_says(name, second):
  # exp(90 - 200) is 0 in float32, as are all but the first: by probabilities
  # the second choice is the first of them, by logits that of 90.
  router, _ = recipe(name, 4)
  logits_GxSxE = jnp.array([[[200.0, 0.0, 90.0, -5.0]]])
  params = {'kernel': jnp.eye(4)}
  assignment, _ = router.apply({'params': params}, logits_GxSxE)
  assert assignment.expert_GxSxK[0, 0, :2].tolist() == [0, second]


def test_codes_of_no_expert_weigh_as_in_their_code():
  # DSelectKGate adds 1 / sum(selector) to the loss as it is.
  _, weights = recipe('dselect_k', 6)
  assert weights['unassigned_codes'] == 1


def test_soft_moe():
  case = CASES['vmoe', 'soft_moe', 'plain']
  router, _ = recipe('soft_moe', case['phi'].shape[1])

  def objective(params, x_GxSxD):
    assignment, _ = router.apply({'params': params}, x_GxSxD)
    combine = assignment.combine_GxSxExC * case['combine_cotangent']
    dispatch = assignment.dispatch_GxSxExC * case['dispatch_cotangent']
    return combine.sum() + dispatch.sum(), assignment

  params = {'phi': case['phi'], 'scale': case['scale']}
  compute = jax.jit(jax.grad(objective, (0, 1), has_aux=True))
  (by_params, by_x), assignment = compute(params, case['x'])
  close(assignment.combine_GxSxExC, case['combine'])
  close(assignment.dispatch_GxSxExC, case['dispatch'])
  for name, gradient in by_params.items():
    close(gradient, case[f'grad/{name}'], err_msg=name)
  close(by_x, case['grad/x'])


def test_the_bias_of_loss_free_balancing_moves():
  case = CASES['megatron', 'loss_free', 'step']
  moved = update_biases(
    {'layers_0': {'router': {BIAS: case['params/balance_bias']}}},
    {'layers_0': {'chosen_E': case['chosen'].sum((0, 1))}},
    rate=1e-3,
  )
  close(moved['layers_0']['router'][BIAS], case['updated_bias'])


def test_sinkhorn_s_plan():
  case = CASES['megatron', 's_base', 'plain']
  plan_GxSxE = case['plan']
  router, _ = recipe('s_base', plan_GxSxE.shape[-1])
  ours_GxSxE = jnp.exp(log_plan(case['logits'], iterations=router.iterations))
  close(ours_GxSxE, plan_GxSxE)


def test_thor_s_two_passes_are_kept_alike():
  case = CASES['thor', 'thor', 'consistency']

  def divergence(first, second):
    return (_symmetric_kl(first, second) * case['mask']).sum()

  value, gradients = jax.value_and_grad(divergence, (0, 1))(
    case['first'], case['second']
  )
  close(value, case['loss'])
  for gradient, name in zip(gradients, ('first', 'second'), strict=True):
    close(gradient, case[f'grad_{name}'])


def test_the_page_says_what_the_originals_are():
  page = (ROOT / 'docs' / 'routers.md').read_text()
  section = page.split('## Checked against the originals')[1].split('\n## ')[0]
  table, without = section.split('These have no original to compare with:')
  rows = re.findall(r'^\| (`.*?) \|', table, re.MULTILINE)
  compared = re.findall(r'`(\w+)`', ' '.join(rows))
  without = re.findall(r'`(\w+)`', without)
  recipes = {
    path.stem
    for path in ROOT.glob('gin/routers/*.gin')
    if '\n# Original: not compared\n' not in path.read_text()
  }
  assert sorted(compared + without) == sorted(recipes)
  assert {recipe for _, recipe, _ in CASES} == set(compared)
