"""From one checkpoint to another, a piece at a time."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from flax import traverse_util

from sparse_experts import storage
from sparse_experts.convert import blocks_before, native, tensor_map
from sparse_experts.convert.formats import FORMATS, Checkpoint, look
from sparse_experts.convert.tensor_map import Places
from sparse_experts.training import checkpoints, directories

_JOURNAL = 'journal.jsonl'
_TOKENIZER = (  # What a tokenizer of Hugging Face may be written in.
  *('added_tokens.json', 'chat_template.jinja', 'merges.txt'),
  *('special_tokens_map.json', 'spiece.model', 'tokenizer.json'),
  *('tokenizer.model', 'tokenizer_config.json', 'vocab.json', 'vocab.txt'),
)


def load(path: str | pathlib.Path, format: str | None = None):
  """Model and parameters of a checkpoint, in memory.

  Replaces what gin has parsed in this process.

  Args:
    path: of a checkpoint, or of a MODEL_DIR: then of its latest.
    format: 't5x', 'hf' or 'native'; None: what it looks like.

  Returns:
    (model, params), for `model.logits(params, batch)` and the rest.

  Raises:
    ValueError, FileNotFoundError: one line that names what is wrong.
  """
  source = look(path, format)
  where = native.target_places(source.model, source.shapes)
  shapes = tensor_map.expected(source.shapes, where)
  arrays = {name: np.empty(shape, np.float32) for name, shape in shapes.items()}

  def write(name, index, array):
    arrays[name][index] = array

  for piece in tensor_map.pieces(source.shapes):
    array = tensor_map.read(piece, source.places[piece.name], source.tensors)
    tensor_map.write(piece, array, where[piece.name], write)
  params = traverse_util.unflatten_dict(arrays, sep='/')
  return source.model, jax.tree.map(jnp.asarray, params)


def convert(
  path: str | pathlib.Path,
  output: str | pathlib.Path,
  *,
  source: str | None = None,
  target: str = 'native',
  gin_files: Sequence[str] = (),
  bindings: Sequence[str] = (),
  search_paths: Sequence[str] = (),
  change: Callable[..., Checkpoint] | None = None,
  dry_run: bool = False,
) -> dict[str, Any]:
  """Writes the checkpoint at `path` into a new folder, in another format.

  One piece is in memory at a time. What is complete survives an interruption,
  in `<output>.partial`, and the same call goes on from there; `output` appears
  when all of it is complete. Replaces what gin has parsed in this process.

  Args:
    path: of the checkpoint, see `load`.
    output: a folder that is not there yet.
    source: its format; None: what it looks like.
    target: the format to write.
    gin_files, bindings, search_paths: see `formats.look`.
    change: (checkpoint, gin_files=, bindings=, search_paths=) -> checkpoint,
      another model made of the input, as by `surgery.selection.select`; then
      `gin_files` and the rest are the output's model. None: as it is.
    dry_run: check, and write nothing.

  Returns:
    A report: step; parameters; tensors and bytes written; unused, what was not
    converted; missing, which is empty; added, blocks of zeros that the output's
    layout needs; unsaid, what of the model's training the output does not say;
    tokenizer, files beside the checkpoint that are copied as they are. Unless
    `dry_run` also sha256 of the parameters, the same in every format but for
    what is added, and resumed, the number of pieces that were there.

  Raises:
    ValueError, FileNotFoundError: one line that names what is wrong. There is
      no output then.
  """
  if target not in FORMATS:
    raise ValueError(f'--to is one of {", ".join(FORMATS)}, not {target!r}.')
  if not os.fspath(output).strip() or not storage.is_local(output):
    raise ValueError(
      f'--output={output} is no local folder, where a checkpoint is converted '
      'to; copy it from there.'
    )
  directories.check_home(output)
  output = pathlib.Path(output).absolute()
  if output.exists() and (not output.is_dir() or any(output.iterdir())):
    raise ValueError(f'{output} is there already; give another --output.')
  directories.check_new(output, by='--output')
  given = {
    'gin_files': gin_files,
    'bindings': bindings,
    'search_paths': search_paths,
  }
  if change is None:
    checkpoint = look(path, source, **given)
  else:
    checkpoint = change(look(path, source), **given)
  if before := FORMATS[target].blocks_before(checkpoint.model):
    checkpoint = blocks_before.lead(checkpoint, before)
  where = FORMATS[target].target_places(checkpoint.model, checkpoint.shapes)
  shapes = tensor_map.expected(checkpoint.shapes, where)
  parameters = sum(math.prod(shape) for shape in checkpoint.shapes.values())
  report = {
    'input': str(checkpoint.path),
    'output': str(output),
    'to': target,
    'step': checkpoint.step,
    'parameters': parameters,
    'tensors': len(shapes),
    'bytes': 4 * sum(math.prod(shape) for shape in shapes.values()),
    'unused': checkpoint.unused,
    'missing': [],
    'added': [
      f'{number} block of zeros before those of the {stack}'
      for stack, number in before.items()
    ],
    'unsaid': FORMATS[target].unsaid(checkpoint.model),
    'tokenizer': [file.name for file in _tokenizer(checkpoint.path)],
  }
  if not dry_run:
    report |= _write(checkpoint, where, target, output)
  return report


def _write(
  checkpoint: Checkpoint, where: Places, target: str, output: pathlib.Path
) -> dict[str, Any]:
  """Writes `output`; returns what that adds to the report."""
  partial = output.with_name(output.name + '.partial')
  journal = _Journal(partial, _fingerprint(checkpoint, target))
  resumed = len(journal.digests)
  try:
    writer = FORMATS[target].Writer(
      tensor_map.Target(
        partial,
        checkpoint.model,
        tensor_map.expected(checkpoint.shapes, where),
        tensor_map.parts(checkpoint.shapes, where),
        checkpoint.step,
      )
    )
    _move(checkpoint, where, writer.write, journal)
    writer.finish(checkpoint.gin)
    for file in _tokenizer(checkpoint.path):
      shutil.copy(file, partial)
  except ValueError:  # The checkpoint cannot be read: no use in going on.
    shutil.rmtree(partial)
    raise
  sha256 = journal.close()
  os.replace(partial, output)
  return {'sha256': sha256, 'resumed': resumed}


def _tokenizer(path: pathlib.Path) -> list[pathlib.Path]:
  """The files of a tokenizer beside a checkpoint, or in its MODEL_DIR."""
  folder = pathlib.Path(checkpoints.root_of(path))
  if folder.name.startswith('checkpoint_'):  # T5X's.
    folder = folder.parent
  return [folder / n for n in _TOKENIZER if (folder / n).is_file()]


def _move(checkpoint: Checkpoint, where: Places, write, journal) -> None:
  """Reads and writes every piece that the journal does not have."""
  every = list(tensor_map.pieces(checkpoint.shapes))
  with tqdm.tqdm(
    total=4 * sum(math.prod(piece.shape) for piece in every),
    unit='B',
    unit_scale=True,
    file=sys.stderr,
    mininterval=1,
  ) as bar:
    for piece in every:
      if str(piece) not in journal.digests:
        array = tensor_map.read(
          piece, checkpoint.places[piece.name], checkpoint.tensors
        )
        tensor_map.write(piece, array, where[piece.name], write)
        journal.add(str(piece), hashlib.sha256(array.data).hexdigest())
      bar.update(4 * math.prod(piece.shape))


class _Journal:
  """Which pieces are complete, in the folder of an unfinished conversion.

  Attributes:
    digests: SHA-256 of each complete piece.
  """

  def __init__(self, folder: pathlib.Path, fingerprint: str):
    """Begins, or goes on where one of the same fingerprint stopped."""
    self._path = folder / _JOURNAL
    self.digests: dict[str, str] = {}
    if folder.exists():
      lines = []
      if self._path.is_file():
        lines = self._path.read_text().splitlines()
      if lines[:1] != [fingerprint]:
        raise ValueError(
          f'{folder} is of another conversion, or of another version of this '
          'checkpoint; delete it, or give another --output.'
        )
      for line in lines[1:]:
        piece, _, digest = line.rpartition(' ')
        if len(digest) == 64:  # The last line may be cut off.
          self.digests[piece] = digest
      if not self.digests:  # Nothing to go on from.
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    head = [fingerprint, *(f'{p} {d}' for p, d in self.digests.items())]
    self._path.write_text('\n'.join(head) + '\n')

  def add(self, piece: str, digest: str) -> None:
    self.digests[piece] = digest
    with self._path.open('a') as file:
      file.write(f'{piece} {digest}\n')

  def close(self) -> str:
    """SHA-256 of all pieces."""
    self._path.unlink()
    lines = [f'{piece} {digest}\n' for piece, digest in self.digests.items()]
    return hashlib.sha256(''.join(sorted(lines)).encode()).hexdigest()


def _fingerprint(checkpoint: Checkpoint, target: str) -> str:
  facts = {
    'path': str(checkpoint.path),
    'target': target,
    'gin': checkpoint.gin,
    'experts': checkpoint.experts,
    'tensors': {
      name: [list(tensor.shape), str(tensor.dtype)]
      for name, tensor in checkpoint.tensors.items()
    },
  }
  text = json.dumps(facts, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()
