"""Docstrings, which are plain text, as the markup that Sphinx reads.

Docstrings are written for readers of the source. So indented blocks are shown
as they stand, and outside of backticks `*`, `|` and a final `_` mean
themselves.
"""

import re

SECTION = re.compile(
  r'(Args|Attributes|Raises|Returns|Yields|Example|Examples|References):'
)
ITEM = re.compile(r'  \S')
NAMED = re.compile(r'  \w+(, \w+)*: ')
CODE = re.compile(r'(`[^`]*`)')


def markup(lines: list[str]) -> list[str]:
  """The lines of a docstring in Sphinx's markup.

  Args:
    lines: dedented, as `inspect.getdoc` has them.

  Returns:
    Lines for Sphinx's napoleon, which reads the sections `Args:` and so on.
  """
  written, section, literal, after_blank = [], None, False, True
  for line in lines:
    text = line.lstrip()
    indent = len(line) - len(text)
    if text and indent == 0:
      heading = SECTION.fullmatch(text)
      section, literal = (heading[1] if heading else None), False
      if section == 'Attributes':  # Which the class is built with, and lists.
        text = 'Args:'
    elif (
      text
      and not (section or literal)
      and (after_blank or not _in_list(written))
    ):
      written += ['', '.. code-block:: text', '']
      literal = True
    if text.startswith('>>>'):  # To the next line without an indent.
      literal = True
    if not text:
      written.append('')
    elif literal or section in ('Example', 'Examples'):
      written.append(line)
    elif section == 'References' and indent:
      written.append(('  * ' if indent == 2 else '    ') + _escaped(text))
    elif section:
      # An item is at 2 columns and its text at 4; what is deeper goes with it.
      written.append(' ' * min(indent, 4) + _escaped(text))
    else:
      written.append(' ' * indent + _escaped(text))
    after_blank = not text
  return _with_lists(written)


def _in_list(written):
  """Whether the paragraph so far is an item of a list."""
  for line in reversed(written):
    if not line or line.startswith(('* ', '- ')):
      return bool(line)
  return False


def _escaped(text):
  """The text, whose marks mean themselves; code and bullets stay."""
  bullet, text = (text[:2], text[2:]) if text[:2] == '* ' else ('', text)
  parts = CODE.split(text)
  parts[::2] = (
    re.sub(r'_(?!\w)', r'\\_', re.sub(r'([*|\\])', r'\\\1', part))
    for part in parts[::2]
  )
  return bullet + ''.join(parts)


def _with_lists(lines):
  """The lines, in which a `Returns:` of several names is a list of them."""
  if 'Returns:' not in lines:
    return lines
  first = lines.index('Returns:') + 1
  rest = range(first, len(lines))
  end = next((i for i in rest if lines[i] and lines[i][0] != ' '), len(lines))
  body = lines[first:end]
  items = [line for line in body if ITEM.match(line)]
  # A first line without a colon, before which napoleon would see a type.
  if len(items) > 1 and all(map(NAMED.match, items)):
    listed = (
      f'  * {line[2:]}' if ITEM.match(line) else f'  {line}'.rstrip()
      for line in body
    )
    body = ['  By name', '', *listed]
  else:
    body = ['  \\', *body]
  return lines[:first] + body + lines[end:]
