"""The walks of docs/tutorials/ run as they are shown, and show what comes out.

A page is read as a reader would follow it. A block is

* of `sh`: commands, which are run;
* of `text`: what those print, see `agrees`;
* of `bash`: what is done once on a machine, installing and fetching; not here;
* any other: a file, whose name ends the line before it.
"""

import os
import pathlib
import re
import shlex
import subprocess
import sys
from typing import NamedTuple

import pytest
from paths import ROOT

from sparse_experts import cli
from sparse_experts.commands import settings

PAGES = sorted((ROOT / 'docs/tutorials').glob('*.md'))
each_page = pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)
# Made by scripts/check_hugging_face.sh, or as the page says.
HUGGING_FACE = '.venv-hugging-face'


class Block(NamedTuple):
  """What stands between two fences; `name`: of a file, else ''."""

  kind: str
  text: str
  name: str


def blocks(page):
  found = re.findall(
    r'(?:`([\w./]+)`:\n\n)?^```(\w*)\n(.*?)^```$', page.read_text(), re.S | re.M
  )
  return [Block(kind, text, name) for name, kind, text in found]


def commands(page):
  """The words of each command of ours, in order."""
  shown = ''.join(b.text for b in blocks(page) if b.kind == 'sh')
  lines = shown.replace('\\\n', ' ').splitlines()
  words = [shlex.split(line.partition(' | ')[0]) for line in lines]
  return [line[3:] for line in words if line[1:3] == ['-m', 'sparse_experts']]


def agrees(shown, printed):
  """Whether what is printed has the lines shown, one below the other.

  A line `...` stands for any lines. Numbers with a point are of one machine:
  they agree to a tenth of themselves, or of one. All else is equal.
  """
  shown, printed = shown.splitlines(), printed.splitlines()
  rows = range(len(printed) + 1)
  reached = set(rows)  # Lines printed so far: the text may begin anywhere.
  for line in shown:
    if line.strip() == '...':
      reached = {row for row in rows if row >= min(reached)}
    else:
      reached = {
        row + 1
        for row in reached
        if row in rows[:-1] and same(line, printed[row])
      }
    if not reached:
      return False
  return True


def same(line, other):
  words, others = line.split(), other.split()
  return len(words) == len(others) and all(
    word == other_word or near(word, other_word)
    for word, other_word in zip(words, others)
  )


def near(word, other):
  number = re.compile(r'-?\d+\.\d+(?:e[+-]\d+)?')
  if number.sub('', word) != number.sub('', other):
    return False
  pairs = zip(number.findall(word), number.findall(other))
  return all(
    abs(float(a) - float(b)) <= 0.1 * max(abs(float(a)), 1) for a, b in pairs
  )


def write(path, text):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)


def follow(page, folder):
  """Does what a page says, in a folder that looks as a checkout."""
  for path in ROOT.iterdir():
    if path.name not in ('runs', '.git', HUGGING_FACE):
      (folder / path.name).symlink_to(path)
  there = (ROOT / HUGGING_FACE).exists()
  if there:
    (folder / HUGGING_FACE).symlink_to(ROOT / HUGGING_FACE)
  ours = {'XLA_FLAGS', 'JAX_DISABLE_MOST_OPTIMIZATIONS', 'PYTHONPATH'}
  environment = {k: v for k, v in os.environ.items() if k not in ours}
  python = os.path.dirname(sys.executable)
  environment |= {
    'PATH': f'{python}:{environment["PATH"]}',
    'PYTHONUNBUFFERED': '1',
  }
  printed = None
  for kind, text, name in blocks(page):
    if name:
      write(folder / name, text)
    elif kind == 'sh':
      printed = None
      if HUGGING_FACE in text and not there:
        continue
      done = subprocess.run(
        ['bash', '-euo', 'pipefail', '-c', text],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
      )
      printed = done.stdout
      print(f'{text}\n{printed}')
      assert done.returncode == 0, printed
    elif kind == 'text' and printed is not None:
      assert agrees(text, printed), f'{text}\nis shown, and there is\n{printed}'


@pytest.mark.slow
@each_page
def test_a_walk(page, tmp_path):
  follow(page, tmp_path)


@each_page
def test_what_a_page_shows_can_be_read(page, python_folder, monkeypatch):
  """Blocks, flags, files and macros, without doing what they say."""
  assert f'(tutorials/{page.name})' in (ROOT / 'docs/tutorials.md').read_text()
  monkeypatch.chdir(python_folder)
  last = ''
  for kind, text, name in blocks(page):
    assert bool(name) == (kind not in ('sh', 'text', 'bash')), text
    assert kind != 'text' or last == 'sh', text
    last = kind
    if name:
      write(python_folder / name, text)
    if kind == 'python':
      compile(text, name, 'exec')
  of_page = commands(page)
  assert of_page
  for words in of_page:
    _, args = cli.arguments(words)
    if args.gin_file and not any(map(includes_a_run, args.gin_file)):
      settings.parse(args)


def includes_a_run(file):
  """Whether a gin file needs one that an earlier command writes."""
  path = pathlib.Path(file)
  return path.is_file() and "include 'runs/" in path.read_text()


def test_what_agrees():
  printed = 'a\nloss 1.52 at 7\nb\nc\n'
  assert agrees('loss 1.50 at 7\n', printed)
  assert agrees('a\n...\nc\n', printed)
  assert agrees('...\nb\n', printed)
  assert not agrees('a\nb\n', printed)
  assert not agrees('loss 1.3 at 7\n', printed)
  assert not agrees('loss 1.50 at 8\n', printed)
  assert not agrees('c\n...\na\n', printed)
