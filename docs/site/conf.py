"""Sphinx's settings for the site, which scripts/docs_site.py builds.

Sphinx runs on a copy of the pages, of gin/ and of the package. API pages are
read from the source without importing it.
"""

import os
import pathlib
import re

import docstring_markup  # Beside scripts/docs_site.py.
from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.parsers import Parser
from sphinx.transforms.post_transforms import SphinxPostTransform

SITE = pathlib.Path(__file__).parent

project = 'sparse_experts'
copyright = 'its authors, Apache 2.0'
root_doc = 'README'
extensions = [
  'autoapi.extension',
  'myst_parser',
  'sphinx.ext.napoleon',
  'sphinx.ext.viewcode',
]
source_suffix = {'.md': 'markdown', '.gin': 'gin', '.rst': 'restructuredtext'}
exclude_patterns = ['sparse_experts', 'docs/site']
default_role = 'code'  # `x` in docstrings is what it is in Markdown.
suppress_warnings = [
  'ref.python',  # Classes of one name in several modules, in annotations.
]

myst_enable_extensions = ['dollarmath']
myst_heading_anchors = 3

autoapi_dirs = ['sparse_experts']
autoapi_root = 'api'
autoapi_add_toctree_entry = False
autoapi_keep_files = False
autoapi_member_order = 'bysource'
autoapi_options = ['members', 'undoc-members', 'show-module-summary']
autoapi_ignore = ['*/_data/*']

python_use_unqualified_type_names = True
pygments_dark_style = 'github-dark'

html_theme = 'furo'
html_title = 'sparse_experts'
html_static_path = ['static']
html_css_files = ['site.css']
html_show_sphinx = False
html_copy_source = False
html_math_renderer = 'mathml'


class GinPage(Parser):
  """A page of a gin file: its path and its text."""

  supported = ('gin',)

  def parse(self, inputstring, document):
    env = document.settings.env
    path = f'{env.docname}.gin'
    env.metadata[env.docname]['orphan'] = True  # Reached by links, not the bar.
    section = nodes.section(ids=['file'], names=['file'])
    section += nodes.title(path, path)
    section += nodes.literal_block(inputstring, inputstring, language='python')
    document += section


class LinkPaths(SphinxPostTransform):
  """`gin/x.gin` and `moe/layer.py` in a text lead to their pages."""

  default_priority = 900

  def run(self, **kwargs):
    pages = self.env.found_docs
    for node in list(self.document.findall(nodes.literal)):
      page = page_of(node.astext(), pages)
      if (
        page is None
        or page == self.env.docname
        or isinstance(node.parent, nodes.reference | nodes.title)
      ):
        continue
      uri = self.app.builder.get_relative_uri(self.env.docname, page)
      link = nodes.reference('', '', internal=True, refuri=uri)
      node.replace_self(link)
      link += node


def page_of(text, pages):
  """The page of a file that a text names, or None."""
  if text.endswith('.gin'):
    found = [text.removesuffix('.gin')]
  elif text.endswith('.py'):
    module = text.removesuffix('.py').removesuffix('/__init__')
    found = [f'api/{module}/index', f'api/sparse_experts/{module}/index']
  else:
    return None
  return next((page for page in found if page in pages), None)


def write_math(self, node):
  """Formulas as MathML, which browsers show without a script."""
  if isinstance(node, nodes.math_block):
    formula = tex2mathml(node.astext(), as_block=True)
    self.body.append(f'<div class="formula">{formula}</div>')
  else:
    self.body.append(tex2mathml(node.astext()))
  raise nodes.SkipNode


def contents():
  """The table of contents, of the lists of docs/index.md: (section, pages)."""
  text = (SITE.parent / 'index.md').read_text()
  for section in text.split('\n## ')[1:]:
    links = re.findall(r'^\* \[.*?\]\((.*?)\.md\)', section, re.MULTILINE)
    pages = [os.path.normpath(f'docs/{link}') for link in links]
    yield section.partition('\n')[0], [x for x in pages if x != root_doc]


def add_contents(app, docname, source):
  """Adds the tables of contents that the side bar shows.

  The first page has that of docs/index.md. Below docs/x.md come the pages of
  the folder docs/x/, first those that docs/x.md names, in its order.
  """
  if docname == root_doc:
    for caption, pages in contents():
      source[0] += tree(pages, f':caption: {caption}')
    everything = ['docs/index', 'Modules <api/sparse_experts/index>']
    source[0] += tree(everything, ':caption: Everything')
  elif (SITE.parents[1] / docname).is_dir() and docname.startswith('docs/'):
    folder = SITE.parents[1] / docname
    linked = re.findall(rf'\]\({folder.name}/(\w+)\.md\)', source[0])
    rest = sorted(path.stem for path in folder.glob('*.md'))
    pages = dict.fromkeys([*linked, *rest])
    source[0] += tree([f'/{docname}/{page}' for page in pages])
  elif docname.startswith('tests/'):  # Reached by a link alone.
    source[0] = f'---\norphan: true\n---\n{source[0]}'


def tree(pages, option=''):
  """A hidden table of contents."""
  return '\n'.join(
    ['', '```{toctree}', ':hidden:', option, '', *pages, '```', '']
  )


def members(app, what, name, obj, skip, options):
  """`__call__` is what a module is for; other such names are Python's."""
  if name.endswith('.__call__') and obj.docstring:
    return False
  return None


def as_markup(app, what, name, obj, options, lines):
  """Docstrings, before napoleon reads their sections."""
  lines[:] = docstring_markup.markup(lines)


def setup(app):
  app.connect('autodoc-process-docstring', as_markup, priority=400)
  app.add_source_parser(GinPage)
  app.add_post_transform(LinkPaths)
  app.add_html_math_renderer('mathml', (write_math, None), (write_math, None))
  app.connect('source-read', add_contents)
  app.connect('autoapi-skip-member', members)
