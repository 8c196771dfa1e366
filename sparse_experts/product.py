"""The matrix product of a layer with its parameter, injected.

Under `use_product` every `layers.linear.Linear` hands its input, and its kernel
as it is stored, to another function. So a module made for one set of parameters
runs with a stack of them: same class, same names.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator

from sparse_experts.arrays import Array

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
    >>> from sparse_experts.layers.linear import Linear
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
