"""One self-contained HTML page: no script, no font, no request to anywhere."""

from __future__ import annotations

import html
import io
import re
import typing
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sparse_experts.insight.colours import COLOURS, ink

if typing.TYPE_CHECKING:
  from matplotlib.figure import Figure

# What scrolls has a shadow at an edge that hides more: two covers move with the
# content, and two shadows below them do not.
_STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fdfdfc;
  --faint: #666; --line: #d8d8d4; --panel: #f3f3f0; --link: #005a9c;
  --shadow: #0006; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e3;
  --paper: #16181a; --faint: #a0a09b; --line: #3a3d40; --panel: #202326;
  --link: #8ec7f5; --shadow: #fff6; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem 1rem 4rem; max-width: 64rem;
  font: 16px/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--paper); }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem; padding-top: .5rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
.figures, .scroll, details { margin: .9rem 0; }
p { margin: .4rem 0; max-width: 44rem; } .faint, figcaption {
  color: var(--faint); font-size: .9rem; }
nav a { margin-right: .9rem; } a { color: var(--link); }
.figures { display: grid; gap: 1.2rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); }
figure { margin: 0; } figure svg { width: 100%; height: auto; display: block; }
figure svg text { fill: currentColor; }
.scroll, pre { --under: var(--paper); overflow-x: auto; background:
  linear-gradient(to right, var(--under) 40%, transparent) left / 2rem 100%
    no-repeat local,
  linear-gradient(to left, var(--under) 40%, transparent) right / 2rem 100%
    no-repeat local,
  linear-gradient(to right, var(--shadow), transparent) left / .7rem 100%
    no-repeat scroll,
  linear-gradient(to left, var(--shadow), transparent) right / .7rem 100%
    no-repeat scroll, var(--under); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums;
  font-size: .9rem; }
