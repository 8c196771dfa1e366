"""Parameters and arithmetic of a model, from its real modules.

The modules are traced with abstract shapes, so no size costs any memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from sparse_experts import sharding
from sparse_experts.layers import cost
from sparse_experts.models import layout
from sparse_experts.models.decoding import is_decodable
from sparse_experts.models.objective import Objective
from sparse_experts.training import optimizers

T5_LENGTHS = {'inputs': 512, 'targets': 114}

# Traced at once, which costs nothing: groups of 2, 3, ... 64 sequences need a
# multiple of that. Not more, or indices of tokens leave int32.
_ROWS = 2**6 * 3 * 5


class _Slots(NamedTuple):
  """A sparse layer's experts for one token: chosen, and computed."""

  useful: float
  executed: float


def ledger(
  model: Objective, feature_lengths: Mapping[str, int] | None = None
) -> dict[str, Any]:
  """Counts a model.

  Args:
    model: the model.
    feature_lengths: of an example, by default T5's 512 inputs and 114 targets
      (626 targets for a decoder alone).

  Returns:
    total_params; block_params: without embedding, logits, and what blocks of a
    stack share; sparse_params (with an `expert` axis); active_params: those
    that one token meets, K of E experts; components: parameters of the parts,
    which add up to the total; forward_flops_per_sequence: two for each
    multiply-add of the products a token needs (K experts, no capacity padding)
    and of attention; executed_forward_flops_per_sequence: the same with every
    slot of every expert, full or empty, at training's capacity factor;
    kaplan_forward_flops_per_sequence: as papers count (Kaplan et al. 2020,
    https://arxiv.org/abs/2001.08361, section 2.1, and the logits): half of
    attention, no routers, and keys and values of the memory as if it were as
    long as the targets;
    train_flops_per_sequence: three times forward_flops_per_sequence, and the
    forward pass of what stands frozen beside the model, a teacher, whose
    frozen_params are none of the others; train_flops_per_token: per input and
    target token; parameter_bytes and optimizer_bytes (by optimizer):
    all float32; feature_lengths, and the size of an 'example' for people;
    writes_text: it can be asked.
  """
  if feature_lengths is None:
    feature_lengths = model.features.example_lengths()
  shapes = model.features.shapes(feature_lengths, _ROWS, task_ids=True)
  boxed, slots, lengths, around = _trace(model, shapes)
  names = sharding.names_of(boxed)

  kinds = ('total_params', 'block_params', 'sparse_params', 'active_params')
  counts: dict[str, float] = dict.fromkeys(kinds, 0)
  components: dict[str, int] = {}
  flops, kaplan, padding = around, around, 0.0
  is_names = lambda x: isinstance(x, tuple)
  for (path, axes), leaf in zip(
    jax.tree_util.tree_leaves_with_path(names, is_leaf=is_names),
    jax.tree.leaves(boxed),
  ):
    parts = tuple(key.key for key in path)
    size = math.prod(leaf.shape)
    share = executed_share = 1.0
    if 'expert' in axes:
      E = leaf.shape[axes.index('expert')]
      layer = slots[parts[: parts.index('expert')]]
      share, executed_share = layer.useful / E, layer.executed / E
      counts['sparse_params'] += size
    counts['total_params'] += size
    if layout.block_of(parts):
      counts['block_params'] += size
    counts['active_params'] += size * share
    stack = layout.stack_of(parts, lengths)
    component = _component(parts, stack)
    components[component] = components.get(component, 0) + size
    if stack is None:
      continue
    tokens, context = _tokens(parts, stack, lengths)
    if parts[-1] == 'kernel':
      flops += 2 * size * share * tokens
      padding += 2 * size * (executed_share - share) * tokens
      if 'router' not in parts:
        kaplan += 2 * size * share * sum(lengths[stack])
    # Queries times keys and weights times values; or queries times distances.
    if parts[-2:] in (('out', 'kernel'), ('relative', 'kernel')):
      layers = leaf.shape[axes.index('layers')] if 'layers' in axes else 1
      width = size // (layers * leaf.shape[axes.index('embed')])
      product = 2 * layers * width * tokens * context
      flops += 2 * product if parts[-2] == 'out' else product
      kaplan += product if parts[-2] == 'out' else 0
  frozen = [
    ledger(of.objective, feature_lengths) for of in model.frozen.values()
  ]
  train_flops = 3 * flops + sum(
    facts['forward_flops_per_sequence'] for facts in frozen
  )
  return {
    **counts,
    'frozen_params': sum(facts['total_params'] for facts in frozen),
    'active_params': round(counts['active_params']),
    'components': dict(sorted(components.items())),
    'forward_flops_per_sequence': round(flops),
    'executed_forward_flops_per_sequence': round(flops + padding),
    'kaplan_forward_flops_per_sequence': round(kaplan),
    'train_flops_per_sequence': round(train_flops),
    'train_flops_per_token': round(
      train_flops / sum(map(sum, lengths.values()))
    ),
    'parameter_bytes': _bytes(boxed),
    'optimizer_bytes': _optimizer_bytes(names, boxed),
    'feature_lengths': dict(feature_lengths),
    'example': model.features.size(feature_lengths),
    'writes_text': is_decodable(model),
  }


