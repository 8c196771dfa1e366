"""What decoding with experts costs beside the dense model of equal work."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from sparse_experts.letters import Array
from sparse_experts.models.decoding import Sampling, check_decodable
from sparse_experts.models.language import Language
from sparse_experts.numbers import Count
from sparse_experts.planning import topology


@dataclasses.dataclass(frozen=True, eq=False)
class Given(Sampling):
  """Writes given tokens, so that what is timed does not hang on their luck.

  Attributes:
    tokens_TxB: int32, neither padding nor EOS.
  """

  tokens_TxB: Any = None

  def draw(
    self, keys_B: Array | None, position: Array, logits_BxV: Array
  ) -> Array:
    del keys_B, logits_BxV
    return self.tokens_TxB[position]


def measure(
  models: Iterable[tuple[str, Language]],
  batch_sizes: Sequence[Count] = (1, 8, 64),
  inputs: Count = 32,
  max_tokens: Count = 32,
  rounds: Count = 11,
  on_row: Callable[[dict[str, Any]], None] = lambda row: None,
  dry_run: bool = False,
) -> list[dict[str, Any]]:
  """Times `Objective.decode` on this machine's first device.

  Each round runs every model once, the first before the others; ratios are
  taken within a round, and the median over rounds is given, so a machine that
  is slow for a while slows all. Rows are given random tokens to write, so
  routers without training spread them over their experts.

  Args:
    models: names and models, of which each is compiled before the next is
      asked for; the first is what the others are compared with.
    batch_sizes: rows B.
    inputs: tokens of an encoder's inputs; decoders alone start from nothing.
    max_tokens: T, all of which are written.
    rounds: at least 1; 11 for a figure to publish.
    on_row: called with every row as it is ready.
    dry_run: check, and time nothing.

  Returns:
    A row for each model and B: `model`, `batch`, `tokens_per_second` and
    `seconds` (medians), `ratio` (its time over the first model's),
    `ratio_iqr` (first and third quartile), and `flops_per_token`, XLA's count
    of one step of one row.
  """
  programs, flops = {}, {}
  for name, model in models:
    check_decodable(model)
    if dry_run:
      jax.eval_shape(functools.partial(_params, model))
      continue
    params = _params(model)
    flops[name] = _flops(model, params, inputs, max_tokens)
    for B in batch_sizes:
      programs[name, B] = _program(model, params, B, inputs, max_tokens)
  rows = []
  for B in () if dry_run else batch_sizes:
    seconds = {name: [] for name in flops}
    for _ in range(rounds):
      for name in flops:
        start = time.perf_counter()
        jax.block_until_ready(programs[name, B]())
        seconds[name].append(time.perf_counter() - start)
    first = np.array(next(iter(seconds.values())))
    for name, sample in seconds.items():
      ratios = np.array(sample) / first
      row = {
        'model': name,
        'batch': B,
        'tokens_per_second': B * max_tokens / float(np.median(sample)),
        'seconds': float(np.median(sample)),
        'ratio': float(np.median(ratios)),
        'ratio_iqr': np.quantile(ratios, (0.25, 0.75)).tolist(),
        'flops_per_token': flops[name],
      }
      on_row(row)
      rows.append(row)
  return rows


def _batch(model: Language, rows: int, inputs: int) -> dict[str, np.ndarray]:
  random = np.random.default_rng(0)
  if model.module.encoder is None:
    return {'decoder_input_tokens': np.zeros((rows, 1), np.int32)}
  tokens = random.integers(2, model.module.embed.vocab_size, (rows, inputs))
  return {'encoder_input_tokens': tokens.astype(np.int32)}


def _params(model: Language):
  shapes = {
    name: jax.ShapeDtypeStruct((1, 2), np.int32)
    for name in (
      'encoder_input_tokens',
      'decoder_input_tokens',
      'decoder_target_tokens',
    )
  }
  return jax.jit(lambda: nn.unbox(model.init(jax.random.key(0), shapes)))()


def _program(model: Language, params, rows: int, inputs: int, max_tokens: int):
  """Decodes a batch; compiled, and run once for nothing."""
  random = np.random.default_rng(1)
  vocab_size = model.module.embed.vocab_size
  tokens_TxB = random.integers(2, vocab_size, (max_tokens, rows))
  strategy = Given(tokens_TxB=jnp.asarray(tokens_TxB, jnp.int32))
  decode = functools.partial(
    model.decode, max_tokens=max_tokens, strategy=strategy
  )
  arguments = params, _batch(model, rows, inputs)
  program = functools.partial(
    jax.jit(decode).lower(*arguments).compile(), *arguments
  )
  jax.block_until_ready(program())
  return program


def _flops(model: Language, params, inputs: int, max_tokens: int) -> float:
  """Of one step of one row.

  The loop over the experts of a single row has one turn, so what XLA counts,
  loops' bodies once, is all there is.
  """
  _, variables = jax.eval_shape(
    lambda params: model.module.apply(
      {'params': params},
      _batch(model, 1, inputs),
      1 + max_tokens,
      method='start',
      mutable=['cache'],
    ),
    params,
  )

  def step(params, cache, token_B):
    return model.module.apply(
      {'params': params, 'cache': cache},
      token_B,
      method='step',
      mutable=['cache'],
    )

  token_B = jax.ShapeDtypeStruct((1,), jnp.int32)
  compiled = jax.jit(step).lower(params, variables['cache'], token_B).compile()
  return topology.facts(compiled)['flops']