th, td { padding: .2rem .7rem .2rem 0; text-align: right; vertical-align: top;
  border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child, .text td, .text th { text-align: left; }
.text td:last-child { white-space: normal; overflow-wrap: anywhere; }
pre { --under: var(--panel); padding: .8rem;
  font: .8rem/1.4 ui-monospace, monospace; }
summary { cursor: pointer; }
dl { font-size: .9rem; color: var(--faint); max-width: 44rem; }
dt { float: left; clear: left; margin-right: .5rem; color: var(--ink); }
dd { margin: 0; }
.tokens { line-height: 2.1; max-width: none; }
.token { --of: var(--faint); padding: .1rem .2rem; white-space: pre;
  border: 2px solid var(--of); border-radius: .2rem; background: var(--of);
  color: var(--on); }
.token small { margin-left: .2rem; font-size: .7rem; vertical-align: sub; }
.token.cut { border: 2px dashed var(--ink); }
.token.lost { border: 2px dashed var(--of); background: none;
  color: var(--ink); }
.token:hover, .token:focus { outline: 3px solid var(--ink); }
.token:hover::after, .token:focus::after { content: attr(aria-label);
  position: fixed; inset: auto 0 0; padding: .6rem 1rem; z-index: 1;
  white-space: normal; background: var(--ink); color: var(--paper);
  font: .9rem/1.4 system-ui, sans-serif; }
.token:hover::after { z-index: 2; }
code { background: var(--panel); padding: 0 .25rem;
  font: .85rem ui-monospace, monospace; overflow-wrap: anywhere; }
td code { margin-right: .3rem; white-space: pre; }
""" + ''.join(
  f'.of{i} {{ --of: {colour}; --on: {ink(colour)}; }}\n'
  for i, colour in enumerate(COLOURS)
)


class Token(NamedTuple):
  """A token of a text, on a ground that says whose it is.

  Attributes:
    text: of the token, as it is shown.
    number: that stands beside it and decides on the ground; None: it has none.
    detail: what is said of it where it is pointed at or has the focus.
    kept: 'all', or what is dashed: 'some', 'none'.
    starts_word: there is a space before it.
  """

  text: str
  number: int | None
  detail: str
  kept: str = 'all'
  starts_word: bool = False


def render(title: str, sections: Sequence[tuple[str, str]], lead: str) -> str:
  """The page: `lead`, links to the sections, then each under its heading.

  Args:
    title: its title and heading, as plain text.
    sections: names, as plain text, and contents, as HTML.
    lead: what stands first, as HTML.
  """
  links = ''.join(
    f'<a href="#{anchor(name)}">{html.escape(name)}</a>\n'
    for name, _ in sections
  )
  body = ''.join(
    f'<section id="{anchor(name)}"><h2>{html.escape(name)}</h2>\n{content}\n'
    '</section>\n'
    for name, content in sections
  )
  return (
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    '<link rel="icon" href="data:,">\n'  # Or browsers ask for one.
    f'<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n'
    f'<body>\n<h1>{html.escape(title)}</h1>\n{lead}\n<nav>{links}</nav>\n'
    f'{body}</body>\n</html>\n'
  )


def paragraph(text: str) -> str:
  """Plain text, in which what stands between backticks is code."""
  text = re.sub('`(.+?)`', r'<code>\1</code>', html.escape(text))
  return f'<p class="faint">{text}</p>\n'


def heading(text: str) -> str:
  return f'<h3>{html.escape(text)}</h3>\n'


def preformatted(text: str) -> str:
  return f'<pre tabindex="0">{html.escape(text)}</pre>\n'


def folded(title: str, content: str) -> str:
  """Content that opens at a click."""
  title = html.escape(title)
  return f'<details><summary>{title}</summary>\n{content}</details>\n'


def terms(meanings: Mapping[str, str]) -> str:
  """What words mean, each with its text."""
  found = ''.join(
    f'<dt>{html.escape(word)}</dt><dd>{html.escape(meaning)}</dd>\n'
    for word, meaning in meanings.items()
  )
  return f'<dl>{found}</dl>\n'


def tokens(found: Sequence[Token]) -> str:
  """A text that wraps, token by token."""
  return f'<p class="tokens">{"".join(map(_token, found))}</p>\n'


def table(
  header: Sequence[str], rows: Sequence[Sequence[object]], text: bool = False
) -> str:
  """A table, whose cells are plain text.

  Args:
    header: a name for each column.
    rows: a cell for each column. One that is a tuple of texts is set piece by
      piece, each as code.
    text: the last column is text and wraps; else columns after the first are
      numbers, to the right.
  """

  def row(cells, tag):
    cells = (f'<{tag}>{_cell(cell)}</{tag}>' for cell in cells)
    return f'<tr>{"".join(cells)}</tr>\n'

  body = ''.join(row(cells, 'td') for cells in rows)
  kind = ' class="text"' if text else ''
  return (
    f'<div class="scroll" tabindex="0"><table{kind}>\n'
    f'<thead>{row(header, "th")}</thead>\n<tbody>{body}</tbody></table></div>\n'
  )


def anchor(text: str) -> str:
  """A text as the name of a place in a page, or of a file."""
  return re.sub(r'\W+', '-', text).strip('-').lower()


def figures(captioned: Sequence[tuple[str, Figure]]) -> str:
  """Figures side by side where there is room, in the colours of the page."""
  return (
    '<div class="figures">'
    + ''.join(_figure(caption, figure) for caption, figure in captioned)
    + '</div>\n'
  )


def _figure(caption: str, figure: Figure) -> str:
  import matplotlib

  file = io.StringIO()
  # Text stays text; ids differ between figures, not between runs.
  with matplotlib.rc_context({'svg.fonttype': 'none', 'svg.hashsalt': caption}):
    figure.savefig(
      file, format='svg', transparent=True, metadata={'Date': None}
    )
  svg = file.getvalue()
  svg = svg[svg.index('<svg') :]
  svg = re.sub(r'<metadata>.*?</metadata>', '', svg, flags=re.DOTALL)
  svg = svg.replace('#000000', 'currentColor')
  name = anchor(caption)
  svg = re.sub(r'(\bid="|url\(#|href="#)', rf'\g<1>{name}-', svg)
  label = html.escape(caption)
  svg = svg.replace('<svg ', f'<svg role="img" aria-label="{label}" ', 1)
  return f'<figure>{svg}<figcaption>{label}</figcaption></figure>\n'


def _token(token: Token) -> str:
  classes, number = 'token', '-'
  if token.number is not None:
    classes, number = f'token of{token.number % len(COLOURS)}', token.number
  classes += {'all': '', 'some': ' cut', 'none': ' lost'}[token.kept]
  gap = ' ' if token.starts_word else '<wbr>'
  return (
    f'{gap}<span class="{classes}" tabindex="0" role="note" '
    f'aria-label="{html.escape(token.detail)}">{html.escape(token.text)}'
    f'<small>{number}</small></span>'
  )


def _cell(content) -> str:
  if isinstance(content, tuple):
    pieces = (html.escape(piece.replace('\n', '⏎')) for piece in content)
    return ' '.join(f'<code>{piece}</code>' for piece in pieces)
  return html.escape(str(content))
