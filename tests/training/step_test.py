"""A step of a model of one number, by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparse_experts.models.auxiliary import Totals
from sparse_experts.models.objective import Judged, Objective
from sparse_experts.moe.outputs import Aux
from sparse_experts.training import step
from sparse_experts.training.state import TrainState

KEY = jax.random.key(0)
SGD = optax.sgd(0.5)


@dataclasses.dataclass(frozen=True)
class Line(Objective):
  """The mean over rows of w (x + a draw), and a router's loss of 5 w."""

  module: None = None

  def totals(self, batch):
    rows = jnp.float32(len(batch['x_B']))
    return Totals(rows, {'decoder': rows})

  def outputs(self, params, batch, rng, *, train, step):
    rows = jnp.float32(len(batch['x_B']))
    aux = Aux({'router_z': 5 * params['w']}, {}, tokens=rows)
    y_B = params['w'] * (batch['x_B'] + jax.random.normal(rng))
    return y_B, {'decoder/layers_0': aux}

  def measure(self, y_B, batch, totals):
    return Judged(y_B.sum() / totals.weight, {}, {})


def take(x_B, microbatches):
  """Step 7 of w = 2."""
  params = {'w': jnp.float32(2)}
  before = TrainState(jnp.int32(7), params, SGD.init(params), jnp.int32(0))
  return step.train_step(
    before,
    {'x_B': jnp.array(x_B)},
    KEY,
    model=Line(loss_weights={'router_z': 0.1}),
    optimizer=SGD,
    microbatches=microbatches,
  )


@pytest.mark.parametrize('microbatches', [1, 2])
def test_a_gradient_is_the_batchs_and_microbatches_draw_apart(microbatches):
  after, sums = take([1.0, 2.0, 3.0, 6.0], microbatches)
  rng = jax.random.fold_in(KEY, 7)
  draws = [
    jax.random.normal(jax.random.fold_in(rng, i)) for i in range(microbatches)
  ]
  # The mean of x is 3, and 0.1 * 5 is the router's, once.
  gradient = 3 + np.mean(draws) + 0.5
  np.testing.assert_allclose(sums['gradient_norm'], abs(gradient), rtol=1e-6)
  np.testing.assert_allclose(after.params['w'], 2 - 0.5 * gradient, rtol=1e-6)
  assert (after.step, after.skipped) == (8, 0)


def test_a_gradient_that_is_not_finite_moves_nothing():
  after, sums = take([1.0, np.nan, 3.0, 6.0], 1)
  assert after.params == {'w': 2}
  assert (after.step, after.skipped, sums['skipped']) == (8, 1, 1)
