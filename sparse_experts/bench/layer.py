"""What a sparse layer costs beside a dense MLP of equal active size."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from sparse_experts import sharding
from sparse_experts.layers.mlp import Mlp
from sparse_experts.letters import Dtype
from sparse_experts.moe import dispatchers, metrics
from sparse_experts.moe.layer import MoE
from sparse_experts.moe.routers.top_k import TopK
from sparse_experts.numbers import Count, Positive
from sparse_experts.planning import chips as chips_module
from sparse_experts.planning import hlo
from sparse_experts.planning import topology as topology_module


@dataclasses.dataclass(frozen=True)
class Layer:
  """The layer that is measured: ReLU experts under a top-k router.

  Attributes:
    tokens: of one group.
    width, hidden_width: D and F.
    capacity_factor: of dispatchers that have slots; `grouped` has none.
    buffer_factor: room for rows on each device relative to a balanced load,
      under `grouped` on a mesh; None: room for the worst case.
    dtype: of tokens; parameters are float32.
  """

  tokens: Count = 4096
  width: Count = 512
  hidden_width: Count = 2048
  capacity_factor: Positive = 1.25
  buffer_factor: Positive | None = None
  dtype: Dtype = 'float32'

  def sparse(self, dispatcher: str, experts: int, k: int) -> MoE:
    """The sparse layer of this shape.

    Args:
      dispatcher: a file of moe/dispatchers.
      experts: E.
      k: experts per token.

    Raises:
      ValueError: there is no such dispatcher.
    """
    return MoE(
      make_router=functools.partial(TopK, num_experts=experts, k=k),
      make_expert=functools.partial(Mlp, hidden_width=self.hidden_width),
      **self._dispatch(dispatcher),
    )

  def _dispatch(self, name: str) -> dict[str, Any]:
    dispatch = dispatchers.load(name)
    if name == 'grouped':
      dispatch = functools.partial(dispatch, buffer_factor=self.buffer_factor)
    if self.factor(name) is None:
      return {'exact_dispatch': dispatch}
    return {'dispatch': dispatch}

  def factor(self, dispatcher: str) -> float | None:
    """The capacity factor; None for a dispatcher that needs no slots."""
    capped = dispatcher in ('gather', 'einsum')
    return self.capacity_factor if capped else None

  def dense(self, k: int) -> nn.Module:
    return Mlp(hidden_width=k * self.hidden_width)

  def useful_flops(self, k: int, groups: int = 1) -> float:
    """Of the experts' matrix products, forward; training does three times."""
    return 4.0 * groups * self.tokens * k * self.width * self.hidden_width


