"""What layers tell of their cost, by hand and by the products they trace."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax.extend.core import jaxprs_in_params

from sparse_experts import moe, sharding
from sparse_experts.layers.attention import Attention
from sparse_experts.layers.cost import Cost, calls, cost_of
from sparse_experts.layers.embed import TokenEmbed
from sparse_experts.layers.linear import Linear, Projection
from sparse_experts.layers.mlp import Mlp
from sparse_experts.layers.norm import LayerNorm, RMSNorm
from sparse_experts.moe.capacity import CapacityRule
from sparse_experts.moe.routers.noisy_top_k import NoisyTopK
from sparse_experts.moe.routers.rl_r import RLR
from sparse_experts.moe.routers.soft_moe import SoftMoE
from sparse_experts.moe.routers.wpl import WPL

partial = functools.partial
B, L, M, D, F, E = 2, 6, 10, 16, 24, 4
KEY = jax.random.key(0)


def shape(*sizes):
  return jax.ShapeDtypeStruct(sizes, jnp.float32)


X = shape(B, L, D)


def init(module, *args, **kwargs):
  """Traces the initialisation of a module on shapes."""
  return lambda: jax.eval_shape(
    lambda *args: module.init(KEY, *args, **kwargs), *args
  )


def total(module, *args, **kwargs):
  _, found = calls(init(module, *args, **kwargs))
  return sum((call.cost for call in found.values()), Cost())


def products(module, *args, **kwargs):
  """FLOPs of all products in the trace of a call."""
  variables = init(module, *args)()

  def of(jaxpr):
    flops = 0
    for equation in jaxpr.eqns:
      if equation.primitive.name == 'dot_general':
        (contracted, _), _ = equation.params['dimension_numbers']
        inputs = equation.invars[0].aval.shape
        outputs = math.prod(equation.outvars[0].aval.shape)
        flops += 2 * outputs * math.prod(inputs[i] for i in contracted)
      for inner in jaxprs_in_params(equation.params):
        flops += of(inner)
    return flops

  apply = partial(module.apply, **kwargs)
  return of(jax.make_jaxpr(apply)(nn.unbox(variables), *args).jaxpr)


@pytest.mark.parametrize(
  ('module', 'args'),
  [
    (Mlp(F), (X,)),
    (Mlp(F, gated=True), (X,)),
    (Linear((5,), ('heads', 'kv', 'embed'), num_inputs=2), (X,)),
    (Projection(), (X,)),
    (RMSNorm(), (X,)),
    (LayerNorm(), (X,)),
    (Attention(4, 8), (X, X)),
    (Attention(4, 8, num_kv_heads=2, norm=True), (X, shape(B, M, D))),
  ],
  ids=lambda x: type(x).__name__,
)
def test_flops_are_those_of_the_products_in_the_trace(module, args):
  told = total(module, *args)
  assert told.flops + told.attention_flops == products(module, *args)
  assert told.expert_flops == 0


def test_mlp_by_hand():
  T = B * L
  plain, gated = total(Mlp(F), X), total(Mlp(F, 'silu', gated=True), X)
  assert plain == Cost(
    flops=4 * T * D * F, width=T * D, mlp=T * F, activated=T * F, relu=T * F
  )
  assert gated == Cost(
    flops=6 * T * D * F, width=T * D, mlp=2 * T * F, activated=2 * T * F
  )


def test_attention_by_hand():
  # 4 heads of 8; of keys and of values 2 heads. Queries and keys have norms.
  module = Attention(4, 8, num_kv_heads=2, norm=True)
  told = total(module, X, shape(B, M, D))
  assert told == Cost(
    flops=2 * D * (2 * B * L * 32 + 2 * B * M * 16),
    width=B * L * D,
    heads=B * L * 32 + 2 * B * M * 16,
    attention_flops=2 * 2 * B * 4 * L * M * 8,
    attention=B * 4 * L * M,
    float32_inputs=2,
  )
  biased = total(module, X, X, bias_1xHxLxM=jnp.ones((1, 4, L, L)))
  assert biased.biased == biased.attention == B * 4 * L * L


def test_a_table_costs_where_it_is_multiplied():
  class Tied(nn.Module):
    @nn.compact
    def __call__(self, tokens_BxL):
      embed = TokenEmbed(50, D, name='embed')
      return embed.attend(embed(tokens_BxL) + embed(tokens_BxL))

  told = total(Tied(), jax.ShapeDtypeStruct((B, L), jnp.int32))
  assert told == Cost(flops=2 * B * L * D * 50, logits=B * L * 50)


def make_moe(router=None, expert=None, **arguments):
  router = router or partial(moe.TopK, num_experts=E, k=2)
  expert = expert or partial(Mlp, hidden_width=F)
  return moe.MoE(make_router=router, make_expert=expert, **arguments)


EXACT = CapacityRule(minimum=1)


def asked(layer, factor):
  """What a layer tells of a capacity that it was not initialised with."""
  _, found = calls(init(layer, X, capacity_factor=None), capacity_factor=factor)
  return sum((call.cost for call in found.values()), Cost())


def test_experts_by_hand():
  # Groups of 3 tokens: 4 groups, 4 experts, ceil(1.5 x 3 x 2 / 4) slots.
  rows = 4 * 4 * 3
  layer = make_moe(group_size=3, capacity_rule=EXACT)
  assert asked(layer, 1.5) == Cost(
    flops=2 * B * L * D * E,
    expert_flops=rows * 4 * D * F,
    float32_inputs=1,
    routed=B * L * E,
    choices=2 * B * L,
    rows=rows,
    slots=rows * D,
    hidden=rows * F,
    activated=rows * F,
    relu=rows * F,
    group=(3, L),
  )
  # Without capacity every choice has a slot, and no more; and the experts of a
  # layer may be more than its router's.
  exact = asked(make_moe(num_experts=8), None)
  assert (exact.rows, exact.choices) == (2 * B * L, 2 * B * L)
  assert (exact.routed, exact.group) == (B * L * 8, (L, L))


def test_experts_flops_are_those_of_the_products_in_the_trace():
  def layer(width, shared):
    return make_moe(
      expert=partial(Mlp, hidden_width=width),
      make_shared_expert=partial(Mlp, hidden_width=shared),
    )

  # Combining multiplies with gates, whatever the experts are.
  small, large = layer(24, 40), layer(72, 56)
  told = [asked(layer, 1.25) for layer in (small, large)]
  traced = [
    products(layer, X, capacity_factor=1.25) for layer in (small, large)
  ]
  assert told[1].expert_flops == 3 * told[0].expert_flops > 0
  flops = [cost.flops + cost.expert_flops for cost in told]
  assert flops[1] - flops[0] == traced[1] - traced[0]


def test_experts_with_a_norm_read_their_slots_in_float32():
  class Normed(nn.Module):
    @nn.compact
    def __call__(self, x_xD, *, deterministic=True):
      return Mlp(F)(RMSNorm()(x_xD), deterministic=deterministic)

  plain = asked(make_moe(capacity_rule=EXACT), 2.0)
  normed = asked(
    make_moe(
      capacity_rule=EXACT, expert=Normed, exact_dispatch=moe.all_experts
    ),
    2.0,
  )
  # 2 groups, 4 experts, ceil(2 x 6 x 2 / 4) slots: four times the 12 tokens.
  assert plain.rows == 2 * 4 * 6
  assert normed.float32_inputs - plain.float32_inputs == 2 * 4 * 6 / 12


def test_routers_tell_all_their_products():
  T = B * L
  noisy = asked(make_moe(partial(NoisyTopK, num_experts=E, k=2)), 1.0)
  assert noisy.flops == 2 * (2 * T * D * E)  # Logits, and their noise.
  wpl, rl_r = (
    asked(make_moe(partial(router, num_experts=E)), 1.0)
    for router in (WPL, RLR)
  )
  assert rl_r == wpl  # Losses more, and no product.
  # Its own 3 slots of each expert, for each sequence, whatever the capacity.
  soft = make_moe(partial(SoftMoE, num_experts=E, slots=3), dispatch=moe.einsum)
  for factor in (None, 2.0):
    told = asked(soft, factor)
    assert told.rows == B * E * 3
    assert told.expert_flops == B * E * 3 * 4 * D * F
    assert (told.routed, told.flops) == (T * E * 3, 2 * T * D * E * 3)


def test_a_call_counts_once_however_often_it_is_traced():
  class Twice(nn.Module):
    @nn.compact
    def __call__(self, x_xD):
      linear = Linear((D,), ('embed', 'embed'), name='linear')
      return linear(linear(x_xD))

  once = init(Twice(), X)
  one, again = calls(once)[1], calls(lambda: (once(), once()))[1]
  assert one['linear',].cost == Cost(
    flops=4 * B * L * D * D, width=2 * B * L * D
  )
  assert again['linear',].cost == one['linear',].cost


class Scaled(nn.Module):
  """A parameter, and no cost."""

  @nn.compact
  def __call__(self, x_xD, *, deterministic=True):
    init = sharding.named(nn.initializers.ones, 'embed')
    gain_D = self.param('gain', init, x_xD.shape[-1:])
    return x_xD * gain_D.reshape((1,) * (x_xD.ndim - 1) + (-1,))


def test_a_layer_that_does_not_tell_is_named():
  class Outer(nn.Module):
    @nn.compact
    def __call__(self, x_xD):
      return Scaled(name='scaled')(Mlp(F)(x_xD))

  with pytest.raises(ValueError, match='Scaled at scaled has parameters and'):
    cost_of(Outer(), X)
  with pytest.raises(ValueError, match='Scaled at the root has parameters and'):
    asked(make_moe(expert=Scaled, exact_dispatch=moe.all_experts), 1.0)


def test_what_a_module_calls_counts_each_time_that_it_is_called():
  """Two calls of one tower, of a module made anew in each, and lifted."""

  class Tower(nn.Module):
    lift: bool

    @nn.compact
    def __call__(self, x):
      make = nn.remat(Mlp) if self.lift else Mlp
      return make(F, name='mlp')(x)

  class Both(nn.Module):
    lift: bool

    def setup(self):
      self.tower = Tower(self.lift)

    def __call__(self, x, y):
      return self.tower(x), self.tower(y)

  y = shape(B, M, D)
  for lift in (False, True):
    _, found = calls(init(Both(lift), X, y))
    flops = sum(call.cost.flops for call in found.values())
    assert flops == 4 * B * (L + M) * D * F
    assert found['tower',].shapes == ((B, L, D), (B, M, D))
    assert found['tower', 'mlp', 'wi'].shapes == ((B, L, D), (B, M, D))
