"""The site has every page and figure, and builds without a warning."""

import ast
import os
import re
import subprocess
import sys

import docstring_markup
import pytest
from paths import ROOT

DOCS = ROOT / 'docs'
# An environment of the extra `docs`, where it is not that of the tests.
PYTHON = os.environ.get('DOCS_PYTHON', sys.executable)


def links(page):
  """The files that a page of docs/ leads to or shows."""
  text = page.read_text()
  targets = re.findall(r'\]\(([^)#:]+)(?:#[^)]*)?\)', text)
  return {(page.parent / target).resolve() for target in targets}


def test_every_page_is_in_the_table_of_contents():
  """Pages of a folder x/ are below x.md, which leads to them."""
  contents = links(DOCS / 'index.md')
  for page in DOCS.rglob('*.md'):
    if page.parent == DOCS:
      assert page in contents or page.name == 'index.md', (
        f'add {page.name} to docs/index.md'
      )
    else:
      above = page.parent.with_suffix('.md')
      assert above in contents and page in links(above), (
        f'add {page.relative_to(DOCS)} to {above.relative_to(ROOT)}'
      )
  assert {ROOT / 'CONTRIBUTING.md', ROOT / 'CHANGELOG.md'} < contents


def test_the_gallery_has_every_figure():
  shown = links(DOCS / 'gallery.md')
  for suffix in ('png', 'svg'):
    for figure in DOCS.rglob(f'*.{suffix}'):
      assert figure in shown, f'add {figure.relative_to(DOCS)} to gallery.md'
  # And a command after each figure.
  text = (DOCS / 'gallery.md').read_text()
  for after in text.split('![')[1:]:
    assert re.search(r'^```sh\n(bash|python) \S', after, re.M), after[:50]


def test_docstrings_as_markup():
  docstring = """\
  A `x_` of x_...xD and **kwargs, where |a| < b_.

  * An item of `a * b`,
    which goes on.

  One paragraph
      a  b
        c

  Attributes:
    one, two: these, or
        those.

  Returns:
    first: 1 * 2.
    second_E: that,
      or this.

  References:
    Someone 2020,
      section 1.
    Another 2021.

  Example:
    >>> 2 * 3
    6
  """
  lines = [line.removeprefix('  ') for line in docstring.rstrip().split('\n')]
  assert docstring_markup.markup(lines) == [
    r'A `x_` of x\_...xD and \*\*kwargs, where \|a\| < b\_.',
    '',
    '* An item of `a * b`,',
    '  which goes on.',
    '',
    'One paragraph',
    '',
    '.. code-block:: text',
    '',
    '    a  b',
    '      c',
    '',
    'Args:',
    '  one, two: these, or',
    '    those.',
    '',
    'Returns:',
    '  By name',
    '',
    r'  * first: 1 \* 2.',
    '  * second_E: that,',
    '      or this.',
    '',
    'References:',
    '  * Someone 2020,',
    '    section 1.',
    '  * Another 2021.',
    '',
    'Example:',
    '  >>> 2 * 3',
    '  6',
  ]


def test_what_is_before_a_colon_is_no_type():
  lines = ['Returns:', '  y and Aux: of all.']
  assert docstring_markup.markup(lines) == [
    'Returns:',
    '  \\',
    '  y and Aux: of all.',
  ]


def installed():
  command = [PYTHON, '-c', 'import autoapi, furo, myst_parser, sphinx']
  return not subprocess.run(command, capture_output=True).returncode


@pytest.mark.slow
def test_the_site_builds_and_asks_no_network(tmp_path):
  if not installed():
    pytest.skip(f'{PYTHON} has no extra `docs`; set DOCS_PYTHON to one.')
  built = subprocess.run(
    [PYTHON, 'scripts/docs_site.py', f'--output={tmp_path}'],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert built.returncode == 0, built.stderr
  html = tmp_path / 'html'
  pages = {str(path.relative_to(html)) for path in html.rglob('*.html')}
  expected = {'index.html', 'docs/gallery.html', 'gin/quickstart.html'}
  expected |= {
    str(path.relative_to(ROOT).with_suffix('.html'))
    for path in DOCS.rglob('*.md')
  }
  assert expected < pages
  for path in html.rglob('*.html'):
    fetched = re.findall(
      r'<(?:script|img|iframe|source)\b[^>]*\bsrc="([^"]*)"'
      r'|<link\b[^>]*\bhref="([^"]*)"',
      path.read_text(),
    )
    for target in map(''.join, fetched):
      assert '//' not in target, f'{path} asks for {target}'
  layer = (html / 'api/sparse_experts/moe/layer/index.html').read_text()
  tree = ast.parse((ROOT / 'sparse_experts/moe/layer.py').read_text())
  (moe,) = (node for node in tree.body if getattr(node, 'name', '') == 'MoE')
  assert ast.get_docstring(moe).partition('\n')[0] in layer
  walks = re.findall(
    r'toctree-l2"><a[^>]*href="tutorials/(\w+)\.html"',
    (html / 'docs/tutorials.html').read_text(),
  )
  linked = re.findall(
    r'\(tutorials/(\w+)\.md\)', (DOCS / 'tutorials.md').read_text()
  )
  assert walks == linked
  recipes = (html / 'docs/recipes.html').read_text()
  assert 'href="../gin/models/switch/base.html"' in recipes


def test_a_folder_of_something_else_is_left_alone(tmp_path):
  file = tmp_path / 'html/mine'
  file.parent.mkdir()
  file.touch()
  ended = subprocess.run(
    [sys.executable, 'scripts/docs_site.py', f'--output={tmp_path}'],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert ended.returncode == 1 and file.exists()
  assert ended.stderr.startswith(f'error: {tmp_path} is there, and this script')
