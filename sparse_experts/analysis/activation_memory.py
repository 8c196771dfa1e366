"""Memory of activations in a training step, per sequence.

    saved   = head + sum over blocks of kept(block, remat)
    working = largest over stacks of
              WORKING * whole(period) + whole(period) - kept(period, remat)
    bytes   = saved + working

`kept` is what a block leaves for the backward pass under a policy, `whole` what
it leaves under 'none', `head` all that blocks do not leave: embeddings, last
norms, logits and loss. They are read off the real modules: traced, never
computed, as the arrays between a block's forward and backward pass. A backward
pass first computes again what was not kept, for one period of the stack (two
blocks, if every second is sparse), then the gradients of it, of which WORKING
says how many live at once.

It is per sequence: what all sequences share (parameters, their casts and
gradients, masks) is not in it. Stacks are taken as scanned, which is where XLA
keeps what JAX says; in one that is not, XLA fuses and recomputes as it likes.
Within 15% of XLA:CPU for small models, but for encoder-decoders under 'dots',
which come out up to a fifth too high.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.extend.core import Var

from sparse_experts.data import batches
from sparse_experts.models import layout
from sparse_experts.models.model import Model
from sparse_experts.models.transformer import REMAT_POLICIES

# Of a period's activations, the share that its gradients have at one time; what
# XLA's programs show, see tests/activation_memory_test.py.
WORKING = 0.65

# Enough for groups of 2, 3, ... 64 sequences; and what all of them share, such
# as a mask, is next to nothing of each.
_ROWS = 2**6 * 3 * 5


@dataclasses.dataclass(frozen=True)
class ActivationMemory:
  """Bytes per sequence.

  Attributes:
    saved: kept from the forward for the backward pass.
    working: at most needed beside it.
  """

  saved: float
  working: float

  @property
  def total(self) -> float:
    return self.saved + self.working


def activation_memory(
  model: Model,
  feature_lengths: Mapping[str, int],
  remat: str | None = None,
  dtype: str | None = None,
) -> ActivationMemory:
  """Activations of a training step, in bytes per sequence.

  Args:
    model: the model.
    feature_lengths: of an example, as `ledger.ledger` takes them.
    remat: 'none', 'dots' or 'full', see `transformer.Stack`; None: as the
      model's stacks have it.
    dtype: of activations; None: as the model has it.

  Raises:
    ValueError: no such policy.
  """
  if remat is not None and remat not in REMAT_POLICIES:
    raise ValueError(
      f'remat must be one of {", ".join(REMAT_POLICIES)}, not {remat!r}.'
    )
  if dtype is not None:
    model = _with(model, embed=model.module.embed.clone(dtype=dtype))
  whole = _kept(model, feature_lengths, 'none')
  if remat == 'none':
    return _peak(model, whole, whole)
  return _peak(model, _kept(model, feature_lengths, remat), whole)


def bytes_per_token(
  model: Model, feature_lengths: Mapping[str, int]
) -> dict[str, int]:
  """By policy, the total per token, of inputs and targets together."""
  kept = {
    remat: _kept(model, feature_lengths, remat) for remat in REMAT_POLICIES
  }
  tokens = sum(feature_lengths.values())
  return {
    remat: round(_peak(model, kept[remat], kept['none']).total / tokens)
    for remat in kept
  }


class _Kept(NamedTuple):
  """Bytes per sequence that each (stack, kind of block) keeps, and the rest."""

  blocks: Mapping[tuple[str, Any], float]
  head: float


def _peak(model: Model, kept: _Kept, whole: _Kept) -> ActivationMemory:
  """The formula above."""
  saved, working = kept.head, 0.0
  for name, blocks in _blocks(model).items():
    saved += sum(kept.blocks[name, kind] for kind in blocks)
    period = _period(blocks)
    everything = sum(whole.blocks[name, kind] for kind in period)
    again = everything - sum(kept.blocks[name, kind] for kind in period)
    working = max(working, WORKING * everything + again)
  return ActivationMemory(saved, working)


def _blocks(model: Model) -> dict[str, tuple[Any, ...]]:
  """The kinds of blocks of each stack, in order."""
  stacks = {
    name: getattr(model.module, name) for name in ('encoder', 'decoder')
  }
  return {
    name: layout.kinds(stack.num_layers, stack.sparse_layers)
    for name, stack in stacks.items()
    if stack is not None
  }


def _period(blocks: Sequence[Any]) -> Sequence[Any]:
  """What a scan repeats; all blocks where nothing does."""
  try:
    prefix, period, _ = layout.split_period(blocks)
  except ValueError:
    return blocks
  return blocks[prefix : prefix + period]


def _kept(
  model: Model, feature_lengths: Mapping[str, int], remat: str | None
) -> _Kept:
  """Traces models that have every kind of block.

  Two equal blocks a stack, scanned: what a block keeps is what a scan stacks.
  """
  kinds = {name: sorted(set(b)) for name, b in _blocks(model).items()}
  kept = {}
  for of_stacks in itertools.zip_longest(*kinds.values()):
    pair = {
      name: kinds[name][-1] if kind is None else kind
      for name, kind in zip(kinds, of_stacks)
    }
    stacks = {}
    for name, kind in pair.items():
      stack = getattr(model.module, name)
      stacks[name] = stack.clone(
        num_layers=2,
        sparse_layers=_layers(kind),
        scan=True,
        remat=stack.remat if remat is None else remat,
      )
    stacked, rest = _residuals(_with(model, **stacks), feature_lengths)
    kept |= {
      (name, kind): size / 2
      for (name, kind), size in zip(pair.items(), stacked)
    }
  return _Kept(kept, rest)


def _layers(kind: bool | int) -> Any:
  """The `sparse_layers` of two blocks of a kind."""
  return int(kind) if isinstance(kind, bool) else {0: kind, 1: kind}


def _residuals(
  model: Model, feature_lengths: Mapping[str, int]
) -> tuple[list[float], float]:
  """What the backward pass is given, bytes per sequence: by each scan, else."""
  shapes = batches.shapes(
    model.converter, feature_lengths, _ROWS, pack=False, task_ids=True
  )
  # In the dtype of activations, so that no parameter is cast: a cast one would
  # look like an activation.
  params = jax.tree.map(
    lambda p: jax.ShapeDtypeStruct(p.shape, model.module.embed.dtype),
    jax.eval_shape(lambda: nn.unbox(model.init(jax.random.key(0), shapes))),
  )

  def backward(params, batch):
    def loss(params):
      return model.loss(
        params, batch, jax.random.key(0), train=True, step=jnp.int32(0)
      )

    return jax.vjp(loss, params, has_aux=True)[1]

  jaxpr = jax.make_jaxpr(backward)(params, shapes).jaxpr
  # Of what is left, that which is no parameter, constant or target.
  computed = {v for eqn in jaxpr.eqns for v in eqn.outvars}
  left = computed.intersection(v for v in jaxpr.outvars if isinstance(v, Var))
  scans = [
    set(eqn.outvars[eqn.params['num_carry'] :])
    for eqn in jaxpr.eqns
    if eqn.primitive.name == 'scan'
  ]
  stacked = [_bytes(left & scan) / _ROWS for scan in scans]
  return stacked, _bytes(left.difference(*scans)) / _ROWS


def _bytes(variables) -> int:
  return sum(math.prod(v.aval.shape) * v.aval.dtype.itemsize for v in variables)


def _with(model: Model, **parts: nn.Module) -> Model:
  return dataclasses.replace(model, module=model.module.clone(**parts))
