"""Decoding: exact, the same alone and in any batch, and as it is defined."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import tiny_models

from sparse_experts import sharding
from sparse_experts.data.special_tokens import NO_TOKEN, T5, SpecialTokens
from sparse_experts.models import beam_search
from sparse_experts.models.decoding import BeamSearch, Sampling
from sparse_experts.models.language_model import answered
from sparse_experts.moe import grouped_matmul
from sparse_experts.moe.routers.hash import Hash

EOS = 1

FAMILIES = {
  'encoder_decoder': dict(encoder=True),
  'encoder_decoder_scanned': dict(encoder=True, sparse_layers=1, scan=True),
  'decoder': dict(encoder=False, k=2),
  'decoder_scanned_own_bias': dict(
    encoder=False, sparse_layers=1, scan=True, own_bias=True
  ),
  'decoder_rotary': dict(
    encoder=False,
    attention=dict(num_kv_heads=1, rotary_base=100.0, scaled=True, norm=True),
  ),
  'decoder_relative': dict(encoder=False, attention=dict(relative=True)),
  # Groups of two sequences, which a single new token each does not fill.
  'groups': dict(encoder=True, group_size=24),
  'hash': dict(
    encoder=False,
    make_router=functools.partial(
      Hash, num_experts=8, vocab_size=tiny_models.VOCAB
    ),
    loss_weights={},
  ),
  'sparse_dense': dict(encoder=True, extra_mlp=True),
  'dense': dict(encoder=True, sparse_layers=0),
}
SLOW = ('sparse_dense', 'dense', 'decoder_relative')


def exact(model, batch, params):
  """Teacher-forced log-probabilities without capacity, [B, L, V]."""

  def log_probs(params):
    logits_BxLxV, _ = model.module.apply({'params': params}, batch)
    return jax.nn.log_softmax(logits_BxLxV)

  return jax.jit(log_probs)(params)


def incremental(model, batch, params):
  """The same, one token after the other through the cache."""
  L = batch['decoder_input_tokens'].shape[1]

  def log_probs(params):
    logits_BxV, variables = model.module.apply(
      {'params': params}, batch, L, method='start', mutable=['cache']
    )

    def take(cache, token_B):
      logits_BxV, variables = model.module.apply(
        {'params': params, 'cache': cache},
        token_B,
        method='step',
        mutable=['cache'],
      )
      return variables['cache'], logits_BxV

    tokens_LxB = batch['decoder_input_tokens'][:, 1:].T
    _, rest_LxBxV = jax.lax.scan(take, variables['cache'], tokens_LxB)
    logits_BxLxV = jnp.concatenate([logits_BxV[None], rest_LxBxV]).swapaxes(
      0, 1
    )
    return jax.nn.log_softmax(logits_BxLxV)

  return jax.jit(log_probs)(params)


@pytest.mark.parametrize(
  'family',
  [
    pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW))
    for name in FAMILIES
  ],
)
def test_teacher_forced_equals_incremental(family):
  arguments = FAMILIES[family]
  model = tiny_models.make_model(layers=2, **arguments)
  batch = tiny_models.make_batch(encoder=arguments['encoder'], targets=12)
  params = tiny_models.make_params(model, batch)
  real_BxL = np.asarray(batch['decoder_target_tokens'] > 0)
  expected = np.asarray(exact(model, batch, params))
  actual = np.asarray(incremental(model, batch, params))
  np.testing.assert_allclose(actual[real_BxL], expected[real_BxL], atol=1e-5)


STRATEGIES = {
  'greedy': Sampling(),
  'sampled': Sampling(temperature=1.0, top_k=20, top_p=0.95),
  'beams': BeamSearch(width=3),
}


@functools.cache
def answering(kind):
  """A model, parameters, a batch without its targets, and keys."""
  encoder = kind == 'encoder'
  scan = dict(scan=True, sparse_layers=1) if encoder else {}
  model = tiny_models.make_model(encoder=encoder, layers=2, **scan)
  batch = tiny_models.make_batch(encoder=encoder)
  params = tiny_models.make_params(model, batch)
  if encoder:
    batch = {'encoder_input_tokens': batch['encoder_input_tokens']}
  else:  # Prompts of different lengths.
    prompt = jnp.arange(8)[None] < jnp.array([1, 2, 3, 4, 5, 6, 7, 8])[:, None]
    batch = {
      'decoder_causal_attention': prompt.astype(jnp.int32),
      'decoder_input_tokens': batch['decoder_input_tokens'] * prompt,
    }
  return model, params, batch, jax.random.split(jax.random.key(5), 8)


@functools.cache
def compiled(kind, strategy):
  """(params, batch, keys) -> tokens and scores."""
  model, *_ = answering(kind)
  return jax.jit(
    functools.partial(model.decode, max_tokens=6, strategy=strategy)
  )


def decode(kind, strategy):
  """Tokens and scores of the whole batch."""
  _, params, batch, keys = answering(kind)
  return jax.device_get(compiled(kind, strategy)(params, batch, keys))


def of_kinds(*default):
  """Runs a test by default with some kinds and strategies, or slowly all."""
  return pytest.mark.parametrize(
    'kind, strategy',
    [
      pytest.param(
        *pair, marks=[] if '-'.join(pair) in default else pytest.mark.slow
      )
      for pair in itertools.product(('encoder', 'prompt'), STRATEGIES)
    ],
  )


@of_kinds('encoder-beams', 'prompt-sampled')
def test_alone_in_a_batch_and_at_any_padding(kind, strategy):
  _, params, batch, keys = answering(kind)
  strategy = STRATEGIES[strategy]
  tokens, scores = decode(kind, strategy)
  assert len({row.tobytes() for row in tokens}) > 4
  for i in (0, 3):
    row = {
      name: jnp.pad(x[i : i + 1], ((0, 0), (0, 5))) for name, x in batch.items()
    }
    alone, score = compiled(kind, strategy)(params, row, keys[i : i + 1])
    np.testing.assert_array_equal(alone[0], tokens[i])
    np.testing.assert_allclose(score[0], scores[i], atol=1e-5)


def test_greedy_is_a_beam_of_one():
  tokens, log_probs = decode('prompt', STRATEGIES['greedy'])
  beams, scores = decode('prompt', BeamSearch(width=1, alpha=0.6))
  np.testing.assert_array_equal(beams[:, 0], tokens)
  penalty = ((5 + (tokens > 0).sum(1)) / 6) ** 0.6
  np.testing.assert_allclose(scores[:, 0], log_probs / penalty, rtol=1e-5)


@of_kinds('encoder-beams', 'prompt-greedy')
def test_scores_of_answers_are_those_of_teacher_forcing(kind, strategy):
  model, params, batch, _ = answering(kind)
  strategy = STRATEGIES[strategy]
  tokens, scores = decode(kind, strategy)
  if isinstance(strategy, BeamSearch):
    tokens, scores = tokens[:, 1], scores[:, 1]
    scores = scores * ((5 + (tokens > 0).sum(1)) / 6) ** strategy.alpha
  forced = jax.jit(
    lambda batch, tokens: model.score(params, answered(batch, tokens))
  )(batch, jnp.asarray(tokens))
  np.testing.assert_allclose(forced, scores, atol=2e-5)


@of_kinds('encoder-beams', 'prompt-greedy')
def test_a_mesh_changes_nothing(kind, strategy):
  model, params, batch, keys = answering(kind)
  strategy = STRATEGIES[strategy]
  tokens, scores = decode(kind, strategy)
  mesh = sharding.make_mesh(data=2, expert=4)
  with sharding.use_mesh(mesh):
    shapes = tiny_models.make_batch(encoder=kind == 'encoder')
    boxed = jax.eval_shape(lambda: model.init(jax.random.key(0), shapes))
    placed = jax.device_put(params, sharding.shardings(boxed, mesh))
    there = {
      name: jax.device_put(x, sharding.batch_sharding(mesh, x.shape))
      for name, x in batch.items()
    }
    found = jax.jit(
      functools.partial(model.decode, max_tokens=6, strategy=strategy),
      out_shardings=sharding.replicated(mesh),
    )(placed, there, keys)
  np.testing.assert_array_equal(found[0], tokens)
  np.testing.assert_allclose(found[1], scores, atol=1e-5)


# A language of a few tokens, whose next depends on position and last token.

V, T = 4, 3
TABLE_TxVxV = np.random.default_rng(3).normal(size=(T, V, V)) * 2
ENDLESS_TxVxV = TABLE_TxVxV.copy()
ENDLESS_TxVxV[:, :, EOS] = -np.inf


def search(width, alpha, logits_TxVxV=TABLE_TxVxV, special_tokens=T5):
  """Tokens [N, T] and scores [N] of the table's start."""

  def step(cache, token_B):  # Every row counts its own positions.
    logits_BxV = jnp.asarray(logits_TxVxV, jnp.float32)[cache, token_B]
    return jnp.minimum(cache + 1, len(logits_TxVxV) - 1), logits_BxV

  logits_2xV = jnp.broadcast_to(logits_TxVxV[0, 0], (2, V))
  tokens, scores = jax.jit(
    lambda logits_2xV: BeamSearch(width, alpha)(
      logits_2xV,
      step,
      jnp.ones(2, jnp.int32),
      max_tokens=len(logits_TxVxV),
      special_tokens=special_tokens,
    )
  )(logits_2xV)
  np.testing.assert_array_equal(tokens[0], tokens[1])
  return np.asarray(tokens[0]), np.asarray(scores[0])


