"""The report of a run: one HTML page from what lies in MODEL_DIR."""

from __future__ import annotations

import json
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from sparse_experts import storage
from sparse_experts.insight import (
  agreement,
  curves,
  figure_files,
  html,
  likeliest,
  plots,
  records,
  routing,
  specialisation,
  token_view,
)
from sparse_experts.insight.curves import Curve
from sparse_experts.insight.records import Records
from sparse_experts.planning import ledger

if typing.TYPE_CHECKING:
  from matplotlib.figure import Figure

_CURVES = {
  'loss': 'loss, nats',
  'accuracy': 'accuracy, share of targets',
  'learning_rate': 'learning rate, no unit',
  'gradient_norm': 'norm of the gradient, no unit',
  'tokens_per_second_without_padding': 'tokens per second',
  'tokens_per_second_with_padding': 'tokens per second, padding counted',
  # What runs of earlier versions have instead.
  'tokens_per_second': 'tokens per second, padding counted',
}
_ROUTING = {
  'imbalance': 'largest over mean load of an expert',
  'dropped': 'dropped, share of choices',
  'dead': 'dead, experts without a token',
  'entropy': "entropy of the router's choice, nats",
}
# Of the tables' headers.
_WORDS = {
  'load': 'its share of the choices that tokens made',
  'most of all': 'the class of tokens that it gets most beyond its share',
  'max / mean load': 'of the fullest expert over the mean; 1 is balance',
  'hot': f'experts with {routing.HOT:g} times the mean load or more',
  'dead': 'experts that no token chose',
  'dropped': 'share of choices that found no room at their expert',
  'left out': 'share of tokens of which no choice was kept',
  'fill': "share of the experts' slots in use; 0 where there is no capacity",
  'entropy': "of the router's probabilities, nats, mean over tokens; 0 is sure",
  'confidence': 'largest of those probabilities, mean over tokens',
  'log z': (
    "logsumexp of the router's logits, nats, mean over tokens; the z-loss "
    'keeps it near 0'
  ),
}
_SAMPLES = 6
_SHOWN_TOKENS = 128
_NAMES = {'train': 'training', 'eval': 'held out'}


class _Figures:
  """The figures of the page, by title, in the order they are set in."""

  def __init__(self):
    self.by_title: dict[str, Figure] = {}

  def __call__(self, titled: Sequence[tuple[str, Figure]]) -> str:
    """Sets figures side by side."""
    self.by_title.update(titled)
    return html.figures(titled)


def write(
  model_dir: epath.PathLike,
  ledger_facts: Mapping[str, Any] | None = None,
  figures: epath.PathLike | None = None,
) -> epath.Path:
  """Writes MODEL_DIR/report.html; returns where.

  It shows what is there: metrics.jsonl (which must be), config.gin,
  hardware.json, inferences/ and records/. The page needs no network.

  Args:
    model_dir: of a run.
    ledger_facts: of `ledger.ledger`; None: no such section.
    figures: a folder that the page's figures are written to as well, each named
      by its caption, see `figure_files`; None: they are not.

  Raises:
    FileNotFoundError: no metrics.jsonl.
  """
  root = epath.Path(model_dir)
  history = curves.read(root)
  draw = _Figures()
  sections = {
    'Training': _training(history, draw),
    'Routing over time': _routing(history, draw),
    'Routing by token': _by_token(root, history, draw),
    'Samples': _samples(root, ledger_facts),
    'Parameters': ledger_facts and html.preformatted(ledger.text(ledger_facts)),
    'Hardware': _hardware(root),
    'Config': _config(root),
  }
  title = root.name or str(root)
  found = [(name, text) for name, text in sections.items() if text]
  text = html.render(title, found, _lead(history))
  path = root / 'report.html'
  storage.replace(path, text.encode())
  if figures is not None:
    for name, figure in draw.by_title.items():
      figure_files.write(figure, figures, html.anchor(name))
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


def _training(
  history: Mapping[str, Mapping[str, Curve]], draw: _Figures
) -> str:
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
  return draw(figures)


def _routing(history: Mapping[str, Mapping[str, Curve]], draw: _Figures) -> str:
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
  header = ('last step', 'max / mean load', 'dead', 'dropped', 'fill')
  return (
    html.paragraph(f'From the {_NAMES[name]} metrics of metrics.jsonl.')
    + draw(figures)
    + html.heading('Where it ended')
    + _explained_table(header, rows)
  )


def _explained_table(
  header: Sequence[str], rows: Sequence[Sequence[object]], text: bool = False
) -> str:
  """A table, and below it what the words of its header mean."""
  meanings = {word: _WORDS[word] for word in header if word in _WORDS}
  return html.table(header, rows, text) + html.terms(meanings)


def _by_token(
  root: epath.Path, history: Mapping[str, Mapping[str, Curve]], draw: _Figures
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
  text += draw(figures)
  text += ''.join(
    html.folded(layer, _layer(last, layer, draw)) for layer in last.layers
  )
  return text + _text(last)


def _text(found: Records) -> str:
  """The first row of a record, where its tokens have texts."""
  if not found.pieces:
    return ''
  return (
    html.heading('A text, by expert')
    + html.paragraph(
      'The first row of the record. `python -m sparse_experts record '
      '--gin_file=... --text="..."` makes a page of a text of your own.'
    )
    + html.paragraph(token_view.READ_AS)
    + token_view.view(found, 0, _SHOWN_TOKENS)
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
  header[header.index('imbalance')] = 'max / mean load'
  return _explained_table(header, rows)


def _layer(found: Records, layer: str, draw: _Figures) -> str:
  figures, what = [], 'positions'
  if found.pieces.get(layer.split('/')[0]):
    what = 'tokens'
    by_class = specialisation.by_class(found, layer)
    figures = [
      (
        f'Classes of tokens, {layer}',
        plots.specialisation(by_class, 'class of tokens'),
      )
    ]
  if found.domains:
    by_domain = specialisation.by_domain(found, layer)
    title = f'Domains of tokens, {layer}'
    figures.append((title, plots.specialisation(by_domain, 'domain')))
  if found.layers[layer].expert_BxLxK.shape[-1] > 1:
    both = routing.coactivation(found.layers[layer])
    figures.append((f'Chosen together, {layer}', plots.coactivation(both)))
  rows = [
    (e.expert, f'{e.load:.1%}', e.label, e.tokens)
    for e in specialisation.expert_table(found, layer)
  ]
  header = ('expert', 'load', 'most of all', f'{what} that say most about it')
  return draw(figures) + _explained_table(header, rows, text=True)


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
  samples = [json.loads(line) for line in lines[:_SAMPLES]]
  if any(sample.get('top') for sample in samples):
    text += html.paragraph(likeliest.EXPLAINED)
  for sample in samples:
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
