"""The letters that shapes are written in, and what a sparse layer returns.

An array's name ends in its shape: `x_BxLxD` has axes B, L and D. A letter
means one thing everywhere, and einsum strings use the same letters:

  B  sequences in a batch          G  groups of tokens
  L  tokens in a sequence          S  tokens in a group
  M  memory length (keys)          E  experts
  D  model width                   C  capacity: slots of one expert per group
  H  attention heads               K  choices (experts) per token, K <= E
  A  width of a head               N  layers
  F  hidden width of an FFN        V  vocabulary

`GxSK` is a merged axis, S-major; `1` is an axis of size one.
"""

from __future__ import annotations

from typing import Any

import flax
import jax
import jax.numpy as jnp

Array = jax.Array


@flax.struct.dataclass
class Aux:
  """What a sparse layer returns beside its output.

  Returned, never sown, so it passes through scan, remat and microbatches.

  Attributes:
    losses: name -> float32 scalar, unweighted, a mean over tokens or groups.
      Their weights live in `models.Model`.
    tokens: float32, how many tokens those are means over, by which microbatches
      weigh; None: all microbatches weigh alike.
    balance: a `moe.losses.Balance`, the sums that the loss `load_balance` is
      made of, where there is one: the model can take it over more than groups.
    metrics: name -> float32 array of *sums* over tokens, so that they add over
      microbatches, steps and processes; `moe.metrics.summary` divides.
    decisions: of routers that learn from reward, see `models.reward.losses`.
      Float32, one number a token: [G, S] from a router, [B, L] from a layer.
    logits: from a router that has some, float32 [G, S, E], up to a constant of
      each token: what its entropy and confidence are of. A layer has none.
    log_z: from a router that has logits of its own, float32 [G, S]: the
      logsumexp of x W as the product gave it, before noise. A layer has none.
    record: from a layer that was asked for it, a `moe.record.Record`.
  """

  losses: dict[str, Array]
  metrics: dict[str, Array]
  decisions: dict[str, Array] = flax.struct.field(default_factory=dict)
  logits: Array | None = None
  log_z: Array | None = None
  tokens: Array | None = None
  balance: Any = None
  record: Any = None


def masked_mean(x: Array, mask: Array | None, axis: int = -1) -> Array:
  """Mean of `x` over `axis` where `mask` holds; 0 where it holds nowhere."""
  if mask is None:
    return x.mean(axis)
  weights = jnp.broadcast_to(mask, x.shape).astype(x.dtype)
  return (x * weights).sum(axis) / jnp.maximum(weights.sum(axis), 1)
