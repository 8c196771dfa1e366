"""What a person sees of a run: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time

import jax
import tqdm


class Progress:
  """Reports steps on stderr, from process 0."""

  def __init__(self, start: int, stop: int, positions: int):
    """A run from step `start` to `stop`, each of so many positions."""
    self._start, self._stop = start, stop
    self._positions, self._tokens = positions, 0.0
    self._from: tuple[int, float] | None = None
    self._shown = jax.process_index() == 0
    self._bar = None
    if self._shown and sys.stderr.isatty():
      self._bar = tqdm.tqdm(
        total=stop, initial=start, unit='step', dynamic_ncols=True
      )

  def step(self, step: int) -> None:
    """One step more; `step` are done. Speed is counted from the first on."""
    if self._from is None:
      self._from = (step, time.monotonic())
    if self._bar is not None:
      self._bar.update(1)

  def report(self, step: int, metrics: dict, tokens: float) -> dict[str, float]:
    """Shows metrics of the steps up to `step`; returns the speed.

    Args:
      step: how many are done.
      metrics: of `step.summary`.
      tokens: in the steps since the last report, without padding.
    """
    self._tokens += tokens
    speed = self.speed(step)
    text = f'loss {metrics["loss"]:.3f}' if 'loss' in metrics else 'no loss'
    if metrics['skipped']:
      text += f'  {metrics["skipped"]} skipped'
    if speed:
      without = f'{speed["tokens_per_second_without_padding"]:,.0f}'
      padded = f'{speed["tokens_per_second_with_padding"]:,.0f}'
      text += f'  {without} tokens/s'
      if padded != without:
        text += f' ({padded} with padding)'
    if self._bar is not None:
      self._bar.set_postfix_str(text)
    elif self._shown:
      if speed:
        rest = (self._stop - step) / speed['steps_per_second']
        text += f'  {int(rest // 60)}:{int(rest % 60):02} left'
      self.say(f'step {step}/{self._stop}  {text}')
    return speed

  def speed(self, step: int) -> dict[str, float]:
    """Steps and tokens per second since the first step; empty before two.

    With padding a step has all the positions of a batch, whatever is in them;
    without, the mean number of tokens of the steps that were reported.
    """
    if self._from is None or step <= self._from[0]:
      return {}
    seconds = time.monotonic() - self._from[1]
    steps_per_second = (step - self._from[0]) / seconds
    tokens = self._tokens / (step - self._start)
    return {
      'steps_per_second': steps_per_second,
      'tokens_per_second_with_padding': steps_per_second * self._positions,
      'tokens_per_second_without_padding': steps_per_second * tokens,
    }

  def say(self, text: str) -> None:
    """A line on stderr."""
    if self._bar is not None:
      self._bar.write(text, file=sys.stderr)
    elif self._shown:
      print(text, file=sys.stderr, flush=True)

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()
