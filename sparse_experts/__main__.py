"""`python -m sparse_experts COMMAND ...`; see cli."""

import os
import sys

from sparse_experts import failures


def main() -> None:
  """A process that is nothing but a command."""
  failures.catch_interrupts()
  from sparse_experts import cli  # Whatever it takes may be interrupted.

  code = cli.main()
  if code == failures.INTERRUPTED:
    os._exit(code)  # What else runs is not waited for.
  sys.exit(code)


if __name__ == '__main__':
  main()
