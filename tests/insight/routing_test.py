"""Analyses of routing records, each against numbers derived by hand."""

import json
import math

import documents
import numpy as np
import paths
import pytest

from sparse_experts.insight import (
  agreement,
  curves,
  plots,
  routing,
  specialisation,
)
from sparse_experts.insight.curves import Curve
from sparse_experts.insight.records import Records
from sparse_experts.insight.token_classes import CLASSES, classify
from sparse_experts.moe import FATES, Record

KEPT, CUT, NONE, PAD = (
  FATES.index(fate) for fate in ('kept', 'capacity', 'no choice', 'padding')
)
NAN = np.nan

# Five tokens, the last position is padding; three experts, capacity 3. Lines
# are served token by token: the fourth of experts 0 and 1 is cut.
TOY = Record(
  expert_BxLxK=np.array([[[0, 1], [0, 1], [1, 0], [1, 3], [2, 0], [3, 3]]]),
  gate_BxLxK=np.array(
    [[[0.6, 0.3], [0.5, 0.2], [0.4, 0.6], [1, 0], [0.7, 0.1], [0, 0]]]
  ),
  position_BxLxK=np.array([[[0, 0], [1, 1], [2, 2], [3, 0], [0, 3], [0, 0]]]),
  fate_BxLxK=np.array(
    [[[KEPT] * 2, [KEPT] * 2, [KEPT] * 2, [CUT, NONE], [KEPT, CUT], [PAD] * 2]]
  ),
  entropy_BxL=np.array([[0.1, 0.2, 0.3, 0.4, 0.5, 0]]),
  confidence_BxL=np.array([[1, 1, 0.5, 0.5, 1, 0]]),
  log_z_BxL=np.array([[1, 2, 3, 4, 5, 0]]),
  num_experts=3,
  group_size=6,
  capacity=3,
)
RECORDS = Records(
  layers={'decoder/layers_0': TOY},
  tokens={'decoder': np.array([[5, 5, 6, 6, 7, 0]])},
  domains={'decoder': np.array([[1, 1, 1, 3, 3, 0]])},
  pieces={'decoder': {5: '▁the', 6: '0.5', 7: '<extra_id_0>', 0: '<pad>'}},
  domain_names=('jax', 'numpy', 'optax', 'scipy'),
  facts={'step': 8},
)
LAYER = 'decoder/layers_0'


def first_choices(*experts, num_experts=2):
  """A record of one choice a token; num_experts is none, of padding."""
  expert_BxLxK = np.array(experts)[None, :, None]
  return Record(
    expert_BxLxK=expert_BxLxK,
    gate_BxLxK=np.ones(expert_BxLxK.shape),
    position_BxLxK=np.zeros_like(expert_BxLxK),
    fate_BxLxK=np.where(expert_BxLxK < num_experts, KEPT, PAD),
    num_experts=num_experts,
    group_size=len(experts),
  )


def assert_matrix(matrix, rows, columns, values):
  assert (matrix.rows, matrix.columns) == (tuple(rows), tuple(columns))
  np.testing.assert_allclose(matrix.values, values, 1e-12)


# One layer.


def test_summary():
  expected = {
    'load_E': [4 / 9, 4 / 9, 1 / 9],
    'gate_mass_E': [(0.6 + 0.5 + 0.6) / 3, (0.3 + 0.2 + 0.4) / 3, 0.7],
    'imbalance': 4 / 3,
    'dropped': 2 / 9,
    'left_out': 1 / 5,  # The fourth token.
    'padding': 1 / 6,
    'dead': 0,
    'hot': 0,
    'fill': 7 / 9,
    'entropy': 1.5 / 5,
    'confidence': 4 / 5,
    'log_z': 3,
  }
  result = routing.summary(TOY)
  assert result.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(result[name], value, err_msg=name)


def test_hot_and_dead():
  # Loads 3/6, 2/6, 1/6, 0, and 0 of 5 experts: twice the mean is 2/5.
  result = routing.summary(first_choices(0, 0, 0, 1, 1, 2, num_experts=5))
  assert (result['hot'], result['dead'], result['fill']) == (1, 2, 0)
  assert 'entropy' not in result and 'log_z' not in result


def test_overview():
  matrix = routing.overview(RECORDS)
  assert matrix.rows == (LAYER,)
  row = dict(zip(matrix.columns, matrix.values[0]))
  assert row['imbalance'] == pytest.approx(4 / 3)
  assert row['log_z'] == 3


def test_lines_and_first_choices():
  assert routing.line_lengths(TOY).tolist() == [[4, 4, 1]]
  halves = TOY.replace(group_size=3)
  assert routing.line_lengths(halves).tolist() == [[3, 3, 0], [1, 1, 1]]
  # The third token's second choice has the larger gate.
  assert routing.first_choice(TOY).tolist() == [[0, 0, 0, 1, 2, 3]]


