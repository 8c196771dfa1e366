"""The letters that shapes are written in.

An array's name ends in its shape: `x_BxLxD` has axes B, L and D. A letter
means one thing everywhere, and einsum strings use the same letters:

  B  examples (sequences) in a batch   G  groups of tokens
  L  tokens in a sequence              S  tokens in a group
  M  memory length (keys)              E  experts
  U  distances, or buckets of them     C  capacity: an expert's slots in a group
  D  model width                       K  choices: experts per token, the k best
  H  attention heads                   J  groups of experts
  A  width of a head                   Q  experts in a group of experts
  F  hidden width of an FFN            P  devices that share the experts
  N  layers                            X  experts of one of these devices
  V  vocabulary, classes               Y  tasks
  T  tokens of an answer, steps        R  rows: sorted by expert, of a table
  W  answers to an example: options, beams (their width)
  Z  values of one input vector: of a patch, a frame
  I  entries of any other list         O  entries taken from it, or made of it

`GxSK` is a merged axis, S-major; `1` is an axis of size one; `Bx___` has axes
that are not looked at.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

Array = jax.Array
Dtype = Literal['float32', 'bfloat16', 'float16'] | jnp.dtype  # Of activations.
