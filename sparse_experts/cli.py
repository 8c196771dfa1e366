"""The command line: flags, gin files, and one function per command."""

from __future__ import annotations

import argparse
import json
import logging
import os
import pathlib
import sys
import traceback
from collections.abc import Sequence

from sparse_experts import __version__

COMMANDS = {
  'train': 'train a model, from its latest checkpoint if there is one',
  'evaluate': 'held-out loss and task metrics of a checkpoint',
  'infer': "a checkpoint's answers to a task's examples",
  'inspect': 'count parameters and arithmetic, or read a checkpoint',
  'table': 'a table of a paper, published beside computed',
  'list': 'name recipes, tasks, routers and dispatchers',
  'equivalence': 'routers x dispatchers x meshes against a numpy oracle',
  'bench': "'bench layer': time a sparse layer, or compile it for a TPU pod",
}

EXPECTED_ERRORS = (ValueError, OSError, ImportError, FloatingPointError)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs a command; returns the process's exit code, 2 for a user's error."""
  parser = _parser()
  args, rest = parser.parse_known_args(argv)
  if args.command is None:
    parser.print_help()
    return 0
  if args.what is not None and args.command != 'bench':
    rest = [args.what, *rest]  # As any other argument that is not known.
  try:
    _prepare(args)
    command = {
      'train': _train,
      'evaluate': _evaluate,
      'infer': _infer,
      'inspect': _inspect,
      'table': _table,
      'list': _list,
      'equivalence': _equivalence,
      'bench': _bench,
    }[args.command]
    return command(args, _bindings(rest)) or 0
  except EXPECTED_ERRORS as error:
    if args.verbose:
      traceback.print_exc()
    from sparse_experts import config

    print(f'error: {config.first_line(error)}', file=sys.stderr)
    return 2


class _Parser(argparse.ArgumentParser):
  """Says what is wrong in one line, as the commands do."""

  def error(self, message: str):
    self.exit(2, f'error: {message}; --help lists commands and flags.\n')


def _parser() -> argparse.ArgumentParser:
  parser = _Parser(
    prog='python -m sparse_experts',
    description='Sparse expert models in JAX and Flax.',
    allow_abbrev=False,  # --gin.N would be short for --gin.NAME.
    formatter_class=argparse.RawDescriptionHelpFormatter,
    epilog='commands:\n'
    + '\n'.join(f'  {name:10}{text}' for name, text in COMMANDS.items())
    + '\n\nexample:\n  python -m sparse_experts inspect '
    '--gin_file=gin/quickstart.gin\n',
  )
  parser.add_argument('command', nargs='?', choices=COMMANDS, metavar='COMMAND')
  parser.add_argument('what', nargs='?', help="bench: what to, 'layer'")
  parser.add_argument(
    '--gin_file', action='append', default=[], metavar='FILE', help='repeatable'
  )
  parser.add_argument(
    '--gin.NAME',
    dest='_',
    metavar='VALUE',
    help='override macro NAME, or module.Class.argument',
  )
  parser.add_argument(
    '--gin_search_paths', default='', metavar='DIR,DIR', help='further folders'
  )
  parser.add_argument(
    '--dry_run', action='store_true', help='check, count parameters, and stop'
  )
  parser.add_argument(
    '--json', action='store_true', help='one JSON object on stdout'
  )
  parser.add_argument(
    '--checkpoint', metavar='DIR', help='inspect: a MODEL_DIR or a step of it'
  )
  parser.add_argument(
    '--paper', metavar='TABLE', help="table: which, such as 'switch_table9'"
  )
  parser.add_argument(
    '--topology',
    metavar='NAME',
    help="bench: compile for these TPU chips, such as 'v5p:4x4x4'",
  )
  parser.add_argument(
    '--profile', metavar='START:STOP', help='train: trace these steps'
  )
  parser.add_argument(
    '--coordinator',
    metavar='HOST:PORT',
    help="several processes: process 0's address; 'auto' on a pod",
  )
  parser.add_argument('--num_processes', type=int, metavar='N')
  parser.add_argument('--process_id', type=int, metavar='I')
  parser.add_argument(
    '--verbose', action='store_true', help='tracebacks and library logs'
  )
  parser.add_argument('--version', action='version', version=__version__)
  return parser


def _bindings(rest: Sequence[str]) -> list[str]:
  """`NAME=VALUE` from --gin.NAME=VALUE; anything else is a mistake."""
  bindings = []
  for argument in rest:
    if not argument.startswith('--gin.') or '=' not in argument:
      raise ValueError(
        f'unknown argument {argument!r}; bindings are --gin.NAME=VALUE, and '
        '--help lists the flags.'
      )
    bindings.append(argument.removeprefix('--gin.'))
  return bindings


def _prepare(args: argparse.Namespace) -> None:
  """Quiet libraries, a compilation cache, and the other processes."""
  if not args.verbose:
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
    import absl.logging

    absl.logging.set_verbosity(absl.logging.ERROR)
    # Orbax leaves reads behind where one fails; they fail later, out of reach.
    sys.unraisablehook = lambda _: None
    logging.getLogger('asyncio').setLevel(logging.CRITICAL)
  import jax

  cache = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
  if not os.environ.get('JAX_COMPILATION_CACHE_DIR'):
    jax.config.update(
      'jax_compilation_cache_dir',
      str(pathlib.Path(cache) / 'sparse_experts/jax'),
    )
  if args.coordinator == 'auto':
    jax.distributed.initialize()
  elif args.coordinator:
    if args.num_processes is None or args.process_id is None:
      raise ValueError(
        '--coordinator needs --num_processes=N and --process_id=I.'
      )
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')
    jax.distributed.initialize(
      args.coordinator, args.num_processes, args.process_id
    )
  if args.coordinator:
    # Results are process 0's to print; Gloo greets its peers on stdout.
    first = jax.process_index() == 0
    results = os.dup(1) if first else os.open(os.devnull, os.O_WRONLY)
    sys.stdout = os.fdopen(results, 'w')
    os.dup2(2, 1)


def _parse(
  args: argparse.Namespace, bindings: Sequence[str], *more_files: str
) -> None:
  from sparse_experts import config

  files = [*args.gin_file, *more_files]
  if not files:
    raise ValueError(
      f'{args.command} needs --gin_file=FILE; `python -m sparse_experts list` '
      'names those that come with the package.'
    )
  paths = [path for path in args.gin_search_paths.split(',') if path]
  config.parse(files, bindings, paths)


def _train(args, bindings) -> None:
  from sparse_experts import config
  from sparse_experts.training import train

  _parse(args, bindings)
  run = config.bound(train.train)
  if args.dry_run:
    return _print_ledger(args)

  def write_config(model_dir):
    (model_dir / 'config.gin').write_text(config.operative())

  results = run(on_start=write_config, **_profile(args.profile))
  if args.json:
    _print_json(_plain(results))
  else:
    _print_training(results, config.value('MODEL_DIR'))


def _evaluate(args, bindings) -> None:
  from sparse_experts import config
  from sparse_experts.training import evaluate, report

  _parse(args, bindings)
  run = config.bound(evaluate.evaluate)
  if args.dry_run:
    return _print_ledger(args)
  results = run()
  if args.json:
    return _print_json(_plain(results))
  rows = {
    **report.scalars(results['metrics']),
    **{f'task/{k}': v for k, v in results['task_metrics'].items()},
  }
  factor = results['capacity_factor']
  print(
    f'{results["task"]}, {results["split"]} split, step {results["step"]}, '
    + ('exact' if factor is None else f'capacity factor {factor:g}')
  )
  print(
    report.table(('metric', ''), [(k, f'{v:.5g}') for k, v in rows.items()])
  )
  if results['metrics']['layers']:
    print('\n' + report.expert_load(results['metrics']['layers']))


def _infer(args, bindings) -> None:
  from sparse_experts import config
  from sparse_experts.training import infer

  _parse(args, bindings)
  run = config.bound(infer.infer)
  if args.dry_run:
    return _print_ledger(args)
  results = run()
  if args.json:
    return _print_json(results)
  for result in results:
    for name in ('inputs', 'prediction', 'targets'):
      print(f'{name + ":":12}{" ".join(result[name].split())}')
    print(f'{"log prob:":12}{result["log_prob"]:.1f} nats\n')


def _inspect(args, bindings) -> None:
  if args.checkpoint:
    return _inspect_checkpoint(args)
  _parse(args, bindings)
  _print_ledger(args, bindings)


def _inspect_checkpoint(args) -> None:
  from sparse_experts.training import checkpoints

  params, step = checkpoints.load_params(args.checkpoint)
  leaves = checkpoints.flatten(params)
  facts = {
    'step': step,
    'total_params': int(sum(leaf.size for leaf in leaves.values())),
    'params_sha256': checkpoints.digest(params),
    'tree': {name: list(leaf.shape) for name, leaf in sorted(leaves.items())},
  }
  if args.json:
    return _print_json(facts)
  for name, shape in facts.pop('tree').items():
    print(f'{name}  {" x ".join(map(str, shape))}')
  for name, fact in facts.items():
    print(f'{name}: {fact}')


def _table(args, bindings) -> None:
  from sparse_experts import config
  from sparse_experts.analysis import ledger, published

  if args.gin_file or bindings:
    raise ValueError('table takes --paper=TABLE alone; its rows name recipes.')
  if args.paper not in published.TABLES:
    raise ValueError(
      f'--paper must be one of {", ".join(published.TABLES)}, not '
      f'{args.paper!r}.'
    )
  table = published.TABLES[args.paper]
  rows = []
  for row in table.rows:
    config.parse([row.file], row.bindings, [])
    facts = ledger.ledger(
      config.value('MODEL'), config.value('TASK_FEATURE_LENGTHS')
    )
    rows.append(
      {
        'model': row.model,
        'recipe': row.file,
        'bindings': list(row.bindings),
        'values': published.compare(row, facts),
      }
    )
  if args.json:
    return _print_json(
      {'table': args.paper, 'title': table.title, 'rows': rows}
    )
  print(table.title)
  _print_compared(
    'model', [(row['model'], value) for row in rows for value in row['values']]
  )


def _print_compared(title, named_values) -> None:
  """Comparisons of `analysis.published`, and why some numbers do not agree."""
  from sparse_experts.training import report

  rows, reasons = [], {}
  for name, value in named_values:
    rows.append(
      (
        name,
        value['quantity'],
        value['published'],
        f'{value["computed"]:,}',
        f'{value["difference"]:+.1%}',
        '' if value['agrees'] else '*',
      )
    )
    if value['because']:
      models = reasons.setdefault((value['quantity'], value['because']), [])
      models.append(name)
  heading = (title, '', 'published', 'computed', 'difference', '')
  print(report.table(heading, rows))
  for (quantity, reason), models in reasons.items():
    print(f'* {quantity} of {", ".join(models)}: {reason}.')


def _list(args, bindings) -> None:
  from sparse_experts import config
  from sparse_experts.data import tasks
  from sparse_experts.moe import dispatchers

  folder = config.root()
  recipes = sorted((folder / 'gin').rglob('*.gin'))
  facts = {
    'recipes': [str(path.relative_to(folder)) for path in recipes],
    'tasks': tasks.names(),
    'routers': _router_names(),
    'dispatchers': dispatchers.names(),
  }
  if args.json:
    return _print_json(facts)
  for title, names in facts.items():
    print(f'{title}:')
    print('\n'.join(f'  {name}' for name in names))


def _equivalence(args, bindings) -> None:
  # Fake devices, if no backend has been asked for its devices yet.
  fake = '--xla_force_host_platform_device_count'
  if fake not in os.environ.get('XLA_FLAGS', ''):
    os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {fake}=8'
  import jax

  from sparse_experts import config
  from sparse_experts.analysis import equivalence
  from sparse_experts.training import report

  jax.config.update('jax_platforms', 'cpu')
  args.gin_file = args.gin_file or ['gin/equivalence.gin']
  _parse(args, bindings)
  names = config.value('ROUTERS') or _router_names()
  dispatchers, meshes = config.value('DISPATCHERS'), config.value('MESHES')
  widths = (24, 12, 24, 10, 10)
  table = []
  if not args.json:
    print(
      report.line(
        ('router', 'dispatcher', 'mesh', 'outputs', 'gradients'), widths
      )
    )
  for name in names:
    _parse(args, bindings, f'gin/routers/{name}.gin')
    thorough = name in config.value('ON_ALL_MESHES')
    rows = equivalence.rows(
      name,
      config.value('ROUTER'),
      [
        (dispatcher, mesh)
        for dispatcher in dispatchers
        for mesh in (meshes if thorough else meshes[:1])
      ],
    )
    table += rows
    for row in () if args.json else rows:
      mesh = ' '.join(f'{axis}={size}' for axis, size in row['mesh'].items())
      found = ('illegal:', row.get('reason'))
      if row['legal']:
        found = tuple(
          f'{row[f"{what}_difference"]:.1e}' for what in ('output', 'gradient')
        )
      print(report.line((name, row['dispatcher'], mesh, *found), widths))
  if args.json:
    _print_json(table)


def _bench(args, bindings) -> None:
  from sparse_experts import config
  from sparse_experts.analysis import bench

  if args.what != 'layer':
    raise ValueError(f"bench times a 'layer', not {args.what!r}: bench layer.")
  on_pod = args.topology is not None
  default = 'gin/bench/pod_layer.gin' if on_pod else 'gin/bench/layer.gin'
  args.gin_file = args.gin_file or [default]
  _parse(args, bindings)
  show = (lambda row: None) if args.json else _bench_printer(on_pod)
  if on_pod:
    rows = config.bound(bench.compiled_layer, given=('topology',))(
      topology=args.topology, on_row=show
    )
  else:
    rows = config.bound(bench.layer)(on_row=show)
  if args.json:
    _print_json(rows)


def _bench_printer(on_pod: bool):
  """Prints rows of `bench` as they come, below a heading."""
  from sparse_experts.training import report

  widths = (12, 7, 3, 11, 7, 9, 7, 13, 8, 8, 7, 10)
  heading = (
    *('dispatcher', 'experts', 'k', 'forward ms', 'ratio', 'train ms'),
    *('ratio', '(quartiles)', 'TFLOP/s', 'dropped', 'FLOPs', 'memory'),
  )
  if on_pod:
    widths = (12, 7, 3, 8, 10, 10, 10, 0)
    heading = (
      *('dispatcher', 'experts', 'k', 'FLOPs', 'bytes', 'memory', 'XLA ms'),
      'collectives',
    )
  print(report.line(heading, widths))

  def show(row):
    first = (row['dispatcher'], row['experts'], row['k'])
    flops = f'{row["executed_flops_ratio"]:.2f}x'
    memory = f'{row["temp_bytes"] / 2**30:.2f} GiB'
    if on_pod:
      seconds = row['optimal_seconds']
      rest = (
        flops,
        f'{row["bytes_accessed"] / 2**30:.2f} GiB',
        memory,
        'n/a' if seconds is None else f'{seconds * 1e3:.2f}',
        ', '.join(
          f'{entry["count"]} {name} ({entry["bytes"] / 2**20:.0f} MiB)'
          for name, entry in row['collectives'].items()
        ),
      )
    else:
      low, high = row['train_ratio_iqr']
      rest = (
        f'{row["forward_ms"]:.1f}',
        f'{row["forward_ratio"]:.2f}x',
        f'{row["train_ms"]:.1f}',
        f'{row["train_ratio"]:.2f}x',
        f'({low:.2f} - {high:.2f})',
        f'{row["tflops"]:.3g}',
        f'{row["dropped"]:.1%}',
        flops,
        memory,
      )
    print(report.line((*first, *rest), widths), flush=True)

  return show


def _router_names() -> list[str]:
  """The routers there are a gin file for."""
  from sparse_experts import config

  return sorted(
    path.stem for path in (config.root() / 'gin' / 'routers').glob('*.gin')
  )


def _print_ledger(args, bindings=()) -> None:
  """Parameters and arithmetic of the model the gin files describe."""
  from sparse_experts import config
  from sparse_experts.analysis import ledger, published

  lengths = None
  if config.defined('TASK_FEATURE_LENGTHS'):
    lengths = config.value('TASK_FEATURE_LENGTHS')
  facts = ledger.ledger(config.value('MODEL'), lengths)
  compared = [
    {'paper': table.title, 'model': row.model, **value}
    for table, row in published.rows_of(args.gin_file, bindings)
    for value in published.compare(row, facts)
  ]
  if args.json:
    return _print_json(
      {**facts, **({'published': compared} if compared else {})}
    )
  print(ledger.text(facts))
  if compared:
    print()
    _print_compared('paper', [(value['paper'], value) for value in compared])


def _print_training(results, model_dir) -> None:
  from sparse_experts.training import report

  before, after = results['eval_before'], results['eval']
  if after is not None:
    print(
      f'held-out loss: {before["loss"]:.3f} nats at the start of this run, '
      f'{after["loss"]:.3f} at step {results["step"]}'
    )
    if after['layers']:
      print('\n' + report.expert_load(after['layers']))
  print(
    f'\ncheckpoint:   {model_dir}/checkpoints/{results["step"]}\n'
    f'TensorBoard:  {model_dir}/tensorboard\n'
    f'metrics:      {model_dir}/metrics.jsonl\n'
    f'config:       {model_dir}/config.gin'
  )


def _profile(text: str | None) -> dict[str, tuple[int, int]]:
  if text is None:
    return {}
  start, _, stop = text.partition(':')
  if not (start.isdigit() and stop.isdigit() and int(start) < int(stop)):
    raise ValueError(f'--profile takes START:STOP in steps, not {text!r}.')
  return {'profile': (int(start), int(stop))}


def _plain(tree):
  """Numpy arrays as lists, for JSON."""
  if isinstance(tree, dict):
    return {name: _plain(value) for name, value in tree.items()}
  return tree.tolist() if hasattr(tree, 'tolist') else tree


def _print_json(facts) -> None:
  print(json.dumps(facts))
