"""Modules that are no experts are refused, before the first step."""

import functools

import command
import jax
import jax.numpy as jnp
import pytest
import tiny_experts
from flax import linen as nn
from tiny_experts import KINDS, MIXERS, Mixer, NormAndBias, Plain

from sparse_experts.moe import MoE, TopK, all_experts, grouped
from sparse_experts.moe.expert_check import check_expert, checking

D = 4


@pytest.mark.parametrize('name', KINDS)
def test_what_is_an_expert_passes(name):
  check_expert(KINDS[name][0], D)


@pytest.mark.parametrize('mix', MIXERS)
def test_what_mixes_rows_is_refused(mix):
  with pytest.raises(ValueError, match='^Mixer mixes rows: when slot') as error:
    check_expert(Mixer(mix, in_training=mix == 'mean'), D)
  assert '\n' not in str(error.value)


class Fourier(nn.Module):
  """Needs rows of 12 numbers, which narrow ones are not."""

  @nn.compact
  def __call__(self, x_xD, *, deterministic=True):
    x_xD = x_xD.reshape(*x_xD.shape[:-1], 12)
    y_xD = KINDS['plain'][0].copy(name='mlp')(x_xD)
    return y_xD - x_xD.mean(-2, keepdims=True)


def test_an_expert_of_one_width_is_checked_at_that():
  with pytest.raises(ValueError, match='^Fourier mixes rows'):
    check_expert(Fourier(), 12)


def test_what_gives_other_numbers_when_grouped_is_refused():
  # A scan over as many layers as there are experts in the check takes one axis
  # for the other, and no shape tells.
  def scanned(length):
    return nn.scan(
      lambda linear, x_xD, _: (linear(x_xD), None),
      variable_axes={'params': 0},
      split_rngs={'params': True},
      length=length,
      metadata_params={nn.PARTITION_NAME: 'layers'},
    )

  class Scanned(nn.Module):
    length: int

    @nn.compact
    def __call__(self, x_xD, *, deterministic=True):
      linear = tiny_experts.narrow(x_xD, 'linear')
      return scanned(self.length)(linear, x_xD, None)[0]

  check_expert(Scanned(3), D, is_grouped=False)
  with pytest.raises(ValueError, match='^Scanned cannot be grouped: its'):
    check_expert(Scanned(3), D)
  with pytest.raises(ValueError, match="asks for 'kernel' of shape"):
    check_expert(Scanned(2), D)


def test_a_block_checks_each_layer_that_it_traces():
  def trace(make_expert, exact):
    layer = MoE(
      make_router=functools.partial(TopK, num_experts=4),
      make_expert=make_expert,
      exact_dispatch=exact,
    )
    jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((1, 2, D)))

  mixer = functools.partial(Mixer, 'mean')
  with checking():
    trace(NormAndBias, grouped)
    trace(Plain, all_experts)
  with pytest.raises(ValueError, match='^Mixer mixes rows'), checking():
    trace(NormAndBias, grouped)
    trace(mixer, all_experts)
  trace(mixer, all_experts)  # Outside, nothing is checked.


@pytest.mark.parametrize('dry', [True, False])
def test_train_refuses_what_mixes_rows_before_it_writes(dry, tmp_path):
  mine = tmp_path / 'mine.gin'
  mine.write_text(
    'from __gin__ import dynamic_registration\n'
    'import tiny_experts\n'
    'from sparse_experts.moe import layer\n'
    'layer.MoE.make_expert = @tiny_experts.Mixer\n'
    "tiny_experts.Mixer.mix = 'mean'\n"
  )
  outcome = command.run(
    *('train', command.TINY, f'--gin_file={mine}', command.NO_EVALUATION),
    *(f'--gin.MODEL_DIR={tmp_path / "run"}', *(['--dry_run'] if dry else [])),
  )
  assert outcome.code == 2
  assert outcome.stderr.startswith('error: Mixer mixes rows: when slot')
  assert len(outcome.stderr.splitlines()) == 1
  assert list(tmp_path.iterdir()) == [mine]
