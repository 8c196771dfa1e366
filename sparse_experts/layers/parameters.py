"""How a parameter meets rows.

A layer multiplies or adds no parameter by itself. It asks `matrix` for the
product of its rows with one, and `vector` for what each of its rows is scaled
or shifted by. How they meet is injected: in a dense layer, and in an expert
that runs by itself, all rows meet the same parameters (`Shared`). Under the
dispatcher `grouped` a module made for one set of them runs once, with those of
all experts stacked, and each row meets its expert's (`Grouped`): same class,
same names.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparse_experts import sharding  # noqa: F401  (for docstrings' examples)
from sparse_experts.letters import Array


def matrix(
  module: nn.Module,
  x: Array,
  name: str,
  init: Callable[..., Array],
  shape: Sequence[int],
  num_inputs: int = 1,
) -> Array:
  """The product of the last `num_inputs` axes of x with a parameter.

  Args:
    module: declares the parameter; call this inside a compact method.
    x: rows, the input axes last.
    name: of the parameter.
    init: initialiser, with axis names (`sharding.named`).
    shape: of the parameter, input axes and then output axes. It is float32 and
      is cast to the dtype of x.
    num_inputs: how many axes are contracted.

  Example:
    >>> class Sum(nn.Module):
    ...   @nn.compact
    ...   def __call__(self, x_xD):
    ...     ones = sharding.named(nn.initializers.ones, 'embed', 'mlp')
    ...     return matrix(self, x_xD, 'kernel', ones, (x_xD.shape[-1], 1))
    >>> y, _ = Sum().init_with_output(jax.random.key(0), jnp.ones((2, 3)))
    >>> y.tolist()
    [[3.0], [3.0]]
  """
  rows = current()
  w = rows.declared(module, name, init, tuple(shape))
  return rows.product(x, w.astype(x.dtype), num_inputs)


def vector(
  module: nn.Module,
  x: Array,
  name: str,
  init: Callable[..., Array],
  shape: Sequence[int],
) -> Array:
  """A parameter as the rows of x meet it: a scale, a bias, a gate.

  Args:
    module, name, init: see `matrix`.
    x: rows. Their first axis is none of the parameter's.
    shape: of the parameter, along the last axes of x; () is one number.

  Returns:
    float32, of as many axes as x, to be multiplied with x or added to it.

  Example:
    >>> class Scale(nn.Module):
    ...   @nn.compact
    ...   def __call__(self, x_xD):
    ...     ones = sharding.named(nn.initializers.ones, 'embed')
    ...     return x_xD * vector(self, x_xD, 'scale', ones, x_xD.shape[-1:])
    >>> variables = {'params': {'scale': jnp.array([[1.0, 2.0], [3.0, 4.0]])}}
    >>> with use(Grouped(3, jnp.array([1, 2]), product_of_groups=None)):
    ...   Scale().apply(variables, jnp.ones((3, 2))).tolist()
    [[1.0, 2.0], [3.0, 4.0], [3.0, 4.0]]
  """
  rows = current()
  v = rows.declared(module, name, init, tuple(shape))
  return rows.spread(v, x)


@dataclasses.dataclass(frozen=True, eq=False)
class Shared:
  """All rows meet the same parameters.

  Attributes:
    mask_dims: axes of rows along which one dropout mask serves all: positions,
      as T5 drops; none in an expert, whose rows are of many sequences.
  """

  mask_dims: tuple[int, ...] = (-2,)

  def declared(self, module, name, init, shape) -> Array:
    """The parameter, declared if it is not yet.

    Args:
      module, name, init, shape: as of `vector`.
    """
    return module.param(name, init, shape, jnp.float32)

  def product(self, x: Array, w: Array, num_inputs: int) -> Array:
    """The last axes of x times the first of w.

    Args:
      x: rows; their last `num_inputs` axes are contracted.
      w: one matrix, [inputs, outputs], of any axes each.
      num_inputs: axes of the inputs.
    """
    contracting = tuple(range(x.ndim - num_inputs, x.ndim))
    return jax.lax.dot_general(
      x, w, ((contracting, tuple(range(num_inputs))), ((), ()))
    )

  def spread(self, v: Array, x: Array) -> Array:
    """v along the last axes of x."""
    return v.reshape((1,) * (x.ndim - v.ndim) + v.shape)


@dataclasses.dataclass(frozen=True, eq=False)
class Grouped:
  """Each row meets the parameters of its expert, rows sorted by expert.

  Attributes:
    num_rows: R, the first axis of every x.
    sizes_E: int32, rows of each expert; rows beyond their sum meet zeros.
    product_of_groups: (x_RxD, w_ExDxF, sizes_E) -> y_RxF, see
      `moe.grouped_matmul`.
    mask_dims: see `Shared`.
  """

  num_rows: int
  sizes_E: Array
  product_of_groups: Callable[[Array, Array, Array], Array]
  mask_dims: tuple[int, ...] = ()

  def declared(self, module, name, init, shape) -> Array:
    """The parameters of all experts, [E, *shape], which are there already.

    Args:
      module, name, init, shape: as of `vector`, of one expert.

    Raises:
      ValueError: what is there has another shape.
    """
    stacked = module.get_variable('params', name)
    if stacked.shape != (len(self.sizes_E), *shape):
      raise ValueError(
        f'{module.name or type(module).__name__} asks for {name!r} of shape '
        f'{shape}, and {len(self.sizes_E)} experts have {stacked.shape}: a '
        'module that is mapped or scanned cannot be grouped; set '
        'exact_dispatch=all_experts and dispatch=gather.'
      )
    return stacked

  def product(self, x: Array, w: Array, num_inputs: int) -> Array:
    """The last axes of x times those of its rows' matrices.

    Args:
      x: rows; their last `num_inputs` axes are contracted.
      w: a matrix for each expert, [E, inputs, outputs].
      num_inputs: axes of the inputs.
    """
    self._check(x)
    rows, inputs = x.shape[:-num_inputs], math.prod(x.shape[-num_inputs:])
    sizes_E = self.sizes_E
    if len(rows) > 1:  # Heads, say, which share a matrix.
      sizes_E = sizes_E * math.prod(rows[1:])
    y = self.product_of_groups(
      x.reshape(-1, inputs), w.reshape(len(sizes_E), inputs, -1), sizes_E
    )
    return y.reshape(*rows, *w.shape[1 + num_inputs :])

  def spread(self, v: Array, x: Array) -> Array:
    """The rows' own v along the last axes of x."""
    self._check(x)
    E, *shape = v.shape
    rows_R = jnp.arange(self.num_rows)[:, None]
    expert_R = (rows_R >= jnp.cumsum(self.sizes_E)[None]).sum(-1)
    v_RxF = _of_rows(v.reshape(E, -1), expert_R)
    ones = (1,) * (x.ndim - 1 - len(shape))
    return v_RxF.reshape(self.num_rows, *ones, *shape)

  def _check(self, x: Array) -> None:
    if x.shape[0] != self.num_rows:
      raise ValueError(
        f'an expert made rows of shape {x.shape} of {self.num_rows} rows: '
        'their first axis must stay, for they lie in the order of experts.'
      )


