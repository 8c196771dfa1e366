"""Experts of many kinds, each with its definition in numpy on one row.

`KINDS` are made of our layers, or of parameters that meet rows as theirs do.
`Plain` declares parameters by itself. A `Mixer` is no expert.
"""

import jax.numpy as jnp
import numpy as np
import oracle
from flax import linen as nn

from sparse_experts import sharding
from sparse_experts.layers import parameters
from sparse_experts.layers.linear import Linear
from sparse_experts.layers.mlp import Mlp
from sparse_experts.layers.norm import LayerNorm, RMSNorm

F, R = 6, 2
EPSILON = 1e-6
ACT = oracle.ACTIVATIONS['gelu']


def wide(name, **options):
  return Linear((F,), ('embed', 'mlp'), name=name, **options)


def narrow(x_xD, name, **options):
  return Linear((x_xD.shape[-1],), ('mlp', 'embed'), name=name, **options)


class Biased(nn.Module):
  @nn.compact
  def __call__(self, x_xD, *, deterministic=True):
    h_xF = nn.gelu(wide('wi', use_bias=True)(x_xD))
    return narrow(x_xD, 'wo', use_bias=True)(h_xF)


class NormAndBias(nn.Module):
  """A matrix, biases and scales: each way in which parameters meet rows."""

  @nn.compact
  def __call__(self, x_xD, *, deterministic=True):
    return Biased(name='ffn')(LayerNorm(name='norm')(x_xD))


class TwoHidden(nn.Module):
  @nn.compact
  def __call__(self, x_xD, *, deterministic=True):
    h_xF = nn.gelu(wide('wi')(x_xD))
    h_xF = nn.gelu(Linear((F,), ('mlp', 'mlp'), name='wh')(h_xF))
    return narrow(x_xD, 'wo')(h_xF)


class LowRank(nn.Module):
  """x W + (x A) B."""

  @nn.compact
  def __call__(self, x_xD, *, deterministic=True):
    D = x_xD.shape[-1]
    h_xR = Linear((R,), ('embed', 'kv'), name='a')(x_xD)
    y_xD = Linear((D,), ('kv', 'mlp'), name='b')(h_xR)
    return y_xD + Linear((D,), ('embed', 'mlp'), name='w')(x_xD)


class Normed(nn.Module):
  make_norm: type = LayerNorm

  @nn.compact
  def __call__(self, x_xD, *, deterministic=True):
    return narrow(x_xD, 'wo')(
      nn.gelu(wide('wi')(self.make_norm(EPSILON, name='norm')(x_xD)))
    )


class Heads(nn.Module):
  """Two heads that share a matrix, a bias for each, a gate of one number."""

  @nn.compact
  def __call__(self, x_xD, *, deterministic=True):
    x_xHxA = x_xD.reshape(*x_xD.shape[:-1], 2, -1)
    A = x_xHxA.shape[-1]
    init = nn.initializers.normal(0.5)
    h_xHxA = parameters.matrix(
      self, x_xHxA, 'kernel', sharding.named(init, 'embed', 'kv'), (A, A)
    )
    h_xHxA += parameters.vector(
      self, h_xHxA, 'bias', sharding.named(init, 'heads', 'kv'), (2, A)
    )
    gate = parameters.vector(self, h_xHxA, 'gate', sharding.named(init), ())
    y_xD = Linear((2 * A,), ('heads', 'kv', 'embed'), 2, name='out')
    return y_xD(nn.gelu(h_xHxA * gate))


class Plain(nn.Module):
  """`Biased`, of parameters that it declares by itself."""

  @nn.compact
  def __call__(self, x_xD, *, deterministic=True):
    def linear(name, x, features):
      init, names = nn.initializers.normal(0.5), ('embed', 'mlp')
      shape = (x.shape[-1], features)
      w = self.param(name, sharding.named(init, *names), shape)
      b = self.param(f'{name}_bias', sharding.named(init, 'mlp'), shape[1:])
      return x @ w + b.reshape((1,) * (x.ndim - 1) + (-1,))

    return linear('wo', nn.gelu(linear('wi', x_xD, F)), x_xD.shape[-1])


def mlp(x_D, p):
  if 'wi_0' in p:
    h_F = ACT(x_D @ p['wi_0']['kernel']) * (x_D @ p['wi_1']['kernel'])
    return h_F @ p['wo']['kernel']
  return linear(ACT(linear(x_D, p['wi'])), p['wo'])


def linear(x, p):
  return x @ p['kernel'] + p.get('bias', 0)


def two_hidden(x_D, p):
  return linear(ACT(linear(ACT(linear(x_D, p['wi'])), p['wh'])), p['wo'])


def low_rank(x_D, p):
  W = p['w']['kernel'] + p['a']['kernel'] @ p['b']['kernel']
  return x_D @ W


def layer_norm(x_D, p):
  y_D = (x_D - x_D.mean()) / np.sqrt(x_D.var() + EPSILON)
  return mlp(y_D * p['norm']['scale'] + p['norm']['bias'], p)


def rms_norm(x_D, p):
  y_D = x_D / np.sqrt((x_D**2).mean() + EPSILON)
  return mlp(y_D * p['norm']['scale'], p)


def heads(x_D, p):
  h_HxA = np.stack([x_A @ p['kernel'] for x_A in np.split(x_D, 2)])
  h_HxA = ACT((h_HxA + p['bias']) * p['gate'])
  return h_HxA.reshape(-1) @ p['out']['kernel'].reshape(len(x_D), -1)


def plain(x_D, p):
  return ACT(x_D @ p['wi'] + p['wi_bias']) @ p['wo'] + p['wo_bias']


KINDS = {
  'plain': (Mlp(F, activation='gelu'), mlp),
  'gated': (Mlp(F, activation='gelu', gated=True), mlp),
  'dropout': (Mlp(F, activation='gelu', dropout_rate=0.5), mlp),
  'biased': (Biased(), mlp),
  'two_hidden': (TwoHidden(), two_hidden),
  'low_rank': (LowRank(), low_rank),
  'layer_norm': (Normed(LayerNorm), layer_norm),
  'rms_norm': (Normed(RMSNorm), rms_norm),
  'heads': (Heads(), heads),
}


class Mixer(nn.Module):
  """y = x W + what `mix` makes of all rows, times a weight that starts at 0."""

  mix: str
  in_training: bool = False

  @nn.compact
  def __call__(self, x_xD, *, deterministic=True):
    y_xD = Linear(x_xD.shape[-1:], ('embed', 'mlp'), name='w')(x_xD)
    zero = sharding.named(nn.initializers.zeros)
    weight = parameters.vector(self, y_xD, 'weight', zero, ())
    if self.in_training and deterministic:
      return y_xD
    return y_xD + weight * MIXERS[self.mix](x_xD)


def earlier(x_xD):
  """A convolution's tap: the row before, of the same sequence."""
  return jnp.roll(x_xD, 1, -2).at[..., 0, :].set(0)


def later(x_xD):
  return jnp.roll(x_xD, -1, -2).at[..., -1, :].set(0)


MIXERS = {
  'earlier': earlier,
  'later': later,
  'mean': lambda x_xD: x_xD.mean(-2, keepdims=True),
  'groups': lambda x_xD: x_xD.mean(0, keepdims=True),
  'largest': lambda x_xD: x_xD / jnp.abs(x_xD).max(),  # As int8 scales do.
}
