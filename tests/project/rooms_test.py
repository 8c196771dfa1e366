"""The picture of the rooms is the one that the source makes."""

import re

import imports_picture
from rooms import RANK


def test_the_picture_is_of_this_source():
  drawn = imports_picture.draw(imports_picture.count_imports())
  assert imports_picture.PICTURE.read_text() == drawn, (
    'Draw it anew: bash scripts/docs.sh --write rooms'
  )


def test_a_picture_of_two_imports():
  text = imports_picture.draw({('cli', 'config'): 3, ('models', 'moe'): 41})
  assert re.findall('class="count".*>(.*)</text>', text) == ['3', '41']
  boxes = re.findall('<text x=".*" y="(.*)">(.*)</text>', text)
  heights = {name: float(y) for y, name in boxes}
  assert set(heights) == set(RANK)
  for name, rank in RANK.items():  # What may be imported stands lower.
    lower = {other for other in RANK if RANK[other] < rank}
    assert all(heights[other] > heights[name] for other in lower)
