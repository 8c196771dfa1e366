"""Routers decide which tokens meet which experts; one file each."""

import pkgutil


def names() -> list[str]:
  """The routers there are, by file name."""
  return sorted(module.name for module in pkgutil.iter_modules(__path__))
