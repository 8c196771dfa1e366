"""The report of a run: one HTML page from what lies in MODEL_DIR."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from sparse_experts.insight import (
  agreement,
  curves,
  html,
  likeliest,
  plots,
  records,
  routing,
  specialisation,
)
from sparse_experts.insight.curves import Curve
from sparse_experts.insight.records import Records
from sparse_experts.planning import ledger

_CURVES = {
  'loss': 'loss',
  'accuracy': 'accuracy',
  'learning_rate': 'learning rate',
  'gradient_norm': 'gradient norm',
  'tokens_per_second_without_padding': 'tokens per second',
  'tokens_per_second_with_padding': 'tokens per second, padding counted',
  # What runs of earlier versions have instead.
  'tokens_per_second': 'tokens per second, padding counted',
}
_ROUTING = {
  'imbalance': 'largest over mean load',
  'dropped': 'share of choices dropped',
  'dead': 'experts without a token',
  'entropy': "entropy of the router's choice, nats",
}
_SAMPLES = 6
_NAMES = {'train': 'training', 'eval': 'held out'}


def write(
  model_dir: epath.PathLike, ledger_facts: Mapping[str, Any] | None = None
) -> epath.Path:
  """Writes MODEL_DIR/report.html; returns where.

  It shows what is there: metrics.jsonl (which must be), config.gin,
  hardware.json, inferences/ and records/. The page needs no network.

  Args:
    model_dir: of a run.
    ledger_facts: of `ledger.ledger`; None: no such section.

  Raises:
    FileNotFoundError: no metrics.jsonl.
  """
  root = epath.Path(model_dir)
  history = curves.read(root)
  sections = {
    'Training': _training(history),
    'Routing over time': _routing(history),
    'Routing by token': _by_token(root, history),
    'Samples': _samples(root, ledger_facts),
    'Parameters': ledger_facts and html.preformatted(ledger.text(ledger_facts)),
    'Hardware': _hardware(root),
    'Config': _config(root),
  }
  title = root.name or str(root)
  found = [(name, text) for name, text in sections.items() if text]
  text = html.render(title, found, _lead(history))
  path = root / 'report.html'
  partial = root / 'report.html.partial'
  partial.write_text(text)
  partial.replace(path)
  return path


def _lead(history: Mapping[str, Mapping[str, Curve]]) -> str:
  """What the run reached, in a line."""
  said = []
  for name, kind in _NAMES.items():
    if 'loss' in history.get(name, {}):
      steps, values = history[name]['loss']
      said.append(
        f'{kind} loss {values[0]:.3f} at step {steps[0]:,}, '
        f'{values[-1]:.3f} at step {steps[-1]:,}'
      )
  return html.paragraph('; '.join(said) + '.') if said else ''


def _training(history: Mapping[str, Mapping[str, Curve]]) -> str:
  figures = []
  for key, ylabel in _CURVES.items():
    named = {
      kind: history[name][key]
      for name, kind in _NAMES.items()
      if key in history.get(name, {})
    }
    if named:
      title = key.replace('_', ' ').capitalize()
      figures.append((title, plots.curves(named, ylabel=ylabel)))
  return html.figures(figures)


def _routing(history: Mapping[str, Mapping[str, Curve]]) -> str:
  name = 'train' if curves.layers(history.get('train', {})) else 'eval'
  found = history.get(name, {})
  layers = curves.layers(found)
  if not layers:
    return ''
  figures = [
    (f'Load of experts, {layer}', plots.load_over_time(*load))
    for layer in layers
    for load in [curves.load_over_time(found, layer)]
  ]
  for key, ylabel in _ROUTING.items():
    named = {
      layer: found[f'layers/{layer}/{key}']
      for layer in layers
      if f'layers/{layer}/{key}' in found
    }
    if named:
      title = f'{key.capitalize()} by layer'
      figures.append((title, plots.curves(named, ylabel=ylabel)))
  last = {
    layer: {
      key: found[f'layers/{layer}/{key}'].values[-1]
      for key in ('imbalance', 'dead', 'dropped', 'fill')
    }
    for layer in layers
  }
  rows = [
    (
      layer,
      f'{row["imbalance"]:.2f}',
      f'{row["dead"]:.0f}',
      f'{row["dropped"]:.1%}',
      f'{row["fill"]:.1%}',
    )
    for layer, row in last.items()
  ]
  header = ('last step', 'max / mean load', 'dead', 'dropped', 'slots in use')
  return (
    html.paragraph(f'From the {_NAMES[name]} metrics of metrics.jsonl.')
    + html.figures(figures)
    + html.heading('Where it ended')
    + html.table(header, rows)
  )


def _by_token(
  root: epath.Path, history: Mapping[str, Mapping[str, Curve]]
) -> str:
  """The newest record, and how far earlier ones of its tokens agree."""
  if not any(map(curves.layers, history.values())):
    return ''
  paths = sorted((root / 'records').glob('*.npz'))
  if not paths:
    return html.paragraph(
      'No records yet: `python -m sparse_experts record --gin_file=...` writes '
      'one, and the next report shows it.'
    )
  found = sorted(map(records.load, paths), key=lambda x: x.facts['step'])
  last = found[-1]
  facts = ', '.join(
    f'{key.replace("_", " ")} {x}' for key, x in last.facts.items()
  )
  text = html.paragraph(f'Record of {facts}.') + _overview(last)
  figures = [
    ('Load of experts by layer', plots.load(last)),
    ('What became of choices', plots.fates(last)),
  ]
  if any(x.confidence_BxL is not None for x in last.layers.values()):
    figures.append(('Confidence of routers', plots.confidence(last)))
  earlier = [x for x in found[:-1] if agreement.same_tokens(x, last)]
  if earlier:
    steps = [x.facts['step'] for x in earlier]
    shares = [agreement.saturation(x, last) for x in earlier]
    figures.append(('Router saturation', plots.saturation(steps, shares)))
  text += html.figures(figures)
  return text + ''.join(
    html.folded(layer, _layer(last, layer)) for layer in last.layers
  )


def _overview(found: Records) -> str:
  table = routing.overview(found)
  shares = {'dropped', 'left_out', 'fill'}
  rows = [
    (
      name,
      *(
        f'{value:.1%}' if column in shares else f'{value:.3g}'
        for column, value in zip(table.columns, values)
      ),
    )
    for name, values in zip(table.rows, table.values)
  ]
  header = [column.replace('_', ' ') for column in ('', *table.columns)]
  return html.table(header, rows)


def _layer(found: Records, layer: str) -> str:
  figures, what = [], 'positions'
  if found.pieces.get(layer.split('/')[0]):
    what = 'tokens'
    by_class = specialisation.by_class(found, layer)
    figures = [(f'Classes of tokens, {layer}', plots.specialisation(by_class))]
  if found.domains:
    by_domain = specialisation.by_domain(found, layer)
    title = f'Domains of tokens, {layer}'
    figures.append((title, plots.specialisation(by_domain)))
  if found.layers[layer].expert_BxLxK.shape[-1] > 1:
    both = routing.coactivation(found.layers[layer])
    figures.append((f'Chosen together, {layer}', plots.coactivation(both)))
  rows = [
    (e.expert, f'{e.load:.1%}', e.label, e.tokens)
    for e in specialisation.expert_table(found, layer)
  ]
  header = ('expert', 'load', 'most of all', f'{what} that say most about it')
  return html.figures(figures) + html.table(header, rows, text=True)


def _samples(root: epath.Path, ledger_facts: Mapping[str, Any] | None) -> str:
  paths = list((root / 'inferences').glob('*.jsonl'))
  if ledger_facts is not None and not ledger_facts['writes_text']:
    return ''
  if not paths:
    return html.paragraph(
      'No samples yet: `python -m sparse_experts infer --gin_file=...` writes '
      'some, and the next report shows them.'
    )
  newest = max(paths, key=lambda path: path.stat().mtime)
  lines = newest.read_text().splitlines()
  text = html.paragraph(
    f'The first {min(len(lines), _SAMPLES)} of {len(lines)} in {newest.name}.'
  )
  for line in lines[:_SAMPLES]:
    sample = json.loads(line)
    top = likeliest.places(sample.pop('top', ()))
    rows = [
      (name.replace('_', ' '), f'{x:.2f}' if isinstance(x, float) else x)
      for name, x in sample.items()
    ] + top
    text += html.table(('sample', ''), rows, text=True)
  return text


def _hardware(root: epath.Path) -> str:
  path = root / 'hardware.json'
  if not path.exists():
    return ''
  rows = [
    (
      name,
      ', '.join(f'{k} {v}' for k, v in fact.items())
      if isinstance(fact, dict)
      else fact,
    )
    for name, fact in json.loads(path.read_text()).items()
  ]
  return html.table(('of the last start', ''), rows, text=True)


def _config(root: epath.Path) -> str:
  path = root / 'config.gin'
  if not path.exists():
    return ''
  return html.folded('config.gin', html.preformatted(path.read_text()))
