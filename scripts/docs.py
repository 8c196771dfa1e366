"""Writes what docs/ has from the source, or says which of it is stale.

A part of a page stands between two lines,

  <!-- routers: written by scripts/docs.sh -->
  <!-- end of routers -->

and is made of the headers of gin files and of mutants, of what classes declare,
of what the ledger counts, and of the project's address. A gin header's first
sentence is a file's row.

  bash scripts/docs.sh --write            # all parts, in two minutes
  bash scripts/docs.sh --write routers    # one
  bash scripts/docs.sh --check            # ends with 1 if one is stale
"""

import argparse
import collections
import inspect
import pathlib
import re
import sys
import textwrap

import imports_picture
import mutants
import notebook_setup

from sparse_experts import config, convert, moe, sharding
from sparse_experts.commands import table
from sparse_experts.papers import published
from sparse_experts.planning import program_ledger

ROOT = pathlib.Path(__file__).resolve().parents[1]

# In this order; another that a header names follows.
KINDS = (
  'tokens choose',
  'experts choose',
  'assigned for all',
  'fixed or given',
  'learned by reward',
  'soft',
)


def header(file):
  """The comment that a gin file begins with, on one line."""
  lines = (ROOT / file).read_text().partition('\n\n')[0].splitlines()
  return ' '.join(line.removeprefix('#').strip() for line in lines)


def sentence(file):
  """The first of a file's header, its citations as links."""
  found = re.match(r'(.*?)\.( [A-Z`]|  |$)', header(file))
  if not found or ' Provides: ' in found[1]:
    raise ValueError(f'{file} begins with no sentence: its header needs one.')
  text = found[1]
  text = re.sub(r'([A-Z][^(;:,]* \d{4}), (https://[^,;)]+)', r'[\1](\2)', text)
  return re.sub(r'(gin/\S+\.gin)', r'`\1`', text)


def files(pattern):
  return sorted(str(p.relative_to(ROOT)) for p in ROOT.glob(pattern))


def rows(*of):
  """Lines of a table: each a tuple of cells."""
  return ''.join(f'| {" | ".join(cells)} |\n' for cells in of)


def routers():
  """Every router, by kind."""
  by_kind = collections.defaultdict(list, {kind: [] for kind in KINDS})
  yes = {True: 'yes', False: 'no'}
  for file in files('gin/routers/*.gin'):
    config.parse(['gin/equivalence.gin', file], [], [])
    router = config.value('ROUTER')()
    kind = re.search('^# Kind: (.*)$', (ROOT / file).read_text(), re.MULTILINE)
    by_kind[kind[1] if kind else 'others'].append(
      (
        f'`{pathlib.Path(file).stem}`',
        sentence(file),
        f'`{type(router).__name__}`',
        yes[router.is_causal],
        yes[router.drops],
        ', '.join(router.needs),
      )
    )
  heading = ('file', 'what it does', 'class', 'causal', 'drops', 'needs')
  return rows(heading, ('---',) * 6) + ''.join(
    rows((f'**{kind}**', *[''] * 5), *of) for kind, of in by_kind.items() if of
  )


def of_files(*patterns):
  """A table of gin files and the first sentences of their headers."""
  found = [file for pattern in patterns for file in files(pattern)]
  return rows(
    ('file', 'what'),
    ('---', '---'),
    *((f'`{file}`', sentence(file)) for file in found),
  )


def names():
  """What packages export, each with the first line of its documentation."""
  text = []
  for package in (moe, sharding, convert):
    exported = ((name, getattr(package, name)) for name in package.__all__)
    found = [
      (f'`{name}`', documentation(value)) for name, value in sorted(exported)
    ]
    table_of = rows(('name', 'what'), ('---', '---'), *found)
    text.append(f'### `{package.__name__}`\n\n{table_of}')
  return '\n'.join(text)


def documentation(value):
  """The first line of what a function or class says; a constant is itself."""
  if callable(value) and value.__module__.startswith('sparse_experts'):
    return inspect.getdoc(value).partition('\n')[0].rstrip('.')
  return f'a constant, {type(value).__name__}'


def paper(name, computed):
  """A paper's table, published beside computed, and why some disagree.

  Args:
    name: of `published.tables()`.
    computed: its rows, as of `table.computed`.
  """
  lines, reasons = [], collections.defaultdict(list)
  for row in computed:
    for value in row['values']:
      lines.append(
        (
          row['model'],
          value['quantity'],
          value['published'],
          f'{value["computed"]:,}',
          f'{value["difference"]:+.1%}',
        )
      )
      if value['because']:
        reasons[value['quantity'], value['because']].append(row['model'])
  heading = ('model', 'what', 'published', 'computed', 'difference')
  text = f'### `{name}`: {published.tables()[name].title}\n\n'
  text += rows(heading, ('---', '---', '---:', '---:', '---:'), *lines)
  notes = (
    f'* {quantity} of {", ".join(models)}: {because}.'
    for (quantity, because), models in reasons.items()
  )
  notes = [textwrap.fill(note, 79, subsequent_indent='  ') for note in notes]
  return text + '\n' * bool(notes) + ''.join(f'{note}\n' for note in notes)


def papers():
  """All tables of all papers."""
  return '\n'.join(
    paper(name, list(map(table.computed, of.rows)))
    for name, of in published.tables().items()
  )


