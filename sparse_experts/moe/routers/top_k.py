"""Each token chooses its k most probable experts.

Switch (k = 1), GShard, ST-MoE and Mesh TensorFlow (k = 2, n), V-MoE without
its losses: they differ in the arguments below, which every recipe states.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.scipy.special import entr

from sparse_experts.letters import Array
from sparse_experts.moe import losses
from sparse_experts.moe.assignment import (
  Assignment,
  is_causal,
  largest,
  positions,
)
from sparse_experts.moe.outputs import Aux
from sparse_experts.moe.router import KERNEL_INIT, Router
from sparse_experts.numbers import Rate


class TopK(Router):
  """Learned router: softmax(x W) in float32, then `route`.

  Attributes:
    gates, choose_by: see `route`.
    policy_train, policy_eval: which choices after the first are taken, in
      training and otherwise; see `route`. 'random' draws from the rng stream
      'dropout'.
    threshold: of those policies.
    priority: who is served first, see `route`; 'random' is in training, and
      'choice' in evaluation, which draws nothing.
    balance_counts: 'first' or 'all', see `route`.
    losses_over: 'tokens' or 'positions', see `route`.
    jitter: see `Router.logits`; in training only. Switch's code uses 1e-2 (its
      paper's Figure 15 adds the noise to the logits; this follows the code).
    noise: in training, Gaussian noise of standard deviation noise / E is added
      to the logits (Riquelme et al. 2021, section 2.1, noise = 1).
    kernel_init: initialiser of W, [D, E].

  Example:
    >>> router = TopK(num_experts=4, k=1)
    >>> x_GxSxD = jax.random.normal(jax.random.key(0), (2, 16, 8))
    >>> variables = router.init(jax.random.key(1), x_GxSxD)
    >>> assignment, aux = router.apply(variables, x_GxSxD)
    >>> assignment.expert_GxSxK.shape
    (2, 16, 1)

  References:
    Shazeer et al. 2017, https://arxiv.org/abs/1701.06538.
    Lepikhin et al. 2020 (GShard), https://arxiv.org/abs/2006.16668.
    Fedus et al. 2021 (Switch), https://arxiv.org/abs/2101.03961.
    Zoph et al. 2022 (ST-MoE), https://arxiv.org/abs/2202.08906.
  """

  gates: str = 'all'
  choose_by: str = 'logits'
  policy_train: str = 'all'
  policy_eval: str = 'all'
  threshold: float = 0.2
  priority: str = 'choice'
  balance_counts: str = 'first'
  losses_over: str = 'tokens'
  jitter: Rate = 0.0
  noise: float = 0.0
  kernel_init: nn.initializers.Initializer = KERNEL_INIT

  @property
  def needs(self) -> tuple[str, ...]:
    policies = (self.policy_train, self.policy_eval) if self.k > 1 else ()
    draws = 'random' in (self.priority, *policies)
    return ('rng',) if self.jitter or self.noise or draws else ()

  @property
  def is_causal(self) -> bool:
    """No token's fate depends on a later token of its group."""
    return is_causal(self.priority, self.k)

  @nn.compact
  def __call__(
    self,
    x_GxSxD: Array,
    *,
    mask_GxS: Array | None = None,
    deterministic: bool = True,
  ) -> tuple[Assignment, Aux]:
    """Routes tokens x [G, S, D]; masked tokens get no expert."""
    self.check_gradient(
      self.gates == 'chosen' and self.k == 1, "gates='chosen' of k=1 choice"
    )
    logits_GxSxE = self.logits(
      x_GxSxD,
      kernel_init=self.kernel_init,
      jitter=0.0 if deterministic else self.jitter,
    )
    noise_GxSxE = None
    if self.noise and not deterministic:
      noise_GxSxE = (self.noise / self.num_experts) * jax.random.normal(
        self.make_rng('dropout'), logits_GxSxE.shape
      )
    policy = self.policy_eval if deterministic else self.policy_train
    priority = self.priority
    if deterministic and priority == 'random':
      priority = 'choice'
    draws = priority == 'random' or (policy == 'random' and self.k > 1)
    return route(
      logits_GxSxE,
      noise_GxSxE=noise_GxSxE,
      k=self.k,
      mask_GxS=mask_GxS,
      gates=self.gates,
      choose_by=self.choose_by,
      policy=policy,
      threshold=self.threshold,
      priority=priority,
      balance_counts=self.balance_counts,
      losses_over=self.losses_over,
      rng=self.make_rng('dropout') if draws else None,
    )


