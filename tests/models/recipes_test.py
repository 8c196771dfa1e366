"""The papers' recipes: they build, and count what the papers print."""

import functools
import json
import math

import command
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from paths import ROOT

import docs
from sparse_experts import config
from sparse_experts.config import provenance
from sparse_experts.convert.arguments import arguments
from sparse_experts.models import auxiliary
from sparse_experts.models.balance_bias import update_biases
from sparse_experts.papers import published
from sparse_experts.planning import ledger

RECIPES = sorted(
  str(path.relative_to(ROOT)) for path in ROOT.glob('gin/models/*/*.gin')
)

ONE_A_FOLDER = {file.rpartition('/')[0]: file for file in RECIPES}.values()


def model_of(file, *bindings):
  config.parse([file], bindings, [])
  return config.model(), config.value('TASK_FEATURE_LENGTHS')


@functools.cache
def table(name):
  """The rows of `table --paper=NAME --json`."""
  outcome = command.run('table', f'--paper={name}', '--json')
  assert (outcome.code, outcome.stderr) == (0, '')
  return json.loads(outcome.stdout)['rows']


OF_PAPERS = {
  row.file for table in published.tables().values() for row in table.rows
}


@pytest.mark.parametrize('file', RECIPES)
def test_it_trains_and_is_documented(file):
  head = (ROOT / file).read_text().partition('\n\n')[0]
  assert '# Provides: MODEL' in head and '# Requires: ' in head
  # One of a paper, as of its tables, cites it, or a recipe that does.
  cites = 'https://arxiv.org/abs/' in head or ', see gin/models/' in head
  assert cites == ('# Differs from the paper:' in head)
  assert cites or file not in OF_PAPERS
  model, lengths = model_of(file)
  # Enough rows for groups of 16 sequences; abstract, so of any size.
  shapes = model.features.shapes(lengths, 16)
  params = jax.eval_shape(lambda: model.init(jax.random.key(0), shapes))
  loss, sums = jax.eval_shape(
    lambda params, batch: model.loss(
      params, batch, jax.random.key(0), train=True
    ),
    jax.tree.map(lambda leaf: leaf.value, params, is_leaf=_is_boxed),
    shapes,
  )
  assert loss.shape == ()
  returned = set(sums['aux_losses'])
  assert set(model.loss_weights) <= returned or not returned


@pytest.mark.parametrize('file', RECIPES)
def test_its_paper_s_training_is_a_run(file):
  config.parse(
    [file, 'gin/tasks/c4.gin', 'gin/runs/pretrain.gin'],
    ['BATCH_SIZE=16', 'TRAIN_STEPS=1'],
    [],
  )
  make_optimizer = config.value('OPTIMIZER')
  rate = config.value('LEARNING_RATE')
  assert 0 < rate(10**6) < rate(10**4) <= 0.01
  make_optimizer({'scale': ('embed',)}, learning_rate=rate)


@pytest.mark.parametrize(
  'file',
  [
    pytest.param(file, marks=() if file in ONE_A_FOLDER else pytest.mark.slow)
    for file in RECIPES
  ],
)
def test_modern_fits_it(file):
  config.parse([file, 'gin/modern.gin'], [], [])
  model, lengths = config.value('MODEL'), config.value('TASK_FEATURE_LENGTHS')
  sparse = bool(model.module.decoder.sparse_layers)
  shapes = model.features.shapes(lengths, 16)
  params = jax.eval_shape(
    lambda: nn.unbox(model.init(jax.random.key(0), shapes))
  )

  def loss_and_moved(params, batch):
    loss, sums = model.loss(params, batch, jax.random.key(0), train=True)
    if sparse:  # The bias of every router moves.
      params = update_biases(params, sums['layers'], model.bias_rate)
    return loss, params

  loss, moved = jax.eval_shape(loss_and_moved, params, shapes)
  assert loss.shape == ()
  assert jax.tree.structure(moved) == jax.tree.structure(params)
  names = {
    key.key
    for path, _ in jax.tree_util.tree_leaves_with_path(params)
    for key in path
  }
  assert not names & {'relative_bias', 'relative', 'wi', 'bias'}
  assert {'query_norm', 'wi_0'} <= names
  assert ('balance_bias' in names) == sparse


def _is_boxed(leaf):
  return hasattr(leaf, 'names')


