"""Activation memory: what XLA allocates, and what the formula says."""

import jax
import jax.numpy as jnp
import pytest
import tiny_models
from flax import linen as nn

from sparse_experts.analysis.activation_memory import activation_memory
from sparse_experts.data import batches

LENGTHS = {'inputs': 64, 'targets': 128}


def make_model(encoder, sparse_layers, remat):
  return tiny_models.make_model(
    encoder=encoder,
    layers=6,
    sparse_layers=sparse_layers,
    width=64,
    hidden_width=256,
    scan=True,
    remat=remat,
  )


def allocated(model, lengths):
  """Temporary bytes that XLA gives a sequence more, in forward and backward."""

  def temporary(rows):
    shapes = batches.shapes(model.converter, lengths, rows, pack=False)
    params = jax.eval_shape(
      lambda: nn.unbox(model.init(jax.random.key(0), shapes))
    )

    def gradients(params, batch):
      def loss(params):
        return model.loss(
          params, batch, jax.random.key(0), train=True, step=jnp.int32(0)
        )[0]

      return jax.grad(loss)(params)

    compiled = jax.jit(gradients).lower(params, shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  return (temporary(16) - temporary(8)) / 8


@pytest.mark.parametrize(
  'encoder, sparse_layers, remat',
  [
    (False, 0, 'none'),
    (False, 2, 'full'),
    pytest.param(False, 2, 'none', marks=pytest.mark.slow),
    pytest.param(False, 2, 'dots', marks=pytest.mark.slow),
    pytest.param(True, 2, 'full', marks=pytest.mark.slow),
  ],
)
def test_it_is_what_xla_allocates(encoder, sparse_layers, remat):
  model = make_model(encoder, sparse_layers, remat)
  lengths = LENGTHS if encoder else {'targets': 128}
  computed = activation_memory(model, lengths).total
  assert computed == pytest.approx(allocated(model, lengths), rel=0.15)


def test_full_rematerialisation_keeps_the_input_of_every_block():
  lengths = {'targets': 128}

  def saved(layers):
    model = tiny_models.make_model(encoder=False, layers=layers, scan=True)
    return activation_memory(model, lengths, remat='full').saved

  # 128 tokens of width 16 in float32, for each block more.
  assert saved(8) - saved(4) == 4 * 128 * 16 * 4


def test_bfloat16_halves_what_products_give():
  lengths = {'targets': 128}
  model = make_model(False, 0, 'dots')
  wide, narrow = (
    activation_memory(model, lengths, dtype=dtype).saved
    for dtype in ('float32', 'bfloat16')
  )
  # Six blocks keep their input, 64 wide, queries, keys, values, each 2 x 8,
  # attention's output, 64, and the hidden layer, 256.
  assert wide - narrow >= 6 * 128 * 2 * (64 + 3 * 16 + 64 + 256)


def test_an_unknown_policy():
  with pytest.raises(ValueError, match="one of none, full, dots, not 'some'"):
    activation_memory(make_model(False, 0, 'none'), {'targets': 8}, 'some')