def layer(
  experts: Sequence[Count] = (8, 32, 64, 128),
  choices: Sequence[Count] = (1, 2),
  dispatcher_names: Sequence[str] = ('gather', 'einsum', 'grouped'),
  shape: Layer = Layer(),
  rounds: Count = 11,
  on_row: Callable[[dict[str, Any]], None] = lambda row: None,
  dry_run: bool = False,
) -> list[dict[str, Any]]:
  """Times layers on this machine's first device.

  Each round runs the dense MLP and then every dispatcher once, forward and
  forward + backward; ratios are taken within a round, and the median over
  rounds is given, so a machine that is slow for a while slows both.

  Args:
    experts: E of each layer. choices: k of each.
    dispatcher_names: files of moe/dispatchers.
    shape: of the layer.
    rounds: at least 1; 11 for a figure to publish.
    on_row: called with every row as it is ready.
    dry_run: check, and time nothing.

  Returns:
    A row for each: `dispatcher`, `experts`, `k`, `forward_ms`, `train_ms`
    (forward + backward; medians), `forward_ratio`, `train_ratio` (over the
    dense MLP), `train_ratio_iqr` (first and third quartile), `dropped` (share
    of choices), `executed_flops_ratio` (of training, XLA's count over the
    useful ones; a loop's body counts once), `temp_bytes`, and `tflops` (useful
    ones a second in training).
  """
  if dry_run:
    _check(shape, dispatcher_names, experts, choices)
    return []
  rows = []
  for k in choices:
    dense = _Program.of_dense(shape, k)
    for num_experts in experts:
      sparse = {
        name: _Program.of_sparse(shape, name, num_experts, k)
        for name in dispatcher_names
      }
      times = {name: ([], []) for name in ['dense', *dispatcher_names]}
      for _ in range(rounds):
        for name, program in {'dense': dense, **sparse}.items():
          for sample, seconds in zip(times[name], program.time()):
            sample.append(seconds)
      for name, program in sparse.items():
        forward, train = (
          np.array(mine) / np.array(denses)
          for mine, denses in zip(times[name], times['dense'])
        )
        seconds = float(np.median(times[name][1]))
        useful = 3 * shape.useful_flops(k)
        row = {
          'dispatcher': name,
          'experts': num_experts,
          'k': k,
          'forward_ms': float(np.median(times[name][0])) * 1e3,
          'forward_ratio': float(np.median(forward)),
          'train_ms': seconds * 1e3,
          'train_ratio': float(np.median(train)),
          'train_ratio_iqr': np.quantile(train, (0.25, 0.75)).tolist(),
          'dropped': program.dropped,
          'executed_flops_ratio': program.facts['flops'] / useful,
          'temp_bytes': program.facts['temp_bytes'],
          'tflops': useful / seconds / 1e12,
        }
        on_row(row)
        rows.append(row)
  return rows


def compiled_layer(
  topology: str,
  experts: Sequence[Count] = (64,),
  choices: Sequence[Count] = (2,),
  dispatcher_names: Sequence[str] = ('gather', 'einsum', 'grouped'),
  shape: Layer = Layer(2048, 2048, 8192, buffer_factor=1.25, dtype='bfloat16'),
  on_row: Callable[[dict[str, Any]], None] = lambda row: None,
  dry_run: bool = False,
) -> list[dict[str, Any]]:
  """Compiles forward + backward of layers for a TPU topology that is not here.

  One group of tokens a chip; experts lie on as many chips as there are experts,
  the rest of the mesh is `data`.

  Args:
    topology: of TPU chips, such as 'v5e:4x4'.
    experts: E of each layer. choices: k of each.
    dispatcher_names: files of moe/dispatchers.
    shape: of the layer.
    on_row: called with every row as it is ready.
    dry_run: check, and compile nothing.

  Returns:
    A row for each: `dispatcher`, `experts`, `k`, `mesh`,
    `executed_flops_ratio`, and `topology.facts` and `collectives` of one chip.
  """
  if dry_run:
    chips_module.parse_topology(topology)
    _check(shape, dispatcher_names, experts, choices)
    return []
  chips = topology_module.devices(topology)
  rows = []
  for k in choices:
    for num_experts in experts:
      mesh = sharding.make_mesh(
        expert=min(num_experts, len(chips)), devices=chips
      )
      for name in dispatcher_names:
        compiled, text = topology_module.compile(
          _lower(shape, name, num_experts, k, mesh)
        )
        facts = topology_module.facts(compiled)
        row = {
          'dispatcher': name,
          'experts': num_experts,
          'k': k,
          'mesh': dict(mesh.shape),
          'executed_flops_ratio': facts['flops'] / 3 / shape.useful_flops(k),
          **facts,
          'collectives': hlo.Program(text).collectives(),
        }
        on_row(row)
        rows.append(row)
  return rows


def _check(
  shape: Layer,
  names: Sequence[str],
  experts: Sequence[int],
  choices: Sequence[int],
) -> None:
  """Traces every layer, in which mistakes show."""
  x_BxLxD = jax.ShapeDtypeStruct((1, shape.tokens, shape.width), shape.dtype)
  for name, num_experts, k in itertools.product(names, experts, choices):
    module = shape.sparse(name, num_experts, k)
    jax.eval_shape(module.init, jax.random.key(0), x_BxLxD)


