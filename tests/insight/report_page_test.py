"""The commands `record` and `report`, on a run of the tiny model."""

import html
import html.parser
import json
import pathlib
import re

import browser
import command
import numpy as np
import pytest

from sparse_experts import config
from sparse_experts.insight import html as html_page
from sparse_experts.insight import records, routing, specialisation

SECTIONS = [
  'training', 'routing-over-time', 'routing-by-token', 'samples', 'parameters',
  'hardware', 'config',
]  # fmt: skip
VOID = {'meta', 'link', 'br', 'image', 'path', 'use', 'rect', 'wbr'}


class Reader(html.parser.HTMLParser):
  """What stands in a page; fails where tags do not close."""

  def __init__(self, text):
    super().__init__()
    self.open, self.ids, self.tags, self.urls = [], [], set(), []
    self.feed(text)
    assert not self.open

  def handle_starttag(self, tag, attributes):
    self.tags.add(tag)
    for name, value in attributes:
      if name == 'id':
        self.ids.append(value)
      if name in ('src', 'href', 'xlink:href'):
        self.urls.append(value)
    if tag not in VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attributes):
    self.handle_starttag(tag, attributes)
    if tag not in VOID:
      self.open.pop()

  def handle_endtag(self, tag):
    if tag not in VOID:
      assert self.open.pop() == tag


def run(*arguments):
  outcome = command.run(*arguments)
  assert outcome.code == 0, outcome.stderr
  return json.loads(outcome.stdout) if '--json' in arguments else None


@pytest.fixture(scope='module')
def model_dir(tmp_path_factory):
  """Two steps with a held-out loss, a record and a made-up sample."""
  folder = tmp_path_factory.mktemp('run')
  given = (command.TINY, f'--gin.MODEL_DIR={folder}', '--gin.TRAIN_STEPS=2')
  run('train', *given, '--gin.LOG_PERIOD=1')
  outcome = command.run('record', *given)
  path = folder / 'records/tiny_sums-validation-2.npz'
  assert outcome.stdout.endswith(f'record:  {path}\n')
  (folder / 'printed').write_text(outcome.stdout)
  sample = {'inputs': '<b>8+1', 'prediction': '&', 'targets': '9'}
  nine, end = (
    {'token': token, 'probability': p}
    for token, p in (('9', 0.25), ('</s>', 0.5))
  )
  place = {**nine, 'likeliest': [end, nine]}
  (folder / 'inferences').mkdir()
  (folder / 'inferences/tiny_sums-validation-2.jsonl').write_text(
    json.dumps({**sample, 'log_prob': -1.25, 'top': [place]}) + '\n'
  )
  return folder


def test_a_record_is_what_evaluation_counts(model_dir):
  found = records.load(model_dir / 'records/tiny_sums-validation-2.npz')
  assert len(found.facts.pop('inputs')) == 16
  assert found.facts == {
    'task': 'tiny_sums',
    'split': 'validation',
    'step': 2,
    'capacity_factor': 2.0,
  }
  assert found.pieces['decoder'][ord('8') + 3] == '8'
  (layer,) = found.layers.values()
  # 20 sums: '8+0' and '8' have an end each; 3 answers of one digit, 17 of two.
  assert (~routing.is_padding(layer)).sum() == 20 * 5 + 3 + 17 * 2
  lines = (model_dir / 'metrics.jsonl').read_text().splitlines()
  last = [json.loads(x) for x in lines if '"eval"' in x][-1]
  for name, value in routing.summary(layer).items():
    key = f'layers/decoder/layers_1/{name}'
    if key in last:
      np.testing.assert_allclose(value, last[key], 1e-5, err_msg=name)
    elif name == 'load_E':
      loads = [last[f'{key}/{e}'] for e in range(4)]
      np.testing.assert_allclose(value, loads, 1e-6)


def test_record_prints_what_each_expert_took(model_dir):
  found = records.load(model_dir / 'records/tiny_sums-validation-2.npz')
  (layer,) = found.layers
  lines = (model_dir / 'printed').read_text().splitlines()
  rows = lines[lines.index('', 1) + 1 :]
  assert rows[0].startswith(layer)
  table = specialisation.expert_table(found, layer)
  for row, expert in zip(rows[2:], table):
    start = f'{expert.expert} {expert.load:.0%} {expert.label}'.split()
    assert row.split()[: len(start)] == start
    assert row.endswith(' '.join(expert.tokens))


@pytest.fixture(scope='module')
def report(model_dir):
  path = model_dir / 'report.html'
  assert run('report', str(model_dir), '--json') == {'path': str(path)}
  return path.read_text()


