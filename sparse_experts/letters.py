"""The letters that shapes are written in.

An array's name ends in its shape: `x_BxLxD` has axes B, L and D. A letter
means one thing everywhere, and einsum strings use the same letters:

  B  sequences in a batch          G  groups of tokens
  L  tokens in a sequence          S  tokens in a group
  M  memory length (keys)          E  experts
  D  model width                   C  capacity: slots of one expert per group
  H  attention heads               K  choices (experts) per token, K <= E
  A  width of a head               N  layers
  F  hidden width of an FFN        V  vocabulary

`GxSK` is a merged axis, S-major; `1` is an axis of size one.
"""

from __future__ import annotations

import jax

Array = jax.Array
