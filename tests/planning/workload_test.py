"""The workload against the ledger, which counts parameters and not calls."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
import tiny_models
from flax import linen as nn

from sparse_experts import sharding
from sparse_experts.layers import cost
from sparse_experts.moe import MoE, TopK
from sparse_experts.planning import ledger, workload

B = 6
MODELS = {
  'encoder and decoder': {'extra_mlp': True, 'own_bias': True},
  'decoder': {'encoder': False, 'k': 2},
  'gelu': {'encoder': False, 'activation': 'gelu'},
  'remat': {'encoder': False, 'remat': 'full'},
  'groups': {'encoder': False, 'group_size': 4},
  'no capacity': {'encoder': False, 'k': 3, 'capacity_factor_train': None},
  'pyramid': {
    'encoder': False,
    'layers': 6,
    'sparse_layers': {1: 2, 3: 4, 5: 4},
  },
}


def trace(model):
  lengths = {'targets': 8}
  if model.module.encoder is not None:
    lengths['inputs'] = 12
  shapes = model.features.shapes(lengths, B)
  _, found = workload.trace(
    model,
    lambda: jax.eval_shape(
      lambda key: model.init(key, shapes), jax.random.key(0)
    ),
  )
  return found, lengths


@pytest.mark.parametrize('name', MODELS)
def test_layers_tell_what_the_ledger_counts(name):
  model = tiny_models.make_model(**MODELS[name])
  found, lengths = trace(model)
  facts = ledger.ledger(model, lengths)
  executed = facts['executed_forward_flops_per_sequence']
  assert found.forward_flops == pytest.approx(B * executed, rel=1e-9)
  assert found.is_relu == (name != 'gelu')


@pytest.mark.parametrize('remat', ['none', 'full'])
def test_scan_and_remat_change_no_sum(remat):
  make = tiny_models.make_model
  plain, _ = trace(make(encoder=False))
  other, _ = trace(make(encoder=False, scan=True, remat=remat))
  fields = [field.name for field in dataclasses.fields(workload.Block)]
  for name in {*fields} - {'group', 'layers', 'logits', 'untold'}:
    assert other.total(name) == plain.total(name) > 0, name
  assert len(other.blocks) == 2 and len(plain.blocks) == 4
  assert (other.logits, other.num_experts) == (plain.logits, plain.num_experts)


def test_a_layer_that_does_not_tell_is_one_line():
  class Scale(nn.Module):
    @nn.compact
    def __call__(self, x_BxLxD):
      init = sharding.named(nn.initializers.ones, 'embed')
      gain_D = self.param('gain', init, x_BxLxD.shape[-1:])
      return x_BxLxD * gain_D[None, None]

  model = tiny_models.make_model(encoder=False)
  decoder = model.module.decoder.clone(make_norm=Scale)
  model = dataclasses.replace(model, module=model.module.clone(decoder=decoder))
  with pytest.raises(ValueError, match='Scale at decoder/norm has') as error:
    trace(model)
  assert '\n' not in str(error.value)
  # The ledger needs no count of what a layer does.
  told = ledger.ledger(tiny_models.make_model(encoder=False), {'targets': 8})
  assert ledger.ledger(model, {'targets': 8}) == told


def test_an_expert_that_does_not_tell_is_counted_and_not_planned():
  """Its parameters are there to be counted; what it costs it alone knows."""

  class Scale(nn.Module):
    @nn.compact
    def __call__(self, x_xD, deterministic=True):
      ones = sharding.named(nn.initializers.ones, 'embed')
      return x_xD * self.param('scale', ones, x_xD.shape[-1:])[None]

  make_router = functools.partial(TopK, num_experts=4)
  layer = MoE(make_router=make_router, make_expert=Scale)
  boxed, calls = cost.calls(
    lambda: jax.eval_shape(
      lambda key: layer.init(key, jnp.ones((2, 8, 16))), jax.random.key(0)
    )
  )
  told = calls[()].told
  assert (told.choices, told.group) == (2 * 8, (8, 8))
  with pytest.raises(ValueError, match='Scale.*does not tell what it costs'):
    _ = calls[()].cost
