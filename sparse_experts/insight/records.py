"""Routing records of a checkpoint on a split or texts: made, saved, read."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.typing import ArrayLike

from sparse_experts import sharding
from sparse_experts.data import prompts
from sparse_experts.data.dataset import Dataset
from sparse_experts.data.features.base import TokenIds
from sparse_experts.data.features.text import TextToText
from sparse_experts.inference import given_texts
from sparse_experts.models.layout import LayerId
from sparse_experts.models.objective import Objective
from sparse_experts.moe import Record
from sparse_experts.numbers import Count
from sparse_experts.training import checkpoints, global_batch, step
from sparse_experts.training.checkpoints import restore_params

_STATIC = ('num_experts', 'group_size', 'capacity')


@dataclasses.dataclass(frozen=True)
class Records:
  """What every sparse layer did with every token, and which tokens they were.

  Attributes:
    layers: 'encoder/layers_1', 'decoder/layers_1', ... -> `moe.Record` of numpy
      arrays; rows of batches are one below the other.
    tokens: 'encoder', 'decoder' -> int32 [B, L], ids that the layers saw: the
      decoder's inputs, which are its targets one step later. Tokens without
      ids, as patches of an image, have their positions; and no pieces.
    domains: likewise, the task (domain) of each token; empty where unknown.
    pieces: likewise, id -> text of those that occur.
    domain_names: what the numbers in `domains` mean.
    facts: 'task', 'split', 'step', 'capacity_factor', where known, and
      'inputs', a digest of what was recorded; of texts also 'texts', one a row.
  """

  layers: Mapping[str, Record]
  tokens: Mapping[str, np.ndarray]
  domains: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
  pieces: Mapping[str, Mapping[int, str]] = dataclasses.field(
    default_factory=dict
  )
  domain_names: tuple[str, ...] = ()
  facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def save(self, path: epath.PathLike) -> None:
    """Writes one compressed .npz, whole or not at all."""
    arrays = {}
    for kind in ('tokens', 'domains'):
      for stack, ids_BxL in getattr(self, kind).items():
        arrays[f'{kind}/{stack}'] = ids_BxL
    static = {}
    for name, layer in self.layers.items():
      fields = {
        field.name: getattr(layer, field.name)
        for field in dataclasses.fields(layer)
      }
      static[name] = {field: fields.pop(field) for field in _STATIC}
      for field, x in fields.items():
        if x is not None:
          arrays[f'layers/{name}/{field}'] = x
    about = {
      'layers': static,
      'pieces': self.pieces,
      'domain_names': self.domain_names,
      'facts': self.facts,
    }
    file = io.BytesIO()
    np.savez_compressed(file, about=np.array(json.dumps(about)), **arrays)
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f'{path.name}.partial'
    partial.write_bytes(file.getvalue())
    partial.replace(path)


def load(path: epath.PathLike) -> Records:
  """What `Records.save` wrote.

  Raises:
    FileNotFoundError: there is no such file. ValueError: it is something else.
  """
  path = epath.Path(path)
  if not path.exists():
    raise FileNotFoundError(
      f'no routing record {path}; `python -m sparse_experts record` writes one.'
    )
  try:
    with np.load(io.BytesIO(path.read_bytes())) as file:
      arrays = dict(file)
    about = json.loads(str(arrays.pop('about')))
  except (KeyError, ValueError, OSError, EOFError) as error:
    raise ValueError(
      f'{path} is not a routing record; `python -m sparse_experts record` '
      'writes one.'
    ) from error

  def below(prefix):
    return {
      name.removeprefix(prefix): x
      for name, x in arrays.items()
      if name.startswith(prefix)
    }

  # Records of earlier versions call a position a place.
  arrays = {
    name.replace('/place_BxLxK', '/position_BxLxK'): x
    for name, x in arrays.items()
  }

  return Records(
    layers={
      name: Record(**static, **below(f'layers/{name}/'))
      for name, static in about['layers'].items()
    },
    tokens=below('tokens/'),
    domains=below('domains/'),
    pieces={
      stack: {int(i): text for i, text in pieces.items()}
      for stack, pieces in about['pieces'].items()
    },
    domain_names=tuple(about['domain_names']),
    facts=about['facts'],
  )


def collect(
  pairs: Iterable[tuple[Mapping[str, ArrayLike], Mapping[str, Record]]],
  token_ids: Mapping[str, TokenIds] = TextToText.token_ids,
) -> Records:
  """Batches and what `Objective.record` said of each, as one.

  In a notebook:

      take = jax.jit(model.record)
      records = collect((batch, take(params, batch)) for batch in batches)

  Args:
    pairs: what is put together.
    token_ids: `Features.token_ids` of the batches.
  """
  batches, layers, digest = [], [], hashlib.sha256()
  for batch, of_layers in pairs:
    batches.append({name: np.asarray(x) for name, x in batch.items()})
    for name in sorted(batch):
      digest.update(name.encode() + batches[-1][name].tobytes())
    layers.append(jax.tree.map(np.asarray, of_layers))
  if not batches:
    raise ValueError('there is no batch to record; choose another split.')

  def column(kind):
    names = {stack: getattr(ids, kind) for stack, ids in token_ids.items()}
    return {
      stack: np.concatenate([batch[name] for batch in batches])
      for stack, name in names.items()
      if name in batches[0]
    }

  # Not through jax.tree.map, which sorts the layers by name.
  whole = {
    name: jax.tree.map(
      lambda *parts: np.concatenate(parts), *(part[name] for part in layers)
    )
    for name in sorted(layers[0], key=LayerId.parse)
  }
  positions = {
    LayerId.parse(name).stack: _positions(layer)
    for name, layer in whole.items()
  }
  return Records(
    layers=whole,
    tokens={**positions, **column('tokens')},
    domains=column('task_ids'),
    facts={'inputs': digest.hexdigest()[:16]},
  )


def _positions(layer: Record) -> np.ndarray:
  """The position of each token, int32 [B, L]."""
  B, L, _ = layer.expert_BxLxK.shape
  return np.broadcast_to(np.arange(L, dtype=np.int32), (B, L)).copy()


def record(
  model: Objective,
  model_dir: str,
  dataset: Dataset,
  *,
  texts: Sequence[Mapping[str, Any]] | None = None,
  microbatches: Count = 1,
  parameters: str = 'trained',
  placement: sharding.Placement = sharding.DATA_PARALLEL,
  dry_run: bool = False,
) -> tuple[Records | None, epath.Path]:
  """Records the latest checkpoint in `model_dir` on a split, or on texts.

  At the model's evaluation capacity, as `evaluate`. Where the task knows the
  domains of its tokens they are recorded too.

  Args:
    model, dataset: who routes what.
    model_dir: a run's directory, or one checkpoints/<step> of it.
    texts: in place of the split, 'inputs' and maybe 'targets' each, as
      `prompts.read` has them: one a row, as the dataset's task would make it.
      Where an encoder-decoder has no targets, its decoder is given the model's
      own answer, the most probable token at each step.
    microbatches: parts a batch is run in, to save memory.
    parameters: see `checkpoints.restore_params`; a file of 'ema' ends so.
    placement: as in `train.train`; any reads any checkpoint.
    dry_run: check all, down to the first batch, and record none.

  Returns:
    The records, and where they are written:
    MODEL_DIR/records/<task>-<split>-<step>.npz, or of texts
    MODEL_DIR/records/texts/<task>-<digest>-<step>.npz, a digest of the texts,
    the lengths and the capacity.

  Raises:
    ValueError: there is no sparse layer; texts, and the model reads none.
  """
  given = None
  if texts is not None:
    features = given_texts.features_of(model)
    model.check_data(dataset)
    dataset = dataclasses.replace(dataset, pack=False, task_ids=False)
    given = prompts.tokenized(texts, dataset, features)
    batches = prompts.batches(given, dataset, features)
  else:
    if dataset.task_names() and not dataset.task_ids:
      dataset = dataclasses.replace(dataset, task_ids=True)
    batches = dataset.evaluation(model.features)
  with placement.use() as mesh:
    params, at = restore_params(
      model, model_dir, dataset, mesh, parameters, dry_run
    )
    made_of = None
    if texts is not None:
      lengths = dict(sorted(dataset.feature_lengths.items()))
      made_of = [texts, lengths, model.capacity_factor_eval]
    path = _path(model_dir, dataset, made_of, at, parameters)
    if dry_run:
      next(iter(batches))
      return None, path
    if given is not None:
      batches = given_texts.answered(
        batches, given, model, params, mesh, dataset
      )
    take = jax.jit(
      functools.partial(
        step.record_step,
        model=model,
        microbatches=microbatches,
        data_shards=sharding.data_shards(mesh),
      ),
      out_shardings=sharding.replicated(mesh),
    )

    def pairs():
      for batch in batches:
        placed = global_batch.place(batch, mesh, dataset.batch_size, 0)
        yield batch, take(params, placed)

    found = collect(pairs(), model.features.token_ids)
  of_texts = {}
  if given is not None:
    of_texts = {'split': None, 'texts': [dict(text.texts) for text in given]}
  found = explained(
    found,
    model,
    dataset,
    step=at,
    capacity_factor=model.capacity_factor_eval,
    **of_texts,
  )
  if jax.process_index() == 0:
    found.save(path)
  return found, path


def _path(
  model_dir: str, dataset: Dataset, made_of: Any, at: int, parameters: str
) -> epath.Path:
  folder = checkpoints.root_of(model_dir) / 'records'
  suffix = '' if parameters == 'trained' else f'-{parameters}'
  if made_of is None:
    name = dataset.split
  else:
    folder /= 'texts'
    name = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:8]
  return folder / f'{dataset.mixture_or_task_name}-{name}-{at}{suffix}.npz'


def explained(
  found: Records, model: Objective, dataset: Dataset, **facts: Any
) -> Records:
  """Records of a dataset, with the text of its tokens and further facts.

  Args:
    found: from `collect`.
    model: whose token ids were recorded.
    dataset: that they are of: it has vocabularies and names of tasks.
    **facts: by name, beside those there are.

  Raises:
    ValueError: there is no sparse layer among them.
  """
  if not found.layers:
    raise ValueError('the model has no sparse layer: no routing to record.')
  return dataclasses.replace(
    found,
    pieces={
      stack: dataset.pieces(ids.feature, np.unique(found.tokens[stack]))
      for stack, ids in model.features.token_ids.items()
      if ids.tokens in dataset.shapes(model.features)
    },
    domain_names=dataset.task_names(),
    facts={
      **found.facts,
      'task': dataset.mixture_or_task_name,
      'split': dataset.split,
      **facts,
    },
  )