Rows = Shared | Grouped

_DENSE = Shared()
_rows: contextvars.ContextVar[Rows] = contextvars.ContextVar(
  'rows', default=_DENSE
)


@contextlib.contextmanager
def use(rows: Rows) -> Iterator[None]:
  """Lets parameters meet rows in this way, for a block."""
  token = _rows.set(rows)
  try:
    yield
  finally:
    _rows.reset(token)


def current() -> Rows:
  """The way in use."""
  return _rows.get()


@jax.custom_vjp
def _of_rows(v_ExF: Array, expert_R: Array) -> Array:
  """Row e(r) of v, [R, F]; zeros where e(r) is E."""
  return jnp.take(v_ExF, expert_R, axis=0, mode='fill', fill_value=0)


def _of_rows_forward(v_ExF, expert_R):
  return _of_rows(v_ExF, expert_R), (expert_R, len(v_ExF))


def _of_rows_backward(residuals, dv_RxF):
  # A product and no scatter-add, which TPUs do row after row.
  expert_R, E = residuals
  dv_RxF = jnp.where((expert_R < E)[:, None], dv_RxF, 0)
  onehot_RxE = jax.nn.one_hot(expert_R, E, dtype=dv_RxF.dtype)
  highest = jax.lax.Precision.HIGHEST
  dv_ExF = jnp.einsum('RE,RF->EF', onehot_RxE, dv_RxF, precision=highest)
  return dv_ExF, None


_of_rows.defvjp(_of_rows_forward, _of_rows_backward)
