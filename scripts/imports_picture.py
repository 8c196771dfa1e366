"""Draws docs/rooms.svg, which room of the package imports which, from source.

Rooms stand on a staircase, in the order of imports. A line leaves a room to the
right, and at every number on it turns down to a room that it imports: nothing
can point up, as `tests/project/structure_test.py` holds.

  bash scripts/docs.sh --write rooms
"""

import collections
import pathlib
import sys

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / 'tests'))

from rooms import FILES, LAYERS, RANK, imports, room  # noqa: E402

PICTURE = ROOT / 'docs/rooms.svg'
STEP, LEFT, TOP, MARGIN = 37, 112, 24, 14
STYLE = """
  text { fill: #1b2733; text-anchor: middle;
    font: 13px ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace }
  .count { font-size: 11px; fill: #ffffff }
  .words { font: 14px system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif;
    fill: #4a5866; text-anchor: start }
  .title { font-size: 18px; font-weight: 600; fill: #1b2733 }
  .line { fill: none; stroke: #9fb3c8; stroke-width: 1.5 }
"""
WORDS = (
  'To the right of a room: what it imports, all below it.',
  'Above a room: who imports it.',
  'A number counts the imported names.',
  'Rooms of one band do not import each other.',
)


def count_imports():
  """How many names rooms import from rooms, by (from, to)."""
  counts = collections.Counter()
  for path in FILES:
    for name in imports(path):
      package, _, rest = name.partition('.')
      to = rest.partition('.')[0]
      if package == 'sparse_experts' and to in RANK and room(path) in RANK:
        counts[room(path), to] += to != room(path)
  return +counts


def draw(counts):
  """The picture of such counts, as text of an SVG file."""
  rooms = [name for line in reversed(LAYERS) for name in line.split()]
  at = {name: i * STEP + STEP // 2 for i, name in enumerate(rooms)}
  size = len(rooms) * STEP
  width, height = LEFT + size + MARGIN, TOP + size + MARGIN
  shapes = [
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
    f'width="{width}" height="{height}" role="img">',
    '<title>Which room of sparse_experts imports which</title>',
    f'<style>{STYLE}</style>',
    f'<rect width="{width}" height="{height}" rx="10" fill="#ffffff"/>',
    *_bands(width),
    *(
      shape
      for name in rooms
      for shape in _lines(name, at, [to for of, to in counts if of == name])
    ),
    *(
      shape
      for (of, to), count in sorted(counts.items())
      for shape in _number(LEFT + at[to], TOP + at[of], count)
    ),
    *(shape for name in rooms for shape in _box(name, at[name])),
    *_caption(height),
    '</svg>',
  ]
  return '\n'.join(shapes) + '\n'


def _bands(width):
  """Every other line of `LAYERS` on grey."""
  y = TOP
  for i, line in enumerate(reversed(LAYERS)):
    height = len(line.split()) * STEP
    if i % 2 == 0:
      yield f'<rect y="{y}" width="{width}" height="{height}" fill="#f1f5f9"/>'
    y += height


def _lines(name, at, imported):
  """From a room to the right, and down to each room that it imports."""
  x, y = LEFT + at[name], TOP + at[name]
  if imported:
    end = LEFT + max(at[to] for to in imported)
    yield f'<path class="line" d="M{x} {y}H{end}"/>'
  for to in sorted(imported):
    x, end = LEFT + at[to], TOP + at[to] - 12
    yield f'<path class="line" d="M{x} {y}V{end - 5}"/>'
    yield f'<path d="M{x - 4} {end - 6}h8l-4 6z" fill="#6b8299"/>'


def _number(x, y, count):
  """A disc whose area grows with the count."""
  radius = min(8 + count**0.5, 15)
  yield f'<circle cx="{x}" cy="{y}" r="{radius:.1f}" fill="#1f6feb"/>'
  yield f'<text class="count" x="{x}" y="{y + 4}">{count}</text>'


def _box(name, at):
  """A room on its stair; the name lies to the left, where no line is."""
  width, x, y = 8 * len(name) + 18, LEFT + at + 10, TOP + at
  yield (
    f'<rect x="{x - width}" y="{y - 12}" width="{width}" height="24" rx="5" '
    'fill="#dbe7f3" stroke="#6b8299"/>'
  )
  yield f'<text x="{x - width / 2:g}" y="{y + 4}">{name}</text>'


def _caption(height):
  """Words in the empty corner below the stairs."""
  y = height - MARGIN - 22 * len(WORDS) - 12
  title = 'The rooms of sparse_experts'
  yield f'<text class="words title" x="24" y="{y}">{title}</text>'
  for i, line in enumerate(WORDS, 1):
    yield f'<text class="words" x="24" y="{y + 4 + 22 * i}">{line}</text>'