def log_prob(answer, logits_TxVxV):
  last, total = 0, 0.0
  for t, token in enumerate(answer):
    logits_V = logits_TxVxV[t, last]
    total += logits_V[token] - np.log(np.exp(logits_V).sum())
    last = token
  return total


def score(answer, alpha, logits_TxVxV):
  """By hand: log p / ((5 + length) / 6)^alpha."""
  penalty = ((5 + len(answer)) / 6) ** alpha
  return log_prob(answer, logits_TxVxV) / penalty


def check(found, answers, alpha, logits_TxVxV):
  """That these were found, the best first, and nothing else."""
  tokens, scores = found
  padded = [[*answer, *[0] * (T - len(answer))] for answer in answers]
  assert tokens[: len(answers)].tolist() == padded
  expected = [score(answer, alpha, logits_TxVxV) for answer in answers]
  np.testing.assert_allclose(scores[: len(answers)], expected, rtol=1e-5)
  assert (scores[len(answers) :] == -np.inf).all()
  assert not tokens[len(answers) :].any()


@pytest.mark.parametrize(
  'alpha, endless', [(0.0, False), (3.0, False), (0.6, True)]
)
def test_a_wide_beam_is_brute_force(alpha, endless):
  logits_TxVxV = ENDLESS_TxVxV if endless else TABLE_TxVxV
  all_of_them = {
    answer[: answer.index(EOS) + 1] if EOS in answer else answer
    for answer in itertools.product(range(1, V), repeat=T)
  }
  # EOS first, second, third; or, where nothing ends, three of two words.
  whole = [a for a in all_of_them if (EOS in a) != endless]
  assert len(whole) == (8 if endless else 1 + 2 + 4)
  whole.sort(key=lambda answer: -score(answer, alpha, logits_TxVxV))
  check(search(16, alpha, logits_TxVxV), whole, alpha, logits_TxVxV)


