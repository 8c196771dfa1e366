"""The sparse layer by definition: numpy, float64, a python loop per letter.

Written from the papers, not from the library, and as slowly as they read: what
is decided (`decide`) is apart from what is differentiable (`gates`, `losses`,
`layer`), so that `gradient` can take finite differences with the decisions held
fixed, as the gradient of a router is defined.
"""

import dataclasses
import itertools
import math
from fractions import Fraction

import numpy as np

ACTIVATIONS = {
  'relu': lambda x: np.where(x > 0, x, 0),
  'gelu': lambda x: (
    0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
  ),
  'gelu_exact': lambda x: (
    0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
  ),
  'silu': lambda x: x / (1 + np.exp(-x)),
}


@dataclasses.dataclass(frozen=True)
class Decisions:
  """What a router decides, arrays [G, S, K].

  Attributes:
    ranked: the k most probable experts.
    taken: whether the choice is made.
    place: its place in the line of its expert; 0 where it is not made.
  """

  ranked: np.ndarray
  taken: np.ndarray
  place: np.ndarray

  def kept(self, capacity: int | None) -> np.ndarray:
    fits = True if capacity is None else self.place < capacity
    return self.taken & fits


def softmax(logits: np.ndarray) -> np.ndarray:
  """Of one row of logits."""
  exp = np.exp(np.asarray(logits, np.float64) - np.max(logits))
  return exp / exp.sum()


def row_gates(probs: np.ndarray, ranked: np.ndarray, over: str) -> np.ndarray:
  """Gates of one token's choices."""
  chosen = np.array([probs[e] for e in ranked])
  return chosen / (chosen.sum() if over == 'chosen' else 1.0)


def gates(logits: np.ndarray, ranked: np.ndarray, over: str) -> np.ndarray:
  """Gates [G, S, K] of every ranked choice, taken or not."""
  values = np.zeros(ranked.shape)
  for g, s in np.ndindex(ranked.shape[:2]):
    values[g, s] = row_gates(softmax(logits[g, s]), ranked[g, s], over)
  return values


def decide(
  logits: np.ndarray,
  *,
  k: int,
  mask: np.ndarray | None = None,
  over: str = 'all',
  policy: str = 'all',
  threshold: float = 0.2,
  draws: np.ndarray | None = None,
  priority: str = 'choice',
  order: np.ndarray | None = None,
) -> Decisions:
  """Who goes where, in which place.

  `draws` [G, S, K] are the numbers of the policy 'random', `order` [G, S] those
  of the priority: the largest is first.
  """
  G, S, E = logits.shape
  ranked = np.zeros((G, S, k), int)
  taken = np.zeros((G, S, k), bool)
  confidence = np.zeros((G, S))
  for g, s in np.ndindex(G, S):
    if mask is not None and not mask[g, s]:
      continue
    probs = softmax(logits[g, s])
    ranked[g, s] = sorted(range(E), key=lambda e: (-probs[e], e))[:k]
    confidence[g, s] = probs.max()
    values = row_gates(probs, ranked[g, s], over)
    for j in range(k):
      taken[g, s, j] = (
        j == 0
        or {
          'all': True,
          'none': False,
          'threshold': values[j] > threshold,
          'random': draws is not None
          and draws[g, s, j] < min(1, values[j] / threshold),
        }[policy]
      )
  place = np.zeros((G, S, k), int)
  for g in range(G):
    tokens = list(range(S))
    if priority in ('confidence', 'random'):
      first = confidence if priority == 'confidence' else order
      tokens.sort(key=lambda s: (-first[g, s], s))
    if priority == 'token':
      queue = list(itertools.product(tokens, range(k)))
    else:
      queue = [(s, j) for j in range(k) for s in tokens]
    line = [0] * E
    for s, j in queue:
      if taken[g, s, j]:
        place[g, s, j] = line[ranked[g, s, j]]
        line[ranked[g, s, j]] += 1
  return Decisions(ranked, taken, place)


def losses(
  logits: np.ndarray,
  ranked: np.ndarray,
  *,
  mask: np.ndarray | None = None,
  counts: str = 'first',
  over: str = 'tokens',
) -> tuple[float, float]:
  """(load balance, router z) of Switch eqs. 4 to 6 and ST-MoE eq. 5.

  Over positions, masked ones count: as zeros in f and P, with zero logits in z.
  """
  G, S, E = logits.shape
  balance = z = total = 0.0
  for g in range(G):
    f, P, z_group, n = np.zeros(E), np.zeros(E), 0.0, 0
    for s in range(S):
      if mask is not None and not mask[g, s]:
        if over == 'positions':
          z_group += math.log(E) ** 2
          n += 1
        continue
      n += 1
      P += softmax(logits[g, s])
      highest = logits[g, s].max()
      z_group += (highest + math.log(np.exp(logits[g, s] - highest).sum())) ** 2
      for e in ranked[g, s][: 1 if counts == 'first' else None]:
        f[e] += 1
    if n:  # A group weighs by what it has.
      balance += n * E * (f / n * P / n).sum()
    z += z_group
    total += n
  return balance / max(total, 1), z / max(total, 1)


def capacity(
  factor: str,
  *,
  tokens,
  num_experts,
  k,
  per_choice,
  rounding,
  minimum,
  clip,
  multiple_of=1,
) -> int:
  """Slots of an expert, in exact fractions; `factor` as it is written."""
  exact = Fraction(factor) * tokens * (k if per_choice else 1) / num_experts
  slots = exact.numerator // exact.denominator
  rest = exact - slots
  if rounding == 'ceil' and rest > 0:
    slots += 1
  if rounding == 'round' and (
    rest > Fraction(1, 2) or (rest == Fraction(1, 2) and slots % 2)
  ):
    slots += 1
  slots = max(slots, minimum)
  while slots % multiple_of:
    slots += 1
  return min(slots, tokens) if clip else slots


def mlp(
  x_D: np.ndarray, weights: dict[str, np.ndarray], activation: str
) -> np.ndarray:
  """An expert on one token; gated where it has two input matrices."""
  act = ACTIVATIONS[activation]
  if 'wi_0' in weights:
    h_F = act(x_D @ weights['wi_0']) * (x_D @ weights['wi_1'])
  else:
    h_F = act(x_D @ weights['wi'])
  return h_F @ weights['wo']


def layer(
  x: np.ndarray,
  logits: np.ndarray,
  weights: dict[str, np.ndarray],
  decisions: Decisions,
  *,
  over: str,
  capacity: int | None,
  activation: str,
) -> np.ndarray:
  """y_s = sum_k gate_sk expert_{e(s, k)}(x_s) over kept choices, [G, S, D].

  Weights are stacked over experts, [E, ...].
  """
  y = np.zeros(x.shape)
  values = gates(logits, decisions.ranked, over)
  for g, s, j in np.argwhere(decisions.kept(capacity)):
    e = decisions.ranked[g, s, j]
    expert = {name: w[e] for name, w in weights.items()}
    y[g, s] += values[g, s, j] * mlp(x[g, s], expert, activation)
  return y


def gradient(f, arrays: dict[str, np.ndarray], step: float = 1e-6):
  """Central differences of scalar f(arrays) by every entry of every array."""
  result = {}
  for name, array in arrays.items():
    result[name] = np.zeros(array.shape)
    for index in np.ndindex(array.shape):
      ends = []
      for sign in (1, -1):
        moved = array.copy()
        moved[index] += sign * step
        ends.append(f({**arrays, name: moved}))
      result[name][index] = (ends[0] - ends[1]) / (2 * step)
  return result