@pytest.mark.parametrize(
  'file',
  [
    str(path.relative_to(ROOT))
    for path in sorted(ROOT.glob('gin/routers/*.gin'))
    if provenance.statements(path).get('top_k.TopK.k') == 1
  ],
)
def test_a_router_s_decoder_has_no_gates_of_the_recipe(file):
  # Mixtral's, renormalised, would leave one choice no gradient.
  config.parse(['gin/models/mixtral/8x7b.gin', file], [], [])
  router = config.value('DECODER_ROUTER')()
  assert (router.k, router.gates) == (1, 'all')


# A second for each row: by default of short tables, and of one that is longer.
@pytest.mark.parametrize(
  'name',
  [
    name
    if len(of.rows) < 5 or name == 'switch_table9'
    else pytest.param(name, marks=pytest.mark.slow)
    for name, of in published.tables().items()
  ],
)
def test_counts_are_those_that_papers_print(name):
  """All but those with a reason; and a reason is for one that is not."""
  for row in table(name):
    for value in row['values']:
      agrees = value['because'] is None
      assert value['agrees'] == agrees, (row['model'], value)


@pytest.mark.slow
def test_the_page_of_recipes_has_the_tables():
  tables = '\n'.join(
    docs.paper(name, table(name)) for name in published.tables()
  )
  (page,), _ = docs.PARTS['papers']
  text = (ROOT / page).read_text()
  assert text == docs.with_part(text, 'papers', tables), (
    'bash scripts/docs.sh --write papers'
  )


def auxiliary_loss(model, num_layers, logits_GxSxE=None):
  """What routers of these logits add to the loss, by name; None: equal ones."""
  router = model.module.decoder.make_block.keywords['make_moe'].keywords[
    'make_router'
  ]()
  E = router.num_experts
  if logits_GxSxE is None:
    logits_GxSxE = jnp.zeros((2, E, E))
  _, aux = router.apply({'params': {'kernel': jnp.eye(E)}}, logits_GxSxE)
  auxes = {f'decoder/layers_{i}': aux for i in range(num_layers)}
  totals = auxiliary.Totals(jnp.float32(1), {'decoder': aux.tokens})
  scope = model.balance_over
  auxes = auxiliary.of_layers(auxes, scope, totals)
  combined = auxiliary.over_layers(auxes, model.layer_reduction, scope, totals)
  return {
    name: float(weight * combined[name])
    for name, weight in model.loss_weights.items()
  }


@pytest.mark.parametrize(
  'file, bindings, num_layers, expected',
  [
    # transformers: the joint loss is k at balance, of weight .02.
    ('mixtral/8x7b', (), 32, {'load_balance': 0.04}),
    # MegaBlocks: 1 of weight .01; z, of 64 equal logits, log(64)^2 / 8 of .001.
    (
      'olmoe/1b_7b',
      (),
      16,
      {'load_balance': 0.01, 'router_z': 1e-3 * math.log(64) ** 2 / 8},
    ),
    (
      'olmoe/1b_7b',
      ('NUM_SELECTED_EXPERTS=2',),
      16,
      {'load_balance': 0.01, 'router_z': 1e-3 * math.log(64) ** 2 / 2},
    ),
    # DeepSeekMoE: .001 of each of 27 layers, whatever k.
    ('deepseek_moe/16b', (), 27, {'load_balance': 0.027}),
    (
      'deepseek_moe/16b',
      ('NUM_SELECTED_EXPERTS=2',),
      27,
      {'load_balance': 0.027},
    ),
    ('deepseek_moe/2b', (), 9, {'load_balance': 0.09}),
    # DeepSpeed: its code adds .01 of every layer.
    ('prmoe/350m_moe', (), 12, {'load_balance': 0.12}),
  ],
)
def test_auxiliary_losses_at_balance_are_their_codes(
  file, bindings, num_layers, expected
):
  model, _ = model_of(f'gin/models/{file}.gin', *bindings)
  found = auxiliary_loss(model, num_layers)
  assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
  'file, num_experts, k, expected',
  [('mixtral/8x7b', 8, 2, 0.04), ('olmoe/1b_7b', 64, 8, 0.01)],
)
def test_sequences_that_prefer_opposite_halves_are_balanced_in_their_codes(
  file, num_experts, k, expected
):
  # Each half takes its sequence's tokens in turns: alone a sequence is twice
  # off its balance, both together are balanced.
  half = num_experts // 2
  index = np.arange(num_experts)  # Of tokens, and of experts.
  turn_SxE = (index - k * index[:, None]) % half < k
  prefers_GxE = np.stack([index < half, index >= half])
  logits_GxSxE = jnp.float32(1e-4 * turn_SxE + 30 * prefers_GxE[:, None])
  model, _ = model_of(f'gin/models/{file}.gin')
  found = auxiliary_loss(model, 2, logits_GxSxE)
  assert found['load_balance'] == pytest.approx(expected, rel=1e-3)


