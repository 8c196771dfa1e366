"""A model with other special tokens is the same model, its tokens renamed."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf
import tiny_models

from sparse_experts.data import converters, prompts, streams
from sparse_experts.data.special_tokens import NO_TOKEN, SpecialTokens
from sparse_experts.evaluation import scoring
from sparse_experts.models import policy_gradient
from sparse_experts.models.decoding import BeamSearch
from sparse_experts.models.language_model import answered
from sparse_experts.moe.outputs import Aux
from sparse_experts.training import step

V = tiny_models.VOCAB
# T5's, but that a fourth of the tokens end an answer.
T5 = SpecialTokens(eos=tuple(range(1, V, 4)))
# Names of the tokens from 1 on: text may be 0, and T5's 0 is only a start.
NAMES = np.random.default_rng(7).permutation(V - 1)
MIXTRAL = NO_TOKEN, V - 1, np.array([V - 1, *NAMES])
# All names are others, T5's 0 among them, which pads and starts.
OLMOE = 1, 1, np.array([1, *np.delete(np.roll(np.arange(V), 9), 10)])


def renamed(model, params, pad, start, names_V):
  """The same model of tokens `names_V`, by T5's ids."""
  special_tokens = SpecialTokens(
    pad=pad,
    eos=[int(names_V[i]) for i in T5.eos],
    start=start,
    suppressed=(start,),
  )
  module = model.module.clone(special_tokens=special_tokens)
  ids_V = np.argsort(names_V)  # T5's, by name.
  params = {
    **params,
    'embed': {'embedding': params['embed']['embedding'][ids_V]},
    'logits': {'kernel': params['logits']['kernel'][:, ids_V]},
  }
  return dataclasses.replace(model, module=module), params


def all_of_it(model, params, batch, questions, options_BxWxT):
  """What a model makes of tokens: numbers, and tokens in the last two."""
  state = step.TrainState(jnp.int32(0), params, (), jnp.int32(0))
  loss, sums = model.loss(params, batch, train=False)
  greedy, log_probs = model.decode(params, questions, max_tokens=5)
  beams, scores = model.decode(
    params, questions, max_tokens=5, strategy=BeamSearch(2)
  )
  _, gradients_sums = step.gradients(
    state, batch, jax.random.key(0), model=model
  )
  without = {k: x for k, x in batch.items() if k != 'decoder_target_tokens'}
  numbers = {
    'loss': loss,
    'chosen': [s['chosen_E'] for s in sums['layers'].values()],
    'score': model.score(params, batch),
    'ranked': scoring.rank_options(model, params, questions, options_BxWxT),
    'log_probs': log_probs,
    'scores': scores,
    'objective': gradients_sums['objective'],
    'every position': model.logits(params, without).max(-1),
    'no target': model.logits(params, batch).any(-1),
  }
  return numbers, {'greedy': greedy, 'beams': beams}


@pytest.mark.parametrize('encoder, others', [(True, MIXTRAL), (False, OLMOE)])
def test_the_same_by_other_names(encoder, others):
  pad, start, names_V = others
  model = tiny_models.make_model(encoder=encoder, layers=1, sparse_layers=1)
  model = dataclasses.replace(
    model, module=model.module.clone(special_tokens=T5)
  )
  batch = tiny_models.make_batch(rows=4, inputs=6, targets=6, encoder=encoder)
  del batch['decoder_loss_weights']  # The model's to say.
  params = tiny_models.make_params(model, batch)
  questions = {k: x for k, x in batch.items() if k.startswith('encoder')}
  if not encoder:
    rows = [[5, 9, 30], [7], [40, 2, 2, 9, 9], [50]]
    rows = [prompts.features('decoder', np.array(r), 5) for r in rows]
    questions = jax.tree.map(lambda *rows: jnp.stack(rows), *rows)
  options_BxWxT = np.zeros((4, 2, 3), np.int32)
  options_BxWxT[:, 0] = [40, 3, 1]
  options_BxWxT[1:, 1] = [50, 1, 0]

  def rename(name, x):
    if not name.endswith('_tokens'):
      return x
    filled = x == 0
    if name == 'decoder_input_tokens':
      first = jnp.arange(x.shape[-1]) == 0
      return jnp.where(filled, jnp.where(first, start, pad), names_V[x])
    return jnp.where(filled, pad, names_V[x])

  expected, written = jax.jit(functools.partial(all_of_it, model))(
    params, batch, questions, options_BxWxT
  )
  # A token that is written is called 0.
  zero, first = int(np.flatnonzero(names_V == 0)[0]), written['greedy'][0, 0]
  names_V = names_V.copy()
  names_V[[zero, first]] = names_V[[first, zero]]
  other, other_params = renamed(model, params, pad, start, names_V)
  found, tokens = jax.jit(functools.partial(all_of_it, other))(
    other_params,
    {name: rename(name, x) for name, x in batch.items()},
    {name: rename(name, x) for name, x in questions.items()},
    rename('option_tokens', options_BxWxT),
  )
  for name, x in expected.items():
    np.testing.assert_allclose(found[name], x, rtol=1e-5, err_msg=name)
  assert tokens['greedy'][0, 0] == 0 and tokens['greedy'][0, 1] != pad
  for name, x in written.items():
    x = np.asarray(x)
    assert (x == 0).any(), name  # Some end.
    theirs = np.where(x == 0, pad, names_V[x])
    np.testing.assert_array_equal(tokens[name], theirs, err_msg=name)


