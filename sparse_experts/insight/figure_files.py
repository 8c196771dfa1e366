"""Figures as files, for papers."""

from __future__ import annotations

import io
import typing

from etils import epath

from sparse_experts import storage

if typing.TYPE_CHECKING:
  from matplotlib.figure import Figure

# By kind of file, what it would otherwise say of when it was made.
_KINDS = {'pdf': {'CreationDate': None}, 'svg': {'Date': None}, 'png': {}}


def write(figure: Figure, folder: epath.PathLike, name: str) -> None:
  """Writes FOLDER/NAME.pdf, .svg and .png, the same bytes for the same figure.

  Args:
    figure: of `plots`.
    folder: is made if need be.
    name: of the files, without an ending. The .png has 300 dots an inch.
  """
  import matplotlib

  folder = epath.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  for kind, metadata in _KINDS.items():
    file = io.BytesIO()
    # Type 42: journals take no fonts of type 3, which is matplotlib's choice.
    with matplotlib.rc_context({'svg.hashsalt': name, 'pdf.fonttype': 42}):
      figure.savefig(file, format=kind, dpi=300, metadata=metadata)
    storage.replace(folder / f'{name}.{kind}', file.getvalue())