def known_bugs():
  """Mutants, and the test that kills each."""
  heading = ('mutant', 'what the code does then', 'its test')
  found = [
    (
      f'[`{m.name}`]({m.known})' if m.known else f'`{m.name}`',
      m.bug,
      f'`{m.test.removeprefix("tests/")}`',
    )
    for m in mutants.mutants()
  ]
  return rows(heading, ('---',) * 3, *found)


def ledgers():
  """Programs that are kept, each a row: what one device does in a step."""
  kinds = ('all-to-all', 'ragged-all-to-all', 'all-gather', 'all-reduce')
  kinds += ('reduce-scatter', 'collective-permute')
  lines = []
  for path in sorted((ROOT / 'tests/data/ledgers').glob('*.json')):
    kept = program_ledger.read(path)
    number = collections.defaultdict(int, kept.quantities)
    executed, useful = number['executed FLOPs'], number['useful FLOPs']
    recipe = kept.gin_file[0].removeprefix('gin/models/').removesuffix('.gin')
    lines.append(
      (
        f'`{recipe}`, `{kept.topology}`',
        f'{executed:.3e}, {executed / useful:.2f}',
        f'{number["peak HBM bytes"] / 2**30:.2f}',
        *(
          f'{number[f"{kind} count"]:,}, {number[f"{kind} bytes"] / 2**30:.2f}'
          if number[f'{kind} count']
          else ''
          for kind in kinds
        ),
      )
    )
  heading = ('recipe, topology', 'executed FLOPs, over useful', 'peak')
  alignment = ('---', *['---:'] * (2 + len(kinds)))
  return rows((*heading, *kinds), alignment, *lines)


def gallery():
  """Figures of notebooks, each with its section and its command."""
  text = []
  for path in sorted((ROOT / 'docs/notebooks').glob('*.md')):
    lines = path.read_text().splitlines()
    title = next(line[2:] for line in lines if line.startswith('# '))
    section, code = '', False
    for line in lines:
      code ^= line.startswith('```')
      if line.startswith('## ') and not code:
        section = line[3:].rstrip('?')
      elif found := re.fullmatch(r'!\[\w+\]\((.*)\)', line):
        text.append(
          f'![{title}: {section}](notebooks/{found[1]})\n\n'
          f'[{title}](notebooks/{path.name}): {section}\n\n'
          f'```sh\npython scripts/render_notebooks.py {path.name[:2]}\n```\n'
        )
  return '\n'.join(text)


# A part's name: the pages that it is of, and how it is made.
PARTS = {
  'routers': (['docs/routers.md'], routers),
  'recipes': (['docs/recipes.md'], lambda: of_files('gin/models/*/*.gin')),
  'papers': (['docs/recipes.md'], papers),
  'ledgers': (['docs/results/pods.md'], ledgers),
  'names': (['docs/names.md'], names),
  'mutants': (['docs/mutants.md'], known_bugs),
  'tasks': (
    ['docs/finetuning.md'],
    lambda: of_files('gin/tasks/*.gin', 'gin/tasks/*/*.gin'),
  ),
  'gallery': (['docs/gallery.md'], gallery),
  'colab': (
    ['README.md', 'docs/notebooks.md'],
    lambda: notebook_setup.colab(notebook_setup.repository()),
  ),
}


def rooms():
  """The picture of imports."""
  drawn = imports_picture.draw(imports_picture.count_imports())
  return {imports_picture.PICTURE: drawn}


def setup():
  """The first code cell of notebooks, and of their pages."""
  cell = notebook_setup.cell(notebook_setup.repository())
  return notebook_setup.with_cell(cell)


# Parts that are whole files, or all but the rest of some.
FILES = {'rooms': rooms, 'setup': setup}


def marks(name):
  """The lines that a part stands between."""
  first = f'<!-- {name}: written by scripts/docs.sh -->\n'
  return f'{first}\n', f'\n<!-- end of {name} -->\n'


def with_part(page, name, text):
  """The text of a page in which a part is this."""
  first, last = marks(name)
  before, mark, rest = page.partition(first)
  _, mark_too, after = rest.partition(last)
  if not (mark and mark_too):
    raise ValueError(
      f'the lines {first.strip()!r} and {last.strip()!r}, that {name} stands '
      'between, are not in its page.'
    )
  return before + first + text + last + after


def updated(name):
  """The files that a part is in, each with its text, the part made anew."""
  if name in FILES:
    return FILES[name]()
  pages, make = PARTS[name]
  text = make()
  return {
    ROOT / page: with_part((ROOT / page).read_text(), name, text)
    for page in pages
  }


def main(argv=None):
  """Returns 1 if a part that was to be checked is stale."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  what = parser.add_mutually_exclusive_group(required=True)
  what.add_argument('--write', action='store_true', help='write the parts')
  what.add_argument('--check', action='store_true', help='name stale ones')
  parser.add_argument('parts', nargs='*', help='of all', metavar='PART')
  args = parser.parse_args(argv)
  known = [*PARTS, *FILES]
  if unknown := set(args.parts) - set(known):
    parser.error(f'no part {", ".join(unknown)}; there are {", ".join(known)}.')
  stale = []
  for name in args.parts or known:
    texts = updated(name)
    if any(text != path.read_text() for path, text in texts.items()):
      stale.append(name)
      if args.write:
        for path, text in texts.items():
          path.write_text(text)
  if stale and args.check:
    print(f'stale: {", ".join(stale)}; bash scripts/docs.sh --write')
  return int(bool(stale and args.check))


if __name__ == '__main__':
  sys.exit(main())
