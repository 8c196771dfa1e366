"""What a router decides and a dispatcher executes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from sparse_experts.letters import Array


@struct.dataclass
class Assignment:
  """Which tokens meet which experts, with which gate, in which order.

  Made by a router, executed by a dispatcher; neither knows the other. A choice
  whose position is at or beyond the capacity is dropped by the dispatcher; it
  never depends on the capacity.

  Attributes:
    expert_GxSxK: int32, the expert of each choice of each token; num_experts
      where there is no choice (a masked token, a second choice not taken).
    gate_GxSxK: float32, the weight of that expert's output.
    position_GxSxK: int32 >= 0, the position in that expert, in that group.
    num_experts: E.
  """

  expert_GxSxK: Array
  gate_GxSxK: Array
  position_GxSxK: Array
  num_experts: int = struct.field(pytree_node=False)

  def chosen(self) -> Array:
    """Boolean [G, S, K]: the choice exists."""
    return self.expert_GxSxK < self.num_experts

  def kept(self, capacity: int | None) -> Array:
    """Boolean [G, S, K]: the choice exists and finds a slot."""
    if capacity is None:
      return self.chosen()
    return self.chosen() & (self.position_GxSxK < capacity)


@struct.dataclass
class SoftAssignment:
  """Slots that are mixtures of tokens, and tokens that are mixtures of slots.

  Made by a soft router. Its number of slots C is its own, nothing is dropped.

  Attributes:
    dispatch_GxSxExC: float32, the weight of each token in each slot.
    combine_GxSxExC: float32, the weight of each slot's output in each token.
  """

  dispatch_GxSxExC: Array
  combine_GxSxExC: Array

  @property
  def num_experts(self) -> int:
    return self.dispatch_GxSxExC.shape[2]


def require_hard(assignment: Assignment | SoftAssignment, who: str) -> None:
  """Refuses soft weights where choices are meant.

  Raises:
    ValueError: the assignment is soft.
  """
  if isinstance(assignment, SoftAssignment):
    raise ValueError(
      f'{who} executes choices, but this router returns soft weights, which '
      'only the einsum dispatcher executes: use dispatch=einsum.'
    )


def ungated(
  expert_GxSxK: Array,
  num_experts: int,
  mask_GxS: Array | None = None,
  gate: float = 1.0,
) -> Assignment:
  """The assignment of experts that are not weighed, served in token order.

  Args:
    expert_GxSxK: int32 experts of each token; num_experts for none.
    num_experts: E.
    mask_GxS: False for padding, which gets none.
    gate: of every choice.
  """
  if mask_GxS is not None:
    expert_GxSxK = jnp.where(mask_GxS[..., None], expert_GxSxK, num_experts)
  return Assignment(
    expert_GxSxK=expert_GxSxK,
    gate_GxSxK=jnp.where(expert_GxSxK < num_experts, jnp.float32(gate), 0),
    position_GxSxK=positions(expert_GxSxK, num_experts, priority='token'),
    num_experts=num_experts,
  )


def largest(scores_GxSxE: Array, k: int) -> Array:
  """Experts of the k largest scores of each token, int32 [G, S, K].

  The largest first, ties to the lower index, k different ones even where
  scores are -inf. Not `jax.lax.top_k`, for which XLA gathers the operand from
  all devices.
  """
  scores_GxSxE = jnp.maximum(scores_GxSxE, jnp.finfo(scores_GxSxE.dtype).min)
  experts = []
  for _ in range(k):
    expert_GxS = jnp.argmax(scores_GxSxE, -1).astype(jnp.int32)
    experts.append(expert_GxS)
    is_it_GxSxE = jax.nn.one_hot(expert_GxS, scores_GxSxE.shape[-1], dtype=bool)
    scores_GxSxE = jnp.where(is_it_GxSxE, -jnp.inf, scores_GxSxE)
  return jnp.stack(experts, -1)


def positions(
  expert_GxSxK: Array,
  num_experts: int,
  *,
  priority: str = 'choice',
  confidence_GxS: Array | None = None,
) -> Array:
  """Position of every choice in its expert, int32 [G, S, K].

  Args:
    expert_GxSxK: experts chosen; num_experts for none, which takes no position.
    num_experts: E.
    priority: who is served first.
      'choice': all first choices, in token order, before all second choices
        (GShard, Lepikhin et al. 2020, Algorithm 1). Not causal for K > 1: a
        later token's first choice can evict an earlier token's second.
      'token': all choices of a token before those of the next. Causal.
      'confidence': first choices before second, tokens in decreasing order of
        `confidence_GxS` (batch-prioritised routing, Riquelme et al. 2021,
        section 4.1), ties in token order. Not causal.
    confidence_GxS: used by 'confidence' only.
  """
  G, S, K = expert_GxSxK.shape
  if priority == 'token':
    return _count_before(expert_GxSxK.reshape(G, S * K), num_experts).reshape(
      G, S, K
    )
  if priority == 'confidence':
    order_GxS = jnp.argsort(-confidence_GxS, axis=1, stable=True)
    expert_GxSxK = jnp.take_along_axis(
      expert_GxSxK, order_GxS[..., None], axis=1
    )
  elif priority != 'choice':
    raise ValueError(
      f"priority must be 'choice', 'token' or 'confidence', not {priority!r}."
    )
  position_GxKS = _count_before(
    expert_GxSxK.swapaxes(1, 2).reshape(G, K * S), num_experts
  )
  position_GxSxK = position_GxKS.reshape(G, K, S).swapaxes(1, 2)
  if priority == 'confidence':
    back_GxS = jnp.argsort(order_GxS, axis=1)
    position_GxSxK = jnp.take_along_axis(
      position_GxSxK, back_GxS[..., None], axis=1
    )
  return position_GxSxK


def is_causal(priority: str, k: int) -> bool:
  """Whether, in this order, no later token moves an earlier one."""
  return priority == 'token' or (priority == 'choice' and k == 1)


def _count_before(expert_GxI: Array, num_experts: int) -> Array:
  """How many entries before this one name the same expert, int32 [G, I]."""
  onehot_GxIxE = jax.nn.one_hot(expert_GxI, num_experts, dtype=jnp.int32)
  before_GxIxE = jnp.cumsum(onehot_GxIxE, axis=1) - onehot_GxIxE
  return (before_GxIxE * onehot_GxIxE).sum(-1)
