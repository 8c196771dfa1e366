"""What a router or a sparse layer returns beside its decision or its output."""

from __future__ import annotations

from typing import Any

from flax import struct

from sparse_experts.letters import Array


@struct.dataclass
class Aux:
  """What a sparse layer returns beside its output.

  Returned, never sown, so it passes through scan, remat and microbatches.

  Attributes:
    losses: name -> float32 scalar, unweighted, a mean over tokens or groups.
      Their weights live in `models.Objective`.
    tokens: float32, how many tokens those are means over, by which microbatches
      weigh; None: all microbatches weigh alike.
    balance: a `moe.losses.Balance`, the sums that the loss `load_balance` is
      made of, where there is one: the model can take it over more than groups.
    metrics: name -> float32 array of *sums* over tokens, so that they add over
      microbatches, steps and processes; `moe.metrics.summary` divides.
    decisions: of routers that learn from reward, see
      `models.policy_gradient.losses`. Float32, one number a token: [G, S] from
      a router, [B, L] from a layer.
    logits: from a router that has some, float32 [G, S, E], up to a constant of
      each token: what its entropy and confidence are of. A layer has none.
    log_z: from a router that has logits of its own, float32 [G, S]: the
      logsumexp of x W as the product gave it, before noise. A layer has none.
    record: from a layer that was asked for it, a `moe.record.Record`.
  """

  losses: dict[str, Array]
  metrics: dict[str, Array]
  decisions: dict[str, Array] = struct.field(default_factory=dict)
  logits: Array | None = None
  log_z: Array | None = None
  tokens: Array | None = None
  balance: Any = None
  record: Any = None
