"""Runs the notebooks at full length and renders them into docs/notebooks/.

pip install -e '.[notebooks]'
python scripts/render_notebooks.py          # some 15 minutes on two cores
python scripts/render_notebooks.py 02 07    # these two
"""

import pathlib
import sys
import time

import nbclient
import nbconvert
import nbformat

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = ROOT / 'docs' / 'notebooks'
SHARP = "--InlineBackend.figure_formats={'retina'}"  # Two pixels for one.


def execute(path):
  """The notebook with its outputs, without progress and warnings."""
  notebook = nbformat.read(path, as_version=4)
  nbclient.NotebookClient(
    notebook,
    timeout=900,
    resources={'metadata': {'path': path.parent}},
    extra_arguments=[SHARP],
  ).execute()
  for cell in notebook.cells:
    if cell.cell_type == 'code':
      cell.outputs = [
        output for output in cell.outputs if output.get('name') != 'stderr'
      ]
  return notebook


def render(path):
  """Writes the page of a notebook and its images."""
  name = path.stem
  text, resources = nbconvert.MarkdownExporter().from_notebook_node(
    execute(path), resources={'unique_key': name}
  )
  PAGES.mkdir(exist_ok=True)
  for old in PAGES.glob(f'{name}*'):
    old.unlink()
  for image, data in resources['outputs'].items():
    (PAGES / image).write_bytes(data)
  # Between the first cell, which has the title, and the code.
  about, fence, rest = text.strip().partition('```python\n')
  source = f'[{path.name}](../../notebooks/{path.name})'
  note = f'This page is the notebook {source}, run.'
  text = f'{about.rstrip()}\n\n{note}\n\n{fence}{rest}'
  page = '\n'.join(line.rstrip() for line in text.splitlines()) + '\n'
  (PAGES / f'{name}.md').write_text(page)


def main():
  wanted = tuple(sys.argv[1:]) or ('',)
  for path in sorted((ROOT / 'notebooks').glob('*.ipynb')):
    if path.stem.startswith(wanted):
      start = time.monotonic()
      render(path)
      print(f'{path.stem}: {time.monotonic() - start:.0f} s', flush=True)


if __name__ == '__main__':
  main()
