"""What JAX has no public way to ask: all that is private of it, in one place.

The next minor release of JAX may break these two functions, and nothing else of
this package (`docs/dependencies.md`).
"""

from __future__ import annotations

from collections.abc import Mapping


def entered_mesh():
  """The mesh of the enclosing `with mesh:`, which JAX has deprecated.

  Returns:
    A `jax.sharding.Mesh`; an `.empty` one outside.
  """
  from jax._src import mesh

  return mesh.thread_resources.env.physical_mesh


def cost_analysis(hlo: str) -> Mapping[str, float]:
  """XLA's count of what a program costs, from its text alone.

  Args:
    hlo: a module, `HloModule name` and its computations.

  Returns:
    'flops' and 'bytes accessed' (bytes), among others.
  """
  import jax
  from jaxlib import _jax, xla_client

  return _jax.hlo_module_cost_analysis(
    jax.local_devices(backend='cpu')[0].client,
    xla_client.hlo.hlo_module_from_text(hlo),
  )
