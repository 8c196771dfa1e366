"""A policy over experts that learns from reward: what its routers share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparse_experts import sharding
from sparse_experts.letters import Array
from sparse_experts.moe.assignment import Assignment, largest, ungated
from sparse_experts.moe.outputs import Aux
from sparse_experts.moe.router import KERNEL_INIT, Router


class Policy(Router):
  """A policy softmax(x W) over experts, rewarded with log p(target).

  In training the expert is drawn from the policy, otherwise it is the most
  probable one. Its output is not scaled by the probability (gate 1), so the
  router learns from reward alone: `models.policy_gradient.losses` makes
  'policy' and 'value' of the decisions returned here. A linear head on the
  tokens, whose gradient stops there, predicts the reward as a baseline.

  Attributes:
    kernel_init: initialiser of W, [D, E].
  """

  kernel_init: nn.initializers.Initializer = KERNEL_INIT

  needs = ('rng',)

  @nn.compact
  def __call__(
    self,
    x_GxSxD: Array,
    *,
    mask_GxS: Array | None = None,
    deterministic: bool = True,
  ) -> tuple[Assignment, Aux]:
    """Routes tokens x [G, S, D]; masked tokens get no expert."""
    check_one_choice(self)
    logits_GxSxE = self.logits(x_GxSxD, kernel_init=self.kernel_init)
    if mask_GxS is not None:  # Whatever padding holds, NaN too, stays there.
      logits_GxSxE = jnp.where(mask_GxS[..., None], logits_GxSxE, 0)
    rng = None if deterministic else self.make_rng('dropout')
    assignment, log_prob_GxS, metrics = act(logits_GxSxE, mask_GxS, rng)
    value_GxSx1 = predict_reward(self, x_GxSxD, mask_GxS, 1)
    gain_GxS, pain_GxS = self.surrogates(log_prob_GxS)
    aux = Aux(
      losses={},
      metrics=metrics,
      logits=logits_GxSxE,
      log_z=jax.nn.logsumexp(logits_GxSxE, -1),
      decisions={
        'value': value_GxSx1[..., 0],
        'gain': gain_GxS,
        'pain': pain_GxS,
      },
    )
    return assignment, self.with_losses(aux, assignment, logits_GxSxE, mask_GxS)

  def with_losses(
    self,
    aux: Aux,
    assignment: Assignment,
    logits_GxSxE: Array,
    mask_GxS: Array | None,
  ) -> Aux:
    """The Aux with losses of the policy's own, of which there may be none.

    Args:
      aux: of the decisions.
      assignment: of tokens to the experts that were drawn.
      logits_GxSxE: of the policy, float32.
      mask_GxS: tokens that count; None: all.
    """
    del assignment, logits_GxSxE, mask_GxS
    return aux

  def surrogates(self, log_prob_GxS: Array) -> tuple[Array, Array]:
    """Gain and pain of decisions, see `models.policy_gradient`."""
    raise NotImplementedError


def act(
  logits_GxSxE: Array, mask_GxS: Array | None = None, rng: Array | None = None
) -> tuple[Assignment, Array, dict[str, Array]]:
  """One expert of the policy softmax(logits) for each token, with gate 1.

  Args:
    logits_GxSxE: float32.
    mask_GxS: False for padding, which gets no expert.
    rng: draws the expert; None takes the most probable.

  Returns:
    The assignment; log pi(expert) [G, S], 0 where there is none; the metrics
    `entropy` and `confidence` (probability of the chosen), sums over tokens.
  """
  num_experts = logits_GxSxE.shape[-1]
  if mask_GxS is not None:
    logits_GxSxE = jnp.where(mask_GxS[..., None], logits_GxSxE, 0)
  if rng is None:
    expert_GxSx1 = largest(logits_GxSxE, 1)
  else:
    expert_GxSx1 = jax.random.categorical(rng, logits_GxSxE)[..., None]
  assignment = ungated(expert_GxSx1.astype(jnp.int32), num_experts, mask_GxS)
  chosen_GxSxE = jax.nn.one_hot(
    assignment.expert_GxSxK[..., 0], num_experts, dtype=bool
  )
  log_prob_GxS = jnp.where(
    chosen_GxSxE, jax.nn.log_softmax(logits_GxSxE), 0
  ).sum(-1)
  real_GxS = assignment.chosen()[..., 0]
  constant = jax.lax.stop_gradient
  metrics = {
    'entropy': (constant(entropy(logits_GxSxE)) * real_GxS).sum(),
    'confidence': (jnp.exp(constant(log_prob_GxS)) * real_GxS).sum(),
  }
  return assignment, log_prob_GxS, metrics


def entropy(logits_GxSxE: Array) -> Array:
  """Of softmax(logits) in nats, [G, S]; with a gradient where p is 0 too."""
  log_probs_GxSxE = jax.nn.log_softmax(logits_GxSxE)
  probs_GxSxE = jnp.exp(log_probs_GxSxE)
  # 0 * -inf, of an expert ruled out, is to be 0.
  log_probs_GxSxE = jnp.where(probs_GxSxE > 0, log_probs_GxSxE, 0)
  return -(probs_GxSxE * log_probs_GxSxE).sum(-1)


def predict_reward(
  router: Router,
  x_GxSxD: Array,
  mask_GxS: Array | None,
  width: int | None = None,
) -> Array:
  """x V + b, float32 [G, S, width or E]; call it inside a compact method.

  It starts at 0, and no gradient reaches x: what predicts the reward is not to
  shape what earns it.

  Args:
    router: whose parameters `value_kernel` and `value_bias` it makes.
    x_GxSxD: tokens.
    mask_GxS: False for padding, whose value is 0; None: there is none.
    width: values of a token; None: E, one for each expert.
  """
  values = router.logits(
    jax.lax.stop_gradient(x_GxSxD),
    width=width,
    kernel_init=nn.initializers.zeros,
    name='value_kernel',
  )
  bias = router.param(
    'value_bias',
    sharding.named(
      nn.initializers.zeros, 'router' if width is None else 'router_width'
    ),
    (width or router.num_experts,),
    jnp.float32,
  )
  values += bias[None, None]
  if mask_GxS is not None:
    values = jnp.where(mask_GxS[..., None], values, 0)
  return values


def check_one_choice(router: Router) -> None:
  """Raises ValueError unless k is 1."""
  if router.k != 1:
    raise ValueError(
      f'{type(router).__name__} decides for one expert a token, so that its '
      f'reward is for that decision: k must be 1, got {router.k}.'
    )