def test_the_page_is_whole_and_asks_nothing_of_anyone(report):
  reader = Reader(report)
  assert [i for i in reader.ids if i in SECTIONS] == SECTIONS
  assert len(set(reader.ids)) == len(reader.ids)
  assert 'script' not in reader.tags
  assert all(url.startswith(('#', 'data:')) for url in reader.urls)
  inside = {url[1:] for url in reader.urls if url.startswith('#')}
  assert inside <= set(reader.ids)
  # Names of XML's vocabularies are never fetched.
  text = re.sub(r'xmlns(:\w+)?="[^"]*"', '', report)
  assert not re.search(r'https?://|@import|url\((?!#)', text)
  assert '#000000' not in report  # Black on black in dark mode.


def assert_figures_are_files(model_dir, folder):
  """Of every caption of the page three files, and no other."""
  assert run('report', str(model_dir), f'--figures={folder}', '--json') == {
    'path': str(model_dir / 'report.html'),
    'figures': str(folder),
  }
  page = (model_dir / 'report.html').read_text()
  captions = re.findall('<figcaption>(.*?)</figcaption>', page)
  names = {html_page.anchor(html.unescape(caption)) for caption in captions}
  assert len(names) == len(captions) and 'loss' in names
  assert {path.name for path in folder.iterdir()} == {
    f'{name}.{kind}' for name in names for kind in ('pdf', 'svg', 'png')
  }


@pytest.mark.slow
def test_every_figure_of_the_page_is_a_file(model_dir, tmp_path):
  assert_figures_are_files(model_dir, tmp_path / 'figures')


def test_words_stand_explained(report):
  for word in ('hot', 'left out', 'fill', 'log z', 'dead', 'dropped'):
    assert f'<th>{word}</th>' in report
    assert re.search(f'<dt>{word}</dt><dd>.{{20}}', report), word


def test_the_page_says_what_the_run_wrote(report, model_dir):
  lines = [
    json.loads(line)
    for line in (model_dir / 'metrics.jsonl').read_text().splitlines()
  ]
  losses = [x['loss'] for x in lines if x['name'] == 'train']
  assert f'training loss {losses[0]:.3f} at step 1' in report
  assert f'{losses[-1]:.3f} at step 2' in report
  assert 'Load of experts, decoder/layers_1' in report
  assert '&lt;b&gt;8+1' in report and '<b>8+1' not in report
  assert '9 25.0%</td>' in report and '(end) 50.0%, 9 25.0%</td>' in report
  assert 'then the likeliest tokens in its place' in report
  assert 'NUM_EXPERTS = 4' in report
  hardware = json.loads((model_dir / 'hardware.json').read_text())
  assert hardware['devices'] in report and '8 x cpu' in report
  assert re.search(r'parameters +[\d,]+', report)
  assert not list(model_dir.glob('*.partial'))


def test_it_needs_no_more_than_metrics(tmp_path):
  line = {'step': 1, 'name': 'train', 'loss': 3.0}
  (tmp_path / 'metrics.jsonl').write_text(json.dumps(line) + '\n')
  assert_figures_are_files(tmp_path, tmp_path / 'new' / 'figures')
  again = command.run(
    'report', str(tmp_path), f'--figures={tmp_path / "new" / "figures"}'
  )
  assert again.code == 2 and 'is not empty' in again.stderr
  reader = Reader((tmp_path / 'report.html').read_text())
  assert [i for i in reader.ids if i in SECTIONS] == ['training', 'samples']


@pytest.mark.parametrize(
  'names, titles',
  [
    (
      ('tokens_per_second_with_padding', 'tokens_per_second_without_padding'),
      ('Tokens per second with padding', 'Tokens per second without padding'),
    ),
    (('tokens_per_second',), ('Tokens per second',)),  # Of earlier versions.
  ],
)
def test_speeds_of_any_age(names, titles, tmp_path):
  lines = [
    {'step': step, 'name': 'train', **dict.fromkeys(names, 9.0)}
    for step in (1, 2)
  ]
  text = '\n'.join(map(json.dumps, lines)) + '\n'
  (tmp_path / 'metrics.jsonl').write_text(text)
  run('report', str(tmp_path))
  page = (tmp_path / 'report.html').read_text()
  found = re.findall(r'Tokens per second[a-z ]*', page)
  assert set(found) == set(titles)


def test_errors(tmp_path):
  outcome = command.run('report', str(tmp_path))
  assert outcome.code == 2
  assert outcome.stderr.startswith(f'error: {tmp_path} has no metrics.jsonl;')
  assert not list(tmp_path.iterdir())
  outcome = command.run('report', str(tmp_path), command.TINY)
  assert outcome.stderr.startswith('error: report takes MODEL_DIR alone')


