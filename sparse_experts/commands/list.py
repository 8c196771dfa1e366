"""list: recipes, tasks, routers and dispatchers, by name."""

from __future__ import annotations

import argparse

from sparse_experts.commands import printing, settings


def run(args: argparse.Namespace) -> None:
  from sparse_experts import config
  from sparse_experts.data import tasks
  from sparse_experts.moe import dispatchers

  settings.refuse(args, 'list takes no gin file and no binding.')
  paths = settings.search_paths(args)
  facts = {
    'recipes': config.files(paths),
    'tasks': tasks.names(),
    'routers': config.routers(paths),
    'dispatchers': dispatchers.names(),
  }
  if args.json:
    return printing.as_json(facts)
  for title, names in facts.items():
    print(f'{title}:')
    print('\n'.join(f'  {name}' for name in names))
