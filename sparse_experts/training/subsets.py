"""Training some parameters, or some experts, and leaving all else as it is.

One mask says what is trained, by parameter and by expert. It is applied to the
gradient, so that a norm is of what is trained; to the update, as weight decay
and momentum move what has no gradient; and to the optimizer's state.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import traverse_util

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
  has no optimizer state; one of which some experts are has that of all, in
  which the others' never moves. A global norm that `optimizer` clips to is of
  what is trained. Balance biases of routers, which `Model.bias_rate` moves and
  no optimizer, are trained or stay as all others.

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

      trains all but experts 0 to 3, and experts 6 and up; with 'moe': (4, 5) in
      the place of the last two, the others' columns of routers stay too.

  Raises:
    ValueError: a pattern is no expression or matches no parameter, or its value
      is neither True nor experts. From `init` and `update`: a parameter has
      no axis of experts, or not so many; or a state has none of them.

  Example:
    >>> from sparse_experts.training import optimizers
    >>> names = {'moe': {'expert': {'wi': ('expert', 'embed', 'mlp')}},
    ...          'norm': {'scale': ('embed',)}}
    >>> tx = only(names, learning_rate=0.1, optimizer=optimizers.adafactor,
    ...           trained={'.*/expert/wi': (1,)})
    >>> params = {'moe': {'expert': {'wi': jnp.ones((3, 2, 4))}},
    ...           'norm': {'scale': jnp.ones(2)}}
    >>> updates, _ = tx.update(params, tx.init(params), params)
    >>> updates['moe']['expert']['wi'][:, 0, 0].round(3).tolist()
    [-0.0, -0.1, -0.0]
  """
  names = traverse_util.flatten_dict(names, sep='/')
  chosen = _chosen(names, trained)

  def part(tree):
    flat = traverse_util.flatten_dict(tree, sep='/')
    return _unflatten({path: flat[path] for path in chosen})

  inner_names = _unflatten({path: names[path] for path in chosen})
  inner = optimizer(inner_names, learning_rate=learning_rate)

  def masks_of(params):
    flat = traverse_util.flatten_dict(params, sep='/')
    return _unflatten(
      {
        path: _mask(path, names[path], leaf, chosen.get(path, False))
        for path, leaf in flat.items()
      }
    )

  def init(params):
    masks_of(params)  # Mistakes show here.
    return inner.init(part(params))

  def update(grads, state, params):
    masks = masks_of(grads)
    kept = keep(masks, grads)
    updates, new = inner.update(part(kept), state, part(params))
    flat = traverse_util.flatten_dict(grads, sep='/')
    flat |= traverse_util.flatten_dict(updates, sep='/')
    # x + -0.0 is x for every x; -0.0 + 0.0 would be 0.0.
    updates = keep(masks, _unflatten(flat), -0.0)
    of_state = _masks_of_state(inner, part(grads), names, part(masks))
    return updates, jax.tree.map(_where, of_state, new, state)

  return Subset(init, update, masks_of)


def masks(optimizer: Any, params: Any) -> Any:
  """What an optimizer trains of `params`: a tree of masks like theirs.

  A mask is a bool array of numpy that broadcasts to its parameter. All of them
  are true of an optimizer that is no `Subset`.
  """
  if isinstance(optimizer, Subset):
    return optimizer.trained(params)
  return jax.tree.map(lambda leaf: np.ones((1,) * leaf.ndim, bool), params)


def keep(masks: Any, tree: Any, other: float = 0.0) -> Any:
  """The entries of `tree` that are trained, and `other` for all else."""
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


def _chosen(
  names: Mapping[str, tuple[str, ...]], trained: Trained
) -> dict[str, bool | frozenset[int]]:
  """What is trained of each parameter that is: True or its experts."""
  table = {trained: True} if isinstance(trained, str) else trained
  chosen = {}
  for pattern, value in table.items():
    experts = frozenset() if value is True else _experts(pattern, value)
    matched = _matched(pattern, names)
    for path in matched:
      so_far = chosen.get(path, frozenset())
      both_some = value is not True and so_far is not True
      chosen[path] = so_far | experts if both_some else True
  if not chosen:
    raise ValueError(
      f'trained={trained!r} trains nothing; give a pattern of paths, such as '
      f'{", ".join(SUBSETS)}.'
    )
  return {path: chosen[path] for path in names if path in chosen}


