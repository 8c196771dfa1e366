"""How likely logits find what is true."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparse_experts.letters import Array


class Likelihood(NamedTuple):
  """Of logits [..., V] and ids [...]: float32, float32 and boolean, [...].

  Attributes:
    log_prob: of the id, in nats.
    log_z: logsumexp of the logits.
    correct: whether the id has the largest logit.
  """

  log_prob: Array
  log_z: Array
  correct: Array


def likelihood(logits: Array, ids: Array) -> Likelihood:
  """Of ids under the softmax of logits, in float32.

  Example:
    >>> found = likelihood(jnp.zeros((1, 4)), jnp.array([0]))
    >>> f'{found.log_prob[0]:.4f} {found.log_z[0]:.4f} {found.correct[0]}'
    '-1.3863 1.3863 True'
  """
  logits = logits.astype(jnp.float32)
  log_z = jax.nn.logsumexp(logits, -1)
  # One-hot, not a lookup: its gradient is no scatter and shards over V.
  onehot = jax.nn.one_hot(ids, logits.shape[-1], dtype=jnp.float32)
  target = (logits * onehot).sum(-1)
  return Likelihood(target - log_z, log_z, jnp.argmax(logits, -1) == ids)