def test_coactivation():
  # Chosen by {0 1}, {0 1}, {0 1}, {1}, {0 2}: N = 4, 4, 1.
  assert_matrix(
    routing.coactivation(TOY),
    '012',
    '012',
    [[NAN, 3 / 4, 1 / 4], [3 / 4, NAN, 0], [1, 0, NAN]],
  )


TWO = Records(
  layers={
    'encoder/layers_0': first_choices(1, 1, 1, 1, 1),
    'decoder/layers_0': first_choices(0, 0, 1, 1, 2),
    'decoder/layers_1': first_choices(0, 1, 1, 1, 2),
  },
  tokens={'decoder': np.array([[3, 4, 5, 6, 0]])},
)


def test_paths():
  # Loads 1/2 1/2, then 1/4 3/4; the last token is padding.
  assert routing.paths(TWO, 'decoder') == [
    ((1, 1), 1 / 2, 3 / 8),
    ((0, 0), 1 / 4, 1 / 8),
    ((0, 1), 1 / 4, 3 / 8),
  ]
  assert len(routing.paths(TWO, 'decoder', most=1)) == 1
  with pytest.raises(ValueError, match="'other' has no sparse layer"):
    routing.paths(TWO, 'other')


def test_transitions():
  first, second = (TWO.layers[f'decoder/layers_{i}'] for i in (0, 1))
  matrix = routing.transitions(first, second)
  assert_matrix(matrix, '01', '01', [[1 / 2, 1 / 2], [0, 1]])


# Specialisation.


def test_by_token():
  assert_matrix(
    specialisation.by_token(RECORDS, LAYER, least=2),
    ('▁the', '0.5'),
    '012',
    [[1, 1, 0], [1 / 2, 1, 0]],
  )
  assert specialisation.by_token(RECORDS, LAYER, least=1).rows[-1] == (
    '<extra_id_0>'
  )


def test_by_class():
  assert_matrix(
    specialisation.by_class(RECORDS, LAYER),
    ('sentinel', 'number', 'stop word'),
    '012',
    [[1, 0, 1], [1 / 2, 1, 0], [1, 1, 0]],
  )


def test_by_domain():
  # Three tokens of numpy, two of scipy, and padding that says jax.
  assert_matrix(
    specialisation.by_domain(RECORDS, LAYER),
    ('numpy', 'scipy'),
    '012',
    [[1, 1, 0], [1 / 2, 1 / 2, 1 / 2]],
  )
  with pytest.raises(ValueError, match='know no domains'):
    specialisation.by_domain(TWO, 'decoder/layers_0')


def test_vocabulary_specialisation():
  # Token 5 goes to expert 0 in 2 of 3 cases, token 6 to expert 1 in 3 of 4.
  records = Records(
    layers={LAYER: first_choices(0, 0, 1, 1, 1, 1, 0, 0)},
    tokens={'decoder': np.array([[5, 5, 5, 6, 6, 6, 6, 7]])},
  )
  result = specialisation.vocabulary_specialisation(records, LAYER, least=2)
  assert result == pytest.approx((2 / 3 + 3 / 4) / 2)
  assert specialisation.vocabulary_specialisation(records, LAYER, 100) == 0


def test_row_entropy():
  # Shares 1/2, 1/2; 1/3, 2/3; 1/2, 1/2.
  found = specialisation.row_entropy(specialisation.by_class(RECORDS, LAYER))
  expected = {
    'sentinel': math.log(2),
    'number': math.log(3) - 2 / 3 * math.log(2),
    'stop word': math.log(2),
  }
  assert found == pytest.approx(expected)


def test_expert_table():
  # Choices by token: the 4, 0.5 3, sentinel 2 of 9. Of expert 0: 2, 1, 1 of 4,
  # so .5 log 9/8, .25 log 3/4 and .25 log 9/8; of expert 1: 2, 2 of 4, so
  # .5 log 9/8 and .5 log 3/2; of expert 2 the sentinel alone.
  found = specialisation.expert_table(RECORDS, LAYER)
  assert [(e.expert, e.label, e.tokens) for e in found] == [
    (0, 'stop word', ('▁the', '<extra_id_0>')),
    (1, 'number', ('0.5', '▁the')),
    (2, 'sentinel', ('<extra_id_0>',)),
  ]
  assert [e.load for e in found] == pytest.approx([4 / 9, 4 / 9, 1 / 9])
  assert len(specialisation.expert_table(RECORDS, LAYER, 1)[0].tokens) == 1
  # All of one class, of which no expert has more than its share.
  found = specialisation.expert_table(TWO, 'decoder/layers_0')
  assert [(e.load, e.label, e.tokens) for e in found] == [
    (0.5, '', ('3', '4')),
    (0.5, '', ('5', '6')),
  ]


