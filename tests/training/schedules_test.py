import jax
import numpy as np
import pytest

from sparse_experts.training import schedules


def rates(schedule, steps):
  """The schedule at each step, traced: the path a train step takes."""
  return jax.jit(jax.vmap(schedule))(np.asarray(steps))


def test_rsqrt_is_constant_during_the_warmup_and_then_falls():
  # 2/sqrt(100) = .2 up to step 100; at 400 2/20 = .1; at 10000 2/100 = .02.
  schedule = schedules.rsqrt(base=2.0, warmup_steps=100)
  np.testing.assert_allclose(
    rates(schedule, [0, 50, 100, 400, 10_000]), [0.2, 0.2, 0.2, 0.1, 0.02]
  )


def test_rsqrt_with_linear_warmup_climbs_to_the_same_peak():
  schedule = schedules.rsqrt(base=2.0, warmup_steps=100, linear_warmup=True)
  np.testing.assert_allclose(
    rates(schedule, [0, 50, 100, 400]), [0, 0.1, 0.2, 0.1], rtol=1e-6
  )


def test_rsqrt_defaults_are_those_of_t5():
  # 1 / sqrt(10000).
  np.testing.assert_allclose(schedules.rsqrt()(0), 0.01, rtol=1e-6)


def test_constant():
  np.testing.assert_allclose(
    [schedules.constant(0.3)(step) for step in (0, 1000)], [0.3, 0.3]
  )
  np.testing.assert_allclose(
    rates(schedules.constant(0.3, warmup_steps=3), [0, 1, 3, 1000]),
    [0, 0.1, 0.3, 0.3],
    rtol=1e-6,
  )


def test_linear_counts_its_decay_from_the_end_of_the_warmup():
  # Up 10 steps to 1, down 100 steps to .2: at 60 halfway, (1 + .2) / 2 = .6.
  schedule = schedules.linear(1.0, warmup_steps=10, decay_steps=100, end=0.2)
  np.testing.assert_allclose(
    rates(schedule, [0, 5, 10, 60, 110, 9999]),
    [0, 0.5, 1, 0.6, 0.2, 0.2],
    rtol=1e-6,
  )


def test_cosine_counts_its_decay_from_the_end_of_the_warmup():
  # A third of the way the cosine is .5: .2 + .8 (1 + .5) / 2 = .8.
  schedule = schedules.cosine(1.0, warmup_steps=10, decay_steps=300, end=0.2)
  np.testing.assert_allclose(
    rates(schedule, [0, 5, 10, 110, 160, 310, 9999]),
    [0, 0.5, 1, 0.8, 0.6, 0.2, 0.2],
    rtol=1e-6,
  )


@pytest.mark.parametrize('family', [schedules.linear, schedules.cosine])
def test_a_decay_may_start_at_its_peak(family):
  schedule = family(0.4, warmup_steps=0, decay_steps=10)
  np.testing.assert_allclose(rates(schedule, [0, 10]), [0.4, 0], atol=1e-8)


def test_as_schedule():
  schedule = schedules.rsqrt()
  assert schedules.as_schedule(schedule) is schedule
  assert schedules.as_schedule(0.5)(7) == 0.5


@pytest.mark.parametrize(
  ('build', 'names'),
  [
    (lambda: schedules.rsqrt(base=float('nan')), 'base=nan'),
    (lambda: schedules.rsqrt(warmup_steps=0), 'warmup_steps=0'),
    (lambda: schedules.rsqrt(warmup_steps=1e4), 'warmup_steps=10000.0'),
    (lambda: schedules.constant(-1e-3), 'value=-0.001'),
    (lambda: schedules.constant('1e-3'), "value='1e-3'"),
    (lambda: schedules.constant(1e-3, -1), 'warmup_steps=-1'),
    (lambda: schedules.linear(float('inf'), 1, 1), 'peak=inf'),
    (lambda: schedules.linear(1e-3, 0, 0), 'decay_steps=0'),
    (lambda: schedules.linear(1e-3, -5, 1), 'warmup_steps=-5'),
    (lambda: schedules.cosine(1e-3, 1, -1), 'decay_steps=-1'),
    (lambda: schedules.cosine(1e-3, 1, 1, end=-1.0), 'end=-1.0'),
  ],
)
def test_bad_arguments_are_named_in_one_line(build, names):
  with pytest.raises(ValueError) as error:
    build()
  assert names in str(error.value)
  assert '\n' not in str(error.value)