@pytest.mark.parametrize('width, alpha', [(2, 0.0), (3, 0.6), (2, 9.0)])
def test_a_narrow_beam_is_its_definition(width, alpha):
  live, ended = [()], []
  for _ in range(T):  # T5's, without its early stop.
    candidates = [(*answer, word) for answer in live for word in range(1, V)]
    candidates.sort(key=lambda answer: -log_prob(answer, TABLE_TxVxV))
    best = candidates[: 2 * width]
    live = [answer for answer in best if answer[-1] != EOS][:width]
    ended += [answer for answer in best if answer[-1] == EOS]
    ended.sort(key=lambda answer: -score(answer, alpha, TABLE_TxVxV))
    ended = ended[:width]
  check(search(width, alpha), ended, alpha, TABLE_TxVxV)


def test_a_narrow_beam_of_several_ends_and_a_token_0():
  # 0 and 3 go on, 1 and 2 end: of (1 + 2) * 2 continuations, as there.
  live, ended, ends = [()], [], (1, 2)
  for _ in range(T):
    candidates = [(*answer, word) for answer in live for word in range(V)]
    candidates.sort(key=lambda answer: -log_prob(answer, TABLE_TxVxV))
    best = candidates[: 3 * 2]
    live = [answer for answer in best if answer[-1] not in ends][:2]
    ended += [answer for answer in best if answer[-1] in ends]
    ended.sort(key=lambda answer: -score(answer, 0.6, TABLE_TxVxV))
    ended = ended[:2]
  special_tokens = SpecialTokens(pad=NO_TOKEN, eos=ends, suppressed=())
  tokens, scores = search(2, 0.6, TABLE_TxVxV, special_tokens)
  padded = [[*answer, *[NO_TOKEN] * (T - len(answer))] for answer in ended]
  assert tokens.tolist() == padded
  expected = [score(answer, 0.6, TABLE_TxVxV) for answer in ended]
  np.testing.assert_allclose(scores, expected, rtol=1e-5)


