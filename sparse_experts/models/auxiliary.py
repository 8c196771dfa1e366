"""What the auxiliary losses of all sparse layers come to in a model's loss."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from sparse_experts.letters import Array
from sparse_experts.models.layout import LayerId
from sparse_experts.moe.losses import Balance
from sparse_experts.moe.outputs import Aux

REDUCTIONS = ('sum', 'mean', 'joint')
SCOPES = ('group', 'microbatch', 'batch', 'batch_so_far', 'last_step')
BALANCE = 'load_balance'  # The loss that a `Balance` is.


@struct.dataclass
class Totals:
  """What a step's losses are divided by, known before its first gradient.

  With it the mean over microbatches is the loss of the whole batch.

  Attributes:
    weight: float32, `Objective.weight` of a microbatch, the mean over them.
    tokens: stack ('encoder', 'decoder') -> float32, tokens that its layers
      route in a microbatch, likewise.
    weights: of an objective that is a sum of several losses, what each is
      divided by, by name; likewise.
    balance: layer ('decoder/layers_1') -> `Balance` of one group, of whose
      counts f is: see `Objective.balance_over`. None: of a microbatch's own.
    rows: what `Objective.statistics` found in every microbatch, [n, b, ...];
      None: this is all of the batch.
    part: int32, which of the n microbatches this one is.
  """

  weight: Array
  tokens: dict[str, Array]
  weights: dict[str, Array] | None = None
  balance: dict[str, Balance] | None = None
  rows: Any = None
  part: Array | None = None


@struct.dataclass
class Statistics:
  """What microbatches tell one another before the first gradient.

  Attributes:
    balance: as in `Totals`; added over microbatches.
    rows: arrays of a microbatch's rows, [b, ...]; kept side by side.
  """

  balance: dict[str, Balance]
  rows: Any = None


def check(layer_reduction: str, balance_over: str) -> None:
  """Raises ValueError unless both are known."""
  if layer_reduction not in REDUCTIONS:
    raise ValueError(
      f'layer_reduction must be one of {", ".join(REDUCTIONS)}, not '
      f'{layer_reduction!r}.'
    )
  if balance_over not in SCOPES:
    raise ValueError(
      f'balance_over must be one of {", ".join(SCOPES)}, not {balance_over!r}.'
    )


def of_layers(
  auxes: Mapping[str, Aux], balance_over: str, totals: Totals
) -> dict[str, Aux]:
  """Aux whose losses are each layer's part of the step's loss.

  Args:
    auxes: of sparse layers, by name.
    balance_over: tokens that the balance loss is of, see `Objective`.
    totals: of the step.
  """

  def of_layer(name: str, aux: Aux) -> Aux:
    share = _share({name: aux}, totals)
    losses = {loss: share * value for loss, value in aux.losses.items()}
    if BALANCE in losses and balance_over != 'group':
      losses[BALANCE] = _balance({name: aux}, balance_over, totals)
    return dataclasses.replace(aux, losses=losses)

  return {name: of_layer(name, aux) for name, aux in auxes.items()}


def over_layers(
  auxes: Mapping[str, Aux],
  layer_reduction: str,
  balance_over: str,
  totals: Totals,
) -> dict[str, Array]:
  """Each loss over all layers; arguments as of `of_layers`, its result given.

  A joint balance loss is that of the tokens of a stack's layers taken together:
  f and P are means over layers, too, before they are multiplied. Other losses
  are the mean over a stack's layers then, and those of two stacks add. Experts
  in attention are layers of their own kind, which add likewise.

  Args:
    auxes: of `of_layers`, by the layers' names.
    layer_reduction: 'sum', 'mean' or 'joint'.
    balance_over: as in `of_layers`.
    totals: as in `of_layers`.
  """
  joint = layer_reduction == 'joint'
  with_loss: dict[tuple[str, tuple[str, ...]], dict[str, Aux]] = {}
  for layer, aux in auxes.items():
    at = LayerId.parse(layer)
    together = (at.stack, at.kind) if joint else ()
    for loss in aux.losses:
      with_loss.setdefault((loss, together), {})[layer] = aux
  combined: dict[str, Array] = {}
  for (loss, _), layers in with_loss.items():
    if joint and loss == BALANCE:
      value = _balance(layers, balance_over, totals)
    else:
      value = sum(aux.losses[loss] for aux in layers.values())
      value /= 1 if layer_reduction == 'sum' else len(layers)
    combined[loss] = combined.get(loss, 0) + value
  return combined


def counts(auxes: Mapping[str, Aux]) -> dict[str, Balance]:
  """Of each layer that has balance, its counts as those of one group."""
  return {
    name: jax.lax.stop_gradient(aux.balance.over_groups())
    for name, aux in auxes.items()
    if aux.balance is not None
  }


def _balance(
  auxes: Mapping[str, Aux], balance_over: str, totals: Totals
) -> Array:
  """The balance loss of these layers' tokens taken together."""
  missing = [name for name, aux in auxes.items() if aux.balance is None]
  if missing:
    raise ValueError(
      f'the router of {missing[0]} returns {BALANCE} without Aux.balance, and '
      'only that can be balanced over more than a group and a layer: set '
      "balance_over='group' and another layer_reduction than 'joint'."
    )

  def together(balances) -> Balance:
    return functools.reduce(operator.add, balances)

  if balance_over == 'group':
    own = together(aux.balance for aux in auxes.values())
    return _share(auxes, totals) * own.loss()
  own = together(aux.balance.over_groups() for aux in auxes.values())
  given = None
  if totals.balance is not None:
    given = together(totals.balance[name] for name in auxes)
  if balance_over == 'microbatch' or given is None:
    share = 1 if balance_over == 'microbatch' else _share(auxes, totals)
    return share * own.loss()
  if balance_over == 'batch_so_far':
    given += own
  if balance_over == 'last_step':  # There is none before the first.
    is_there = given.tokens_G.sum() > 0
    given = jax.tree.map(
      lambda last, now: jnp.where(is_there, last, now),
      given,
      jax.lax.stop_gradient(own),
    )
  return _share(auxes, totals) * own.loss(given)


def _share(auxes: Mapping[str, Aux], totals: Totals) -> Array | float:
  """Tokens of these layers, over their mean number in a microbatch.

  1 where the losses are no means over tokens.
  """
  tokens = [aux.tokens for aux in auxes.values() if aux.tokens is not None]
  if len(tokens) < len(auxes):
    return 1.0
  expected = sum(totals.tokens[LayerId.parse(name).stack] for name in auxes)
  return sum(tokens) / or_one(expected)


def or_one(total: Array | int) -> Array:
  """To divide by: 1 for 0. A mean over microbatches can be less than 1."""
  return jnp.where(total > 0, total, 1)
