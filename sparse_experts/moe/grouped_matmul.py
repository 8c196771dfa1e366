"""Each row times the matrix of its expert, rows sorted by expert.

No row is padded and none is dropped: the work is that of one dense product over
all rows. Forward and backward are three products,

  y = rows(x, w)    y_r = x_r w_e(r)
  dx = rows(dy, w^T)
  dw = outer(x, dy)   dw_e = sum over the rows r of e of x_r^T dy_r

and each implementation is these `rows` and `outer`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from sparse_experts.letters import Array


def grouped_matmul(
  x_RxD: Array,
  w_ExDxF: Array,
  group_sizes_E: Array,
  implementation: str = 'auto',
) -> Array:
  """The product of the rows of each expert with its matrix, [R, F].

  Args:
    x_RxD: rows, those of expert 0 first, then those of expert 1, ...
    w_ExDxF: matrices, of the dtype of x.
    group_sizes_E: int32, how many rows each expert has, in all at most R. Rows
      beyond their sum give zeros and no gradient.
    implementation: 'ragged', `jax.lax.ragged_dot`: on TPU exactly the useful
      arithmetic; on CPU XLA makes it E dense products.
      'megablox': the Pallas kernel for TPU that comes with JAX (Gale et al.
      2022, https://arxiv.org/abs/2211.15841). R must be a multiple of 128.
      'padded': blocks of rows of each expert, for CPU.
      'auto': 'padded' on CPU, 'ragged' elsewhere; decided by the platform that
      the program is compiled for.

  Raises:
    ValueError: shapes do not fit, or the implementation is unknown.

  Example:
    >>> x_RxD, w_ExDxF = jnp.ones((4, 1)), jnp.array([[[1.0]], [[5.0]]])
    >>> y_RxF = grouped_matmul(x_RxD, w_ExDxF, jnp.array([2, 1]))
    >>> y_RxF[:, 0].tolist()
    [1.0, 1.0, 5.0, 0.0]
  """
  shapes = x_RxD.shape, w_ExDxF.shape, group_sizes_E.shape
  if [len(shape) for shape in shapes] != [2, 3, 1] or (
    (group_sizes_E.size, x_RxD.shape[1]) != w_ExDxF.shape[:2]
  ):
    raise ValueError(
      'grouped_matmul takes [R, D] rows, [E, D, F] matrices and [E] sizes, not '
      f'{", ".join(map(str, shapes))}.'
    )
  if implementation not in ('auto', *_IMPLEMENTATIONS):
    raise ValueError(
      f"implementation must be 'auto', {', '.join(map(repr, _IMPLEMENTATIONS))}"
      f', not {implementation!r}.'
    )
  return _product(implementation, x_RxD, w_ExDxF, group_sizes_E)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(implementation, x_RxD, w_ExDxF, sizes_E):
  return _rows(implementation, x_RxD, w_ExDxF, sizes_E)


def _forward(implementation, x_RxD, w_ExDxF, sizes_E):
  y_RxF = _rows(implementation, x_RxD, w_ExDxF, sizes_E)
  return y_RxF, (x_RxD, w_ExDxF, sizes_E)


def _backward(implementation, residuals, dy_RxF):
  x_RxD, w_ExDxF, sizes_E = residuals
  dx_RxD = _rows(implementation, dy_RxF, w_ExDxF, sizes_E, transpose=True)
  dw_ExDxF = _by_platform(implementation, 1)(x_RxD, dy_RxF, sizes_E)
  return dx_RxD, dw_ExDxF, None


_product.defvjp(_forward, _backward)


def _rows(implementation, x_RxI, w_ExDxF, sizes_E, transpose=False):
  rows = _by_platform(implementation, 0, transpose=transpose)
  return rows(x_RxI, w_ExDxF, sizes_E)


def _by_platform(implementation, which, **options):
  """The `rows` (0) or the `outer` (1) of an implementation."""

  def pick(name):
    return functools.partial(_IMPLEMENTATIONS[name][which], **options)

  if implementation != 'auto':
    return pick(implementation)
  # Not jax.default_backend: a program may be compiled on a CPU for TPUs.
  return functools.partial(
    jax.lax.platform_dependent, cpu=pick('padded'), default=pick('ragged')
  )


def _zero_rest(y_RxF: Array, sizes_E: Array) -> Array:
  """Zeros in the rows of no expert, which some kernels leave unwritten."""
  ours_R = jnp.arange(y_RxF.shape[0]) < sizes_E.sum()
  return jnp.where(ours_R[:, None], y_RxF, 0)


# 'ragged'


def _ragged(lhs, rhs, sizes_E, contracting, group):
  numbers = jax.lax.RaggedDotDimensionNumbers(
    (contracting, ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=group,
  )
  return jax.lax.ragged_dot_general(lhs, rhs, sizes_E, numbers)


def _ragged_rows(x_RxI, w_ExDxF, sizes_E, transpose):
  contracting = ((1,), (2,) if transpose else (1,))
  return _zero_rest(_ragged(x_RxI, w_ExDxF, sizes_E, contracting, [0]), sizes_E)


def _ragged_outer(x_RxD, dy_RxF, sizes_E):
  return _ragged(x_RxD, dy_RxF, sizes_E, ((0,), (0,)), [])


# 'megablox'


def _tiling(rows: int, inputs: int, outputs: int) -> tuple[int, int, int]:
  """Tiles that fit the 16 MiB of a TPU core's vector memory."""
  tile = next((t for t in (512, 256, 128) if rows % t == 0), None)
  if tile is None:
    raise ValueError(
      f'megablox takes a multiple of 128 rows, not {rows}: use '
      "implementation='ragged'."
    )
  return tile, min(inputs, 1024), min(outputs, 1024)


def _megablox_rows(x_RxI, w_ExDxF, sizes_E, transpose):
  from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

  (rows, inputs), outputs = x_RxI.shape, w_ExDxF.shape[1 if transpose else 2]
  y_RxO = gmm(
    x_RxI,
    w_ExDxF,
    sizes_E,
    x_RxI.dtype,
    _tiling(rows, inputs, outputs),
    transpose_rhs=transpose,
  )
  return _zero_rest(y_RxO, sizes_E)


def _megablox_outer(x_RxD, dy_RxF, sizes_E):
  from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

  (R, D), F = x_RxD.shape, dy_RxF.shape[1]
  return tgmm(x_RxD.T, dy_RxF, sizes_E, x_RxD.dtype, _tiling(R, D, F))


# 'padded'


def _block(num_rows: int, num_experts: int) -> int:
  """Rows of a block.

  Of few rows, as in decoding, an expert's balanced load: padded, they are at
  most twice as many, however many experts there are. Of more, 64, with which
  XLA's products on CPU are as fast as with thousands, or an eighth of the
  balanced load, which keeps the half block computed in vain small.
  """
  balanced = max(1, num_rows // num_experts)
  return max(min(64, balanced), min(256, balanced // 8 // 64 * 64))


def _ranges(sizes_E):
  ends_E = jnp.cumsum(sizes_E)
  return ends_E - sizes_E, ends_E


def _window(num_rows, size, first, end):
  """Where to read `size` rows that hold `first`, and which are in [first, end).

  Blocks are not aligned: one that runs into the next expert's rows ignores
  them, and at the end of all rows the window is moved back.
  """
  start = jnp.minimum(first, num_rows - size)
  row = start + jnp.arange(size)
  return start, ((row >= first) & (row < end))[:, None]


def _padded_rows(x_RxI, w_ExDxF, sizes_E, transpose):
  R, outputs = x_RxI.shape[0], w_ExDxF.shape[1 if transpose else 2]
  size = _block(R, len(sizes_E))
  contracting = ((1,), (1 if transpose else 0,))
  begin_E, end_E = _ranges(sizes_E)
  used_E = jnp.argsort(sizes_E == 0, stable=True)  # Those with rows first.

  def expert(i, y_RxO):
    # One copy of w, used by all its blocks; none of experts without rows.
    w_DxF = jax.lax.dynamic_index_in_dim(w_ExDxF, used_E[i], keepdims=False)
    begin, end = begin_E[used_E[i]], end_E[used_E[i]]

    def block(i, y_RxO):
      start, ours = _window(R, size, begin + i * size, end)
      new = jax.lax.dot_general(
        jax.lax.dynamic_slice_in_dim(x_RxI, start, size),
        w_DxF,
        (contracting, ((), ())),
      )
      old = jax.lax.dynamic_slice_in_dim(y_RxO, start, size)
      return jax.lax.dynamic_update_slice_in_dim(
        y_RxO, jnp.where(ours, new, old), start, 0
      )

    blocks = (end - begin + size - 1) // size
    return jax.lax.fori_loop(0, blocks, block, y_RxO)

  y_RxO = jnp.zeros((R, outputs), x_RxI.dtype)
  return jax.lax.fori_loop(0, (sizes_E > 0).sum(), expert, y_RxO)


def _padded_outer(x_RxD, dy_RxF, sizes_E):
  R = x_RxD.shape[0]
  size = max(min(R, 64), _block(R, len(sizes_E)))
  most = min(16, -(-R // size))  # Blocks in one product.

  def product(begin, end, blocks):
    rows = min(blocks * size, R)
    start, ours = _window(R, rows, begin, end)
    x_IxD, dy_IxF = (
      jax.lax.dynamic_slice_in_dim(x, start, rows) for x in (x_RxD, dy_RxF)
    )
    return jax.lax.dot_general(
      jnp.where(ours, x_IxD, 0),
      dy_IxF,
      (((0,), (0,)), ((), ())),
      preferred_element_type=jnp.float32,
    )

  def nothing(begin, end):
    return jnp.zeros((x_RxD.shape[1], dy_RxF.shape[1]), jnp.float32)

  def expert(_, of_expert):
    begin, end = of_expert
    # Adding up blocks reads and writes dw for each, so an expert of up to
    # `most` blocks gets one product of as many.
    blocks = (end - begin + size - 1) // size
    dw_DxF = jax.lax.switch(
      jnp.minimum(blocks, most),
      [nothing]
      + [functools.partial(product, blocks=n + 1) for n in range(most)],
      begin,
      end,
    )
    dw_DxF = jax.lax.fori_loop(
      1,
      (blocks + most - 1) // most,
      lambda i, dw_DxF: dw_DxF + product(begin + i * most * size, end, most),
      dw_DxF,
    )
    return None, dw_DxF.astype(x_RxD.dtype)

  return jax.lax.scan(expert, None, _ranges(sizes_E))[1]


_IMPLEMENTATIONS = {
  'ragged': (_ragged_rows, _ragged_outer),
  'megablox': (_megablox_rows, _megablox_outer),
  'padded': (_padded_rows, _padded_outer),
}
