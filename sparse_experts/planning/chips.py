"""Chips: what a roofline and a memory plan need to know of them."""

from __future__ import annotations

import dataclasses
import math
import re


@dataclasses.dataclass(frozen=True)
class Chip:
  """A kind of chip; all numbers are those of one JAX device.

  Two cores that share their memory are one device, so a device is a chip; of
  tpu7x it is half a chip, whose numbers are half the published ones.

  Attributes:
    name: as in the name of a topology.
    hbm_bytes: memory that a program may use, a little less than is built in;
      libtpu says it where a program does not fit.
    flops_bf16: floating point operations a second, at most.
    hbm_bytes_per_s: between memory and the chip.
    ici_bytes_per_s: out of the chip over all its links together; as much comes
      in at the same time, so published bidirectional figures are twice this.
    dims: of its topologies; a chip has two links in each. 0: a GPU, which has
      no topology to compile for.
    devices_per_chip: 1, or 2.
    source: where all of these but hbm_bytes are published; the links of v4 in
      Jouppi et al. 2023, https://arxiv.org/abs/2304.01433, Table 4.
    watts: of a chip in use: of v4 the mean of Jouppi et al. 2023 (table 4, from
      memory, not checked; its maximum is 192), of a GPU its limit; None: not
      published.
  """

  name: str
  hbm_bytes: int
  flops_bf16: float
  hbm_bytes_per_s: float
  ici_bytes_per_s: float
  dims: int
  devices_per_chip: int
  source: str
  watts: float | None = None


_DOCS = 'https://cloud.google.com/tpu/docs/'
_GPUS = 'https://glennklockwood.com/garden/processors/'


def _chip(name, gib, tflops, hbm_gb, ici_gb, dims, devices=1, watts=None):
  """A chip from what is published of it, and the GiB of each device."""
  return Chip(
    name=name,
    hbm_bytes=int(gib * 2**30),
    flops_bf16=tflops * 1e12 / devices,
    hbm_bytes_per_s=hbm_gb * 1e9 / devices,
    ici_bytes_per_s=ici_gb * 1e9 / devices,
    dims=dims,
    devices_per_chip=devices,
    source=(_DOCS if dims else _GPUS) + name,
    watts=watts,
  )


CHIPS = {
  chip.name: chip
  for chip in (
    _chip('v4', 30.75, 275, 1200, 300, 3),
    _chip('v5e', 15.75, 197, 819, 200, 2),
    _chip('v5p', 95.73, 459, 2765, 600, 3),
    _chip('v6e', 31.24, 918, 1638, 400, 2),
    _chip('tpu7x', 94.74, 2307, 7380, 600, 3, devices=2),
    # The SXM modules: dense bfloat16, NVLink one way, the power limit, and all
    # of the 80 GB that are built in: what a program may use was not measured.
    _chip('a100', 74.5, 312, 2039, 300, 0, watts=400),
    _chip('h100', 74.5, 989, 3350, 450, 0, watts=700),
  )
}


MOST_CHIPS = 2**20  # That a plan is made for.


def check_number(num_chips: int) -> None:
  """Raises ValueError where there are no such chips or too many of them."""
  if not 1 <= num_chips <= MOST_CHIPS:
    raise ValueError(
      f'{num_chips:,} chips: take at least 1 and at most {MOST_CHIPS:,}.'
    )


def parse_topology(name: str, slices: int = 1) -> tuple[Chip, int]:
  """The chip of a topology, and the number of JAX devices, which a mesh has.

  Args:
    name: such as 'v5p:8x16x16'.
    slices: so many of it.

  Raises:
    ValueError: no such chip, not its number of dimensions, or too many.

  Example:
    >>> chip, num_devices = parse_topology('v5p:8x16x16')
    >>> chip.name, num_devices
    ('v5p', 2048)
  """
  kind, _, sizes = name.partition(':')
  chip = CHIPS.get(kind)
  if chip is None:
    raise ValueError(
      f'unknown topology {name!r}: chips are {", ".join(CHIPS)}, and a '
      "topology is named as 'v5p:4x4x4' or 'v5e:2x4'."
    )
  if not chip.dims:
    raise ValueError(
      f'unknown topology {name!r}: {kind} is a GPU, which `plan` takes by '
      'number, --chips=N, and nothing compiles for.'
    )
  if not re.fullmatch('x'.join([r'[1-9]\d*'] * chip.dims), sizes):
    example = 'x'.join(['4'] * chip.dims)
    raise ValueError(
      f'unknown topology {name!r}: {kind} has {chip.dims} dimensions, as in '
      f"'{kind}:{example}'."
    )
  num_chips = slices * math.prod(map(int, sizes.split('x')))
  check_number(num_chips)
  return chip, num_chips * chip.devices_per_chip
