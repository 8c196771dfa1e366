"""Options are scored by their probability after the question, and no other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from sparse_experts import sharding
from sparse_experts.data.features.text import Text
from sparse_experts.evaluation import scoring

PROMPTS = [[5, 9, 30], [7], [5, 9, 30, 31, 8]]
OPTIONS = [[[3, 1], [9, 9, 9, 1]], [[4, 1], [8, 1], [3, 1]], [[60, 2, 1]]]


@pytest.fixture(scope='module')
def asked():
  """A decoder, its parameters, and the features of PROMPTS."""
  model = tiny_models.make_model(encoder=False, layers=2)
  batch = tiny_models.make_batch(encoder=False)
  params = tiny_models.make_params(model, batch)
  return (
    model,
    params,
    [Text().prompt(np.array(prompt), 6) for prompt in PROMPTS],
  )


@pytest.fixture(scope='module')
def by_hand(asked):
  """log p of each option after each prompt, one token after the other."""
  model, params, _ = asked

  @jax.jit
  def log_probs(tokens_1xL):
    batch = {
      'decoder_input_tokens': tokens_1xL,
      'decoder_target_tokens': jnp.ones_like(tokens_1xL),
    }
    logits, _ = model.module.apply({'params': params}, batch)
    return jax.nn.log_softmax(logits)[0]

  scores = []
  for prompt, options in zip(PROMPTS, OPTIONS):
    scores.append([])
    for option in options:
      inputs = [0, *prompt, *option[:-1]]
      row = np.zeros((1, 12), np.int32)  # What follows changes nothing.
      row[0, : len(inputs)] = inputs
      rest_LxV = np.asarray(log_probs(row))[len(prompt) :]
      scores[-1].append(sum(rest_LxV[t, w] for t, w in enumerate(option)))
  return scores


def test_options_in_one_array(asked, by_hand):
  model, params, rows = asked
  batch = jax.tree.map(lambda *rows: jnp.stack(rows), *rows)
  options_BxWxT = np.zeros((3, 3, 5), np.int32)
  for b, options in enumerate(OPTIONS):
    for o, option in enumerate(options):
      options_BxWxT[b, o, : len(option)] = option
  for per_token in (False, True):
    found_BxO = jax.jit(
      functools.partial(scoring.rank_options, model, per_token=per_token)
    )(params, batch, options_BxWxT)
    for b, options in enumerate(OPTIONS):
      expected = np.array(by_hand[b])
      if per_token:
        expected = expected / [len(option) for option in options]
      np.testing.assert_allclose(
        found_BxO[b, : len(options)], expected, rtol=1e-5
      )
      assert (found_BxO[b, len(options) :] == -np.inf).all()


def test_any_number_of_options_in_batches_of_one_shape(asked, by_hand):
  model, params, rows = asked
  mesh = sharding.make_mesh(data=4, devices=jax.devices()[:4])
  with sharding.use_mesh(mesh):
    score = scoring.OptionScores(model, mesh, batch_size=4, length=7)
    found = score(
      jax.device_put(params, sharding.replicated(mesh)), rows, OPTIONS
    )
    assert [len(scores) for scores in found] == [2, 3, 1]
    for scores, expected in zip(found, by_hand):
      np.testing.assert_allclose(scores, expected, rtol=1e-5)
    with pytest.raises(ValueError, match='has 8 tokens, but there is room for'):
      score(params, rows[:1], [[[2] * 8]])


@pytest.mark.parametrize(
  'scores, choice, is_tied',
  [
    ([-3.0], 0, False),
    ([-3.0, -1.0, -2.0], 1, False),
    ([-3.0, -3.0, -2.0], 2, False),  # Losers may tie.
    ([-3.0, -2.0, -2.0], 1, True),
    ([0.0, 0.0], 0, True),
  ],
)
def test_the_first_of_the_most_probable_is_chosen(scores, choice, is_tied):
  assert scoring.choose(scores, 'Q') == (choice, is_tied)


@pytest.mark.parametrize(
  'scores, message',
  [
    ([np.nan] * 3, 'option 0 of Q has log-likelihood nan'),
    ([-np.inf] * 2, 'option 0 of Q has log-likelihood -inf'),
    ([-1.0, np.nan], 'option 1 of Q'),
    ([-1.0, -2.0, -np.inf], 'option 2 of Q'),
    ([np.inf, -1.0], 'option 0 of Q has log-likelihood inf'),
    ([], 'Q has no option'),
  ],
)
def test_what_cannot_be_ranked_is_refused(scores, message):
  with pytest.raises(ValueError, match=message):
    scoring.choose(scores, 'Q')
