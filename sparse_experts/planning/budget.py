"""What to train with so many chips for so many hours, by scaling laws.

Clark et al.'s law says which dense model a routed one is worth, Chinchilla's
what such a model reaches with the tokens that the budget buys; see
`scaling_laws`. Models are of Clark et al.'s family: a decoder of which every
second block is sparse, one expert a token.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from sparse_experts.planning import scaling_laws
from sparse_experts.planning.chips import Chip

EXPERTS = tuple(2**i for i in range(10))  # What the law was fitted to.
# Beyond this many nats above the best more experts are not worth their memory.
TOLERANCE = 0.02
# Of a chip's memory, what parameters, Adam's state, gradients and casts may
# take; the rest is for activations. VOCABULARY: of inputs and of logits.
STATE_SHARE = 0.6
STATE_BYTES = 4 + 8 + 4 + 2
VOCABULARY = 2 * 32000
HEAD_DIM = 64
SEQUENCE = 2048
BATCH_TOKENS = 2**19  # 256 sequences, as in the paper.


@dataclasses.dataclass(frozen=True)
class Budget:
  """Chips for hours, and what of their peak a training step reaches."""

  chip: Chip
  num_devices: int
  hours: float
  efficiency: float

  def __post_init__(self):
    if not 0 < self.efficiency <= 1 or not self.hours > 0:
      raise ValueError(
        'a budget needs hours above 0 and an efficiency above 0, at most 1; '
        f'got {self.hours} hours and {self.efficiency}.'
      )

  @property
  def flops(self) -> float:
    """Of training, all chips."""
    seconds = 3600 * self.hours
    return self.num_devices * seconds * self.chip.flops_bf16 * self.efficiency

  def kwh(self, watts: float, pue: float) -> float:
    """Energy, of chips of so many watts in a data centre of this overhead.

    Example:
      >>> from sparse_experts.planning.chips import CHIPS
      >>> Budget(CHIPS['v4'], 100, 20.0, 0.4).kwh(watts=170, pue=1.1)
      374.0
    """
    chips = self.num_devices / self.chip.devices_per_chip
    return round(chips * watts * pue * self.hours / 1000, 6)


@dataclasses.dataclass(frozen=True)
class Proposal:
  """A model and how long to train it.

  Attributes:
    params: N, without embeddings and with one expert a layer.
    experts: E. total_params: with all experts. tokens: D.
    loss: nats per token, predicted. effective_params: of an equal dense model.
    num_layers, width: blocks and model width of about N parameters.
    state_bytes: of a device, all split over all devices by experts and FSDP.
    fits: in STATE_SHARE of its memory.
  """

  params: float
  experts: int
  total_params: float
  tokens: float
  loss: float
  effective_params: float
  num_layers: int
  width: int
  state_bytes: float
  fits: bool


def proposals(
  budget: Budget, experts: Sequence[int] = EXPERTS
) -> tuple[list[Proposal], Proposal]:
  """The best model for each number of experts, and the one to take.

  That is, of those that fit, the one of fewest experts within TOLERANCE nats of
  the least loss.

  Raises:
    ValueError: none fits.
  """
  routed = scaling_laws.Clark.fit(*scaling_laws.losses('S-Base'))
  found = [_proposal(budget, routed, E) for E in experts]
  fitting = [proposal for proposal in found if proposal.fits]
  if not fitting:
    raise ValueError(
      f'no model of this budget fits {budget.num_devices} devices of '
      f'{budget.chip.hbm_bytes / 2**30:.0f} GiB; take more '
      'chips for fewer hours.'
    )
  least = min(proposal.loss for proposal in fitting)
  return found, next(p for p in fitting if p.loss <= least + TOLERANCE)


def _proposal(
  budget: Budget, routed: scaling_laws.Clark, experts: int
) -> Proposal:
  best = routed.optimal(budget.flops, (experts,), scaling_laws.EPOCH)
  # 13 D^2 a block: queries, keys, values, output and positions, and 8 of the
  # FFN; 96 D of width for a block, the middle of their family. FSDP splits the
  # width over the devices that experts are not split over.
  ideal = (96 * best.params / 13) ** (1 / 3)
  data = budget.num_devices // math.gcd(experts, budget.num_devices)
  unit = math.lcm(HEAD_DIM, data)
  width = unit * max(1, round(ideal / unit))
  num_layers = max(2, 2 * round(best.params / (26 * width**2)))
  params = 13 * width**2 * num_layers
  ffns = num_layers / 2 * 8 * width**2  # One expert of each sparse block.
  total = params + (experts - 1) * ffns
  state = STATE_BYTES * (total + VOCABULARY * width) / budget.num_devices
  return Proposal(
    params=params,
    experts=experts,
    total_params=total,
    tokens=budget.flops / (6 * params),
    loss=float(
      scaling_laws.EPOCH.loss(
        routed.effective_params(params, experts), budget.flops / (6 * params)
      )
    ),
    effective_params=float(routed.effective_params(params, experts)),
    num_layers=num_layers,
    width=width,
    state_bytes=state,
    fits=state <= STATE_SHARE * budget.chip.hbm_bytes,
  )


def batch_size(num_devices: int) -> int:
  """Sequences of a batch of about BATCH_TOKENS, a multiple of the devices.

  Example:
    >>> batch_size(64), batch_size(100), batch_size(1024)
    (256, 300, 1024)
  """
  return num_devices * max(1, round(BATCH_TOKENS / SEQUENCE / num_devices))


def gin_bindings(proposal: Proposal, num_devices: int) -> list[str]:
  """The proposal as overrides of gin/models/clark/15m.gin."""
  experts = proposal.experts
  return [
    f'NUM_LAYERS={proposal.num_layers}',
    f'EMBED_DIM={proposal.width}',
    f'MLP_DIM={4 * proposal.width}',
    f'NUM_HEADS={proposal.width // HEAD_DIM}',
    f'HEAD_DIM={HEAD_DIM}',
    f'NUM_EXPERTS={experts}',
    f'SPARSE_LAYERS={2 if experts > 1 else 0}',
    f'BATCH_SIZE={batch_size(num_devices)}',
    "DTYPE='bfloat16'",
  ]
