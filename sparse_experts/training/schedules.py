"""Learning-rate schedules: functions from a step to a learning rate.

A schedule does not know how long a run is: a decay has its own number of steps,
so that a longer run continues a shorter one. Steps count parameter updates from
0. Every schedule works on Python integers and on traced arrays.
"""

import math
import numbers

import jax.numpy as jnp
import optax


def rsqrt(
  base: float = 1.0, warmup_steps: int = 10_000, linear_warmup: bool = False
) -> optax.Schedule:
  """Inverse square root: `base / sqrt(max(step, warmup_steps))`.

  Constant during the warm-up, as T5 pre-trains; with `linear_warmup` it climbs
  from 0 instead (T5X factors 'constant * linear_warmup * rsqrt_decay'). At
  `warmup_steps` and after, both are the same.

  Args:
    base: the rate at step 1, were there no warm-up.
    warmup_steps: steps before the decay begins, at least 1.
    linear_warmup: multiply by `min(1, step / warmup_steps)`.

  Raises:
    ValueError: `base` is no rate, or `warmup_steps` is not positive.

  Example:
    >>> float(rsqrt(warmup_steps=100)(0)), float(rsqrt(warmup_steps=100)(400))
    (0.10000000149011612, 0.05000000074505806)

  References:
    Raffel et al. 2020, https://arxiv.org/abs/1910.10683, section 3.1.2.
  """
  _check_rate('base', base)
  _check_steps('warmup_steps', warmup_steps, at_least=1)

  def schedule(step):
    rate = base / jnp.sqrt(jnp.maximum(step, warmup_steps))
    return (
      rate * jnp.minimum(1.0, step / warmup_steps) if linear_warmup else rate
    )

  return schedule


def constant(value: float, warmup_steps: int = 0) -> optax.Schedule:
  """`value`, after a linear climb from 0 over `warmup_steps`.

  Raises:
    ValueError: `value` is no rate, or `warmup_steps` is negative.

  Example:
    >>> float(constant(1e-3, warmup_steps=10)(5))
    0.0005000000237487257
  """
  _check_rate('value', value)
  return _after_warmup(warmup_steps, value, optax.constant_schedule(value))


def linear(
  peak: float, warmup_steps: int, decay_steps: int, end: float = 0.0
) -> optax.Schedule:
  """From 0 up to `peak`, then straight to `end`, where it stays.

  Args:
    peak: the rate at step `warmup_steps`.
    warmup_steps: steps of the linear climb; 0 starts at `peak`.
    decay_steps: steps from `peak` to `end`, counted from the end of the
      warm-up: `end` is reached at `warmup_steps + decay_steps`.
    end: the last rate.

  Raises:
    ValueError: a rate is no rate, or a number of steps is out of range.

  Example:
    >>> schedule = linear(1e-3, warmup_steps=10, decay_steps=100)
    >>> float(schedule(60))
    0.0005000000237487257
  """
  _check_rate('peak', peak)
  _check_rate('end', end)
  _check_steps('decay_steps', decay_steps, at_least=1)
  decay = optax.linear_schedule(peak, end, decay_steps)
  return _after_warmup(warmup_steps, peak, decay)


def cosine(
  peak: float, warmup_steps: int, decay_steps: int, end: float = 0.0
) -> optax.Schedule:
  """From 0 up to `peak`, then half a cosine to `end`, where it stays.

  Arguments and errors are those of `linear`.

  Args:
    peak: the highest learning rate.
    warmup_steps: from 0 to `peak`.
    decay_steps: from `peak` to `end`, after the warm-up.
    end: the last learning rate.

  Raises:
    ValueError: as of `linear`.

  Example:
    >>> schedule = cosine(1e-3, warmup_steps=10, decay_steps=100, end=1e-4)
    >>> round(float(schedule(60)), 6)  # halfway: (peak + end) / 2
    0.00055

  References:
    Loshchilov & Hutter 2017, https://arxiv.org/abs/1608.03983, equation 5,
    without restarts.
  """
  _check_rate('peak', peak)
  _check_rate('end', end)
  _check_steps('decay_steps', decay_steps, at_least=1)
  fall = optax.cosine_decay_schedule(1.0, decay_steps)
  return _after_warmup(
    warmup_steps, peak, lambda step: end + (peak - end) * fall(step)
  )


def as_schedule(learning_rate: float | optax.Schedule) -> optax.Schedule:
  """A schedule as it is; a number as `constant`."""
  return learning_rate if callable(learning_rate) else constant(learning_rate)


def _after_warmup(
  warmup_steps: int, peak: float, schedule: optax.Schedule
) -> optax.Schedule:
  """Starts `schedule` at `warmup_steps`, after a line from 0 to `peak`."""
  _check_steps('warmup_steps', warmup_steps, at_least=0)
  if not warmup_steps:
    return schedule
  climb = optax.linear_schedule(0.0, peak, warmup_steps)
  return optax.join_schedules([climb, schedule], [warmup_steps])


def _check_rate(name: str, value: float) -> None:
  is_number = isinstance(value, numbers.Real)
  if not is_number or not math.isfinite(value) or value < 0:
    raise ValueError(
      f'A learning rate is a finite number, at least 0, but {name}={value!r}; '
      f'give a {name} such as 1e-3.'
    )


def _check_steps(name: str, value: int, at_least: int) -> None:
  if not isinstance(value, numbers.Integral) or value < at_least:
    raise ValueError(
      f'{name} is a whole number of steps, at least {at_least}, but '
      f'{name}={value!r}; give a {name} such as 10000.'
    )
