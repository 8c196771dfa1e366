"""The ledger: counts derived by hand, arithmetic as XLA counts it."""

import json

import jax
import numpy as np
import pytest
import tiny_models

from sparse_experts.cli import main
from sparse_experts.planning import ledger

LENGTHS = {'inputs': 12, 'targets': 8}


def test_parameters_by_hand():
  facts = ledger.ledger(tiny_models.make_model(), LENGTHS)
  D, F, V, E, HA, U, H = 16, 32, 64, 8, 16, 8, 2
  attention, mlp = 4 * D * HA, 2 * D * F
  # Each stack: 4 blocks of which 2 sparse; a bias table; norms: one before each
  # sub-layer and one at the end.
  expected = {
    'encoder attention': 4 * attention,
    'decoder attention': 4 * 2 * attention,
    'encoder dense FFNs': 2 * mlp,
    'decoder dense FFNs': 2 * mlp,
    'encoder experts': 2 * E * mlp,
    'decoder experts': 2 * E * mlp,
    'encoder routers': 2 * D * E,
    'decoder routers': 2 * D * E,
    'encoder norms and biases': H * U + 9 * D,
    'decoder norms and biases': H * U + 13 * D,
    'token embedding': V * D,
    'output logits': V * D,
  }
  assert facts['components'] == expected
  assert facts['total_params'] == sum(expected.values())
  assert facts['block_params'] == (
    facts['total_params'] - 2 * V * D - 2 * (H * U + D)
  )
  assert facts['sparse_params'] == 4 * E * mlp
  assert facts['active_params'] == facts['total_params'] - 4 * (E - 1) * mlp


def test_scan_changes_no_count():
  for encoder in (True, False):
    lengths = LENGTHS if encoder else {'targets': 8}
    plain, scanned = (
      ledger.ledger(
        tiny_models.make_model(encoder=encoder, scan=scan, k=2), lengths
      )
      for scan in (False, True)
    )
    assert plain == scanned


@pytest.mark.parametrize('encoder', [True, False])
def test_flops_are_what_xla_counts(encoder):
  # A dense model, wide enough that matrix products are nearly all there is.
  lengths = {'inputs': 64, 'targets': 32} if encoder else {'targets': 64}
  model = tiny_models.make_model(
    encoder=encoder, layers=2, sparse_layers=0, width=256, hidden_width=1024
  )
  batch = tiny_models.make_batch(
    rows=1, inputs=64, targets=lengths['targets'], encoder=encoder
  )
  params = jax.eval_shape(lambda: tiny_models.make_params(model, batch))
  forward = jax.jit(lambda p: model.module.apply({'params': p}, batch)[0])
  counted = forward.lower(params).cost_analysis()['flops']
  facts = ledger.ledger(model, lengths)
  assert facts['forward_flops_per_sequence'] == pytest.approx(counted, rel=0.05)
  tokens = sum(lengths.values())
  assert facts['train_flops_per_token'] * tokens == pytest.approx(
    3 * facts['forward_flops_per_sequence'], abs=tokens
  )


def test_relative_attention_multiplies_queries_with_distances():
  flops = [
    ledger.ledger(
      tiny_models.make_model(encoder=False, attention={'relative': relative}),
      {'targets': 8},
    )['forward_flops_per_sequence']
    for relative in (False, True)
  ]
  # In 4 layers: a projection of 8 distances, and 8 queries times each of them.
  assert flops[1] - flops[0] == 4 * 2 * (8 * 16 * 16 + 8 * 8 * 16)


def test_experts_count_k_times_not_e_times():
  flops = {
    k: ledger.ledger(tiny_models.make_model(k=k), LENGTHS)[
      'forward_flops_per_sequence'
    ]
    for k in (1, 2)
  }
  # A second expert for each token of 2 sparse blocks a stack.
  assert flops[2] - flops[1] == 2 * (12 + 8) * 2 * (2 * 16 * 32)


def test_executed_flops_have_the_empty_slots():
  counts = [
    ledger.ledger(tiny_models.make_model(capacity_factor_train=factor), LENGTHS)
    for factor in (1.25, None)
  ]
  useful, executed = (
    [facts[f'{kind}forward_flops_per_sequence'] for facts in counts]
    for kind in ('', 'executed_')
  )
  assert useful[0] == useful[1] == executed[1]
  # At least 4 slots for each of 8 experts in groups of 12 and of 8 tokens: 32
  # rows, in 2 layers a stack; a row is 2 FLOPs for each of 2 x 16 x 32.
  rows = 2 * (32 - 12) + 2 * (32 - 8)
  assert executed[0] - useful[0] == rows * 2 * 2 * 16 * 32


def test_a_soft_layer_executes_its_own_slots(capsys):
  files = ('gin/quickstart.gin', 'gin/routers/soft_moe.gin')
  arguments = [f'--gin_file={file}' for file in files]
  slots = '--gin.soft_moe.SoftMoE.slots={}'
  executed = []
  for p in (1, 3):
    assert main(['inspect', *arguments, slots.format(p), '--json']) == 0
    facts = json.loads(capsys.readouterr().out)
    executed.append(facts['executed_forward_flops_per_sequence'])
  # One layer of the encoder: 2 slots more for 8 experts of 2 x 128 x 512, and
  # as many more columns of phi, which are no product of a kernel.
  assert executed[1] - executed[0] == 2 * 8 * 2 * 2 * 128 * 512


def test_bytes_by_hand():
  counts = {
    E: ledger.ledger(tiny_models.make_model(num_experts=E), LENGTHS)
    for E in (4, 8)
  }
  D, F = 16, 32
  for facts in counts.values():
    assert facts['parameter_bytes'] == 4 * facts['total_params']
    # Two moments and two counts of steps.
    assert facts['optimizer_bytes']['adam'] == 8 * facts['total_params'] + 8
  # Four experts more in four layers: a row and a column of moments for each of
  # two matrices; and of the router a moment for each element.
  more = 4 * 4 * (2 * (D + F) + D)
  small, large = (counts[E]['optimizer_bytes']['adafactor'] for E in (4, 8))
  assert large - small == 4 * more


def test_the_quickstart_and_its_twin_do_the_same_arithmetic(capsys):
  facts = []
  for name in ('quickstart', 'quickstart_dense'):
    assert main(['inspect', f'--gin_file=gin/{name}.gin', '--json']) == 0
    facts.append(json.loads(capsys.readouterr().out))
  sparse, dense = facts
  routers = sum(v for k, v in sparse['components'].items() if 'routers' in k)
  assert sparse['active_params'] == dense['active_params'] + routers
  assert np.isclose(
    sparse['train_flops_per_token'], dense['train_flops_per_token'], rtol=5e-3
  )
