"""Prints what XLA makes of a sparse layer on a CPU, forward and backward.

  JAX_PLATFORMS=cpu python scripts/layer_hlo.py gather 8

The arguments are a dispatcher and the number of experts; the layer is that of
`bench layer`, with one choice. First the products of the optimised program,
then what else writes 4 MiB or more.
"""

import math
import re
import sys

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparse_experts.bench import layer as layer_bench

COMPUTATION = re.compile(r'^(ENTRY )?%(\S+) \(.*?^}', re.MULTILINE | re.DOTALL)
OPERATION = re.compile(
  r'%(\S+) = f32\[([\d,]+)\]\S* ([\w-]+)\((.*?)(?:, calls=%([\w.-]+).*)?\n'
)
DOT = re.compile(r'%([\w.-]+), .*?\blhs_contracting_dims={([\d,]+)}')


def compiled_text(dispatcher: str, experts: int) -> str:
  layer = layer_bench.Layer()
  module = layer.sparse(dispatcher, experts, k=1)
  factor = layer.factor(dispatcher)
  x_BxLxD = jax.ShapeDtypeStruct((1, layer.tokens, layer.width), jnp.float32)
  variables = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), x_BxLxD))

  def loss(variables, x_BxLxD):
    y_BxLxD, _ = module.apply(variables, x_BxLxD, capacity_factor=factor)
    return jnp.square(y_BxLxD).mean()

  step = jax.jit(jax.grad(loss, (0, 1)))
  return step.lower(variables, x_BxLxD).compile().as_text()


shapes, products, others, with_product = {}, [], [], set()
for match in COMPUTATION.finditer(compiled_text(sys.argv[1], int(sys.argv[2]))):
  entry, computation = match.groups()
  for name, dims, kind, rest, called in OPERATION.findall(match[0]):
    shapes[name] = [int(n) for n in dims.split(',')]
    size = math.prod(shapes[name])
    large = size >= 2**20 and kind not in ('parameter', 'bitcast')
    if kind == 'dot':
      operand, axes = DOT.match(rest).groups()
      terms = math.prod(shapes[operand][int(i)] for i in axes.split(','))
      products.append((2e-9 * size * terms, f'f32[{dims}] of {terms} terms'))
      with_product.add(computation)
    elif entry and large and called not in with_product:
      others.append((size / 2**18, f'f32[{dims}] {name}'))
for unit, found in (('GFLOP', products), ('MiB  ', others)):
  for amount, line in sorted(found, reverse=True):
    print(f'{amount:7.2f} {unit}  {line}')
  print(f'{sum(amount for amount, _ in found):7.2f} {unit}  in all\n')