def test_what_is_written_may_be_token_0():
  special_tokens = SpecialTokens(pad=NO_TOKEN, eos=1, start=1, suppressed=())
  logits_TxV = jnp.array([[3.0, 0, 0], [3, 0, 0], [0, 3, 0], [3, 0, 0]])

  def advance(t, tokens_B):
    return t + 1, logits_TxV[t][None]

  tokens, log_prob = BeamSearch(1, 0.0)(
    logits_TxV[:1],
    advance,
    jnp.int32(1),
    max_tokens=4,
    special_tokens=special_tokens,
  )
  assert tokens.tolist() == [[[0, 0, 1, NO_TOKEN]]]
  each = 3 - np.log(2 + np.exp(3))
  np.testing.assert_allclose(log_prob, [[3 * each]], rtol=1e-5)


def test_the_length_of_an_answer_counts_its_end_alone():
  # Width 1, alpha 1: log p / ((5 + length) / 6), of 2 tokens.
  logits_TxV = jnp.array([[3.0, 0, 0], [0, 3, 0], [3, 0, 0], [3, 0, 0]])

  def advance(t, tokens_B):
    return t + 1, logits_TxV[t][None]

  _, score = BeamSearch(1, 1.0)(
    logits_TxV[:1],
    advance,
    jnp.int32(1),
    max_tokens=4,
    special_tokens=SpecialTokens(pad=NO_TOKEN, eos=1, suppressed=()),
  )
  each = 3 - np.log(2 + np.exp(3))
  np.testing.assert_allclose(score, [[2 * each / (7 / 6)]], rtol=1e-5)


def test_answers_follow_a_prompt_that_begins_with_its_own_token():
  special_tokens = SpecialTokens(pad=NO_TOKEN, eos=2, start=None)
  rows = [
    prompts.features('decoder', np.array(row), 3, special_tokens)
    for row in ([7, 0, 8], [9])
  ]
  assert rows[0]['decoder_input_tokens'].tolist() == [7, 0, 8, -1]
  assert rows[0]['decoder_causal_attention'].tolist() == [1, 1, 1, 0]
  assert rows[1]['decoder_input_tokens'].tolist() == [9, -1, -1, -1]
  batch = jax.tree.map(lambda *rows: jnp.stack(rows), *rows)
  found = answered(batch, jnp.array([[5, 0, 2], [0, 2, -1]]), special_tokens)
  assert found['decoder_input_tokens'].tolist() == [
    [7, 0, 8, 5, 0, 2],
    [9, 0, 2, -1, -1, -1],
  ]
  assert found['decoder_target_tokens'].tolist() == [
    [0, 8, 5, 0, 2, -1],
    [0, 2, -1, -1, -1, -1],
  ]
  assert found['decoder_loss_weights'].astype(int).tolist() == [
    [0, 0, 1, 1, 1, 0],
    [1, 1, 0, 0, 0, 0],
  ]
  with pytest.raises(ValueError, match='no start token'):
    prompts.features('decoder', np.zeros(0), 3, special_tokens)


def test_rewards_of_inputs_are_of_their_tokens():
  # Token 0 is text, 5 pads: 2 inputs and 2 targets in row 0, 3 and 1 in row 1.
  batch = {'encoder_input_tokens': jnp.array([[0, 7, 5], [7, 0, 0]])}
  log_probs_BxL = jnp.array([[-1.0, -3.0], [-2.0, -9.0]])
  weights_BxL = jnp.array([[1.0, 1.0], [1.0, 0.0]])
  auxes = {
    'encoder/layers_0': Aux({}, {}, decisions={'value': jnp.zeros((2, 3))})
  }
  found = policy_gradient.losses(
    auxes,
    batch,
    log_probs_BxL,
    weights_BxL,
    3.0,
    special_tokens=SpecialTokens(pad=5),
  )
  # Mean over targets of squared rewards: row 0 (2 targets) -2, row 1 (1) -2.
  value = found['encoder/layers_0'].losses['value']
  np.testing.assert_allclose(value, (2 * 4 + 1 * 4) / 3, rtol=1e-6)


