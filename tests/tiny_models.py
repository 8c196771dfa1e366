"""Models small enough to compile in a second or two, and batches for them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from sparse_experts import moe
from sparse_experts.layers.attention import Attention, RelativeBias
from sparse_experts.layers.embed import TokenEmbed
from sparse_experts.layers.mlp import Mlp
from sparse_experts.models.language import Language
from sparse_experts.models.language_model import LanguageModel
from sparse_experts.models.transformer import Block, Stack

partial = functools.partial

VOCAB = 64


def make_model(
  *,
  encoder=True,
  layers=4,
  sparse_layers=2,
  num_experts=8,
  k=1,
  scan=False,
  remat='none',
  dispatch=moe.gather,
  group_size=None,
  dropout_rate=0.0,
  own_bias=False,
  extra_mlp=False,
  make_router=None,
  width=16,
  hidden_width=32,
  activation='relu',
  dtype=jnp.float32,
  attention=(),
  **model_arguments,
):
  """A language model of `layers` blocks a stack, every second one sparse."""
  attention = partial(Attention, num_heads=2, head_width=8, **dict(attention))
  mlp = partial(Mlp, hidden_width=hidden_width, activation=activation)
  bias = partial(RelativeBias, num_heads=2, num_buckets=8, max_distance=16)
  make_moe = partial(
    moe.MoE,
    # A wide router: choices then differ between tokens.
    make_router=make_router
    or partial(
      moe.TopK,
      num_experts=num_experts,
      k=k,
      priority='token',
      kernel_init=nn.initializers.normal(0.5),
    ),
    make_expert=mlp,
    group_size=group_size,
    dispatch=dispatch,
  )

  def stack(causal):
    block = partial(
      Block,
      make_attention=attention,
      make_mlp=mlp,
      make_moe=make_moe,
      make_extra_mlp=mlp if extra_mlp else None,
      make_cross_attention=attention if causal and encoder else None,
      make_bias=bias if own_bias else None,
      dropout_rate=dropout_rate,
    )
    return Stack(
      num_layers=layers,
      make_block=block,
      sparse_layers=sparse_layers,
      causal=causal,
      make_shared_bias=None if own_bias else bias,
      scan=scan,
      remat=remat,
    )

  module = LanguageModel(
    embed=TokenEmbed(VOCAB, width, dtype),
    decoder=stack(causal=True),
    encoder=stack(causal=False) if encoder else None,
  )
  weights = {'load_balance': 0.1, 'router_z': 0.01}
  return Language(module, **{'loss_weights': weights, **model_arguments})


def make_batch(rows=8, inputs=12, targets=8, encoder=True, seed=0):
  """Random tokens; rows end in padding of different lengths."""
  random = np.random.default_rng(seed)

  def tokens(length):
    x = random.integers(2, VOCAB, (rows, length))
    ends = random.integers(length // 2, length + 1, rows)
    return np.where(np.arange(length)[None] < ends[:, None], x, 0)

  decoder = tokens(targets)
  batch = {
    'decoder_target_tokens': decoder,
    'decoder_input_tokens': np.pad(decoder, ((0, 0), (1, 0)))[:, :-1],
    'decoder_loss_weights': decoder > 0,
  }
  if encoder:
    batch['encoder_input_tokens'] = tokens(inputs)
  return {name: jnp.asarray(x, jnp.int32) for name, x in batch.items()}


def make_params(model, batch, seed=0):
  """Unboxed parameters, drawn by numpy: initialisers take long to compile."""
  boxed = jax.eval_shape(lambda: model.init(jax.random.key(0), batch))
  random = np.random.default_rng(seed)

  def draw(leaf):
    noise = random.normal(size=leaf.shape).astype(np.float32)
    return jnp.asarray(0.3 * noise if leaf.shape[1:] else 1 + 0.3 * noise)

  return jax.tree.map(draw, nn.unbox(boxed))