def _matched(pattern: str, names: Mapping[str, Any]) -> list[str]:
  try:
    expression = re.compile(SUBSETS.get(pattern, pattern))
  except re.error as error:
    raise ValueError(
      f'trained must be one of {", ".join(SUBSETS)} or a regular expression '
      f'of paths, not {pattern!r} ({error}).'
    ) from error
  matched = [path for path in names if expression.fullmatch(path)]
  if not matched:
    raise ValueError(
      f'trained={pattern!r} matches no parameter; paths are such as '
      f'{", ".join(sorted(names)[:3])}, and {", ".join(SUBSETS)} are known.'
    )
  return matched


def _experts(pattern: str, value: Any) -> frozenset[int]:
  if (
    not isinstance(value, (tuple, list))
    or not value
    or not all(type(j) is int and j >= 0 for j in value)
  ):
    raise ValueError(
      f'trained: {pattern!r} is trained whole (True) or in some experts, such '
      f'as (4, 5), not {value!r}; leave out what is not trained.'
    )
  return frozenset(value)


def _mask(
  path: str, names: tuple[str, ...], leaf: Any, chosen: bool | frozenset[int]
) -> np.ndarray:
  """Of the parameter's rank; of size 1 but for the axis of chosen experts."""
  shape = [1] * len(names)
  if isinstance(chosen, bool):
    return np.full(shape, chosen)
  axes = [i for i, name in enumerate(names) if name in EXPERT_AXES]
  if not axes:
    raise ValueError(
      f'trained names experts {sorted(chosen)} of {path}, whose axes {names} '
      'are not of experts; name it apart with True, or leave it out.'
    )
  value = leaf.value if isinstance(leaf, nn.LogicallyPartitioned) else leaf
  size = value.shape[axes[0]]
  if max(chosen) >= size:
    raise ValueError(
      f'trained names expert {max(chosen)} of {path}, which has experts 0 to '
      f'{size - 1}; name those.'
    )
  shape[axes[0]] = size
  return np.isin(np.arange(size), list(chosen)).reshape(shape)


@flax.struct.dataclass
class _OfParameter(nn.LogicallyPartitioned):
  """A box that knows its parameter; an optimizer's state is boxed alike."""

  path: str = flax.struct.field(default='', pytree_node=False)


def _masks_of_state(
  inner: optax.GradientTransformation,
  params: Any,
  names: Mapping[str, tuple[str, ...]],
  masks: Any,
) -> Any:
  """Masks of the optimizer's state; counters and the like are all trained.

  Raises:
    ValueError: a state mixes what is trained with what is not.
  """
  masks = traverse_util.flatten_dict(masks, sep='/')
  boxed = {
    path: _OfParameter(
      jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), names[path], path=path
    )
    for path, leaf in traverse_util.flatten_dict(params, sep='/').items()
  }
  some = any(not mask.all() for mask in masks.values())

  def of_leaf(path, leaf):
    if isinstance(leaf, _OfParameter):
      mask, axes = masks[leaf.path], names[leaf.path]
      sizes = {a: n for a, n in zip(axes, mask.shape, strict=True) if n > 1}
      if sizes.keys() <= set(leaf.names):
        return mask.reshape([sizes.get(name, 1) for name in leaf.names])
    elif not some or not leaf.shape:
      return np.ones((1,) * len(leaf.shape), bool)
    raise ValueError(
      f'{jax.tree_util.keystr(path)} of the optimizer has no axis of experts, '
      'so some of them cannot be trained without the others; train all, or '
      'choose an optimizer that keeps them apart, such as adam.'
    )

  return jax.tree_util.tree_map_with_path(
    of_leaf,
    jax.eval_shape(inner.init, _unflatten(boxed)),
    is_leaf=lambda leaf: isinstance(leaf, _OfParameter),
  )


def _unflatten(flat: Mapping[str, Any]) -> Any:
  return traverse_util.unflatten_dict(flat, sep='/')