LENGTHS = {'inputs': 5, 'targets': 4}


def rows_of(converter, pack, special_tokens):
  """Rows of two examples, 0 among their tokens."""
  examples = [
    {'inputs': [8, 0], 'targets': [0, 9, 2]},
    {'inputs': [0, 0, 2], 'targets': [2]},
  ]
  dataset = tf.data.Dataset.from_generator(
    lambda: iter(examples),
    output_signature=dict.fromkeys(LENGTHS, tf.TensorSpec([None], tf.int32)),
  )
  convert = converters.make(converter, pack, special_tokens=special_tokens)
  return [
    {name: x.tolist() for name, x in row.items()}
    for row in convert(dataset, LENGTHS).as_numpy_iterator()
  ]


def test_rows_have_the_padding_and_the_start_of_a_model():
  mixtral = SpecialTokens(pad=NO_TOKEN, eos=2, start=1)
  first, second = rows_of('encoder_decoder', False, mixtral)
  assert first['encoder_input_tokens'] == [8, 0, -1, -1, -1]
  assert first['decoder_input_tokens'] == [1, 0, 9, 2]
  assert first['decoder_target_tokens'] == [0, 9, 2, -1]
  assert first['decoder_loss_weights'] == [1, 1, 1, 0]
  assert second['encoder_input_tokens'] == [0, 0, 2, -1, -1]
  assert second['decoder_input_tokens'] == [1, 2, -1, -1]
  assert second['decoder_target_tokens'] == [2, -1, -1, -1]
  (packed,) = rows_of('encoder_decoder', True, mixtral)
  assert packed['encoder_input_tokens'] == [8, 0, 0, 0, 2]
  assert packed['encoder_segment_ids'] == [1, 1, 2, 2, 2]
  assert packed['decoder_input_tokens'] == [1, 0, 9, 1]
  assert packed['decoder_target_tokens'] == [0, 9, 2, 2]
  first, second = rows_of('decoder', False, SpecialTokens(pad=6, start=6))
  assert second['decoder_input_tokens'] == [6, 0, 0, 2, 2, *[6] * 4]
  assert second['decoder_target_tokens'] == [0, 0, 2, 2, *[6] * 5]
  assert second['decoder_causal_attention'] == [1, 1, 1, 1, *[0] * 5]
  assert second['decoder_loss_weights'] == [0, 0, 0, 1, *[0] * 5]
  with pytest.raises(ValueError, match='START_ID'):
    rows_of('decoder', False, SpecialTokens(start=None))


def test_the_end_of_a_split_is_filled_with_padding():
  special_tokens = SpecialTokens(pad=NO_TOKEN, start=3)
  *_, last = streams.eval_batches(
    'tiny_sums',
    'validation',
    {'inputs': 8, 'targets': 8},
    64,
    'decoder',
    modules=['tiny_tasks'],
    special_tokens=special_tokens,
  )
  empty_B = ~last['decoder_loss_weights'].any(1)
  assert empty_B.any() and not empty_B[0]
  for name in ('decoder_input_tokens', 'decoder_target_tokens'):
    assert (last[name][empty_B] == NO_TOKEN).all()
  assert (last['decoder_input_tokens'][~empty_B, 0] == 3).all()


def test_streams_of_before_go_on_and_others_do_not(tmp_path):
  def stream(special_tokens):
    return streams.Batches(
      'tiny_sums',
      'train',
      {'inputs': 8, 'targets': 8},
      4,
      'decoder',
      seed=0,
      modules=['tiny_tasks'],
      special_tokens=special_tokens,
    )

  stream(SpecialTokens()).save(tmp_path)
  file = tmp_path / 'batches.json'
  saved = json.loads(file.read_text())
  del saved['pad'], saved['start']  # As it once was.
  file.write_text(json.dumps(saved))
  stream(SpecialTokens()).restore(tmp_path)
  with pytest.raises(ValueError, match='have pad 0, these have -1'):
    stream(SpecialTokens(pad=NO_TOKEN)).restore(tmp_path)


def test_a_task_ends_texts_as_the_model_ends_answers():
  streams.check_vocabulary('docs_lm', 9000, special_tokens=SpecialTokens(eos=1))
  streams.check_vocabulary(
    'docs_lm', 9000, special_tokens=SpecialTokens(eos=(2, 1))
  )
  with pytest.raises(ValueError, match=r'token 1, .* with 2.*EOS_IDS = \(1,\)'):
    streams.check_vocabulary(
      'docs_lm', 9000, special_tokens=SpecialTokens(eos=2)
    )


def test_padding_is_no_end():
  with pytest.raises(ValueError, match='-1'):
    SpecialTokens(pad=2, eos=(1, 2))
