"""The rooms of the package, in the order of imports, read from the source."""

import ast

from paths import ROOT

PACKAGE = ROOT / 'sparse_experts'

# Ground first. A file imports only from its own room or from lines above.
LAYERS = (
  'letters numbers console earlier storage jax_internals',
  'sharding',
  'data layers',
  'moe',
  'models',
  'training',
  'inference',
  'evaluation',
  'planning',
  'insight bench',
  'config',
  'sweeps',
  'papers convert',
  'surgery',
  'commands',
  'failures',
  'cli t5x_adapter',
)
RANK = {name: i for i, line in enumerate(LAYERS) for name in line.split()}
FILES = sorted(
  path for path in PACKAGE.rglob('*.py') if path.name != '__main__.py'
)


def room(path):
  """The folder of the package that a file is in; a file of none is a room."""
  return path.relative_to(PACKAGE).with_suffix('').parts[0]


def imports(path):
  """What a file imports: 'package.module.name' of every name."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module:
      yield from (f'{node.module}.{alias.name}' for alias in node.names)
    elif isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
