"""Task-level gating: a learned choice of experts for each task."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparse_experts import sharding
from sparse_experts.letters import Array
from sparse_experts.moe.assignment import Assignment
from sparse_experts.moe.outputs import Aux
from sparse_experts.moe.router import KERNEL_INIT, Router
from sparse_experts.moe.routers.top_k import route
from sparse_experts.numbers import Count


class TaskGating(Router):
  """TOP_k(softmax(t W)) with a learned embedding t of the token's task.

  All tokens of a task (a language, a domain) choose the same experts, so the
  experts of one task can be taken out and served without the others. A row of
  one task fills the lines of k experts: there, only a capacity factor of None
  (or E / k) drops nothing.

  Losses: load_balance and router_z over all tokens of the batch or microbatch,
  for a group may hold one task only, and that alone has no balance.

  Attributes:
    num_tasks: Y. A token whose task id is not below it meets no expert.
    gates: softmax over 'all' experts or the 'chosen' ones, see `top_k.route`.
    embedding_init: initialiser of the task embeddings, [Y, D].
    kernel_init: initialiser of W, [D, E].

  Example:
    >>> router = TaskGating(num_experts=4, num_tasks=3)
    >>> x_GxSxD, tasks_GxS = jnp.ones((1, 3, 8)), jnp.array([[0, 2, 0]])
    >>> variables = router.init(
    ...   jax.random.key(0), x_GxSxD, task_ids_GxS=tasks_GxS
    ... )
    >>> assignment, _ = router.apply(
    ...   variables, x_GxSxD, task_ids_GxS=tasks_GxS
    ... )
    >>> bool(assignment.expert_GxSxK[0, 0] == assignment.expert_GxSxK[0, 2])
    True

  References:
    Kudugunta et al. 2021, https://arxiv.org/abs/2110.03742, section 3,
    "task-level".
  """

  num_tasks: Count = 0
  gates: str = 'all'
  embedding_init: nn.initializers.Initializer = nn.initializers.normal(1.0)
  kernel_init: nn.initializers.Initializer = KERNEL_INIT

  needs = ('task_ids',)

  @nn.compact
  def __call__(
    self,
    x_GxSxD: Array,
    *,
    task_ids_GxS: Array,
    mask_GxS: Array | None = None,
    deterministic: bool = True,
  ) -> tuple[Assignment, Aux]:
    """Routes by task; of `x_GxSxD` only the width is used."""
    if self.num_tasks < 1:
      raise ValueError(
        f'TaskGating needs num_tasks, the number of task ids, got '
        f'{self.num_tasks}.'
      )
    self.check_gradient(
      self.gates == 'chosen' and self.k == 1, "gates='chosen' of k=1 choice"
    )
    G, S, D = x_GxSxD.shape
    embedding_YxD = self.param(
      'embedding',
      sharding.named(self.embedding_init, 'router_width', 'embed'),
      (self.num_tasks, D),
      jnp.float32,
    )
    # One-hot rather than a lookup: the gradient is no scatter-add.
    onehot_GxSxY = jax.nn.one_hot(task_ids_GxS, self.num_tasks)
    known_GxS = (task_ids_GxS >= 0) & (task_ids_GxS < self.num_tasks)
    if mask_GxS is not None:
      known_GxS &= mask_GxS
    logits_YxE = self.logits(embedding_YxD[None], kernel_init=self.kernel_init)[
      0
    ]
    logits_GxSxE = jnp.einsum(
      'GSY,YE->GSE',
      onehot_GxSxY,
      logits_YxE,
      precision=jax.lax.Precision.HIGHEST,
    )
    assignment, aux = route(
      logits_GxSxE,
      k=self.k,
      mask_GxS=known_GxS,
      gates=self.gates,
      priority='token',  # Causal for k > 1 too.
    )
    # All groups as one.
    _, of_batch = route(
      logits_GxSxE.reshape(1, G * S, -1),
      k=self.k,
      mask_GxS=known_GxS.reshape(1, -1),
    )
    return assignment, dataclasses.replace(
      aux, losses=of_batch.losses, balance=of_batch.balance, tokens=None
    )
