"""`show`: every value, the line that set it, and what that overrode."""

import ast
import json
import re

import command
import pytest
from paths import ROOT, TESTS

from sparse_experts import config

QUICKSTART = '--gin_file=gin/quickstart.gin'


def shown(*arguments):
  outcome = command.run('show', *arguments, '--json')
  assert (outcome.code, outcome.stderr) == (0, '')
  facts = json.loads(outcome.stdout)
  for fact in facts:
    assert list(fact) == ['name', 'value', 'file', 'line', 'overrides']
    for overridden in fact['overrides']:
      assert list(overridden) == ['value', 'file', 'line']
  by_name = {fact['name']: fact for fact in facts}
  assert len(by_name) == len(facts)
  return by_name


def written(place):
  """The name and the value of one line at a place."""
  *before, line = (
    (ROOT / place['file']).read_text().splitlines()[: place['line']]
  )
  name, _, text = line.partition(' = ')
  if line.startswith(' '):  # In a block, whose first line says of what.
    block = next(line for line in reversed(before) if line[:1] not in ('', ' '))
    name = f'{block.removesuffix(":")}.{name.strip()}'
  text = re.sub(r'  #.*', '', text)
  if text[0] in '@%':
    return name, text
  return name, json.loads(json.dumps(ast.literal_eval(text)))


def test_the_quickstart_is_what_its_files_say():
  facts = shown(QUICKSTART)
  for name, fact in facts.items():
    places = [*fact['overrides'], fact]
    for place in places:
      assert written(place)[0] == name, place
    for overridden in fact['overrides']:
      assert written(overridden)[1] == overridden['value']
    value = written(fact)[1]
    while isinstance(value, str) and value[:1] == '%':
      value = facts[value[1:]]['value']
    assert fact['value'] == value, name
  config.parse(['gin/quickstart.gin'], [], [])
  for name in ('TRAIN_STEPS', 'LOSS_WEIGHTS', 'TASK_FEATURE_LENGTHS'):
    assert facts[name]['value'] == config.value(name)
  layers = facts['transformer.Stack.num_layers']
  assert (layers['value'], layers['file']) == (2, 'gin/models/blocks.gin')


def test_a_chain_of_three():
  fact = shown(
    '--gin_file=gin/models/glam/1.7b.gin',
    f'--gin_file={TESTS / "tiny.gin"}',
    *('--gin.NUM_LAYERS=5', '--gin.NUM_LAYERS=6', '--gin.MODEL_DIR=/tmp/run'),
  )['NUM_LAYERS']
  places = [*fact['overrides'], fact]
  assert [(place['value'], place['file']) for place in places] == [
    (12, 'gin/models/glam/0.1b_64e.gin'),
    (24, 'gin/models/glam/1.7b_64e.gin'),
    (2, 'tests/tiny.gin'),
    (5, 'command line'),
    (6, 'command line'),
  ]
  for place in places[:3]:
    assert written(place) == ('NUM_LAYERS', place['value'])
  assert [place['line'] for place in places[3:]] == [None, None]


def test_the_page_of_recipes_shows_what_it_prints():
  page = (ROOT / 'docs/recipes.md').read_text()
  line, expected = re.search(
    r'sparse_experts (show .*?)\n```\n\n```\n(.*?)```', page, re.DOTALL
  ).groups()
  outcome = command.run(*line.replace('\\\n', ' ').split())
  lines = outcome.stdout.splitlines()
  assert (outcome.code, outcome.stderr) == (0, '')
  where = [lines.index(line) for line in expected.splitlines()]
  assert where == sorted(where) and len(where) > 4


def test_arguments_that_pass_a_macro_on_have_no_line():
  text = command.run('show', QUICKSTART).stdout
  assert 'TRAIN_STEPS = 400' in text and 'train.train.train_steps' not in text
  # But where they changed something.
  ema = command.run('show', QUICKSTART, '--gin_file=gin/ema.gin').stdout
  assert 'train.train.optimizer = @ema.averaged' in ema
  back = command.run('show', QUICKSTART, '--gin.encoder/layer.MoE.group_size=8')
  assert 'encoder/layer.MoE.group_size = 8' in back.stdout
  assert 'over %GROUP_SIZE' in back.stdout


@pytest.mark.parametrize(
  'name, subject',
  [
    ('MIXTURE_OR_TASK_NAME', 'task and data'),
    ('NUM_LAYERS', 'model'),
    ('ROUTER', 'router'),
    ('GROUP_SIZE', 'sparse layers'),
    ('LEARNING_RATE', 'training'),
    ('RANK_OPTIONS', 'evaluation'),
    ('TEMPERATURE', 'decoding'),
    ('MESH', 'mesh'),
    ('NUM_TASKS', 'unused'),
  ],
)
def test_subjects(name, subject):
  text = command.run('show', QUICKSTART).stdout
  (group,) = (g for g in text.split('\n\n') if f'\n  {name} = ' in g)
  assert group.partition('\n')[0] == subject


def test_values_of_all_kinds(tmp_path):
  (tmp_path / 'mine.gin').write_text(
    "include 'gin/quickstart.gin'\n"
    'SPARSE_LAYERS = {1: %NUM_EXPERTS}\n'
    "OF_MINE = {('a', 'b'): [None, 1e3, True, @mine/top_k.TopK]}\n"
  )
  file = f'--gin_file={tmp_path / "mine.gin"}'
  facts = shown(file)
  assert facts['SPARSE_LAYERS']['value'] == {'1': 8}
  expected = [None, 1000.0, True, '@mine/top_k.TopK']
  assert facts['OF_MINE']['value'] == {"('a', 'b')": expected}
  assert '  SPARSE_LAYERS = {1: 8}  ' in command.run('show', file).stdout


@pytest.mark.parametrize('form', [(), ('--json',)])
def test_macros_that_are_themselves_are_one_line(form):
  circle = ('--gin.GATED=%TIED_LOGITS', '--gin.TIED_LOGITS=%GATED')
  outcome = command.run('show', QUICKSTART, *circle, *form)
  assert (outcome.code, outcome.stdout) == (2, '')
  assert outcome.stderr.count('\n') == 1
  assert '%GATED = %TIED_LOGITS = %GATED' in outcome.stderr


def test_a_dry_run_begins_with_macros(tmp_path):
  arguments = (QUICKSTART, f'--gin.MODEL_DIR={tmp_path / "run"}')
  text = command.run('train', *arguments, '--dry_run').stdout
  steps = 'TRAIN_STEPS = 400'
  lines = (ROOT / 'gin/quickstart.gin').read_text().splitlines()
  line = lines.index(steps) + 1
  assert f'  {steps:<50}  gin/quickstart.gin:{line}\n' in text
  assert text.index(steps) < text.index('parameters  ')
  assert ' over ' not in text and 'train.train' not in text


def test_a_wrong_order_is_one_line():
  files = ('gin/routers/hash.gin', 'gin/models/switch/base.gin')
  for name in ('show', 'inspect'):
    outcome = command.run(name, *(f'--gin_file={file}' for file in files))
    assert (outcome.code, outcome.stdout) == (2, '')
    assert outcome.stderr.count('\n') == 1
    assert outcome.stderr.startswith(
      'error: gin/routers/hash.gin must come after gin/models/switch/base.gin'
    )
