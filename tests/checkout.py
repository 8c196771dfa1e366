"""Copies of the checkout, in which tests build or change something."""

import pathlib
import subprocess

from paths import ROOT


def files() -> list[str]:
  """What git tracks or would: no build, no run, no environment."""
  command = ['git', 'ls-files', '--cached', '--others', '--exclude-standard']
  done = subprocess.run(
    command, check=True, cwd=ROOT, capture_output=True, text=True
  )
  return [name for name in done.stdout.splitlines() if (ROOT / name).exists()]


def copy(folder: pathlib.Path) -> None:
  """Copies them into a folder, which need not be there."""
  for name in files():
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes((ROOT / name).read_bytes())
