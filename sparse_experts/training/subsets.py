"""Training some parameters, or some experts, and leaving all else as it is.

One mask says what is trained, by parameter, layer and expert. It is applied to
the gradient, so that a norm is of what is trained; to the update, as weight
decay and momentum move what has no gradient; and to the optimizer's state.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import struct, traverse_util

from sparse_experts.models import layout
from sparse_experts.sharding import EXPERT_AXES

# As patterns of parameters' paths. The first five are of ST-MoE's figure 5, in
# which FFN are the dense ones: those between sparse layers, and the extra ones.
SUBSETS = {
  'all': r'.*',
  'moe': r'.*/moe/.*',
  'non_moe': r'(?!.*/moe/).*',
  'attention': r'.*attention/.*',
  'ffn': r'(?!.*/moe/).*mlp/.*',
  'experts': r'.*/expert/.*',
  'routers': r'.*/router/.*',
}

Trained = str | Mapping[str, bool | Sequence[int]]


class Subset(NamedTuple):
  """An optax transformation that knows what it trains.

  A wrapper keeps `trained` by `optimizer._replace(init=..., update=...)`, which
  does for any optax transformation.

  Attributes:
    init, update: as of any transformation.
    trained: parameters -> their masks, see `masks`.
  """

  init: Callable[..., Any]
  update: Callable[..., Any]
  trained: Callable[[Any], Any]


def only(
  names: Any,
  *,
  learning_rate: float | optax.Schedule,
  optimizer: Callable[..., optax.GradientTransformation],
  trained: Trained,
) -> Subset:
  """An optimizer that updates some parameters, or some experts.

  All else stays as it is, bit for bit. A parameter of which nothing is trained
  has no optimizer state; one of which a part is has that of the whole, in which
  the rest never moves. A global norm that `optimizer` clips to is of what is
  trained. Balance biases of routers, which `Objective.bias_rate` moves and no
  optimizer, are trained or stay as all others.

  Expert j of a parameter is its slice j along the axis 'expert', or 'router':
  of a router's kernel the column that makes the logits of expert j. Experts
  share nothing in an optimizer here; columns of a router share what Adafactor
  takes over a whole matrix, its root mean squares.

  Args:
    names, learning_rate: as of any optimizer, see `optimizers`.
    optimizer: of what is trained.
    trained: one of SUBSETS, or a regular expression that the whole path of a
      parameter matches, such as 'decoder/.*'. Or a table of these: True where
      all of it is trained, or the experts that are. What several match is
      trained where one of them says so:

          {'non_moe': True, 'routers': True, 'experts': (4, 5)}

      trains all but the other experts; with 'moe': (4, 5) in the place of the
      last two, their columns of routers stay too. Paths are those without scan,
      'decoder/layers_3/...', or, if a pattern has 'period' in it, as stored.

  Raises:
    ValueError: a pattern is no expression, or its value is neither True nor
      experts. From `init` and `update`: a pattern matches no parameter, or one
      that has no axis of experts or not so many; or a state has none of them.

  Example:
    >>> from sparse_experts.training import optimizers
    >>> names = {'moe': {'expert': {'wi': ('expert', 'embed', 'mlp')}},
    ...          'norm': {'scale': ('embed',)}}
    >>> tx = only(names, learning_rate=0.5, optimizer=optimizers.adafactor,
    ...           trained={'.*/expert/wi': (1,)})
    >>> params = {'moe': {'expert': {'wi': jnp.ones((3, 2, 4))}},
    ...           'norm': {'scale': jnp.ones(2)}}
    >>> updates, _ = tx.update(params, tx.init(params), params)
    >>> updates['moe']['expert']['wi'][:, 0, 0].round(3).tolist()
    [-0.0, -0.5, -0.0]
  """
  patterns = _patterns(trained)
  names = _flatten(names)

  def masks_of(params):
    return _unflatten(_masks(patterns, names, params))

  def inner_of(masks):
    """The optimizer of what is trained, and what takes that from a tree."""
    chosen = [path for path, mask in _flatten(masks).items() if mask.any()]

    def part(flat):
      return _unflatten({path: flat[path] for path in chosen})

    inner = optimizer(part(names), learning_rate=learning_rate)
    return inner, lambda tree: part(_flatten(tree))

  def init(params):
    inner, part = inner_of(masks_of(params))
    return inner.init(part(params))

  def update(grads, state, params):
    masks = masks_of(grads)
    inner, part = inner_of(masks)
    updates, new = inner.update(part(keep(masks, grads)), state, part(params))
    # x + -0.0 is x for every x; -0.0 + 0.0 would be 0.0.
    updates = keep(
      masks, _unflatten({**_flatten(grads), **_flatten(updates)}), -0.0
    )
    of_state = _masks_of_state(inner, part(grads), names, part(masks))
    return updates, jax.tree.map(_where, of_state, new, state)

  return Subset(init, update, masks_of)


def masks(optimizer: Any, params: Any) -> Any:
  """What an optimizer trains of `params`: a tree of masks like theirs.

  A mask is a bool array of numpy that broadcasts to its parameter. All of them
  are true of an optimizer that does not say what it trains.
  """
  if hasattr(optimizer, 'trained'):
    return optimizer.trained(params)
  return jax.tree.map(lambda leaf: np.ones((1,) * leaf.ndim, bool), params)


def keep(masks: Any, tree: Any, other: float = 0.0) -> Any:
  """The entries of `tree` that are trained, and `other` for all else.

  Args:
    masks: from `masks`, of a tree of the same structure.
    tree: of arrays, whose dtypes stay.
    other: a number.
  """
  return jax.tree.map(
    lambda mask, leaf: _where(mask, leaf, jnp.full_like(leaf, other)),
    masks,
    tree,
  )


def _where(mask: np.ndarray, new: Any, old: Any) -> Any:
  if mask.all():
    return new
  # What nobody reads, XLA removes: the gradient of what is not trained.
  return jnp.where(mask, new, old) if mask.any() else old


class _Pattern(NamedTuple):
  """What is trained of the parameters that it matches."""

  text: str
  expression: re.Pattern
  experts: tuple[int, ...] | None  # None: all that there is.


def _patterns(trained: Trained) -> list[_Pattern]:
  """The table, checked; those that train all first."""
  table = {trained: True} if isinstance(trained, str) else trained
  if not isinstance(table, Mapping) or not all(
    isinstance(text, str) for text in table
  ):
    raise ValueError(
      f'trained={trained!r} must be a pattern of paths, such as '
      f"{', '.join(SUBSETS)}, or a table: {{'experts': (4, 5)}}."
    )
  patterns = []
  for text, value in table.items():
    try:
      expression = re.compile(SUBSETS.get(text, text))
    except re.error as error:
      raise ValueError(
        f'trained must be one of {", ".join(SUBSETS)} or a regular expression '
        f'of paths, not {text!r} ({error}).'
      ) from error
    if value is not True and not (
      isinstance(value, (tuple, list))
      and value
      and all(type(j) is int and j >= 0 for j in value)
    ):
      raise ValueError(
        f'trained: {text!r} is trained whole (True) or in some experts, such '
        f'as (4, 5), not {value!r}; leave out what is not trained.'
      )
    experts = None if value is True else tuple(value)
    patterns.append(_Pattern(text, expression, experts))
  if not patterns:
    raise ValueError(
      f'trained={trained!r} trains nothing; give a pattern of paths, such as '
      f'{", ".join(SUBSETS)}.'
    )
  return sorted(patterns, key=lambda pattern: pattern.experts is not None)


def _masks(
  patterns: Sequence[_Pattern],
  names: Mapping[str, tuple[str, ...]],
  params: Any,
) -> dict[str, np.ndarray]:
  """Mask of each parameter, of size 1 along an axis on which it is constant."""
  flat = _flatten(params)
  plain = {p: layout.plain_paths(params, p.split('/')) for p in flat}
  masks = {path: _nothing(names[path], leaf) for path, leaf in flat.items()}
  for pattern in patterns:
    matched = False
    for path, mask in masks.items():
      paths = plain[path]
      if layout.PERIOD in pattern.text:
        paths = [path] * len(paths)
      here = [i for i, p in enumerate(paths) if pattern.expression.fullmatch(p)]
      if here:
        repeats = here if len(paths) > 1 else None  # There is a scan.
        _mark(mask, path, names[path], repeats, pattern.experts)
        matched = True
    if not matched:
      some = sorted(path for paths in plain.values() for path in paths)[:3]
      raise ValueError(
        f'trained={pattern.text!r} matches no parameter; paths are such as '
        f'{", ".join(some)}, and {", ".join(SUBSETS)} are known.'
      )
  return {path: _shrunk(mask) for path, mask in masks.items()}


def _nothing(names: tuple[str, ...], leaf: Any) -> np.ndarray:
  value = leaf.value if isinstance(leaf, nn.LogicallyPartitioned) else leaf
  sliced = ('layers', *EXPERT_AXES)
  sizes = zip(names, value.shape, strict=True)
  return np.zeros([size if name in sliced else 1 for name, size in sizes], bool)


def _mark(
  mask: np.ndarray,
  path: str,
  names: tuple[str, ...],
  repeats: Sequence[int] | None,
  experts: tuple[int, ...] | None,
) -> None:
  """Makes a mask true at these repeats of a scan and experts; None: all."""
  index: list[Sequence[int]] = [range(size) for size in mask.shape]
  if repeats is not None:
    index[names.index('layers')] = repeats
  if experts is not None and not mask[np.ix_(*index)].all():
    axes = [i for i, name in enumerate(names) if name in EXPERT_AXES]
    if not axes:
      raise ValueError(
        f'trained names experts {experts} of {path}, whose axes {names} are '
        'not over experts; name it apart with True, or leave it out.'
      )
    size = mask.shape[axes[0]]
    if max(experts) >= size:
      raise ValueError(
        f'trained names expert {max(experts)} of {path}, which has experts 0 '
        f'to {size - 1}; name those.'
      )
    index[axes[0]] = experts
  mask[np.ix_(*index)] = True


def _shrunk(mask: np.ndarray) -> np.ndarray:
  for axis in range(mask.ndim):
    first = mask.take([0], axis)
    if (mask == first).all():
      mask = first
  return mask


@struct.dataclass
class _OfParameter(nn.LogicallyPartitioned):
  """A box that knows its parameter; an optimizer's state is boxed alike."""

  path: str = struct.field(default='', pytree_node=False)