@pytest.mark.parametrize('size, k', [(9, 9), (128, 3), (1000, 6), (2560, 4)])
def test_the_best_of_many_is_numpy(size, k):
  x_BxM = np.random.default_rng(0).normal(size=(3, size)).astype(np.float32)
  x_BxM[1, 5:] = -np.inf
  x_BxM[2] = np.sort(x_BxM[2])  # All of the best are neighbours.
  values_BxK, index_BxK = beam_search._best(jnp.asarray(x_BxM), k)
  expected_BxK = np.sort(x_BxM)[:, ::-1][:, :k]
  np.testing.assert_array_equal(values_BxK, expected_BxK)
  for b in (0, 2):
    order = np.argsort(-x_BxM[b])
    np.testing.assert_array_equal(index_BxK[b], order[:k])


def test_an_end_is_not_lost_to_hypotheses_that_go_on():
  # Padding, EOS, a, b. At first a and b are likelier than the end, which one
  # list of the two best would drop; but a then ends with .45 x .4 = .18, b with
  # .35 x .4 = .14, and nothing is likelier than the end at once, .2.
  first = [1e-9, 0.2, 0.45, 0.35]
  then = [1e-9, 0.4, 0.3, 0.3]
  tokens, scores = search(2, 0.0, np.log([[first] * 4, [then] * 4]))
  assert tokens.tolist() == [[EOS, 0], [2, EOS]]
  np.testing.assert_allclose(np.exp(scores), [0.2, 0.18], rtol=1e-5)


def test_an_end_that_many_continuations_beat_does_not_count():
  # Width 2: of four continuations. The end at once, .2, is the third; then a-a
  # .205, b-a .195, a-b .164 and b-b .156 are likelier than a's end, .041.
  first = [1e-9, 0.2, 0.41, 0.39]
  then = [1e-9, 0.1, 0.5, 0.4]
  tokens, scores = search(2, 0.0, np.log([[first] * 4, [then] * 4]))
  assert tokens.tolist() == [[EOS, 0], [0, 0]]
  np.testing.assert_allclose(np.exp(scores), [0.2, 0.0], rtol=1e-5)


@pytest.mark.parametrize('alpha, turns', [(0.0, 1), (3.0, 6)])
def test_it_stops_when_no_hypothesis_can_still_win(alpha, turns):
  # An end is .9, a .06, b .04, everywhere. After two tokens the ends are .9 and
  # .06 x .9 = .054, and the best that goes on is a-a, .0036: that is less. With
  # alpha 3 the worst end scores log .054 / (7/6)^3 = -1.84, and of 8 tokens
  # k a could become k log .06 / (13/6)^3: -1.66 of six, -1.94 of seven.
  called = []

  def step(cache, token_B):
    jax.debug.callback(lambda: called.append(1))
    return cache, jnp.broadcast_to(LOGITS, (len(token_B), V))

  LOGITS = jnp.log(jnp.array([1e-9, 0.9, 0.06, 0.04]))
  tokens, scores = jax.jit(
    lambda: BeamSearch(2, alpha)(LOGITS[None], step, {}, max_tokens=8)
  )()
  jax.effects_barrier()
  assert len(called) == turns
  if alpha == 0:
    assert tokens[0].tolist() == [[1, *[0] * 7], [2, 1, *[0] * 6]]
    np.testing.assert_allclose(np.exp(scores[0]), [0.9, 0.054], rtol=1e-5)


def test_it_stops_when_all_are_done():
  # Row 0 ends with its first token, row 1 with its third; of eight allowed.
  turns = []

  def step(t, tokens_B):
    jax.debug.callback(lambda: turns.append(1))
    ends_B = jnp.arange(2) * 2 == t
    return t + 1, jnp.where(ends_B[:, None], *LOGITS)

  LOGITS = jnp.array([[0.0, 5.0, 0.0]]), jnp.array([[9.0, 0.0, 5.0]])
  first = jnp.concatenate([LOGITS[0], LOGITS[1]])
  tokens, log_probs = jax.jit(
    lambda: Sampling()(first, step, jnp.int32(1), None, max_tokens=8)
  )()
  jax.effects_barrier()
  # Padding, though the most probable, is never written.
  assert tokens.tolist() == [[1] + [0] * 7, [2, 2, 1] + [0] * 5]
  assert len(turns) == 2
  by_hand = [5 - np.log(2 + np.exp(5)), 5 - np.log(2 + np.exp(5))]
  by_hand[1] += 2 * (5 - np.log(1 + np.exp(5) + np.exp(9)))
  np.testing.assert_allclose(log_probs, by_hand, rtol=1e-5)


