"""Overlays come after what they change, or it would undo them in silence.

Two files depend on their order only where both bind a name, and only one of
them knows which was meant: the overlay, by a line of its header such as

  # After: gin/models/blocks.gin

A file stands for all that it includes, so this is after every model made of
blocks, and after every recipe that includes such a model. A recipe that has
such a model and an overlay of it is no overlay.
"""

from __future__ import annotations

from collections.abc import Sequence

from sparse_experts.config.provenance import Binding, Source


def check(chains: Sequence[Sequence[Binding]]) -> None:
  """Raises where what an overlay comes after came later, and undid it.

  Args:
    chains: of `provenance.trace`.

  Raises:
    ValueError: one line that says which order was meant.
  """
  for *earlier, last in chains:
    if last.source is None:
      continue
    for binding in earlier:
      if binding.value != last.value:
        _check_pair(binding, last)


def _check_pair(first: Binding, last: Binding) -> None:
  """Of two bindings of a name in files, the second is in effect."""
  assert first.source is not None and last.source is not None
  given, undoing = _apart(first.source, last.source)
  if not undoing:  # What includes a file may change it.
    return
  for overlay in given:
    needs = set(overlay.after)
    of_recipe = overlay is not given[0] and needs & given[0].names
    if of_recipe or not needs & undoing[0].names:
      continue
    earlier, later = undoing[0].name, given[0].name
    order = f'--gin_file={earlier} --gin_file={later}'
    if given[0].parent:
      order = f"include '{earlier}', then '{later}', in {given[0].parent.name}"
    raise ValueError(
      f'{overlay.name} must come after {earlier}, which undoes it: '
      f'{last.name} = {last.value!r} ({last.file}:{last.line}) over '
      f'{first.value!r}; the order meant is {order}.'
    )


def _apart(first: Source, second: Source) -> tuple[list[Source], list[Source]]:
  """Their paths below the file that includes both."""
  paths = first.path(), second.path()
  while all(paths) and paths[0][0] is paths[1][0]:
    paths = paths[0][1:], paths[1][1:]
  return paths