def _loss(module, factor, params, x_BxLxD):
  output = module.apply({'params': params}, x_BxLxD, **factor)
  y_BxLxD, aux = output if isinstance(output, tuple) else (output, None)
  return jnp.square(y_BxLxD.astype(jnp.float32)).mean(), (y_BxLxD, aux)


def _lower(shape: Layer, dispatcher: str, num_experts: int, k: int, mesh):
  """Forward + backward of a sparse layer on abstract arrays of a mesh."""
  module = shape.sparse(dispatcher, num_experts, k)
  factor = {'capacity_factor': shape.factor(dispatcher)}
  shape_BxLxD = (sharding.data_shards(mesh), shape.tokens, shape.width)

  def loss(params, x_BxLxD):
    return _loss(module, factor, params, x_BxLxD)[0]

  with sharding.use_mesh(mesh):
    boxed = jax.eval_shape(
      lambda: module.init(jax.random.key(0), jnp.zeros(shape_BxLxD))['params']
    )
    params = jax.tree.map(
      lambda leaf, placed: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=placed
      ),
      nn.unbox(boxed),
      sharding.shardings(boxed, mesh),
    )
    x_BxLxD = jax.ShapeDtypeStruct(
      shape_BxLxD,
      jnp.dtype(shape.dtype),
      sharding=sharding.batch_sharding(mesh, shape_BxLxD),
    )
    return jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, x_BxLxD)


@dataclasses.dataclass
class _Program:
  """A layer's compiled forward and forward + backward, with arguments.

  Results go where the results before them were, as those of a training step do;
  without that a call would also pay for new pages of memory, which for the
  gradients of E experts is E times what the dense MLP pays.
  """

  forward: jax.stages.Compiled
  train: jax.stages.Compiled
  arguments: tuple[Any, Any]
  results: list[Any]
  facts: dict[str, Any]
  dropped: float = 0.0

  @classmethod
  def of_dense(cls, shape: Layer, k: int) -> _Program:
    return cls._of(shape, shape.dense(k), {})

  @classmethod
  def of_sparse(cls, shape: Layer, dispatcher: str, num_experts: int, k: int):
    return cls._of(
      shape,
      shape.sparse(dispatcher, num_experts, k),
      {'capacity_factor': shape.factor(dispatcher)},
    )

  @classmethod
  def _of(cls, shape, module, factor):
    x_BxLxD = jax.random.normal(
      jax.random.key(0), (1, shape.tokens, shape.width), shape.dtype
    )
    params = jax.jit(
      lambda: nn.unbox(module.init(jax.random.key(1), x_BxLxD)['params'])
    )()
    loss = functools.partial(_loss, module, factor)
    arguments = (params, x_BxLxD)

    def forward(params, x_BxLxD, old):
      del old
      return loss(params, x_BxLxD)[1][0]

    def train(params, x_BxLxD, old):
      del old
      return jax.grad(lambda *args: loss(*args)[0], (0, 1))(params, x_BxLxD)

    programs, results = [], []
    for function in (forward, train):
      shapes = jax.eval_shape(function, *arguments, None)
      old = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
      jitted = jax.jit(function, donate_argnums=2, keep_unused=True)
      programs.append(jitted.lower(*arguments, old).compile())
      results.append(old)
    _, (_, aux) = jax.jit(loss)(*arguments)
    facts = topology_module.facts(programs[1])
    program = cls(programs[0], programs[1], arguments, results, facts)
    if aux is not None:
      program.dropped = metrics.summary(jax.device_get(aux.metrics))['dropped']
    program.time()  # Once for nothing: pages and caches.
    return program

  def time(self) -> tuple[float, float]:
    """Seconds of one forward, and of one forward + backward."""
    seconds = []
    for i, program in enumerate((self.forward, self.train)):
      start = time.perf_counter()
      self.results[i] = jax.block_until_ready(
        program(*self.arguments, self.results[i])
      )
      seconds.append(time.perf_counter() - start)
    return tuple(seconds)
