"""equivalence: routers x dispatchers x meshes against a numpy oracle."""

from __future__ import annotations

import argparse
import os

from sparse_experts.commands import printing, settings

WIDTHS = (24, 12, 24, 10, 10)


def run(args: argparse.Namespace) -> None:
  # Fake devices, if no backend has been asked for its devices yet.
  fake = '--xla_force_host_platform_device_count'
  if fake not in os.environ.get('XLA_FLAGS', ''):
    os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {fake}=8'
  import jax

  from sparse_experts import config, console
  from sparse_experts.bench import equivalence

  jax.config.update('jax_platforms', 'cpu')
  args.gin_file = args.gin_file or ['gin/equivalence.gin']
  settings.parse(args)
  asked = config.bound(equivalence.Table)()
  routers = {}
  for name in asked.routers or config.routers(settings.search_paths(args)):
    settings.parse(args, f'gin/routers/{name}.gin')
    routers[name] = config.now('ROUTER')
  if args.dry_run:
    return printing.checked(args)
  heading = ('router', 'dispatcher', 'mesh', 'outputs', 'gradients')
  if not args.json:
    print(console.line(heading, WIDTHS))
  table = []
  for name, router in routers.items():
    thorough = name in asked.on_all_meshes
    rows = equivalence.rows(
      name,
      router,
      [
        (dispatcher, mesh)
        for dispatcher in asked.dispatchers
        for mesh in (asked.meshes if thorough else asked.meshes[:1])
      ],
    )
    table += rows
    for row in () if args.json else rows:
      print(console.line(_cells(row), WIDTHS))
  if args.json:
    printing.as_json(table)


def _cells(row) -> tuple[str, ...]:
  mesh = ' '.join(f'{axis}={size}' for axis, size in row['mesh'].items())
  first = (row['router'], row['dispatcher'], mesh)
  if not row['legal']:
    return (*first, 'illegal:', row['reason'])
  differences = (row['output_difference'], row['gradient_difference'])
  return (*first, *(f'{difference:.1e}' for difference in differences))
