"""The installed packages that a documentation corpus is harvested from.

They are there wherever this project is, in versions of their own.
"""

import importlib.metadata
import importlib.util
import pathlib
from collections.abc import Iterator

PACKAGES = (
  'absl', 'clu', 'einops', 'etils', 'flax', 'gin', 'h5py', 'jax', 'jaxlib',
  'keras', 'ml_collections', 'nltk', 'numpy', 'opt_einsum', 'optax', 'orbax',
  'pyglove', 'scipy', 'seqio', 'tensorboard', 'tensorflow',
  'tensorflow_datasets', 'tensorflow_text', 'treescope',
)  # fmt: skip


def versions(held_out: str) -> dict[str, str]:
  """The packages that are installed, with their versions.

  Args:
    held_out: the package that must be among them.

  Raises:
    FileNotFoundError: it is not, or no other is.
  """
  distributions = importlib.metadata.packages_distributions()
  found = {
    package: importlib.metadata.version(distributions[package][0])
    for package in PACKAGES
    if package in distributions
  }
  if len(found) < 2 or held_out not in found:
    raise FileNotFoundError(
      f'the corpus needs {held_out!r} and at least one other package of '
      f'installed.PACKAGES, but only {sorted(found)} are installed: run '
      '`pip install sparse_experts` with its dependencies'
    )
  return found


def sources(package: str) -> Iterator[tuple[str, bytes]]:
  """The Python files of a package.

  Yields:
    The dotted path of a module, and its source.
  """
  found = importlib.util.find_spec(package)
  for root in (found and found.submodule_search_locations) or ():
    for file in sorted(pathlib.Path(root).rglob('*.py')):
      parts = file.relative_to(root).with_suffix('').parts
      module = (package, *(part for part in parts if part != '__init__'))
      yield '.'.join(module), file.read_bytes()