def decode_flops(model: Objective, inputs: int, targets: int) -> int:
  """Of a question and its answer: no padding, nothing computed twice.

  One forward pass over both, in which attention counts in full as in `ledger`,
  with the logits of the answer alone.

  Args:
    model: that answers.
    inputs, targets: tokens of a question and of its answer.
  """
  unread, lengths = 0, {'inputs': inputs, 'targets': targets}
  if model.module.encoder is None:
    unread, lengths = inputs, {'targets': inputs + targets}
  facts = ledger(model, lengths)
  parts = facts['components']
  logits = 2 * parts.get('output logits', parts['token embedding'])
  return facts['forward_flops_per_sequence'] - unread * logits


def text(facts: Mapping[str, Any]) -> str:
  """The ledger for people, with `activation_bytes_per_token` if it is there."""
  lines = [f'{"parameters":36}{facts["total_params"]:>20,}']
  for name in ('active_params', 'sparse_params'):
    lines.append(f'{"  " + name.split("_")[0]:36}{facts[name]:>20,}')
  for name, count in facts['components'].items():
    lines.append(f'{"  in " + name:36}{count:>20,}')
  if facts['frozen_params']:
    title = 'frozen beside them (a teacher)'
    lines.append(f'{title:36}{facts["frozen_params"]:>20,}')
  for kind in ('forward', 'executed_forward', 'train'):
    title = f'{kind.replace("_", " ")} FLOPs per sequence'
    lines.append(f'{title:36}{facts[f"{kind}_flops_per_sequence"]:>20,}')
  lines.append(
    f'{"train FLOPs per token":36}{facts["train_flops_per_token"]:>20,}'
  )
  for name, size in {
    'parameters': facts['parameter_bytes'],
    **facts['optimizer_bytes'],
  }.items():
    lines.append(f'{"bytes of " + name:36}{size:>20,}')
  for remat, size in facts.get('activation_bytes_per_token', {}).items():
    title = f'bytes of activations per token, {remat}'
    lines.append(f'{title:36}{size:>20,}')
  lines.append(
    f'(a sequence is {facts["example"]}; attention counts in full; executed: '
    'with the empty slots of experts)'
  )
  return '\n'.join(lines)


class _Traced(NamedTuple):
  """What a model is made of and does with an example.

  Attributes:
    boxed: abstract parameters.
    slots: of sparse layers, by path.
    lengths: of the sequences that a stack reads, by its name; a stack that two
      inputs share reads two.
    around: FLOPs outside the stacks.
  """

  boxed: Any
  slots: dict[tuple[str, ...], _Slots]
  lengths: dict[str, tuple[int, ...]]
  around: float


def _trace(model: Objective, shapes) -> _Traced:
  boxed, calls = cost.calls(
    lambda: jax.eval_shape(
      lambda key: model.init(key, shapes), jax.random.key(0)
    ),
    capacity_factor=model.capacity_factor_train,
  )
  lengths = {
    stack: tuple(shape[1] for shape in calls[tuple(stack.split('/'))].shapes)
    for stack in layout.stacks_of(calls)
  }
  slots, around = {}, 0.0
  for path, call in calls.items():
    if call.told is None:
      continue
    if call.told.choices:
      tokens = sum(math.prod(shape[:2]) for shape in call.shapes)
      slots[path] = _Slots(call.told.choices / tokens, call.told.rows / tokens)
    if layout.stack_of(path, lengths) is None:
      around += call.told.flops / _ROWS
  return _Traced(boxed, slots, lengths, around)


def _optimizer_bytes(names: Any, boxed: Any) -> dict[str, int]:
  """Bytes of state; an axis name without a role is whole to Adafactor."""
  is_names = lambda x: isinstance(x, tuple)
  used = {
    axis for axes in jax.tree.leaves(names, is_leaf=is_names) for axis in axes
  }
  roles = {**dict.fromkeys(used, 'whole'), **optimizers.ROLES}
  txs = {
    'adafactor': optimizers.adafactor(names, learning_rate=1.0, roles=roles),
    'adam': optimizers.adam(names, learning_rate=1.0),
  }
  return {
    name: _bytes(jax.eval_shape(tx.init, boxed)) for name, tx in txs.items()
  }


def _bytes(tree: Any) -> int:
  leaves = jax.tree.leaves(tree)
  return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def _component(parts: tuple[str, ...], stack: str | None) -> str:
  """The part of the model a parameter belongs to, by its path."""
  kinds = {
    'expert': 'experts',
    'shared_expert': 'experts',
    'router': 'routers',
    'attention': 'attention',
    'cross_attention': 'attention',
    'mlp': 'dense FFNs',
    'extra_mlp': 'dense FFNs',
    'embed': 'token embedding',
    'logits': 'output logits',
    'patches': 'patch embedding',
    'frames': 'frame embedding',
    'class_token': 'positions',
    'positions': 'positions',
    'head': 'head',
    'left_projection': 'projections',
    'right_projection': 'projections',
  }
  found = [kinds[part] for part in parts if part in kinds]
  kind = found[0] if found else 'norms and biases'
  return kind if stack is None else f'{stack} {kind}'


def _tokens(
  parts: tuple[str, ...], stack: str, lengths: Mapping[str, tuple[int, ...]]
) -> tuple[int, float]:
  """Tokens that meet a parameter, and keys that each of them looks at."""
  tokens = sum(lengths[stack])
  if 'cross_attention' in parts:
    (memory,) = lengths['encoder']
    return (memory, 0) if parts[-2] in ('key', 'value') else (tokens, memory)
  return tokens, sum(length**2 for length in lengths[stack]) / tokens
