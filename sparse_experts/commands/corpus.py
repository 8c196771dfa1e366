"""corpus: fetches a documentation corpus, and what it holds."""

from __future__ import annotations

import argparse

from sparse_experts.commands import printing, settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
  from sparse_experts.data import corpus

  parser.add_argument(
    'corpus', nargs='?', choices=corpus.PREFIXES, default='small'
  )


def run(args: argparse.Namespace) -> None:
  from sparse_experts import console
  from sparse_experts.data import corpus, wheels

  settings.refuse(args, 'corpus takes no gin file and no binding.')
  absent = corpus.to_fetch(args.corpus)
  if args.dry_run:
    if args.json:
      return printing.as_json({'fetch': [wheel.file for wheel in absent]})
    what = wheels.described(absent) if absent else 'nothing'
    return print(f'{what} to fetch into {corpus.wheel_folder()}')
  found = corpus.fetch(args.corpus)
  if args.json:
    return printing.as_json(
      {
        'corpus': args.corpus,
        'digest': found.digest,
        'path': str(found.path),
        'counts': found.counts,
        'versions': found.versions,
      }
    )
  print(f'{args.corpus}: digest {found.digest}, in {found.path}')
  rows = [
    (
      domain,
      version,
      *(f'{found.counts[s].get(domain, 0):,}' for s in corpus.SPLITS),
    )
    for domain, version in found.versions.items()
  ]
  print(console.table(('package', 'version', *corpus.SPLITS), rows))