def _masks_of_state(
  inner: optax.GradientTransformation,
  params: Any,
  names: Mapping[str, tuple[str, ...]],
  masks: Any,
) -> Any:
  """Masks of the optimizer's state; counters and the like always move.

  Raises:
    ValueError: a state mixes what is trained with what is not.
  """
  masks = _flatten(masks)
  boxed = {
    path: _OfParameter(
      jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), names[path], path=path
    )
    for path, leaf in _flatten(params).items()
  }
  all_trained = all(mask.all() for mask in masks.values())

  def of_leaf(path, leaf):
    if isinstance(leaf, _OfParameter):
      mask, axes = masks[leaf.path], names[leaf.path]
      sizes = {a: n for a, n in zip(axes, mask.shape, strict=True) if n > 1}
      if sizes.keys() <= set(leaf.names):
        return mask.reshape([sizes.get(name, 1) for name in leaf.names])
    elif all_trained or not leaf.shape:
      return np.ones((1,) * len(leaf.shape), bool)
    raise ValueError(
      f'{jax.tree_util.keystr(path)} of the optimizer mixes what is trained '
      'with what is not; train whole parameters, or choose an optimizer that '
      'keeps experts and layers apart, such as adam.'
    )

  return jax.tree_util.tree_map_with_path(
    of_leaf,
    jax.eval_shape(inner.init, _unflatten(boxed)),
    is_leaf=lambda leaf: isinstance(leaf, _OfParameter),
  )


def _flatten(tree: Any) -> dict[str, Any]:
  return traverse_util.flatten_dict(tree, sep='/')


def _unflatten(flat: Mapping[str, Any]) -> Any:
  return traverse_util.unflatten_dict(flat, sep='/')
