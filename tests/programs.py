"""What a traced program is made of."""

import jax
from jax.extend.core import jaxprs_in_params


def primitives(f, *arguments):
  """Names of all operations in f, at any depth."""

  def walk(jaxpr):
    for equation in jaxpr.eqns:
      yield equation.primitive.name.replace('_', '-')
      for inner in jaxprs_in_params(equation.params):
        yield from walk(inner)

  return set(walk(jax.make_jaxpr(f)(*arguments).jaxpr))