def test_classes_of_tokens():
  pieces = {
    'sentinel': ['<extra_id_12>', '▁<extra_id_0>'],
    'control': ['<pad>', '</s>', '<unk>'],
    'space': ['▁', '▁▁▁▁', '\n', '<0x0A>'],
    'number': ['▁32,', '[0,', '7'],
    'punctuation': ['.', '▁(', '```'],
    'identifier': ['▁num_experts', 'float32', 'TopK', '▁np.abs', 'f()'],
    'stop word': ['▁the', '▁The', '▁of,'],
    'capitalised': ['▁Gaussian', 'JAX', '▁B'],
    'word': ['▁axes', "▁don't"],
    'word piece': ['ing', 'the', 'é'],
  }
  assert tuple(pieces) == CLASSES
  for kind, examples in pieces.items():
    assert [classify(piece) for piece in examples] == [kind] * len(examples)


# Two routers.


def test_agreement():
  some, others = (TWO.layers[f'decoder/layers_{i}'] for i in (0, 1))
  # Entropies: log 2; of 1/4 3/4; jointly of 1/4 1/4 1/2.
  h_b = math.log(4) - 3 / 4 * math.log(3)
  information = math.log(2) + h_b - 1.5 * math.log(2)
  assert agreement.agreement(some, others) == pytest.approx(
    {
      'first_choice': 3 / 4,
      'overlap': 3 / 4,
      'information': information / ((math.log(2) + h_b) / 2),
    }
  )


def test_agreement_of_renamed_experts():
  found = agreement.agreement(
    first_choices(0, 0, 1, 2), first_choices(1, 1, 0, 2)
  )
  assert found == pytest.approx(
    {'first_choice': 0, 'overlap': 0, 'information': 1}
  )


def test_overlap_is_of_the_seconds_choices():
  # Of {1}, {0 1}, {1 0}, ... all of TOY's: 1 of 2, 2 of 2, 2 of 2, 1, 1 of 2.
  first_only = TOY.replace(
    expert_BxLxK=np.array([[[1, 3], [0, 1], [1, 0], [1, 0], [0, 1], [3, 3]]])
  )
  found = agreement.agreement(first_only, TOY)
  assert found['overlap'] == pytest.approx((1 / 2 + 1 + 1 + 1 + 1 / 2) / 5)


def test_saturation_needs_the_same_tokens():
  assert agreement.saturation(TWO, TWO) == dict.fromkeys(TWO.layers, 1.0)
  with pytest.raises(ValueError, match='different tokens'):
    agreement.saturation(TWO, RECORDS)
  with pytest.raises(ValueError, match='on the same tokens'):
    agreement.agreement(first_choices(0, 1), first_choices(0, 2))


# What a page shows, what a run wrote, and plots.


def test_the_page_of_the_documentation():
  names = documents.run(paths.ROOT / 'docs/routing_records.md')
  record = names['record']
  assert routing.summary(record)['load_E'].sum() == pytest.approx(1)
  # Every of 16 tokens chooses two experts of four, which have 8 slots.
  assert routing.line_lengths(record).sum(1).tolist() == [32, 32]
  assert record.capacity == 8


@pytest.fixture
def run_dir(tmp_path):
  lines = [
    {'step': 0, 'name': 'eval', 'loss': 5.0},
    *(
      {
        'step': step,
        'name': 'train',
        'loss': loss,
        'layers/decoder/layers_1/imbalance': 1.0,
        'layers/decoder/layers_1/load_E/0': 0.25,
        'layers/decoder/layers_1/load_E/1': 0.75,
      }
      # Killed after step 20, resumed from step 10.
      for step, loss in ((10, 4.0), (20, 3.0), (20, 2.5), (30, 2.0))
    ),
  ]
  text = ''.join(json.dumps(line) + '\n' for line in lines) + '{"step": 40'
  (tmp_path / 'metrics.jsonl').write_text(text)
  return tmp_path


def test_curves_of_a_run(run_dir):
  history = curves.read(run_dir)
  assert history['eval'].keys() == {'loss'}
  steps, values = history['train']['loss']
  assert (steps.tolist(), values.tolist()) == ([10, 20, 30], [4, 2.5, 2])
  assert curves.layers(history['train']) == ['decoder/layers_1']
  steps, load_TxE = curves.load_over_time(history['train'], 'decoder/layers_1')
  assert steps.tolist() == [10, 20, 30]
  assert load_TxE.tolist() == [[0.25, 0.75]] * 3
  with pytest.raises(ValueError, match="load of 'other'; there are decoder"):
    curves.load_over_time(history['train'], 'other')
  with pytest.raises(FileNotFoundError, match='has no metrics.jsonl'):
    curves.read(run_dir / 'nothing')


