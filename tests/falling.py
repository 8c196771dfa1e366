"""Numbers of faults that may only fall, by file of the package.

`falling.json` holds them. A file with more fails, with its faults named; one
with fewer is to be written down, by

  python tests/falling.py                 # lowers; it never raises
"""

import json
import sys
from collections.abc import Mapping, Sequence

from paths import ROOT, TESTS

HELD = TESTS / 'falling.json'


def held() -> dict[str, dict[str, int]]:
  """The numbers by kind of fault and file; of a file left out it is 0."""
  return json.loads(HELD.read_text())


def check(kind: str, faults: Mapping[str, Sequence[str]]) -> None:
  """Holds the faults found, by file, to the numbers of their kind."""
  at_most = held()[kind]
  more = {
    file: lines
    for file, lines in faults.items()
    if len(lines) > at_most.get(file, 0)
  }
  assert not more, '\n'.join(
    f'{file}: {len(lines)} {kind}, at most {at_most.get(file, 0)}\n  '
    + '\n  '.join(lines)
    for file, lines in more.items()
  )
  fewer = [file for file, n in at_most.items() if len(faults.get(file, ())) < n]
  assert not fewer, (
    f'fewer {kind} in {", ".join(fewer)}: `python tests/falling.py` lowers.'
  )


def lowered(kind: str, faults: Mapping[str, Sequence[str]]) -> dict[str, int]:
  """The numbers of a kind, as low as the faults found are."""
  found = {
    file: min(n, len(faults.get(file, ()))) for file, n in held()[kind].items()
  }
  return {file: n for file, n in sorted(found.items()) if n}


if __name__ == '__main__':
  sys.path[:0] = [str(ROOT), str(TESTS / 'project')]
  import documented_test
  import types_test

  if types_test.installed() != types_test.MADE_WITH:
    sys.exit(f'error: the numbers are of {types_test.MADE_WITH}.')
  numbers = {
    types_test.KIND: lowered(types_test.KIND, types_test.errors()),
    documented_test.KIND: lowered(
      documented_test.KIND, documented_test.undocumented()
    ),
  }
  HELD.write_text(json.dumps(numbers, indent=1) + '\n')