def route(
  logits_GxSxE: Array,
  *,
  noise_GxSxE: Array | None = None,
  k: int = 1,
  mask_GxS: Array | None = None,
  gates: str = 'all',
  choose_by: str = 'logits',
  policy: str = 'all',
  threshold: float = 0.2,
  priority: str = 'choice',
  balance_counts: str = 'first',
  losses_over: str = 'tokens',
  rng: Array | None = None,
) -> tuple[Assignment, Aux]:
  """Top-k routing of given logits.

  Args:
    logits_GxSxE: float32 router logits.
    noise_GxSxE: added to them, for all but the z-loss; None for none.
    k: choices per token, 1 <= k <= E; ties go to the lower expert index.
    mask_GxS: boolean, False for padding, which gets no expert and no position.
    gates: softmax over 'all' experts, p_e (Switch, V-MoE), or over the 'chosen'
      ones, p_e / sum of the k chosen p (GShard, ST-MoE, Mixtral). "Softmax
      after top-k" is 'chosen'; with k = 1 it leaves the router no gradient.
    choose_by: the k largest 'logits' (Tensor2Tensor, DeepSpeed's second choice,
      Mixtral), or the k largest 'probs', as other sources have it. They differ
      where float32 rounds probabilities to equal ones: of logits [200, 0, 90]
      the second choice is expert 2 by 'logits', and 1, the first of two
      zeros, by 'probs'.
    policy: which choices after the first are taken: 'all'; 'none'; 'threshold':
      those with gate > threshold; 'random': with probability
      min(1, gate / threshold). GShard's `2 g2 > rnd` (Algorithm 1) is 'random'
      with threshold 0.5; Mesh TF and ST-MoE (appendix G) use 0.2. Choices not
      taken keep their share of the gates: nothing is renormalised for them.
    threshold: of `policy`, a gate.
    priority: see `assignment.positions`; or 'random': first choices before
      second, tokens in an order drawn anew (DeepSpeed's Random Token Selection,
      `use_rts`). Not causal.
    balance_counts: choices that count in f of the load-balancing loss: the
      'first' (Switch, GShard, Mesh TF) or 'all' k (flaxformer).
    losses_over: f, P and z are averaged over the unmasked 'tokens', and groups
      weigh by them, or over all 'positions', where masked ones count as zeros
      and all groups weigh alike (Mesh TF's f and P, flaxformer).
    rng: key, needed by policy and priority 'random'.

  Returns:
    Assignment and Aux with losses `load_balance` and `router_z` (of logits
    without noise) and metrics `entropy` and `confidence` (sums over tokens,
    nats and probability).

  Raises:
    ValueError: an argument is out of its range.

  Example:
    >>> logits_GxSxE = jnp.log(jnp.array([[[.1, .6, .3], [.8, .1, .1]]]))
    >>> assignment, aux = route(logits_GxSxE, k=2, gates='chosen')
    >>> assignment.expert_GxSxK[0].tolist()
    [[1, 2], [0, 1]]
  """
  num_experts = logits_GxSxE.shape[-1]
  if not 1 <= k <= num_experts:
    raise ValueError(f'k must be from 1 to num_experts={num_experts}, got {k}.')
  _check('gates', gates, ('all', 'chosen'))
  _check('choose_by', choose_by, ('logits', 'probs'))
  _check('policy', policy, ('all', 'none', 'threshold', 'random'))
  _check('balance_counts', balance_counts, ('first', 'all'))
  _check('losses_over', losses_over, ('tokens', 'positions'))
  if rng is None:
    if policy == 'random' and k > 1:
      raise ValueError("policy='random' draws numbers: pass rng.")
    if priority == 'random':
      raise ValueError("priority='random' draws numbers: pass rng.")

  if mask_GxS is not None:  # Whatever padding holds, NaN too, stays there.
    logits_GxSxE = jnp.where(mask_GxS[..., None], logits_GxSxE, 0)
  noisy_GxSxE = logits_GxSxE
  if noise_GxSxE is not None:
    noisy_GxSxE += noise_GxSxE
    if mask_GxS is not None:
      noisy_GxSxE = jnp.where(mask_GxS[..., None], noisy_GxSxE, 0)
  probs_GxSxE = jax.nn.softmax(noisy_GxSxE)
  ranked_by_GxSxE = noisy_GxSxE if choose_by == 'logits' else probs_GxSxE
  expert_GxSxK = largest(jax.lax.stop_gradient(ranked_by_GxSxE), k)
  onehot_GxSxKxE = jax.nn.one_hot(expert_GxSxK, num_experts)
  # One-hot rather than a lookup: the gradient is no scatter-add.
  gate_GxSxK = (onehot_GxSxKxE * probs_GxSxE[:, :, None]).sum(-1)
  confidence_GxS = gate_GxSxK[..., 0]
  counted_GxSxE = (
    onehot_GxSxKxE[:, :, 0]
    if balance_counts == 'first'
    else onehot_GxSxKxE.sum(2)
  )
  if gates == 'chosen':
    gate_GxSxK /= gate_GxSxK.sum(-1, keepdims=True)

  taken_GxSxK = _taken(gate_GxSxK, policy, threshold, rng)
  if mask_GxS is not None:
    taken_GxSxK &= mask_GxS[..., None]
    counted_GxSxE *= mask_GxS[..., None]
  expert_GxSxK = jnp.where(taken_GxSxK, expert_GxSxK, num_experts)
  precedence_GxS = confidence_GxS
  if priority == 'random':
    priority = 'confidence'
    precedence_GxS = jax.random.uniform(
      jax.random.fold_in(rng, 1), confidence_GxS.shape
    )
  assignment = Assignment(
    expert_GxSxK=expert_GxSxK,
    gate_GxSxK=jnp.where(taken_GxSxK, gate_GxSxK, 0),
    position_GxSxK=positions(
      expert_GxSxK,
      num_experts,
      priority=priority,
      confidence_GxS=precedence_GxS,
    ),
    num_experts=num_experts,
  )

  real_GxS = (
    jnp.ones(confidence_GxS.shape, bool) if mask_GxS is None else mask_GxS
  )
  # What is averaged over. A masked position's scores are zeros; its logits,
  # too, so over positions it adds (log E)^2, as it does in flaxformer.
  over_GxS, tokens = None, None
  if losses_over == 'tokens':
    over_GxS, tokens = real_GxS, real_GxS.sum().astype(jnp.float32)
  balance = losses.Balance.of(
    probs_GxSxE * real_GxS[..., None], counted_GxSxE, over_GxS
  )
  log_z_GxS = jax.nn.logsumexp(logits_GxSxE, -1)
  # -p log p, 0 at p = 0, where its slope is infinite: no gradient enters.
  entropy_GxS = entr(jax.lax.stop_gradient(probs_GxSxE)).sum(-1)
  return assignment, Aux(
    losses={
      'load_balance': balance.loss(),
      'router_z': losses.router_z(log_z_GxS, over_GxS),
    },
    metrics={
      'entropy': (entropy_GxS * real_GxS).sum(),
      'confidence': (confidence_GxS * real_GxS).sum(),
    },
    logits=noisy_GxSxE,
    log_z=log_z_GxS,
    tokens=tokens,
    balance=balance,
  )


def _taken(
  gate_GxSxK: Array, policy: str, threshold: float, rng: Array | None
) -> Array:
  """Which choices are taken, boolean [G, S, K]; the first always is."""
  if policy == 'all' or gate_GxSxK.shape[-1] == 1:
    return jnp.ones(gate_GxSxK.shape, bool)
  if policy == 'none':
    later_GxSxK = jnp.zeros(gate_GxSxK.shape, bool)
  elif policy == 'threshold':
    later_GxSxK = gate_GxSxK > threshold
  else:
    draw_GxSxK = jax.random.uniform(rng, gate_GxSxK.shape)
    later_GxSxK = gate_GxSxK > draw_GxSxK * threshold
  return later_GxSxK.at[..., 0].set(True)


def _check(name: str, value: str, known: tuple[str, ...]) -> None:
  if value not in known:
    raise ValueError(
      f'{name} must be one of {", ".join(known)}, not {value!r}.'
    )