def test_a_config_that_cannot_be_read_costs_the_ledger_alone(tmp_path):
  line = {'step': 1, 'name': 'train', 'loss': 3.0}
  (tmp_path / 'metrics.jsonl').write_text(json.dumps(line) + '\n')
  (tmp_path / 'config.gin').write_text('import no_such_module\n')
  outcome = command.run('report', str(tmp_path))
  assert outcome.code == 0
  assert outcome.stderr.startswith('no parameters: ')
  assert 'import no_such_module' in (tmp_path / 'report.html').read_text()


def test_tables_escape_what_is_in_them():
  text = html_page.table(('<a>', 'b'), [('&', ('\n', '<i>'))])
  assert '<th>&lt;a&gt;</th>' in text and '<td>&amp;</td>' in text
  assert '<code>⏎</code> <code>&lt;i&gt;</code>' in text


@pytest.fixture(scope='module')
def texts(model_dir):
  """What `record` says of the held-out sums, given as a file."""
  file = model_dir / 'sums.jsonl'
  sums = [(f'{a}+{b}', f'{a + b}') for a in (8, 9) for b in range(10)]
  file.write_text(
    ''.join(json.dumps({'inputs': x, 'targets': y}) + '\n' for x, y in sums)
  )
  given = (command.TINY, f'--gin.MODEL_DIR={model_dir}', f'--input={file}')
  return run('record', *given, '--json')


def test_a_text_is_routed_as_in_a_task_that_holds_it(texts, model_dir):
  given = (command.TINY, f'--gin.MODEL_DIR={model_dir}')
  unpacked = ('--gin.PACK=False', '--gin.EVAL_BATCHES=None')
  path = run('record', *given, *unpacked, '--json')['path']
  expected, found = records.load(path), records.load(texts['path'])
  assert found.facts['inputs'] == expected.facts['inputs']
  (name,) = found.layers
  for field in ('expert_BxLxK', 'gate_BxLxK', 'fate_BxLxK', 'log_z_BxL'):
    np.testing.assert_array_equal(
      getattr(found.layers[name], field), getattr(expected.layers[name], field)
    )
  # And what is printed is the record: '8+0', its end, '8'.
  tokens = texts['tokens'][0]['decoder']
  assert [token['piece'] for token in tokens] == ['<pad>', *'8+0', '</s>', '8']
  for token in tokens:
    (choice,) = token['layers'][name]
    at = (0, token['position'], 0)
    assert choice['expert'] == expected.layers[name].expert_BxLxK[at]
    assert choice['gate'] == expected.layers[name].gate_BxLxK[at]
  assert texts['texts'][0] == {'inputs': '8+0', 'targets': '8'}
  page = Reader(pathlib.Path(texts['page']).read_text())
  assert [i for i in page.ids if i.startswith('text-')] == [
    f'text-{i}' for i in range(1, 21)
  ]
  assert 'script' not in page.tags
  assert all(url.startswith(('#', 'data:')) for url in page.urls)


def test_the_text_of_a_terminal(model_dir, tmp_path):
  outcome = command.run(
    'record',
    command.TINY,
    f'--gin.MODEL_DIR={model_dir}',
    '--text=8+0' + 'x' * 20,
  )
  assert outcome.code == 0, outcome.stderr
  lines = outcome.stdout.splitlines()
  # Of 23 and an end 16 fit.
  assert lines[0] == 'text 1 (8 tokens of the inputs did not fit)'
  assert '1 of 1 texts were cut to TASK_FEATURE_LENGTHS' in lines
  assert lines[1].split() == ['decoder', 'layers_1']
  rows = [line.split() for line in lines[3:7]]
  assert [row[0] for row in rows] == ['<pad>', *'8+0']
  assert all(0 <= int(row[1]) < 4 and 0 < float(row[2]) <= 1 for row in rows)


def test_a_record_is_named_by_all_that_it_is_of(model_dir):
  def path(*changes):
    file = command.TINY.partition('=')[2]
    config.parse([file], [f'MODEL_DIR={model_dir}', *changes], [])
    run = config.bound(records.record)
    return run(texts=[{'inputs': '8+0'}], dry_run=True)[1]

  lengths = "TASK_FEATURE_LENGTHS={'inputs': 16, 'targets': 8}"
  capacity = 'EVAL_CAPACITY_FACTOR=1.0'
  assert len({path(), path(lengths), path(capacity)}) == 3


@pytest.mark.slow
@browser.needs_browser
@pytest.mark.parametrize('page', ['report', 'texts'])
def test_a_browser_has_nothing_to_complain_of(page, request, tmp_path):
  given = request.getfixturevalue(page)
  model_dir = request.getfixturevalue('model_dir')
  path = model_dir / 'report.html' if page == 'report' else given['page']
  opened = browser.open_page(pathlib.Path(path), tmp_path)
  assert '</html>' in opened.dom and 'class="token' in opened.dom
  assert not opened.console and not opened.requests
