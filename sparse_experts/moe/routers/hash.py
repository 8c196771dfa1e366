"""Hash layers: a fixed table says which expert a token id belongs to.

Nothing is learned and nothing computed: the table is a constant, made anew
from its arguments wherever the model is built, the same on every machine.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from sparse_experts import storage
from sparse_experts.letters import Array
from sparse_experts.moe.assignment import Assignment, ungated
from sparse_experts.moe.outputs import Aux
from sparse_experts.moe.router import Router
from sparse_experts.numbers import Count


@dataclasses.dataclass(frozen=True, eq=False)
class RandomTable:
  """Random experts for every token id.

  The k experts of a token differ, where k independent hash functions would
  meet now and then.

  Example:
    >>> RandomTable(seed=0)(vocab_size=5, num_experts=4, k=2).shape
    (5, 2)
  """

  seed: int = 0

  def __call__(
    self, vocab_size: int, num_experts: int, k: int = 1
  ) -> np.ndarray:
    """Experts of each token id, int32 [V, K]."""
    random = np.random.default_rng(self.seed)
    table_VxK = np.zeros((vocab_size, 0), np.int32)
    for j in range(k):
      # One of the E - j experts that are left, counted past those taken.
      expert_V = random.integers(num_experts - j, size=vocab_size)
      for taken_V in np.sort(table_VxK, 1).T:
        expert_V += expert_V >= taken_V
      table_VxK = np.column_stack([table_VxK, expert_V]).astype(np.int32)
    return table_VxK


@dataclasses.dataclass(frozen=True, eq=False)
class BalancedTable:
  """Experts that see equally many tokens.

  The most frequent token first, each goes to the k experts with the least load
  so far, ties to the lower index. Token ids that were never counted are dealt
  out in turn.

  Attributes:
    counts: how often each token id occurs in training, from id 0, or the path
      of a text file of them; scripts/token_counts.py writes one. Ids beyond
      its end count as never seen.

  Example:
    >>> table = BalancedTable(counts=[9, 5, 3, 0, 0])
    >>> table(vocab_size=5, num_experts=2)[:, 0].tolist()
    [0, 1, 1, 0, 1]

  References:
    Roller et al. 2021, https://arxiv.org/abs/2106.04426, section 3.1,
    "Balanced assignment".
  """

  counts: Sequence[float] | np.ndarray | str

  def __call__(
    self, vocab_size: int, num_experts: int, k: int = 1
  ) -> np.ndarray:
    """Experts of each token id, int32 [V, K].

    Raises:
      ValueError: there are more counts than token ids, or negative ones.
    """
    counts = self.counts
    if isinstance(counts, str):
      lines = storage.given(counts, 'counts').read_text().split()
      counts = [float(line) for line in lines]
    counts = np.asarray(counts, np.float64)
    if counts.ndim != 1 or len(counts) > vocab_size or (counts < 0).any():
      raise ValueError(
        f'counts must be at most vocab_size={vocab_size} numbers of at least '
        f'0, got shape {counts.shape}, smallest {counts.min(initial=0):g}.'
      )
    counts_V = np.pad(counts, (0, vocab_size - len(counts)))
    table_VxK = np.zeros((vocab_size, k), np.int32)
    loads = [(0.0, e) for e in range(num_experts)]
    order_V = np.argsort(-counts_V, kind='stable')
    for v in order_V[counts_V[order_V] > 0]:
      least = [heapq.heappop(loads) for _ in range(k)]
      table_VxK[v] = [e for _, e in least]
      for load, e in least:
        heapq.heappush(loads, (load + counts_V[v], e))
    unseen = np.flatnonzero(counts_V == 0)
    table_VxK[unseen] = _dealt_out(len(unseen), num_experts, k)
    return table_VxK


@dataclasses.dataclass(frozen=True, eq=False)
class DispersedTable:
  """Tokens that mean similar things go to different experts.

  Token ids are clustered by k-means and the members of each cluster, in random
  order, are dealt out over the experts, so that of any cluster, and of all,
  two experts' numbers of token ids differ by one at most.

  Attributes:
    embeddings: [V, D], of a trained model, or the path of a .npy file of them.
    clusters: of k-means; None: E.
    seed: of the clusters' first centres and the order within clusters.

  Example:
    >>> embeddings = np.array([[0.], [9.], [0.1], [9.1], [0.2], [9.2]])
    >>> table = DispersedTable(embeddings, clusters=2)
    >>> sorted(table(vocab_size=6, num_experts=3)[::2, 0].tolist())
    [0, 1, 2]

  References:
    Roller et al. 2021, section 3.1, "Dispersed hash".
  """

  embeddings: np.ndarray | str
  clusters: int | None = None
  seed: int = 0

  def __call__(
    self, vocab_size: int, num_experts: int, k: int = 1
  ) -> np.ndarray:
    """Experts of each token id, int32 [V, K].

    Raises:
      ValueError: there are not vocab_size embeddings, or fewer than clusters.
    """
    embeddings_VxD = self.embeddings
    if isinstance(embeddings_VxD, str):
      with storage.given(embeddings_VxD, 'embeddings').open('rb') as file:
        embeddings_VxD = np.load(file)
    embeddings_VxD = np.asarray(embeddings_VxD, np.float64)
    clusters = num_experts if self.clusters is None else self.clusters
    if embeddings_VxD.ndim != 2 or len(embeddings_VxD) != vocab_size:
      raise ValueError(
        f'embeddings must be vocab_size={vocab_size} rows, got shape '
        f'{embeddings_VxD.shape}.'
      )
    if not 1 <= clusters <= vocab_size:
      raise ValueError(
        f'{clusters} clusters of vocab_size={vocab_size} tokens: give 1 to '
        f'{vocab_size}.'
      )
    random = np.random.default_rng(self.seed)
    cluster_V = k_means(embeddings_VxD, clusters, random)
    order_V = random.permutation(vocab_size)
    order_V = order_V[np.argsort(cluster_V[order_V], kind='stable')]
    table_VxK = np.zeros((vocab_size, k), np.int32)
    table_VxK[order_V] = _dealt_out(vocab_size, num_experts, k)
    return table_VxK


def k_means(
  x_VxD: np.ndarray,
  clusters: int,
  random: np.random.Generator,
  max_rounds: int = 50,
) -> np.ndarray:
  """Lloyd's algorithm from random rows: the cluster of each row, [V].

  Args:
    x_VxD: what is clustered.
    clusters: at most V.
    random: draws the first centres.
    max_rounds: after which it stops, converged or not.
  """
  centres = x_VxD[random.choice(len(x_VxD), clusters, replace=False)]
  cluster_V = np.full(len(x_VxD), -1)
  for _ in range(max_rounds):
    # |x - c|^2 without |x|^2, which is the same for all centres.
    distance = (centres**2).sum(1) - 2 * x_VxD @ centres.T
    nearest_V = distance.argmin(1)
    if (nearest_V == cluster_V).all():
      break
    cluster_V = nearest_V
    for c in np.unique(cluster_V):  # An empty cluster's centre stays.
      centres[c] = x_VxD[cluster_V == c].mean(0)
  return cluster_V


class Hash(Router):
  """Experts by token id, with gate 1.

  With k > 1 this is near the paper's MultiHash layer (section 3.2): a token
  meets k experts of its own hash functions, whose outputs are added. Give the
  experts F / k hidden units for the cost of one. There, each of the k second
  matrices reads the hidden units of all k and writes its own D / k outputs;
  here an expert reads only its own and writes all D.

  Attributes:
    vocab_size: V. An id beyond it belongs to no expert.
    table: (vocab_size, num_experts, k) -> experts [V, K]: a `RandomTable`,
      `BalancedTable` or `DispersedTable`. All layers have the same.

  Example:
    >>> router = Hash(num_experts=4, vocab_size=100)
    >>> x_GxSxD = jnp.ones((2, 3, 8))
    >>> ids_GxS = jnp.array([[5, 6, 5], [6, 6, 5]])
    >>> assignment, _ = router.apply({}, x_GxSxD, token_ids_GxS=ids_GxS)
    >>> expert = assignment.expert_GxSxK[..., 0]
    >>> bool(expert[0, 0] == expert[0, 2] == expert[1, 2])
    True

  References:
    Roller et al. 2021, https://arxiv.org/abs/2106.04426.
  """

  vocab_size: Count = 0
  table: Callable[[int, int, int], np.ndarray] = RandomTable()

  needs = ('token_ids',)
  exchangeable = False  # The table names experts.

  @nn.compact
  def __call__(
    self,
    x_GxSxD: Array,
    *,
    token_ids_GxS: Array,
    mask_GxS: Array | None = None,
    deterministic: bool = True,
  ) -> tuple[Assignment, Aux]:
    """Looks tokens up; `x_GxSxD` and `deterministic` are not looked at."""
    self.check_k()
    if self.vocab_size < 1:
      raise ValueError(
        f'Hash needs vocab_size, the number of token ids, got '
        f'{self.vocab_size}.'
      )
    table_VxK = self.table(self.vocab_size, self.num_experts, self.k)
    if table_VxK.shape != (self.vocab_size, self.k):
      raise ValueError(
        f'table must return shape {(self.vocab_size, self.k)}, got '
        f'{table_VxK.shape}.'
      )
    expert_GxSxK = look_up(table_VxK, token_ids_GxS, self.num_experts)
    assignment = ungated(expert_GxSxK, self.num_experts, mask_GxS)
    return assignment, Aux(losses={}, metrics={})


def look_up(table_IxK: np.ndarray, ids_GxS: Array, num_experts: int) -> Array:
  """Rows of a table of experts, int32 [G, S, K]; E for ids outside of it.

  Args:
    table_IxK: experts of I ids.
    ids_GxS: int32.
    num_experts: E, which means none.
  """
  # A negative index would count from the end.
  ids_GxS = jnp.where(ids_GxS < 0, len(table_IxK), ids_GxS)
  return (
    jnp.asarray(table_IxK, jnp.int32)
    .at[ids_GxS]
    .get(mode='fill', fill_value=num_experts)
  )


def _dealt_out(tokens: int, num_experts: int, k: int) -> np.ndarray:
  """The experts in turn, k different ones to a token, [tokens, K]."""
  turns = np.arange(tokens)[:, None] + np.arange(k)
  return turns % num_experts