def test_deepspeed_s_choice_of_whom_to_drop_is_random():
  for file in RECIPES:
    if '/prmoe/' in file:
      found = arguments(model_of(file)[0])
      name = 'decoder.make_block.make_moe.make_router.priority'
      assert found[name] == 'random'


def test_glam_s_slots_are_a_multiple_of_four():
  # praxis: floor(2 * 1000 / 64) = 31 slots, and then 32.
  model, _ = model_of('gin/models/glam/0.1b_64e.gin')
  rule = model.module.decoder.make_block.keywords['make_moe'].keywords[
    'capacity_rule'
  ]
  assert rule(2.0, tokens=1000, num_experts=64, k=2) == 32


def test_v_moe_s_slots_are_a_multiple_of_four():
  # 784 / 32 * 1.05 = 25.7: 26 slots, and then 28.
  config.parse(['gin/quickstart.gin', 'gin/routers/v_moe.gin'], [], [])
  encoder = config.model().module.encoder
  rule = encoder.make_block.keywords['make_moe'].keywords['capacity_rule']
  assert rule(1.05, tokens=784, num_experts=32, k=1) == 28


ROUTERS = sorted(path.stem for path in ROOT.glob('gin/routers/*.gin'))


def test_a_router_s_file_says_what_its_losses_are_over():
  # Whatever the model before it says: weights mean nothing without.
  for router in ROUTERS:
    found = []
    for before in ('olmoe/1b_7b', 'mixtral/8x7b', 'deepseek_moe/2b'):
      config.parse(
        [f'gin/models/{before}.gin', f'gin/routers/{router}.gin'],
        ['NUM_TASKS=4'] if router == 'task_gating' else [],
        [],
      )
      found.append(
        (config.value('LAYER_REDUCTION'), config.value('BALANCE_OVER'))
      )
    if config.value('LOSS_WEIGHTS'):
      assert len(set(found)) == 1, router
      in_one_pass = router in ('mixtral', 'olmoe')
      assert (found[0] == ('sum', 'group')) != in_one_pass, router


def test_glam_by_hand():
  facts = ledger.ledger(*model_of('gin/models/glam/0.1b_64e.gin'))
  L, D, F, E, V = 12, 768, 3072, 64, 32000
  expected = (
    L * 4 * D * 12 * 64  # Attention.
    + L // 2 * 3 * D * F  # Gated dense FFNs.
    + L // 2 * E * 2 * D * F  # Experts, not gated.
    + L // 2 * D * E  # Routers.
    + V * D  # Embedding and logits.
    + (2 * L + 1) * D  # Norms.
    + L * 12 * 32  # A relative bias in every block.
  )
  assert facts['total_params'] == expected
  # Two of 64 experts.
  assert facts['active_params'] == expected - L // 2 * 62 * 2 * D * F


def test_switch_and_its_twin_do_the_same_arithmetic():
  file = 'gin/models/switch/base.gin'
  sparse, dense = (
    ledger.ledger(*model_of(file, *bindings))
    for bindings in ((), ('SPARSE_LAYERS=0',))
  )
  name = 'kaplan_forward_flops_per_sequence'
  assert sparse[name] == dense[name]
  # Group of 8192: floor(1.25 x 8192 / 128) = 80 slots, 1.25 a token; group of
  # 1824: floor(17.8) = 17 slots, 1.193 a token. Six layers of 2 x 768 x 3072.
  extra = 512 * 0.25 + 114 * (17 * 128 / 1824 - 1)
  padding = (
    sparse['executed_forward_flops_per_sequence']
    - sparse['forward_flops_per_sequence']
  )
  assert padding == pytest.approx(extra * 6 * 2 * 2 * 768 * 3072, rel=1e-6)


def test_sizes_are_macros():
  total = {
    E: ledger.ledger(
      *model_of('gin/models/switch/base.gin', f'NUM_EXPERTS={E}')
    )['total_params']
    for E in (2, 4)
  }
  # 12 sparse layers: two more experts and two more columns of a router.
  assert total[4] - total[2] == 12 * 2 * (2 * 768 * 3072 + 768)
