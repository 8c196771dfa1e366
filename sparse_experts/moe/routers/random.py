"""Random experts: a baseline, and the routing of THOR."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparse_experts.letters import Array
from sparse_experts.moe.assignment import Assignment, largest, ungated
from sparse_experts.moe.outputs import Aux
from sparse_experts.moe.router import Router
from sparse_experts.moe.routers.hash import RandomTable, look_up
from sparse_experts.numbers import Count


class Random(Router):
  """k different experts, drawn anew at every training step, of gate 1 / k.

  THOR (Zuo et al. 2021) is `draw='batch'` with `Consistency`: each of two
  passes sends the whole batch through one random expert of each layer. Its
  experts learn the same function, so that any of them can serve any token.

  A draw that many tokens share fills one expert's line: with 'sequence' or
  'batch', and with the mean over all experts, only a capacity factor of None
  (or E / k) drops nothing.

  Attributes:
    draw: in training, experts are drawn for each 'token', 'sequence' (then
      `MoE.group_size` must be None) or whole 'batch' (THOR's code; under
      microbatches, for each of them).
    evaluation: without training's rng, a token's experts are those of a random
      table of 'token_ids', or it gets the 'mean' over all E experts. THOR
      compares random experts for each token and each sentence, and an ensemble.
      Those of a table are as random, and the same when decoding token by token
      and in any company.
    vocab_size: V of the table.
    seed: of the table.

  Example:
    >>> router = Random(num_experts=4, vocab_size=100)
    >>> x_GxSxD, ids_GxS = jnp.ones((2, 3, 8)), jnp.ones((2, 3), int)
    >>> rngs = {'dropout': jax.random.key(0)}
    >>> assignment, _ = router.apply(
    ...   {}, x_GxSxD, token_ids_GxS=ids_GxS, deterministic=False, rngs=rngs
    ... )
    >>> assignment.expert_GxSxK.shape
    (2, 3, 1)

  References:
    Zuo et al. 2021, https://arxiv.org/abs/2110.04260; code:
    microsoft/Stochastic-Mixture-of-Experts, `thor/transformer_thor_layer.py`.
  """

  draw: str = 'token'
  evaluation: str = 'token_ids'
  vocab_size: Count = 0
  seed: int = 0

  @property
  def needs(self) -> tuple[str, ...]:
    return (
      'rng',
      *(('sequences',) if self.draw == 'sequence' else ()),
      *(('token_ids',) if self.evaluation == 'token_ids' else ()),
    )

  @property
  def exchangeable(self) -> bool:
    """A table would name experts."""
    return self.evaluation == 'mean'

  @nn.compact
  def __call__(
    self,
    x_GxSxD: Array,
    *,
    mask_GxS: Array | None = None,
    token_ids_GxS: Array | None = None,
    deterministic: bool = True,
  ) -> tuple[Assignment, Aux]:
    """Draws or looks up experts; of `x_GxSxD` only the shape is used."""
    self.check_k()
    G, S, _ = x_GxSxD.shape
    E, k = self.num_experts, self.k
    units = {'token': (G, S), 'sequence': (G, 1), 'batch': (1, 1)}
    if self.draw not in units:
      raise ValueError(
        f'draw must be one of {", ".join(units)}, not {self.draw!r}.'
      )
    if self.evaluation not in ('token_ids', 'mean'):
      raise ValueError(
        f'evaluation must be one of token_ids, mean, not {self.evaluation!r}.'
      )
    if not deterministic:
      order = jax.random.uniform(
        self.make_rng('dropout'), (*units[self.draw], E)
      )
      expert_GxSxK = jnp.broadcast_to(largest(order, k), (G, S, k))
    elif self.evaluation == 'mean':
      k = E
      expert_GxSxK = jnp.broadcast_to(jnp.arange(E), (G, S, E))
    else:
      if self.vocab_size < 1:
        raise ValueError(
          'Random needs vocab_size, the number of token ids, for evaluation='
          "'token_ids'; 'mean' needs none."
        )
      table_VxK = RandomTable(self.seed)(self.vocab_size, E, k)
      expert_GxSxK = look_up(table_VxK, token_ids_GxS, E)
    assignment = ungated(expert_GxSxK, E, mask_GxS, gate=1 / k)
    return assignment, Aux(losses={}, metrics={})
