"""The Python that pages show, run."""

import re


def blocks(path):
  return re.findall(r'```python\n(.*?)```', path.read_text(), re.DOTALL)


def run(path):
  names = {}
  for block in blocks(path):
    exec(compile(block, str(path), 'exec'), names)
  return names
