"""What layers cost: counts that add, told by each layer beside its code.

A module that has parameters of its own, or multiplies without any, has a method

    cost(*args, **kwargs) -> Cost

It takes what `__call__` takes, looks at shapes alone, and tells what the module
does itself; the modules in it tell their own part. Only experts, which run
apart, are told by their layer. `name_cost` tells of another method `name`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import jax
from flax import linen as nn


@dataclasses.dataclass(frozen=True)
class Cost:
  """Counts of a forward pass over all of the arguments; they add up.

  Attributes:
    flops, expert_flops, attention_flops: two for each multiply-add of products
      with parameters, of experts in every slot, full or empty, at the capacity
      asked for, and of queries and keys and of weights and values.
    width, heads, mlp, logits: elements of outputs of products with parameters,
      by the axis they have at the end (D; H A; F or any other; V).
    activated: elements that go through an activation. relu: of these, through
      ReLU.
    float32_inputs: how many norms and routers read their input in float32.
    routed: elements of routers' logits, G S E.
    attention: B H L M. biased: of these, logits that get a bias of positions.
    choices: tokens times experts that each of them chooses.
    rows: slots of all experts.
    slots, hidden: elements of outputs of experts' products, D wide or other.
    group: (S, L): tokens of a group, and of a sequence, where tokens are
      routed; a sum has that of its parts, None where they differ.
    untold: why this is not all, where a part does not tell what it costs.
  """

  flops: float = 0
  expert_flops: float = 0
  attention_flops: float = 0
  width: float = 0
  heads: float = 0
  mlp: float = 0
  logits: float = 0
  activated: float = 0
  relu: float = 0
  float32_inputs: float = 0
  routed: float = 0
  attention: float = 0
  biased: float = 0
  choices: float = 0
  rows: float = 0
  slots: float = 0
  hidden: float = 0
  group: tuple[int, int] | None = None
  untold: str | None = None

  def __add__(self, other: Cost) -> Self:
    """The sum, of the class of the first.

    Example:
      >>> (Cost(flops=2, group=(8, 4)) + Cost(flops=3)).flops
      5
    """
    counts = [
      field.name
      for field in dataclasses.fields(Cost)
      if field.name not in ('group', 'untold')
    ]
    sums = {name: getattr(self, name) + getattr(other, name) for name in counts}
    groups = {cost.group for cost in (self, other)} - {None}
    group = groups.pop() if len(groups) == 1 else None
    untold = self.untold or other.untold
    return dataclasses.replace(self, **sums, group=group, untold=untold)


class Call(NamedTuple):
  """The calls of a module, or one.

  Attributes:
    module: who was called.
    shapes: of the first argument, in each call.
    told: its own cost; None: it has parameters and tells none.
    within: the calls that it made.
  """

  module: nn.Module
  shapes: tuple[tuple[int, ...], ...]
  told: Cost | None
  within: list[Call]

  @property
  def cost(self) -> Cost:
    """What it told.

    Raises:
      ValueError: nothing, or not all.
    """
    if self.told is None:
      name = type(self.module).__name__
      raise ValueError(
        f'{name} at {"/".join(self.module.path) or "the root"} has parameters '
        'and does not tell what it costs, so nothing is planned with it: give '
        f'{name} a method `cost`, see sparse_experts/layers/cost.py.'
      )
    if self.told.untold is not None:
      raise ValueError(self.told.untold)
    return self.told


def calls(
  init: Callable[[], Any], **others: Any
) -> tuple[Any, dict[tuple[str, ...], Call]]:
  """What `init` returns, and the calls of modules in it by their path.

  Calls of one module, of `name_cost` too, are one. What is traced again, as the
  body of a scan, counts once; so does a scan's body, whatever its repeats. What
  a module calls counts each time that the module is called.
  Modules that a module applies by itself, as experts, are left out.

  Args:
    init: traces the initialisation of a module, as `jax.eval_shape`.
    others: arguments to ask with in place of those that were given, where they
      were: `capacity_factor=1.25`.
  """
  made: list[Call] = []
  under_way = [made]  # Calls made by each of those under way.
  roots: list[nn.Module | None] = [None]  # Of calls under way: who was applied.

  def note(call, args, kwargs, context):
    module = context.module
    if module.scope is None:
      return call(*args, **kwargs)
    roots.append(roots[-1] if module.path else module)
    under_way.append([])
    try:
      result = call(*args, **kwargs)
      is_apart = roots[-1] is not roots[1]
    finally:
      roots.pop()
      within = under_way.pop()
    if is_apart:
      return result
    asked = {name: others.get(name, value) for name, value in kwargs.items()}
    told = _told(module, context.method_name, args, asked)
    shape = getattr(args[0], 'shape', ()) if args else ()
    # Tracing anew makes the modules anew.
    under_way[-1][:] = [
      before
      for before in under_way[-1]
      if before.module is module or before.module.path != module.path
    ]
    under_way[-1].append(Call(module, (shape,), told, within))
    return result

  with nn.intercept_methods(note):
    result = init()
  return result, _by_path(made)


def cost_of(module: nn.Module, x: jax.ShapeDtypeStruct) -> Cost:
  """The cost of an unbound module and of all in it, on one argument.

  Raises:
    ValueError: a module in it has parameters and no method `cost`.

  Example:
    >>> import jax.numpy as jnp
    >>> from sparse_experts.layers.mlp import Mlp
    >>> cost_of(Mlp(32), jax.ShapeDtypeStruct((10, 16), jnp.float32)).flops
    20480
  """
  _, found = calls(
    lambda: jax.eval_shape(lambda x: module.init(jax.random.key(0), x), x)
  )
  return sum((call.cost for call in found.values()), Cost())


_NOTHING = object()


def _by_path(made: Sequence[Call]) -> dict[tuple[str, ...], Call]:
  """Calls and those within them, put together."""
  found: dict[tuple[str, ...], Call] = {}

  def add(call: Call, caller: nn.Module | None) -> None:
    path, is_traced = call.module.path, True
    if caller is not None and caller.path == path:  # Lifted, as by a scan:
      is_traced = caller is call.module  # it is told by who called it.
    if call.told is not _NOTHING and is_traced:
      before = found.get(path)
      if before is not None:
        told = None if call.told is None else before.cost + call.told
        call = call._replace(told=told, shapes=before.shapes + call.shapes)
      found[path] = call
    for inner in call.within:
      add(inner, call.module)

  for call in made:
    add(call, None)
  return found


def _told(
  module: nn.Module, method: str, args: tuple, kwargs: Mapping[str, Any]
) -> Any:
  """The cost of a call; None, if it must have some and tells none."""
  name = 'cost' if method == '__call__' else f'{method}_cost'
  if callable(getattr(type(module), name, None)):
    return getattr(module, name)(*args, **kwargs)
  if method != '__call__':
    return _NOTHING
  own = module.variables.get('params', {}).values()
  return Cost() if all(isinstance(x, Mapping) for x in own) else None
