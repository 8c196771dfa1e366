"""`python -m sparse_experts COMMAND ...`; see cli."""

import contextlib
import os
import signal
import sys


def main() -> None:
  """A process that is nothing but a command.

  Ctrl-C ends it with one line, whatever it interrupts, and at once: what is
  written appears whole or not at all, and a KeyboardInterrupt inside the import
  of a library may be anything by the time it arrives. What has something to
  finish, such as a run, takes the signal over for that time.
  """
  signal.signal(signal.SIGINT, _stop)
  from sparse_experts import cli, failures

  code = cli.main()
  if code == failures.INTERRUPTED:
    os._exit(code)  # What else runs is not waited for.
  sys.exit(code)


def _stop(*_) -> None:
  with contextlib.suppress(Exception):  # It may be in the midst of printing.
    sys.stdout.flush()
  os.write(2, b'interrupted\n')
  os._exit(130)


if __name__ == '__main__':
  main()
