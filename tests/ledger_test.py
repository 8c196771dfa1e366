"""The ledger: counts derived by hand, arithmetic as XLA counts it."""

import json

import jax
import numpy as np
import pytest
import tiny_models

from sparse_experts.analysis import ledger
from sparse_experts.cli import main

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


def test_experts_count_k_times_not_e_times():
  flops = {
    k: ledger.ledger(tiny_models.make_model(k=k), LENGTHS)[
      'forward_flops_per_sequence'
    ]
    for k in (1, 2)
  }
  # A second expert for each token of 2 sparse blocks a stack.
  assert flops[2] - flops[1] == 2 * (12 + 8) * 2 * (2 * 16 * 32)


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
