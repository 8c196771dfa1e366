"""The one matrix product with a parameter that all layers are made of.

It is injected: under `use_product` every `Linear` hands its input, and its
kernel as it is stored, to another function. So a module made for one set of
parameters runs with a stack of them: same class, same names.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparse_experts import sharding
from sparse_experts.layers.cost import Cost
from sparse_experts.letters import Array

Product = Callable[[Array, Array], Array]

_product: contextvars.ContextVar[Product | None] = contextvars.ContextVar(
  'product', default=None
)


@contextlib.contextmanager
def use_product(product: Product) -> Iterator[None]:
  """Lets every Linear return `product(x, kernel)`, for a block.

  The kernel may have any shape, such as [E, D, F] of E experts, and has the
  dtype of x.

  Example:
    >>> import jax.numpy as jnp
    >>> linear = Linear((3,), ('embed', 'mlp'))
    >>> w_ExDxF = jnp.arange(24.0).reshape(4, 2, 3)
    >>> variables = {'params': {'kernel': w_ExDxF}}
    >>> with use_product(lambda x_TxD, w_ExDxF: x_TxD @ w_ExDxF[1]):
    ...   linear.apply(variables, jnp.ones((1, 2))).tolist()
    [[15.0, 17.0, 19.0]]
  """
  token = _product.set(product)
  try:
    yield
  finally:
    _product.reset(token)


def injected() -> Product | None:
  """The product in use; None: the usual one."""
  return _product.get()


class Linear(nn.Module):
  """y = x W, without bias, over the last `num_inputs` axes of x.

  The kernel is float32 and is cast to the dtype of x. Under
  `use_product` another product takes the place of this one.

  Attributes:
    features: sizes of the output axes.
    names: logical names of the kernel's axes, inputs then outputs.
    num_inputs: input axes contracted.
    init_scale: s of the initialiser, a truncated normal of variance s / fan-in
      (Fedus et al. 2021, section 2.4: s = 0.1 for Switch, 1 is T5's).
  """

  features: tuple[int, ...]
  names: tuple[str, ...]
  num_inputs: int = 1
  init_scale: float = 1.0

  @nn.compact
  def __call__(self, x: Array) -> Array:
    product = injected()
    if product is not None:
      kernel = self.get_variable('params', 'kernel')
      return product(x, kernel.astype(x.dtype))
    num_inputs, rank = self.num_inputs, len(self.names)
    init = nn.initializers.variance_scaling(
      self.init_scale,
      'fan_in',
      'truncated_normal',
      in_axis=tuple(range(num_inputs)),
      out_axis=tuple(range(num_inputs, rank)),
    )
    kernel = self.param(
      'kernel',
      sharding.named(init, *self.names),
      (*x.shape[x.ndim - num_inputs :], *self.features),
      jnp.float32,
    )
    contracting = tuple(range(x.ndim - num_inputs, x.ndim))
    return jax.lax.dot_general(
      x,
      kernel.astype(x.dtype),
      ((contracting, tuple(range(num_inputs))), ((), ())),
    )

  def cost(self, x: Array) -> Cost:
    """Of the product."""
    outputs = math.prod(x.shape[: x.ndim - self.num_inputs] + self.features)
    inputs = math.prod(x.shape[x.ndim - self.num_inputs :])
    kinds = {
      'embed': 'width',
      'kv': 'heads',
      'heads': 'heads',
      'vocab': 'logits',
    }
    kind = kinds.get(self.names[-1], 'mlp')
    return Cost(flops=2 * outputs * inputs, **{kind: outputs})


class Projection(nn.Module):
  """y = x W as wide as x: an expert of attention, see `attention.Attention`.

  Attributes:
    init_scale: see `Linear`.
  """

  init_scale: float = 1.0

  @nn.compact
  def __call__(self, x_xD: Array, *, deterministic: bool = True) -> Array:
    del deterministic  # All experts take it.
    return Linear(
      (x_xD.shape[-1],),
      ('embed', 'heads'),
      init_scale=self.init_scale,
      name='projection',
    )(x_xD)
