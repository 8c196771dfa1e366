"""What a sparse layer did with every token, for those who want to look."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import struct
from jax.scipy.special import entr

from sparse_experts.letters import Array
from sparse_experts.moe.assignment import Assignment, SoftAssignment

FATES = ('kept', 'capacity', 'sender', 'receiver', 'no choice', 'padding')


@struct.dataclass
class Record:
  """One layer's routing of a batch, token by token.

  Attributes:
    expert_BxLxK: int32, the expert of each choice; num_experts for none.
    gate_BxLxK: float32, the weight of its output, before any drop.
    position_BxLxK: int32, its position in its expert, in its group.
    fate_BxLxK: int8, what became of the choice, an index of `FATES`: kept;
      dropped for lack of capacity; lost for lack of room at the sender or the
      receiver (`grouped`); not made; not made because the token is padding.
    entropy_BxL: float32, of softmax(logits), nats; 0 for padding.
    confidence_BxL: float32, the largest probability of that softmax.
    log_z_BxL: float32, logsumexp of the logits without noise; the z-loss is the
      mean of its square.
    num_experts: E. group_size: S. capacity: C, or None.

  The three of the logits are None where the router has no logits. A soft router
  is recorded by the expert with the largest share of each token's mixture.
  """

  expert_BxLxK: Array
  gate_BxLxK: Array
  position_BxLxK: Array
  fate_BxLxK: Array
  entropy_BxL: Array | None = None
  confidence_BxL: Array | None = None
  log_z_BxL: Array | None = None
  num_experts: int = struct.field(pytree_node=False, default=1)
  group_size: int = struct.field(pytree_node=False, default=1)
  capacity: int | None = struct.field(pytree_node=False, default=None)


def record(
  assignment: Assignment | SoftAssignment,
  *,
  shape: tuple[int, ...],
  capacity: int | None = None,
  mask_GxS: Array | None = None,
  lost: Mapping[str, Array] | None = None,
  logits_GxSxE: Array | None = None,
  log_z_GxS: Array | None = None,
) -> Record:
  """The record of an assignment and what its dispatcher made of it.

  Args:
    assignment: what the router decided.
    shape: [B, L] of the batch.
    capacity: C, or None.
    mask_GxS: False for padding, or None.
    lost: choices that the dispatcher dropped, see `metrics.counts`.
    logits_GxSxE, log_z_GxS: `Aux.logits` and `Aux.log_z` of the router.
  """
  if isinstance(assignment, SoftAssignment):
    assignment = _largest_share(assignment, mask_GxS)
    capacity = None
  G, S, K = assignment.expert_GxSxK.shape
  if mask_GxS is None:
    mask_GxS = jnp.ones((G, S), bool)
  fate_GxSxK = jnp.where(assignment.chosen(), 0, FATES.index('no choice'))
  for cause, is_it_GxSxK in {
    **(lost or {}),
    'capacity': assignment.chosen() & ~assignment.kept(capacity),
    'padding': ~mask_GxS[..., None],
  }.items():
    fate_GxSxK = jnp.where(is_it_GxSxK, FATES.index(cause), fate_GxSxK)

  def tokens(x_GxSx___):
    return x_GxSx___.reshape(*shape, *x_GxSx___.shape[2:])

  of_logits = {}
  if logits_GxSxE is not None:
    logits_GxSxE = jnp.where(mask_GxS[..., None], logits_GxSxE, 0)
    probs_GxSxE = jax.nn.softmax(logits_GxSxE)
    of_logits = {
      'entropy_BxL': entr(probs_GxSxE).sum(-1),
      'confidence_BxL': probs_GxSxE.max(-1),
    }
  if log_z_GxS is not None:
    of_logits['log_z_BxL'] = log_z_GxS
  return Record(
    expert_BxLxK=tokens(assignment.expert_GxSxK),
    gate_BxLxK=tokens(assignment.gate_GxSxK),
    position_BxLxK=tokens(assignment.position_GxSxK),
    fate_BxLxK=tokens(fate_GxSxK.astype(jnp.int8)),
    **{
      name: tokens(jnp.where(mask_GxS, x_GxS, 0))
      for name, x_GxS in of_logits.items()
    },
    num_experts=assignment.num_experts,
    group_size=S,
    capacity=capacity,
  )


def _largest_share(
  assignment: SoftAssignment, mask_GxS: Array | None
) -> Assignment:
  share_GxSxE = assignment.combine_GxSxExC.sum(-1)
  expert_GxSx1 = share_GxSxE.argmax(-1).astype(jnp.int32)[..., None]
  if mask_GxS is not None:
    expert_GxSx1 = jnp.where(
      mask_GxS[..., None], expert_GxSx1, assignment.num_experts
    )
  return Assignment(
    expert_GxSxK=expert_GxSx1,
    gate_GxSxK=share_GxSxE.max(-1, keepdims=True),
    position_GxSxK=jnp.zeros_like(expert_GxSx1),
    num_experts=assignment.num_experts,
  )
