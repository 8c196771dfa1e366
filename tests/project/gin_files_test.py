"""Command lines that are shown can be read; recipes stay shallow."""

import functools
import json
import re
import shlex

import pytest
from paths import ROOT

from sparse_experts import config

# Deeper than three already. No other is; take off what is not any more.
DEEP = {
  *('gin/quickstart_dense.gin', 'gin/small/distillation.gin'),
  *(
    f'gin/models/{file}.gin'
    for file in (
      *('expert_choice/8b_64e', 'glam/1.7b', 'glam/137b', 'glam/8b'),
      *('gshard/36l', 'gshard/60l', 'prmoe/1.3b_mos', 'prmoe/1.3b_prmoe'),
      *('prmoe/350m_mos', 'st_moe/32b', 'st_moe/dense_large', 'st_moe/large'),
      *('switch/base_attention', 'switch/base_plus', 'switch/c'),
      *('switch/large', 'switch/xxl', 't5_1_1/large', 't5_1_1/xxl'),
    )
  ),
}


@functools.cache
def depth(file):
  """How many files one behind the other a file includes."""
  text = (ROOT / file).read_text()
  included = re.findall(r"^include '(.*)'", text, re.MULTILINE)
  return 1 + max(map(depth, included)) if included else 0


def test_no_recipe_is_deeper_than_three_includes():
  files = (str(p.relative_to(ROOT)) for p in ROOT.glob('gin/**/*.gin'))
  assert {file for file in files if depth(file) > 3} == DEEP


def commands():
  """Words of each command line of pages, notebooks, scripts and headers."""
  paths = [
    *ROOT.glob('*.md'),
    *ROOT.glob('docs/**/*.md'),
    *ROOT.glob('notebooks/*.ipynb'),
    *ROOT.glob('scripts/*.sh'),
    *ROOT.glob('gin/**/*.gin'),
  ]
  for path in sorted(paths):
    text = path.read_text()
    if path.suffix == '.ipynb':
      cells = json.loads(text)['cells']
      text = '\n'.join(''.join(cell['source']) for cell in cells)
    text = re.sub(r'\\\n[# ]*', ' ', text)
    lines = re.findall(r'^.*(?:sparse_experts|\.sh) .*$', text, re.MULTILINE)
    for line in lines:
      if '--gin_file=gin/' in line and not re.search(r'`|\.\.\.|TASK', line):
        yield tuple(shlex.split(line.lstrip('#!'), comments=True))


COMMANDS = sorted(set(commands()))


def test_there_are_command_lines():
  assert len(COMMANDS) > 30


@pytest.mark.parametrize('words', COMMANDS, ids=' '.join)
def test_a_command_line_that_is_shown_can_be_read(words):
  values = {'$factor': '1.0'}
  given = [
    re.sub(r'\$\w+', lambda name: values.get(name[0], 'run'), word)
    for word in words
  ]
  files = [w.removeprefix('--gin_file=') for w in given if '--gin_file=' in w]
  bindings = [w.removeprefix('--gin.') for w in given if w[:6] == '--gin.']
  if any(word.endswith('.sh') for word in words):  # They say where.
    bindings.append('MODEL_DIR=run')
  if {'plan', 'precompile'} & set(words):
    files.insert(0, 'gin/runs/precompile.gin')
  config.parse(files, bindings, [])