PROBABILITIES = np.array([0.0, 0.06, 0.3, 0.24, 0.4])  # Padding first.


@pytest.mark.parametrize(
  'sampling, expected',
  [
    (Sampling(1.0), PROBABILITIES),
    (Sampling(0.5), PROBABILITIES**2),
    (Sampling(1.0, top_k=2), [0, 0, 0.3, 0, 0.4]),
    # 0.4 + 0.3 reach 0.69, 0.4 alone does not.
    (Sampling(1.0, top_p=0.69), [0, 0, 0.3, 0, 0.4]),
    # Of the best three, 0.94 in all, 0.7 are 74%.
    (Sampling(1.0, top_k=3, top_p=0.74), [0, 0, 0.3, 0, 0.4]),
    (Sampling(1.0, top_k=3, top_p=0.75), [0, 0, 0.3, 0.24, 0.4]),
  ],
)
def test_sampled_frequencies_are_the_distribution(sampling, expected):
  N = 4000
  logits_NxV = jnp.broadcast_to(jnp.log(PROBABILITIES), (N, 5))
  tokens_N = jax.jit(sampling.draw)(
    jax.random.split(jax.random.key(1), N), 3, logits_NxV
  )
  count_V = np.bincount(tokens_N, minlength=5)
  possible_V = np.asarray(expected) > 0
  assert count_V[~possible_V].sum() == 0
  share_V = np.asarray(expected)[possible_V]
  test = scipy.stats.chisquare(count_V[possible_V], N * share_V / share_V.sum())
  assert test.pvalue > 1e-3
  # And a wrong one would be found.
  wrong_V = share_V * np.where(np.arange(len(share_V)), 1.0, 0.7)
  wrong = scipy.stats.chisquare(
    count_V[possible_V], N * wrong_V / wrong_V.sum()
  )
  assert wrong.pvalue < 1e-3


@pytest.mark.parametrize('top_k, top_p', [(5, None), (None, 0.7), (9, 0.5)])
def test_top_k_and_top_p_are_numpy(top_k, top_p):
  logits_BxV = np.random.default_rng(0).normal(size=(6, 40)) * 2
  expected_BxV = np.full_like(logits_BxV, -np.inf)
  for logits_V, expected_V in zip(logits_BxV, expected_BxV):
    order = np.argsort(-logits_V)[:top_k]
    probs = np.exp(logits_V[order]) / np.exp(logits_V[order]).sum()
    if top_p is not None:  # As few as reach p.
      order = order[: 1 + np.flatnonzero(np.cumsum(probs) >= top_p)[0]]
    expected_V[order] = logits_V[order]
  found = Sampling(1.0, top_k, top_p).restrict(jnp.asarray(logits_BxV))
  np.testing.assert_allclose(found, expected_BxV, rtol=1e-6)


@pytest.mark.parametrize(
  'make, message',
  [
    (lambda: Sampling(-0.5), 'temperature must be at least 0 and finite'),
    (lambda: Sampling(float('nan')), 'temperature must be at least 0'),
    (lambda: Sampling(1.0, top_k=0), 'top_k must be at least 1, not 0'),
    (lambda: Sampling(1.0, top_p=1.5), r'top_p must be in \(0, 1\], not 1.5'),
    (lambda: Sampling(top_k=5), 'temperature 0 is greedy'),
    (lambda: BeamSearch(0), 'width of a beam must be at least 1, not 0'),
    (lambda: BeamSearch(2, alpha=-1.0), 'alpha must be at least 0'),
  ],
)
def test_a_strategy_that_is_none_is_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()


@pytest.mark.parametrize('rows', [1, 8, 64, 1000, 4096])
@pytest.mark.parametrize('experts', [1, 8, 64, 512])
def test_padded_rows_are_at_most_twice_the_rows_of_few(rows, experts):
  # So work does not grow with the number of experts.
  size = grouped_matmul._block(rows, experts)
  assert 1 <= size <= rows
  random = np.random.default_rng(0)
  even_E = np.full(experts, 1 / experts)
  for probs_E in (even_E, random.dirichlet(even_E)):
    sizes_E = random.multinomial(rows, probs_E)
    blocks = -(-sizes_E // size)
    assert blocks.sum() * size <= 2 * rows
