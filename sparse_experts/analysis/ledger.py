"""Parameters and arithmetic of a model, from its real modules.

The modules are traced with abstract shapes, so no size costs any memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
from flax import linen as nn

from sparse_experts import sharding
from sparse_experts.data import batches
from sparse_experts.models.model import Model

T5_LENGTHS = {'inputs': 512, 'targets': 114}


def ledger(
  model: Model, feature_lengths: Mapping[str, int] | None = None
) -> dict[str, Any]:
  """Counts a model.

  Args:
    model: the model.
    feature_lengths: of an example, by default T5's 512 inputs and 114 targets
      (626 targets for a decoder alone).

  Returns:
    total_params; sparse_params (with an `expert` axis); active_params: those
    that one token meets, K of E experts; components: parameters of the parts,
    which add up to the total; forward_flops_per_sequence: two for each
    multiply-add of the products a token needs (K experts, no capacity padding)
    and of attention; train_flops_per_sequence: three times that;
    train_flops_per_token: per input and target token; feature_lengths.
  """
  encoder_decoder = model.converter == 'encoder_decoder'
  if feature_lengths is None:
    total = sum(T5_LENGTHS.values())
    feature_lengths = T5_LENGTHS if encoder_decoder else {'targets': total}
  shapes = batches.shapes(
    model.converter, feature_lengths, 1, pack=False, task_ids=True
  )
  boxed, choices = _trace(model, shapes)
  names = sharding.names_of(boxed)
  targets = sum(feature_lengths.values())
  inputs = 0
  if encoder_decoder:
    inputs, targets = feature_lengths['inputs'], feature_lengths['targets']

  counts = {'total_params': 0, 'sparse_params': 0, 'active_params': 0.0}
  components: dict[str, int] = {}
  flops = 0.0
  is_names = lambda x: isinstance(x, tuple)
  for (path, axes), leaf in zip(
    jax.tree_util.tree_leaves_with_path(names, is_leaf=is_names),
    jax.tree.leaves(boxed),
  ):
    parts = tuple(key.key for key in path)
    size = math.prod(leaf.shape)
    share = 1.0
    if 'expert' in axes:
      E = leaf.shape[axes.index('expert')]
      share = choices[parts[: parts.index('expert')]] / E
      counts['sparse_params'] += size
    counts['total_params'] += size
    counts['active_params'] += size * share
    component = _component(parts)
    components[component] = components.get(component, 0) + size
    tokens, context = _tokens(parts, inputs, targets)
    if parts[-1] == 'kernel':
      flops += 2 * size * share * tokens
    if parts[-2:] == ('query', 'kernel'):  # q k and weights v.
      layers = leaf.shape[axes.index('layers')] if 'layers' in axes else 1
      width = math.prod(leaf.shape[-2:])
      flops += 4 * layers * width * tokens * context
  if model.module.tied_logits:
    flops += 2 * math.prod(boxed['embed']['embedding'].value.shape) * targets
  return {
    **counts,
    'active_params': round(counts['active_params']),
    'components': dict(sorted(components.items())),
    'forward_flops_per_sequence': round(flops),
    'train_flops_per_sequence': round(3 * flops),
    'train_flops_per_token': round(3 * flops / (inputs + targets)),
    'feature_lengths': dict(feature_lengths),
  }


def text(facts: Mapping[str, Any]) -> str:
  """The ledger for people."""
  lines = [f'{"parameters":28}{facts["total_params"]:>20,}']
  for name in ('active_params', 'sparse_params'):
    lines.append(f'{"  " + name.split("_")[0]:28}{facts[name]:>20,}')
  for name, count in facts['components'].items():
    lines.append(f'{"  in " + name:28}{count:>20,}')
  lengths = ', '.join(f'{n} {k}' for k, n in facts['feature_lengths'].items())
  for kind in ('forward', 'train'):
    flops = facts[f'{kind}_flops_per_sequence']
    lines.append(f'{kind + " FLOPs per sequence":28}{flops:>20,}')
  lines.append(
    f'{"train FLOPs per token":28}{facts["train_flops_per_token"]:>20,}'
  )
  lines.append(f'(a sequence is {lengths}; attention counts in full)')
  return '\n'.join(lines)


def _trace(model: Model, shapes) -> tuple[Any, dict[tuple[str, ...], int]]:
  """Abstract boxed parameters, and K of each sparse layer by its path."""
  choices = {}

  def record(call, args, kwargs, context):
    if context.module.name == 'router':
      choices[context.module.path[:-1]] = context.module.k
    return call(*args, **kwargs)

  with nn.intercept_methods(record):
    boxed = jax.eval_shape(
      lambda key: model.init(key, shapes), jax.random.key(0)
    )
  return boxed, choices


def _component(parts: tuple[str, ...]) -> str:
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
  }
  stack = f'{parts[0]} ' if parts[0] in ('encoder', 'decoder') else ''
  found = [kinds[part] for part in parts if part in kinds]
  return stack + (found[0] if found else 'norms and biases')


def _tokens(
  parts: tuple[str, ...], inputs: int, targets: int
) -> tuple[int, int]:
  """Tokens that meet a parameter, and keys that each of them looks at."""
  if parts[0] == 'encoder':
    return inputs, inputs
  if 'cross_attention' in parts:
    if parts[-2] in ('key', 'value'):
      return inputs, 0
    return targets, inputs
  return targets, targets
