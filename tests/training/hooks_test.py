"""Hooks are called in order, when they are due; seeds share a program."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_models
from jax.experimental.compilation_cache import compilation_cache

from sparse_experts import sharding
from sparse_experts.training import hooks, loop, state, step


def run(start=4, stop=9, **options):
  """A run whose state counts its steps, and whose batches are letters."""
  given = {
    'state': start,
    'take': lambda state, batch: (state + 1, {'skipped': 0, 'batch': batch}),
    **options,
  }
  return loop.Run(
    model_dir=None,
    start=start,
    stop=stop,
    batches=iter('abcdefgh'),
    summary=dict,
    progress=types.SimpleNamespace(say=lambda text: said.append(text)),
    **given,
  )


said = []


def test_hooks_see_the_start_and_every_step():
  seen = []
  loop.loop(
    run(stop=6), [lambda r: seen.append((r.step, r.state, r.batch, r.ending))]
  )
  assert seen == [
    (4, 4, None, False),
    (5, 5, 'a', False),
    (6, 6, 'b', True),
  ]


def test_nothing_is_left_to_train():
  seen = []
  loop.loop(run(start=9), [lambda r: seen.append((r.step, r.ending))])
  assert seen == [(9, True)]


def test_seconds_are_those_of_steps(monkeypatch):
  """Not of the first one, which compiles, nor of what is done apart."""
  now = [0.0]
  monkeypatch.setattr(loop.time, 'monotonic', lambda: now[0])

  def take(state, batch):
    now[0] += 100.0 if batch == 'a' else 2.0
    return state, {'skipped': 0, 'tokens': 1.0}

  def pause(r):
    now[0] += 50.0

  written = []
  of = run(state=types.SimpleNamespace(skipped=0), take=take)
  of.progress.step, of.progress.report = lambda _: None, lambda *_: {}
  of.writers = types.SimpleNamespace(
    write=lambda name, step, metrics: written.append(
      (step, metrics.get('seconds_per_step'))
    )
  )
  log = hooks.Log(of.progress, lambda _: 0.1)
  loop.loop(of, [log.add, hooks.Every(2, log), hooks.Every(3, pause)])
  assert of.seconds == 4 * 2.0  # Steps 6 to 9 of 5 to 9.
  assert written == [(6, 2.0), (8, 2.0), (9, 2.0)]
  # A call of one step measures none.
  of = run(start=8, state=of.state, take=take)
  of.progress.step, of.progress.report = lambda _: None, lambda *_: {}
  of.writers = types.SimpleNamespace(
    write=lambda name, step, metrics: written.append(sorted(metrics))
  )
  log = hooks.Log(of.progress, lambda _: 0.1)
  loop.loop(of, [log.add, hooks.Every(2, log)])
  assert of.seconds == 0 and 'seconds_per_step' not in written[-1]


@pytest.mark.parametrize(
  'at_start, steps', [(False, [6, 8, 9]), (True, [4, 6, 8, 9])]
)
def test_every_is_due_at_multiples_and_the_last_step(at_start, steps):
  seen = []
  loop.loop(run(), [hooks.Every(2, lambda r: seen.append(r.step), at_start)])
  assert seen == steps


def test_what_is_before_the_stop_does_not_see_it_and_what_saves_does():
  """As `train` has them: SIGTERM saves, and does not log."""
  seen = []

  def stop_at_7(r):
    r.preempted = r.step == 7

  said.clear()
  due = functools.partial(hooks.Every, 100)
  order = [
    due(lambda r: seen.append(('log', r.step))),
    stop_at_7,
    due(lambda r: seen.append(('save', r.step))),
  ]
  loop.loop(run(), order)
  assert seen == [('save', 7)]
  assert said == ['SIGTERM: stopping after step 7']


@pytest.mark.parametrize('period', [0, 1.5, -2])
def test_periods_are_numbers_of_steps(period):
  with pytest.raises(ValueError, match=f'at least 1, not {period}'):
    hooks.Every(period, print)


# Seeds.


@pytest.fixture
def cache(tmp_path):
  """An empty compilation cache of its own."""
  # The command `precompile` turns the cache of its process off.
  names = ('jax_compilation_cache_dir', 'jax_enable_compilation_cache')
  before = {name: getattr(jax.config, name) for name in names}
  for name, value in zip(names, (str(tmp_path), True)):
    jax.config.update(name, value)
  compilation_cache.reset_cache()
  yield tmp_path
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


MODEL = tiny_models.make_model(
  encoder=False, layers=1, sparse_layers=1, dropout_rate=0.5
)
BATCH = tiny_models.make_batch(encoder=False)


def begin(seed):
  """A new run's state, and its step."""
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  shapes = jax.eval_shape(lambda: BATCH)
  with sharding.use_mesh(mesh):
    boxed, optimizer = state.abstract(
      MODEL, shapes, lambda names: optax.sgd(0.1)
    )
    placed = state.shardings(boxed, mesh)
    rows = len(BATCH['decoder_target_tokens'])
    take = step.jit_train_step(MODEL, optimizer, mesh, placed, batch_size=rows)
    return state.create(MODEL, shapes, optimizer, placed, seed), take


def test_another_seed_is_the_same_program(cache):
  params, norms, entries = [], [], []
  for seed in (1, 2):
    jax.clear_caches()
    now, take = begin(seed)
    params.append(jax.tree.map(np.asarray, now.params))
    for key_seed in (1, 2):
      copy = jax.tree.map(jnp.copy, now)
      _, sums = take(copy, BATCH, jax.random.key(key_seed))
      norms.append(float(sums['objective']))
    assert take._cache_size() == 1
    entries.append({path.name for path in cache.glob('*-cache')})
  # What is drawn differs: parameters, and dropout.
  assert any((x != y).any() for x, y in zip(*map(jax.tree.leaves, params)))
  assert len(set(norms)) == 4
  assert any('train_step' in name for name in entries[0])
  assert any('init' in name for name in entries[0])
  assert entries[0] == entries[1]


def test_draws_are_a_function_of_seed_and_step():
  """As they ever were: the seed's key, folded by step and microbatch."""
  now, take = begin(1)
  now = now.replace(step=jnp.int32(3))
  rng = jax.random.fold_in(jax.random.key(7), 3)
  loss = jax.jit(functools.partial(MODEL.loss, train=True))
  expected, _ = loss(now.params, BATCH, jax.random.fold_in(rng, 0))
  _, sums = take(now, BATCH, jax.random.key(7))
  np.testing.assert_allclose(sums['objective'], expected, rtol=1e-6)
