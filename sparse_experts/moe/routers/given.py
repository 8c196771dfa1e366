"""Experts given with the data: one for each domain, task or skill."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from sparse_experts.letters import Array
from sparse_experts.moe.assignment import Assignment, ungated
from sparse_experts.moe.outputs import Aux
from sparse_experts.moe.router import Router
from sparse_experts.moe.routers.hash import look_up


class Given(Router):
  """The experts of a token are those of its task id, of gate 1 / k.

  A DEMix layer (Gururangan et al. 2021) has an expert for each domain of the
  training data and no gate: k = 1. Its mixing of experts at test time, by a
  posterior over domains, is not here; evaluate with the ids of the domains.

  Attributes:
    table: the expert of each task id, (e_0, e_1, ...), or its k experts,
      ((e_00, e_01), ...); a task beyond it has no expert. None: expert
      task id modulo E, and with k > 1 the k - 1 after it.

  Example:
    >>> router = Given(num_experts=4, table=(2, 0, 2))
    >>> x_GxSxD, tasks_GxS = jnp.ones((1, 3, 8)), jnp.array([[0, 0, 1]])
    >>> assignment, _ = router.apply({}, x_GxSxD, task_ids_GxS=tasks_GxS)
    >>> assignment.expert_GxSxK[0, :, 0].tolist()
    [2, 2, 0]

  References:
    Gururangan et al. 2021, https://arxiv.org/abs/2108.05036, section 3.
  """

  table: Sequence[int | Sequence[int]] | None = None

  needs = ('task_ids',)
  exchangeable = False  # The table names experts.

  @nn.compact
  def __call__(
    self,
    x_GxSxD: Array,
    *,
    task_ids_GxS: Array,
    mask_GxS: Array | None = None,
    deterministic: bool = True,
  ) -> tuple[Assignment, Aux]:
    """Looks tasks up; `x_GxSxD` and `deterministic` are not looked at."""
    self.check_k()
    if self.table is None:
      expert_GxSxK = task_ids_GxS[..., None] + jnp.arange(self.k)[None, None]
      expert_GxSxK %= self.num_experts
    else:
      expert_GxSxK = look_up(self._table(), task_ids_GxS, self.num_experts)
    assignment = ungated(
      expert_GxSxK.astype(jnp.int32), self.num_experts, mask_GxS, 1 / self.k
    )
    return assignment, Aux(losses={}, metrics={})

  def _table(self) -> np.ndarray:
    """The table as int32 [T, K]."""
    rows = [np.atleast_1d(row) for row in self.table]
    experts = sorted({int(e) for row in rows for e in row})
    if (
      any(row.shape != (self.k,) for row in rows)
      or not experts
      or experts[0] < 0
      or experts[-1] >= self.num_experts
    ):
      raise ValueError(
        f'table must have k={self.k} experts from 0 to {self.num_experts - 1} '
        f'for each task, got {self.table}.'
      )
    return np.stack(rows).astype(np.int32)