def test_every_plot_is_a_figure_of_its_numbers(run_dir):
  figure_module = pytest.importorskip('matplotlib.figure')
  from matplotlib import pyplot

  curve = Curve(np.array([1, 2]), np.array([3.0, 4.0]))
  load_1xE = [[4 / 9, 4 / 9, 1 / 9]]
  by_class = specialisation.by_class(RECORDS, LAYER)
  together = routing.coactivation(TOY)
  images = {
    plots.load(RECORDS): load_1xE,
    plots.load_over_time(np.array([5]), np.array(load_1xE)): np.transpose(
      load_1xE
    ),
    plots.specialisation(by_class): by_class.values,
    plots.coactivation(together): together.values,
    plots.transitions(by_class): by_class.values,
  }
  for figure, values in images.items():
    drawn = figure.axes[0].images[0].get_array()
    np.testing.assert_allclose(np.ma.filled(drawn, NAN), values)
  lines = plots.curves({'a': curve, 'b': curve}, ylabel='loss')
  np.testing.assert_array_equal(
    lines.axes[0].lines[1].get_ydata(), curve.values
  )
  # Kept 7 of 9 choices, the rest for lack of capacity; then what is not there.
  fates = plots.fates(RECORDS)
  widths = [patch.get_width() for patch in fates.axes[0].patches]
  assert widths == pytest.approx([7 / 9, 2 / 9])
  lengths = plots.line_lengths(TOY)
  heights = [patch.get_height() for patch in lengths.axes[0].patches]
  assert heights == [0, 1, 0, 0, 2]
  saturation = plots.saturation([4], [{'a': 0.5}])
  assert saturation.axes[0].lines[0].get_ydata().tolist() == [0.5]
  found = routing.paths(TWO, 'decoder')
  bars = plots.paths(found).axes[0].patches
  assert [bar.get_width() for bar in bars] == [path.share for path in found]
  assert plots.confidence(RECORDS).axes[0].patches
  # Of a router without logits there is nothing to draw.
  assert not plots.confidence(TWO).axes[0].patches
  assert isinstance(lines, figure_module.Figure)
  assert not pyplot.get_fignums()  # A notebook shows each once.


def test_many_series_each_have_their_axes():
  pytest.importorskip('matplotlib')
  steps = np.array([1, 2])

  def drawn(n):
    named = {f'{i}': Curve(steps, np.array([0.0, i])) for i in range(n)}
    return plots.curves(named, ylabel='loss, nats', xlabel='step')

  together = drawn(8)
  (axes,), (legend,) = together.axes, together.legends
  assert len({line.get_color() for line in axes.lines}) == 8
  assert [text.get_text() for text in legend.texts] == list('01234567')
  figure = drawn(9)
  assert [axes.get_title() for axes in figure.axes] == list('012345678')
  assert [len(axes.lines) for axes in figure.axes] == [1] * 9
  # They compare: one scale. The first has nothing but zeros, and says so.
  assert len({axes.get_ylim() for axes in figure.axes}) == 1
  said = [[t.get_text() for t in axes.texts] for axes in figure.axes]
  assert said == [['all zero'], *[[]] * 8]
  assert figure.get_supylabel() == 'loss, nats'


@pytest.mark.parametrize(
  'experts, ticks',
  [(16, range(16)), (17, range(0, 17, 2)), (60, range(0, 60, 4))],
)
def test_ticks_of_maps_are_even(experts, ticks):
  pytest.importorskip('matplotlib')
  names = tuple(map(str, range(experts)))
  matrix = routing.Matrix(('a',), names, np.zeros((1, experts)))
  (axes, _) = plots.specialisation(matrix).axes
  assert axes.get_xticks().tolist() == list(ticks)
  assert [t.get_text() for t in axes.get_xticklabels()] == list(map(str, ticks))


def test_files_of_a_figure(tmp_path):
  """All three kinds, 300 dots an inch, and the same bytes each time."""
  pytest.importorskip('matplotlib')
  from sparse_experts.insight import figure_files

  curve = Curve(np.array([1, 2]), np.array([3.0, 4.0]))
  written = []
  for folder in ('a', 'b'):
    figure = plots.curves({'loss': curve}, ylabel='loss, nats')
    figure_files.write(figure, tmp_path / folder, 'loss')
    written.append(
      {p.name: p.read_bytes() for p in (tmp_path / folder).iterdir()}
    )
  assert written[0] == written[1]
  assert written[0].keys() == {'loss.pdf', 'loss.svg', 'loss.png'}
  assert written[0]['loss.pdf'].startswith(b'%PDF')
  assert b'/Type3' not in written[0]['loss.pdf']
  assert b'<svg' in written[0]['loss.svg']
  # Dots a metre, across and down: 300 / 0.0254, to the next whole number.
  dots = (11811).to_bytes(4, 'big')
  assert b'pHYs' + dots + dots in written[0]['loss.png']
