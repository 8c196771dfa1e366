"""Dense-to-sparse gate: from all experts to few, as a temperature falls."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.scipy.special import entr

from sparse_experts.letters import Array
from sparse_experts.moe import losses
from sparse_experts.moe.assignment import Assignment
from sparse_experts.moe.outputs import Aux
from sparse_experts.moe.router import KERNEL_INIT, Router
from sparse_experts.numbers import Count, Positive

DECAYS = ('exponential', 'linear')
GATES = ('gumbel', 'softmax')


class DenseToSparse(Router):
  """DTS gate: in training a token goes to every expert of weight > threshold.

      weight = softmax((x W + Gumbel noise) / temperature)

  and always to that of the largest weight. While the temperature is high the
  weights are even and the gate is dense; it falls with the training step. In
  evaluation there is no noise and, as in the authors' code, a token goes to one
  expert, or with `sparse_eval=False` to those above the threshold.

  Early in training a token has up to E experts: a capacity has to allow for
  them, and None, which drops nothing as the authors do, costs what it then
  needs anyway.

  Attributes:
    max_temperature, min_temperature: the first and the last.
    decay: how it falls between them: 'exponential' or 'linear' in the step.
    decay_steps: training steps that takes.
    hard_from: training step from which a token goes to one expert only; None:
      never.
    threshold: the authors' code has 0.001.
    gates: a choice's gate is its weight, 'gumbel' (the paper; the code with
      use_gumbel_gates), or softmax(x W), 'softmax' (the code without). Nothing
      is renormalised over the chosen.
    noise: Gumbel noise in training; without it the weights are those of the
      temperature alone.
    sparse_eval: one expert in evaluation.
    kernel_init: initialiser of W, [D, E].

  Example:
    >>> router = DenseToSparse(num_experts=4, noise=False)
    >>> x_GxSxD = jax.random.normal(jax.random.key(0), (2, 16, 8))
    >>> variables = router.init(jax.random.key(1), x_GxSxD)
    >>> assignment, aux = router.apply(
    ...   variables, x_GxSxD, deterministic=False, step=jnp.int32(0)
    ... )
    >>> assignment.chosen().all()
    Array(True, dtype=bool)

  References:
    Nie et al. 2021 (EvoMoE), https://arxiv.org/abs/2112.14397, the
    gate-sparsify phase, and their code, fairseq/modules/moe/topkgate.py and
    fairseq_cli/train.py.
  """

  max_temperature: Positive = 1.0
  min_temperature: Positive = 0.5
  decay: str = 'exponential'
  decay_steps: Count = 10_000
  hard_from: int | None = None
  threshold: float = 1e-3
  gates: str = 'gumbel'
  noise: bool = True
  sparse_eval: bool = True
  kernel_init: nn.initializers.Initializer = KERNEL_INIT

  is_causal = True
  drops = True

  @property
  def needs(self) -> tuple[str, ...]:
    return ('step', 'rng') if self.noise else ('step',)

  @nn.compact
  def __call__(
    self,
    x_GxSxD: Array,
    *,
    mask_GxS: Array | None = None,
    deterministic: bool = True,
    step: Array | None = None,
  ) -> tuple[Assignment, Aux]:
    """Routes tokens x [G, S, D]; masked tokens get no expert.

    Args:
      x_GxSxD: tokens.
      mask_GxS: False for padding.
      deterministic: evaluation.
      step: training step, int32 scalar; None in evaluation is the schedule's
        end.
    """
    if step is None and not deterministic:
      raise ValueError(
        "DenseToSparse's temperature is a function of the training step: pass "
        'step in training.'
      )
    logits_GxSxE = self.logits(x_GxSxD, kernel_init=self.kernel_init)
    noisy_GxSxE = logits_GxSxE
    if self.noise and not deterministic:
      noisy_GxSxE += jax.random.gumbel(
        self.make_rng('dropout'), logits_GxSxE.shape
      )
    if deterministic:
      only_first = jnp.bool_(self.sparse_eval)
    elif self.hard_from is None:
      only_first = jnp.bool_(False)
    else:
      only_first = step >= self.hard_from
    return above_threshold(
      logits_GxSxE,
      noisy_GxSxE,
      temperature=self.temperature(step),
      only_first=only_first,
      threshold=self.threshold,
      gates=self.gates,
      mask_GxS=mask_GxS,
    )

  def temperature(self, step: Array | None) -> Array:
    """Of a training step, float32; None: the last.

    Raises:
      ValueError: the schedule is out of range.
    """
    high, low = self.max_temperature, self.min_temperature
    if not 0 < low <= high or self.decay_steps < 1:
      raise ValueError(
        'temperatures fall from max_temperature to min_temperature above 0 in '
        f'decay_steps >= 1, got {high}, {low} and {self.decay_steps}.'
      )
    if self.decay not in DECAYS:
      raise ValueError(
        f'decay must be one of {", ".join(DECAYS)}, not {self.decay!r}.'
      )
    if step is None:
      return jnp.float32(low)
    done = jnp.minimum(step / jnp.float32(self.decay_steps), 1)
    if self.decay == 'linear':
      return high - (high - low) * done
    return high * (low / high) ** done


def above_threshold(
  logits_GxSxE: Array,
  noisy_GxSxE: Array,
  *,
  temperature: Array | float,
  only_first: Array | bool = False,
  threshold: float = 1e-3,
  gates: str = 'gumbel',
  mask_GxS: Array | None = None,
) -> tuple[Assignment, Aux]:
  """The dense-to-sparse gate on given logits.

  Args:
    logits_GxSxE: float32, x W.
    noisy_GxSxE: the same with noise, if any.
    temperature: weights are softmax(noisy / temperature).
    only_first: boolean scalar: take the largest weight alone.
    threshold: take every weight above it, and the largest.
    gates: 'gumbel' or 'softmax', see `DenseToSparse`.
    mask_GxS: False for padding.

  Returns:
    Assignment with K = E: column e is expert e where it is taken. Lines are in
    token order. Aux with the loss `load_balance`, E sum_e f_e P_e over
    unmasked tokens, where f_e is the fraction of tokens that took expert e and
    P_e, as in the authors' code, the mean of its *taken* gates; and metrics
    `entropy` and `confidence` of the weights.

  Raises:
    ValueError: `gates` is unknown.

  Example:
    >>> logits = jnp.log(jnp.array([[[.7, .2, .1], [.4, .3, .3]]]))
    >>> assignment, _ = above_threshold(
    ...   logits, logits, temperature=1., threshold=.25
    ... )
    >>> assignment.expert_GxSxK.tolist()  # 3 is no choice.
    [[[0, 3, 3], [0, 1, 2]]]
  """
  if gates not in GATES:
    raise ValueError(f'gates must be one of {", ".join(GATES)}, not {gates!r}.')
  E = logits_GxSxE.shape[-1]
  if mask_GxS is None:
    mask_GxS = jnp.ones(logits_GxSxE.shape[:2], bool)
  real_GxSx1 = mask_GxS[..., None]
  logits_GxSxE = jnp.where(real_GxSx1, logits_GxSxE, 0)
  noisy_GxSxE = jnp.where(real_GxSx1, noisy_GxSxE, 0)
  weight_GxSxE = jax.nn.softmax(noisy_GxSxE / temperature)
  first_GxSxE = jax.nn.one_hot(jnp.argmax(noisy_GxSxE, -1), E, dtype=bool)
  above_GxSxE = (weight_GxSxE > threshold) & ~jnp.asarray(only_first)
  taken_GxSxE = (first_GxSxE | above_GxSxE) & real_GxSx1
  gate_GxSxE = (
    weight_GxSxE if gates == 'gumbel' else jax.nn.softmax(logits_GxSxE)
  )
  gate_GxSxE = jnp.where(taken_GxSxE, gate_GxSxE, 0)
  took_GxSxE = taken_GxSxE.astype(jnp.int32)
  # As `positions` with priority 'token', for which a token's own choices do not
  # meet: they are of different experts.
  before_GxSxE = jnp.cumsum(took_GxSxE, axis=1) - took_GxSxE
  experts_1x1xE = jnp.arange(E, dtype=jnp.int32)[None, None]
  weight_GxSxE = jax.lax.stop_gradient(weight_GxSxE)
  balance = losses.Balance.of(
    gate_GxSxE, taken_GxSxE.astype(jnp.float32), mask_GxS
  )
  return Assignment(
    expert_GxSxK=jnp.where(taken_GxSxE, experts_1x1xE, E),
    gate_GxSxK=gate_GxSxE,
    position_GxSxK=jnp.where(taken_GxSxE, before_GxSxE, 0),
    num_experts=E,
  ), Aux(
    losses={'load_balance': balance.loss()},
    metrics={
      'entropy': (entr(weight_GxSxE).sum(-1) * mask_GxS).sum(),
      'confidence': (weight_GxSxE.max(-1) * mask_GxS).sum(),
    },
    logits=noisy_GxSxE / temperature,
    log_z=jax.nn.logsumexp(logits_GxSxE, -1),
    tokens=balance.tokens_G.sum(),
    balance=balance,
  )
