"""S-BASE: the experts of a nearly balanced transport plan.

BASE layers with the linear assignment relaxed to optimal transport with an
entropy, which Sinkhorn's algorithm solves by normalising rows and columns.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.scipy.special import entr, logsumexp

from sparse_experts.letters import Array
from sparse_experts.moe.assignment import Assignment, largest, positions
from sparse_experts.moe.outputs import Aux
from sparse_experts.moe.router import KERNEL_INIT, Router
from sparse_experts.numbers import Count


class Sinkhorn(Router):
  """Learned router: logits L = x W in float32.

  In training a token goes to the k experts of the largest entries of the plan
  `log_plan(L)`; in evaluation to those of the largest logits, as nothing then
  needs balance. The gate is a probability of L alone and the only path of the
  gradient. There is no auxiliary loss. Choices of the plan are balanced nearly,
  not exactly: capacity can drop some.

  Attributes:
    k: experts of a token (1 in the paper's main runs; 2 and 4 in others).
    gates: 'softmax' over experts, or 'sigmoid' of the expert's own logit, as in
      BASE layers.
    iterations: of Sinkhorn's algorithm.
    kernel_init: initialiser of W, [D, E].

  Example:
    >>> router = Sinkhorn(num_experts=4)
    >>> x_GxSxD = jax.random.normal(jax.random.key(0), (2, 16, 8))
    >>> variables = router.init(jax.random.key(1), x_GxSxD)
    >>> assignment, aux = router.apply(variables, x_GxSxD, deterministic=False)
    >>> assignment.expert_GxSxK.shape
    (2, 16, 1)

  References:
    Clark et al. 2022, https://arxiv.org/abs/2202.01169, appendix B.2.1.
  """

  gates: str = 'softmax'
  iterations: Count = 50
  kernel_init: nn.initializers.Initializer = KERNEL_INIT

  is_causal = False
  drops = True

  @nn.compact
  def __call__(
    self,
    x_GxSxD: Array,
    *,
    mask_GxS: Array | None = None,
    deterministic: bool = True,
  ) -> tuple[Assignment, Aux]:
    """Routes tokens x [G, S, D]; masked tokens get no expert."""
    E = self.num_experts
    self.check_k()
    if self.gates not in ('softmax', 'sigmoid'):
      raise ValueError(f"gates is 'softmax' or 'sigmoid', not {self.gates!r}.")
    logits_GxSxE = self.logits(x_GxSxD, kernel_init=self.kernel_init)
    if mask_GxS is None:
      mask_GxS = jnp.ones(x_GxSxD.shape[:2], bool)
    real_GxSx1 = mask_GxS[..., None]
    logits_GxSxE = jnp.where(real_GxSx1, logits_GxSxE, 0)
    scores_GxSxE = jax.lax.stop_gradient(logits_GxSxE)
    if not deterministic:
      scores_GxSxE = log_plan(
        scores_GxSxE, mask_GxS=mask_GxS, iterations=self.iterations
      )
    expert_GxSxK = largest(scores_GxSxE, self.k)
    probs_GxSxE = jax.nn.softmax(logits_GxSxE)
    gates_GxSxE = probs_GxSxE
    if self.gates == 'sigmoid':
      gates_GxSxE = jax.nn.sigmoid(logits_GxSxE)
    onehot_GxSxKxE = jax.nn.one_hot(expert_GxSxK, E)
    gate_GxSxK = (onehot_GxSxKxE * gates_GxSxE[:, :, None]).sum(-1)
    expert_GxSxK = jnp.where(real_GxSx1, expert_GxSxK, E)
    probs_GxSxE = jax.lax.stop_gradient(probs_GxSxE)
    return Assignment(
      expert_GxSxK=expert_GxSxK,
      gate_GxSxK=jnp.where(real_GxSx1, gate_GxSxK, 0),
      position_GxSxK=positions(expert_GxSxK, E),
      num_experts=E,
    ), Aux(
      losses={},
      metrics={
        'entropy': (entr(probs_GxSxE).sum(-1) * mask_GxS).sum(),
        'confidence': (probs_GxSxE.max(-1) * mask_GxS).sum(),
      },
      logits=logits_GxSxE,
      log_z=jax.nn.logsumexp(logits_GxSxE, -1),
    )


def log_plan(
  logits_GxSxE: Array,
  *,
  mask_GxS: Array | None = None,
  iterations: Count = 50,
) -> Array:
  """Log of the plan Pi that maximises <Pi, logits> + H(Pi), [G, S, E].

  Of T unmasked tokens in a group each weighs 1 / T and each expert 1 / E. After
  a finite number of iterations the tokens' sums are exact, the experts' close.

  Args:
    logits_GxSxE: float32; -inf counts as -1e9.
    mask_GxS: False for tokens that take no part; -inf in the result.
    iterations: times that columns, then rows, are normalised.

  Example:
    >>> logits_GxSxE = jnp.array([[[4., 0.], [3., 0.], [2., 0.], [1., 0.]]])
    >>> plan_GxSxE = jnp.exp(log_plan(logits_GxSxE))
    >>> jnp.round(plan_GxSxE.sum((0, 1)), 3).tolist()  # Experts.
    [0.5, 0.5]
    >>> plan_GxSxE.argmax(-1).tolist()
    [[0, 0, 1, 1]]

  References:
    Clark et al. 2022, appendix B.2.1; Cuturi 2013,
    https://arxiv.org/abs/1306.0895, here in logarithms.
  """
  E = logits_GxSxE.shape[-1]
  if mask_GxS is None:
    mask_GxS = jnp.ones(logits_GxSxE.shape[:2], bool)
  tokens_Gx1x1 = mask_GxS.sum(1)[:, None, None]
  log_tokens_Gx1x1 = jnp.log(jnp.maximum(tokens_Gx1x1, 1).astype(jnp.float32))
  # Finite, for differences of infinities are NaN.
  logits_GxSxE = jnp.clip(logits_GxSxE, -1e9, 1e9)
  real_GxSx1 = mask_GxS[..., None]

  def rows(expert_Gx1xE):
    return jax.nn.log_softmax(logits_GxSxE + expert_Gx1xE) - log_tokens_Gx1x1

  def normalise(_, expert_Gx1xE):
    # Not -inf for padding, in case there is nothing else.
    plan_GxSxE = jnp.where(real_GxSx1, rows(expert_Gx1xE), -1e30)
    sum_Gx1xE = logsumexp(plan_GxSxE, axis=1, keepdims=True)
    return expert_Gx1xE - jnp.log(E) - sum_Gx1xE

  expert_Gx1xE = jax.lax.fori_loop(
    0, iterations, normalise, jnp.zeros_like(logits_GxSxE[:, :1])
  )
  log_plan_GxSxE = rows(expert_Gx1xE)
  return jnp.where(real_GxSx1, log_plan_GxSxE, -jnp.inf)
