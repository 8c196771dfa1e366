"""Connectionist temporal classification: labels whose times nobody knows.

A path writes one output a token, a label or the blank. It reads as the labels
that are left when what repeats is written once and blanks are left out:
a a _ a b b reads a a b.

References:
  Graves et al. 2006, Connectionist temporal classification, ICML, sections 3.1
  (what paths read as) and 3.2 (the best path).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from sparse_experts.letters import Array


def tokens_needed(labels_BxT: Array, lengths_B: Array) -> Array:
  """Tokens of the shortest path that reads as the labels, int32 [B].

  One for each label, and a blank between equal neighbours.

  Example:
    >>> tokens_needed(jnp.array([[3, 3, 5, 0]]), jnp.array([3])).tolist()
    [4]
  """
  T = labels_BxT.shape[1]
  is_pair_BxI = labels_BxT[:, 1:] == labels_BxT[:, :-1]
  is_pair_BxI &= jnp.arange(1, T)[None] < lengths_B[:, None]
  return lengths_B + is_pair_BxI.sum(-1)


def log_prob(
  logits_BxLxV: Array, mask_BxL: Array, labels_BxT: Array, lengths_B: Array
) -> Array:
  """Of labels: log of the sum over all paths that read so, float32 [B].

  Args:
    logits_BxLxV: of each token's outputs; the last of them is the blank.
    mask_BxL: True for tokens, which come first, and not for padding.
    labels_BxT: int32, 0 to V - 2; lengths_B of them count, the first.

  Returns:
    In nats. A row that no path reads as has a number below -1e4 and no
    meaning: see `tokens_needed`.

  Example:
    >>> logits = jnp.zeros((1, 2, 3))  # Of 9 paths a a, a _, _ a read as a.
    >>> found = log_prob(logits, jnp.ones((1, 2), bool), jnp.array([[0]]),
    ...                  jnp.array([1]))
    >>> f'{jnp.exp(found[0]):.4f}'
    '0.3333'
  """
  is_padding_BxT = jnp.arange(labels_BxT.shape[1])[None] >= lengths_B[:, None]
  return -optax.ctc_loss(
    logits_BxLxV.astype(jnp.float32),
    (~mask_BxL).astype(jnp.float32),
    labels_BxT,
    is_padding_BxT.astype(jnp.float32),
    blank_id=logits_BxLxV.shape[-1] - 1,
  )


def best_path(logits_BxLxV: Array, mask_BxL: Array) -> tuple[Array, Array]:
  """What the likeliest path reads as: greedy decoding.

  Args:
    logits_BxLxV, mask_BxL: as of `log_prob`.

  Returns:
    path_BxL: int32, each token's likeliest output; and whether it is read,
    boolean [B, L]: it is no blank, and does not repeat the token before it.

  Example:
    >>> path = jnp.array([[0, 0, 2, 0, 1, 1]])  # Of two labels; 2 is the blank.
    >>> _, is_read = best_path(jax.nn.one_hot(path, 3), path >= 0)
    >>> path[is_read].tolist()
    [0, 0, 1]
  """
  path_BxL = logits_BxLxV.argmax(-1).astype(jnp.int32)
  blank = logits_BxLxV.shape[-1] - 1
  is_new_BxL = jnp.pad(
    path_BxL[:, 1:] != path_BxL[:, :-1], ((0, 0), (1, 0)), constant_values=True
  )
  return path_BxL, is_new_BxL & (path_BxL != blank) & mask_BxL


def edit_distance(
  path_BxL: Array, is_read_BxL: Array, labels_BxT: Array, lengths_B: Array
) -> Array:
  """Fewest insertions, deletions and substitutions that make one the other.

  Args:
    path_BxL, is_read_BxL: ids, and which of them make up the first sequence.
    labels_BxT, lengths_B: ids, of which so many, the first, are the second.

  Returns:
    int32 [B].

  Example:
    >>> labels, lengths = jnp.array([[1, 2, 3]]), jnp.array([3])
    >>> path, is_read = jnp.array([[1, 0, 3, 4]]), jnp.array([[1, 0, 1, 1]])
    >>> edit_distance(path, is_read > 0, labels, lengths).tolist()
    [2]

  References:
    Wagner and Fischer 1974, The string-to-string correction problem, JACM.
  """
  B, T = labels_BxT.shape
  ahead_1xI = jnp.arange(T + 1)[None]  # I is T + 1: how many labels there are.

  def advance(distance_BxI, token):
    id_B, is_read_B = token
    is_other_BxT = labels_BxT != id_B[:, None]
    swapped_BxT = distance_BxI[:, :-1] + is_other_BxT
    best_BxI = distance_BxI + 1  # A deletion.
    best_BxI = jnp.minimum(best_BxI, jnp.c_[best_BxI[:, :1], swapped_BxT])
    # Insertions: the least over all before, one for each label from there.
    best_BxI = jax.lax.cummin(best_BxI - ahead_1xI, axis=1) + ahead_1xI
    return jnp.where(is_read_B[:, None], best_BxI, distance_BxI), None

  distance_BxI = jnp.broadcast_to(ahead_1xI, (B, T + 1))
  distance_BxI, _ = jax.lax.scan(
    advance, distance_BxI, (path_BxL.T, is_read_BxL.T)
  )
  return jnp.take_along_axis(distance_BxI, lengths_B[:, None], axis=1)[:, 0]
