"""Scaling laws: loss from parameters, tokens and experts, and what is optimal.

Dense models: `Kaplan` and `Chinchilla`. Routed models: `Clark`, whose effective
parameter count says which dense model a routed one is worth. N is parameters
without embeddings, D training tokens, E experts of a sparse layer, C training
FLOPs (6 N D); losses are nats per token. Everything takes numbers or arrays.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

LOSSES = (
  pathlib.Path(__file__).parent.parent / 'data/assets/clark_2022_losses.csv'
)
FORMS = ('simple', 'bilinear', 'saturating')


class Allocation(NamedTuple):
  """What to train with a budget: N, E, D and the loss to expect."""

  params: float
  experts: int
  tokens: float
  loss: float


@dataclasses.dataclass(frozen=True)
class Kaplan:
  """L(N, D) = ((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D.

  The optimum is the one of this equation, D = C / 6N: N grows as C^0.58. The
  paper's advice, N as C^0.73, is of training far from convergence at a batch
  size that grows, for which it has another fit, L(N, S).

  Example:
    >>> Kaplan().loss(6.4e13, math.inf)
    1.0
    >>> Kaplan().optimal(6e21).params > Chinchilla().optimal(6e21).params
    True

  References:
    Kaplan et al. 2020, https://arxiv.org/abs/2001.08361, equation 1.5, fitted
    with a vocabulary of 50,257 to WebText2.
  """

  alpha_params: float = 0.076
  alpha_tokens: float = 0.103
  critical_params: float = 6.4e13
  critical_tokens: float = 1.8e13

  def loss(self, params: Any, tokens: Any) -> Any:
    """Nats per token."""
    ratio = self.alpha_params / self.alpha_tokens
    of_params = (self.critical_params / params) ** ratio
    return (of_params + self.critical_tokens / tokens) ** self.alpha_tokens

  def optimal(self, flops: float) -> Allocation:
    """N and D of least loss with 6 N D = `flops`."""
    # d/dN of (N_c / N)^r + 6 D_c N / C is 0.
    ratio = self.alpha_params / self.alpha_tokens
    params = (
      ratio * self.critical_params**ratio * flops / (6 * self.critical_tokens)
    ) ** (1 / (1 + ratio))
    tokens = flops / (6 * params)
    return Allocation(params, 1, tokens, self.loss(params, tokens))

  @classmethod
  def fit(cls, params: Any, tokens: Any, losses: Any) -> Kaplan:
    """Least squares of log loss; arguments as of `Clark.fit`."""
    params, tokens, losses = _data(params, tokens, losses)

    def residuals(x):
      ratio = np.exp(x[0] - x[1])
      of_params = ratio * (x[2] - np.log(params))
      total = np.logaddexp(of_params, x[3] - np.log(tokens))
      return np.exp(x[1]) * total - np.log(losses)

    starts = [np.log([a, b, 1e14, 1e13]) for a in (0.05, 0.2) for b in (0.1, 1)]
    return cls(*map(float, np.exp(_least_squares(residuals, starts))))


@dataclasses.dataclass(frozen=True)
class Chinchilla:
  """L(N, D) = irreducible + A / N^alpha + B / D^beta.

  The defaults are the paper's third approach, whose printed constants are
  rounded and do not give its own 70B parameters for 5.76e23 FLOPs; EPOCH is a
  later fit to the same runs, and does.

  Example:
    >>> round(Chinchilla().loss(70e9, 1.4e12), 3)
    1.937
    >>> f'{EPOCH.optimal(5.76e23).params:.0e}'
    '7e+10'

  References:
    Hoffmann et al. 2022, https://arxiv.org/abs/2203.15556, section 3.3 and
    appendix D.3. EPOCH: Besiroglu et al. 2024,
    https://arxiv.org/abs/2404.10102.
  """

  irreducible: float = 1.69
  A: float = 406.4
  B: float = 410.7
  alpha: float = 0.34
  beta: float = 0.28

  def loss(self, params: Any, tokens: Any) -> Any:
    """Nats per token."""
    of_params = self.A * params**-self.alpha
    return self.irreducible + of_params + self.B * tokens**-self.beta

  def optimal(self, flops: float) -> Allocation:
    """N and D of least loss with 6 N D = `flops` (equation 4)."""
    both = self.alpha + self.beta
    scale = (self.alpha * self.A / (self.beta * self.B)) ** (1 / both)
    params = scale * (flops / 6) ** (self.beta / both)
    tokens = flops / (6 * params)
    return Allocation(params, 1, tokens, self.loss(params, tokens))

  @classmethod
  def fit(cls, params: Any, tokens: Any, losses: Any) -> Chinchilla:
    """Huber loss (1e-3) of log loss, from a grid of starts, as the paper does.

    Arguments as of `Clark.fit`.
    """
    params, tokens, losses = _data(params, tokens, losses)

    def residuals(x):
      parts = [
        np.full(losses.shape, x[0]),
        x[1] - x[3] * np.log(params),
        x[2] - x[4] * np.log(tokens),
      ]
      return np.logaddexp.reduce(parts) - np.log(losses)

    starts = [
      np.array([e, a, a, alpha, alpha])
      for e in (-0.5, 0.5)
      for a in (5.0, 10.0)
      for alpha in (0.3, 0.6)
    ]
    x = _least_squares(residuals, starts, loss='huber', f_scale=1e-3)
    return cls(*map(float, (*np.exp(x[:3]), *x[3:])))


EPOCH = Chinchilla(1.8172, 482.01, 2085.43, 0.3478, 0.3658)


@dataclasses.dataclass(frozen=True)
class Clark:
  """Routed models of N parameters and E experts, trained on 130B tokens.

      log L = a log N + b log E' + c log N log E' + d
      1 / E' = 1 / (E - 1 + 1 / (1 / E_start - 1 / E_max)) + 1 / E_max

  in decimal logarithms: three laws in one. Without c (and E' = E) experts help
  alike at every size, the simple law; with c their help ends at N = 10^(-b/c),
  the bilinear law; with E_start and E_max it also begins late and saturates, at
  E' from E_start (E = 1) to E_max. N counts one expert per layer and no
  embeddings; every other block is sparse, and a token meets one expert.

  Example:
    >>> law = Clark(a=-0.08, b=-0.10, c=0.01, d=1.1)
    >>> f'{law.cutoff:.0e}'
    '1e+10'
    >>> bool(law.effective_params(1e9, 8) > 1e9)
    True

  References:
    Clark et al. 2022, https://arxiv.org/abs/2202.01169, equations 1, 2 and 7,
    section 4; `losses` has their data.
  """

  a: float
  b: float
  d: float
  c: float = 0.0
  E_start: float = 1.0
  E_max: float = math.inf

  def saturated(self, experts: Any) -> Any:
    """E' of E."""
    rest = 1 / (1 / self.E_start - 1 / self.E_max)
    return 1 / (1 / (experts - 1 + rest) + 1 / self.E_max)

  def loss(self, params: Any, experts: Any) -> Any:
    """Nats per token."""
    log_n, log_e = np.log10(params), np.log10(self.saturated(experts))
    return 10 ** (
      self.a * log_n + self.b * log_e + self.c * log_n * log_e + self.d
    )

  def effective_params(self, params: Any, experts: Any) -> Any:
    """N' of the model without routing that is as good: L(N', 1) = L(N, E)."""
    log_n, log_e = np.log10(params), np.log10(self.saturated(experts))
    log_start = math.log10(self.E_start)
    return 10 ** (
      (log_n * (self.a + self.c * log_e) + self.b * (log_e - log_start))
      / (self.a + self.c * log_start)
    )

  @property
  def cutoff(self) -> float:
    """The size from which on more experts do not help."""
    return 10 ** (-self.b / self.c) if self.c > 0 else math.inf

  def optimal(
    self, flops: float, experts: Sequence[int], dense: Chinchilla | Kaplan
  ) -> Allocation:
    """N, E and D of least loss with 6 N D = `flops`.

    Clark's law knows one number of tokens; here it says which dense model a
    routed one is worth, and `dense` what such a model reaches with D tokens. So
    it takes for granted that the worth does not change with D.

    Args:
      flops: of training, as of a dense model of N parameters.
      experts: numbers of experts to choose from.
      dense: the law of models without routing.
    """
    from scipy import optimize

    def best(E: int) -> Allocation:
      def loss(log_n):
        N = math.exp(log_n)
        return dense.loss(self.effective_params(N, E), flops / (6 * N))

      center = math.log(dense.optimal(flops).params)
      found = optimize.minimize_scalar(
        loss, bounds=(center - 10, center + 5), method='bounded'
      )
      N = math.exp(found.x)
      return Allocation(N, E, flops / (6 * N), float(found.fun))

    return min(map(best, experts), key=lambda allocation: allocation.loss)

  @classmethod
  def fit(
    cls, params: Any, experts: Any, losses: Any, form: str = 'saturating'
  ) -> Clark:
    """Least squares of log loss.

    Args:
      params, experts, losses: N, E and L of each run, of equal length; runs
        without routing have E = 1.
      form: 'simple', 'bilinear' or 'saturating'.

    Raises:
      ValueError: no such form, or runs of unequal number or fewer than
        coefficients.
    """
    if form not in FORMS:
      raise ValueError(f'form must be one of {", ".join(FORMS)}, not {form!r}.')
    params, experts, losses = _data(params, experts, losses)

    def law(x):
      a, b, d, c, log_start, log_rest = [*x, 0, 0, math.inf][:6]
      if form == 'simple':
        return cls(a, b, d)
      if form == 'bilinear':
        return cls(a, b, d, c)
      start = math.exp(log_start)  # Above 0, and E_max above it.
      return cls(a, b, d, c, start, start + math.exp(log_rest))

    def residuals(x):
      return np.log10(law(x).loss(params, experts) / losses)

    start = {
      'simple': [-0.08, -0.05, 1.1],
      'bilinear': [-0.08, -0.1, 1.1, 0.01],
      'saturating': [-0.08, -0.1, 1.1, 0.01, math.log(2), math.log(300)],
    }[form]
    fitted = law(_least_squares(residuals, [np.array(start)]))
    return cls(*map(float, dataclasses.astuple(fitted)))


def losses(router: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """N, E and final validation losses of Clark et al.'s runs with a router.

  As in their fit: every other block sparse, one expert a token, seed 42, and
  the dense runs as E = 1. `LOSSES` has all 223 runs.

  Args:
    router: 'S-Base', 'RL-R' or 'Hash'.

  Raises:
    ValueError: no such router.
  """
  with LOSSES.open() as file:
    lines = (line for line in file if not line.startswith('#'))
    rows = list(csv.DictReader(lines))
  routers = sorted({row['router'] for row in rows} - {'Dense'})
  if router not in routers:
    raise ValueError(
      f'router must be one of {", ".join(routers)}, not {router!r}.'
    )
  design = {'routing_frequency': '0.5', 'k': '1', 'seed': '42'}
  chosen = [
    row
    for row in rows
    if row['router'] in ('Dense', router)
    and all(row[name] == value for name, value in design.items())
  ]
  params, experts, losses = (
    np.array([kind(row[name]) for row in chosen], float)
    for name, kind in (('dense_params', int), ('experts', int), ('loss', float))
  )
  return params, experts, losses


def _data(*columns: Any) -> list[np.ndarray]:
  arrays = [np.asarray(column, float) for column in columns]
  shapes = {array.shape for array in arrays}
  if len(shapes) > 1 or arrays[0].ndim != 1 or arrays[0].size < 6:
    raise ValueError(
      'a fit needs one row of numbers for each quantity, of equal length and '
      f'of at least 6 runs; their shapes are {[a.shape for a in arrays]}.'
    )
  return arrays


def _least_squares(
  residuals: Callable[[np.ndarray], np.ndarray],
  starts: Sequence[np.ndarray],
  **options,
) -> np.ndarray:
  """The best of the minima found from several starts."""
  from scipy import optimize

  tight = {'ftol': 1e-12, 'xtol': 1e-12, 'gtol': 1e-12, 'max_nfev': 5000}
  with np.errstate(all='ignore'):  # It tries steps that overflow, and recovers.
    found = [
      optimize.least_squares(residuals, x, x_scale='jac', **tight, **options)
      for x in starts
    ]
  return min(found, key=lambda result: result.cost).x
