"""Docstrings, which are plain text, as the markup that Sphinx reads.

They are written for readers of the source: indented blocks are shown as they
stand, and `*`, `|` and a final `_` outside of backticks mean themselves.
"""

import re

SECTION = re.compile(
  r'(Args|Attributes|Raises|Returns|Yields|Example|Examples):'
)
NAMED = re.compile(r'\w+(, \w+)*: ')
CODE = re.compile(r'(`[^`]*`)')


def markup(lines: list[str]) -> list[str]:
  """The lines of a docstring, dedented, in Sphinx's markup."""
  written, section, block, blank, doctest = [], None, False, True, False
  for line in lines:
    text, indent = line.lstrip(), len(line) - len(line.lstrip())
    if not text:
      blank, doctest = True, False
      written.append('')
      continue
    if indent == 0:
      heading = SECTION.fullmatch(text)
      section, block = (heading[1] if heading else None), False
    elif section is None and not block and (blank or not in_list(written)):
      written += ['' if blank else '', '::', '']
      block = True
    doctest |= text.startswith('>>>')
    if block or doctest or section in ('Example', 'Examples'):
      written.append(line)
    elif section:
      # An item is at 2 columns and its text at 4; what is deeper goes with it.
      written.append(' ' * min(indent, 4) + escaped(text))
    else:
      written.append(line[:indent] + escaped(text))
    blank = False
  return list(listed(written))


def in_list(written):
  """Whether the paragraph so far is an item of a list."""
  for line in reversed(written):
    if not line:
      return False
    if line.startswith(('* ', '- ', '1. ')):
      return True
  return False


def escaped(text):
  """The text whose marks mean themselves, but for code and bullets."""
  bullet, text = (text[:2], text[2:]) if text[:2] == '* ' else ('', text)
  parts = CODE.split(text)
  parts[::2] = (
    re.sub(r'_(?!\w)', r'\\_', re.sub(r'([*|\\])', r'\\\1', part))
    for part in parts[::2]
  )
  return bullet + ''.join(parts)


def listed(lines):
  """Returns of several names as a list of them."""
  lines = iter(lines)
  for line in lines:
    yield line
    if line != 'Returns:':
      continue
    body = []
    for after in lines:
      body.append(after)
      if after and not after.startswith(' '):
        break
    else:
      body.append('')
    *body, after = body
    items = [x for x in body if re.match(r'  \S', x)]
    if len(items) > 1 and all(NAMED.match(x.strip()) for x in items):
      yield '  By name'
      yield ''
      for x in body:
        yield (
          ('  * ' if re.match(r'  \S', x) else '    ') + x.strip() if x else x
        )
    else:
      yield from body
    yield after
