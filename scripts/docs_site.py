"""Builds the site of the documentation into build/site/html.

  pip install furo myst-parser sphinx sphinx-autoapi    # the extra `docs`
  python scripts/docs_site.py             # then open build/site/html/index.html

Its pages are those of the checkout: README.md, CONTRIBUTING.md, CHANGELOG.md,
all of docs/, gin/, and the docstrings of the package, which is read and not
imported. So an environment of those four packages is enough. A warning is an
error.
"""

import argparse
import pathlib
import shutil
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
FILES = (
  'README.md',
  'CONTRIBUTING.md',
  'CHANGELOG.md',
  'LICENSE',
  'tests/data/originals/NOTE.md',
)
MARK = '.docs_site'  # In a folder that may be built anew.
FOLDERS = ('docs', 'gin', 'notebooks', 'sparse_experts')


def copy(source: pathlib.Path) -> None:
  """Copies what pages are made of, so that nothing is written beside it."""
  shutil.rmtree(source, ignore_errors=True)
  source.mkdir(parents=True)
  for name in FILES:
    (source / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / name, source / name)
  for name in FOLDERS:
    shutil.copytree(
      ROOT / name, source / name, ignore=shutil.ignore_patterns('__pycache__')
    )


def build(folder: pathlib.Path) -> int:
  """Builds into folder/html; returns Sphinx's exit code."""
  from sphinx.cmd.build import build_main

  source, html = folder / 'source', folder / 'html'
  copy(source)
  shutil.rmtree(html, ignore_errors=True)
  # -E: pages are read anew, as what the settings add to them may be another.
  arguments = ['-q', '-E', '-W', '--keep-going', '-b', 'html']
  arguments += ['-d', folder / 'read', '-c', source / 'docs/site']
  code = build_main([*map(str, arguments), str(source), str(html)])
  if not code:
    shutil.copy(html / 'README.html', html / 'index.html')
  return code


def check(folder: pathlib.Path) -> None:
  """Ends where a folder holds what no build of this script wrote."""
  if folder.exists() and any(folder.iterdir()) and not (folder / MARK).exists():
    sys.exit(
      f'error: {folder} is there, and this script did not make it; choose '
      'another --output, or delete it.'
    )


def main(argv=None) -> int:
  """Returns 0 if the site was built without a warning."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument(
    '--output', type=pathlib.Path, default=ROOT / 'build/site'
  )
  folder = parser.parse_args(argv).output.absolute()
  check(folder)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / MARK).touch()
  if code := build(folder):
    return code
  print(folder / 'html/index.html')
  return 0


if __name__ == '__main__':
  sys.exit(main())
