"""A command that ends with the process that started it, however that ends.

python -m sparse_experts.sweeps.follow CODE train --gin_file=...

Whoever starts it holds the other end of its stdin. That end closes when the
holder ends, by SIGKILL, too. Then the command is asked to stop, as by SIGTERM,
so that `train` saves its step. CODE is `identity.code()` of the holder: where
the source has changed since, nothing is run.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time

from sparse_experts.sweeps import identity

LETS_GO = 300  # Seconds that a command may take to save and end.


def _follow() -> None:
  while os.read(0, 2**16):
    pass
  os.kill(os.getpid(), signal.SIGTERM)
  time.sleep(LETS_GO)
  os._exit(128 + signal.SIGKILL)


if __name__ == '__main__':
  if sys.argv.pop(1) != identity.code():
    print(
      'error: the source of sparse_experts has changed since the sweep began: '
      'start the sweep again.',
      file=sys.stderr,
    )
    sys.exit(2)
  threading.Thread(target=_follow, daemon=True).start()
  runpy.run_module('sparse_experts', run_name='__main__', alter_sys=True)
