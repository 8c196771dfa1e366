"""Eight colours that the colour-blind can tell apart, on light pages and dark.

The first six are Okabe and Ito's, the seventh is of Paul Tol's bright scheme.
Their yellow is left out: lines of it cannot be seen on white.
"""

from __future__ import annotations

COLOURS = (
  '#0072B2', '#E69F00', '#009E73', '#CC79A7', '#56B4E9', '#D55E00', '#AA3377',
  '#8C6238',
)  # fmt: skip
_TAKES_WHITE = {'#0072B2', '#AA3377', '#8C6238'}


def ink(colour: str) -> str:
  """The colour of text on one of `COLOURS`: contrast is 4.5 at least."""
  return '#ffffff' if colour in _TAKES_WHITE else '#111111'
