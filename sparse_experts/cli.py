"""The command line: what every command shares, and how errors end it."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import pathlib
import sys
import threading
import types
from collections.abc import Sequence

from sparse_experts import __version__, failures

COMMANDS = {
  'train': 'train a model, from its latest checkpoint if there is one',
  'sweep': 'train over a grid of values and several seeds',
  'evaluate': 'held-out loss and task metrics of a checkpoint',
  'infer': "a checkpoint's answers to a task's examples",
  'record': "what the experts do with each token of a task's split, or a text",
  'inspect': 'count parameters and arithmetic, or read a checkpoint',
  'show': 'every value in effect, where it was set, and what it overrode',
  'report': 'one HTML page about a run: curves, routing, samples, config',
  'compare': 'runs side by side: configurations, curves, paired differences',
  'convert': 'a checkpoint from or to T5X, Hugging Face, or our own format',
  'table': 'a table of a paper, published beside computed',
  'corpus': 'fetch a documentation corpus, once, and say what it holds',
  'list': 'name recipes, tasks, routers and dispatchers',
  'equivalence': 'routers x dispatchers x meshes against a numpy oracle',
  'bench': 'time a sparse layer or decoding, or compile a layer for a TPU pod',
  'precompile': 'compile a step for TPU chips that are not here',
  'plan': 'meshes for a model on a pod, or a model for a budget',
}


def main(argv: Sequence[str] | None = None) -> int:
  """Runs a command; returns the process's exit code.

  0 if all went well, 2 for a user's error, 1 for one of ours, 130 after Ctrl-C,
  141 if nobody reads what is printed.
  """
  argv = list(sys.argv[1:] if argv is None else argv)
  try:
    try:
      return _run(argv)
    finally:
      sys.stdout.flush()  # Where a pipe may turn out to be broken.
  except (Exception, KeyboardInterrupt) as error:
    return failures.end(error, verbose='--verbose' in argv)


def _run(argv: Sequence[str]) -> int:
  if not argv:
    _parser().print_help()
    return 0
  command, args = arguments(argv)
  _check_processes(args)
  try:
    _prepare(args)
    return command.run(args) or 0
  except Exception:
    if args.coordinator:
      _end_within(20)
    raise


def arguments(
  argv: Sequence[str],
) -> tuple[types.ModuleType, argparse.Namespace]:
  """The module of a command, and what is given to it.

  Raises:
    ValueError: an argument is neither a flag nor a binding.
  """
  name = _parser().parse_args(argv[:1]).command
  command = importlib.import_module(f'sparse_experts.commands.{name}')
  args, rest = _command_parser(name, command).parse_known_args(argv[1:])
  args.command = name
  prefixes = ('gin', *getattr(command, 'PREFIXES', ()))
  args.bindings, *others = (
    _given(rest, prefix, prefixes) for prefix in prefixes
  )
  for prefix, given in zip(prefixes[1:], others):
    setattr(args, prefix, given)
  return command, args


def _end_within(seconds: float) -> None:
  """Ends a process that failed alone: at exit it would wait for the others."""
  ending = threading.Timer(seconds, os._exit, (2,))
  ending.daemon = True
  ending.start()


class _Parser(argparse.ArgumentParser):
  """Says what is wrong in one line, as the commands do."""

  def error(self, message: str):
    self.exit(2, f'error: {message}; --help lists commands and flags.\n')


def _parser() -> argparse.ArgumentParser:
  """Of the first word."""
  parser = _Parser(
    prog='python -m sparse_experts',
    description='Sparse expert models in JAX and Flax.',
    usage='%(prog)s COMMAND [--gin_file=FILE ...] [--gin.NAME=VALUE ...]',
    formatter_class=argparse.RawDescriptionHelpFormatter,
    epilog='commands:\n'
    + '\n'.join(f'  {name:13}{text}' for name, text in COMMANDS.items())
    + '\n\n`COMMAND --help` lists the flags of a command.\n\nexample:\n'
    '  python -m sparse_experts inspect --gin_file=gin/quickstart.gin\n',
  )
  parser.add_argument(
    'command', choices=COMMANDS, metavar='COMMAND', help='one of these:'
  )
  parser.add_argument('--version', action='version', version=__version__)
  return parser


def _command_parser(name: str, command) -> argparse.ArgumentParser:
  """Of what follows the command: its own flags and those of all."""
  parser = _Parser(
    prog=f'python -m sparse_experts {name}',
    description=COMMANDS[name],
    allow_abbrev=False,  # --gin.N would be short for --gin.NAME.
  )
  if hasattr(command, 'add_arguments'):
    command.add_arguments(parser)
  every = parser.add_argument_group('of every command')
  every.add_argument(
    '--gin_file', action='append', default=[], metavar='FILE', help='repeatable'
  )
  every.add_argument(
    '--gin.NAME',
    dest='_',
    metavar='VALUE',
    help='override macro NAME, or module.Class.argument',
  )
  every.add_argument(
    '--gin_search_paths', default='', metavar='DIR,DIR', help='further folders'
  )
  every.add_argument(
    '--dry_run', action='store_true', help='check, count parameters, and stop'
  )
  every.add_argument(
    '--json', action='store_true', help='one JSON value on stdout'
  )
  every.add_argument(
    '--coordinator',
    metavar='HOST:PORT',
    help="several processes: process 0's address; 'auto' on a pod",
  )
  every.add_argument('--num_processes', type=int, metavar='N')
  every.add_argument('--process_id', type=int, metavar='I')
  every.add_argument(
    '--verbose', action='store_true', help='tracebacks and library logs'
  )
  return parser


def _given(
  rest: Sequence[str], prefix: str, prefixes: Sequence[str]
) -> list[str]:
  """`NAME=VALUE` of each --prefix.NAME=VALUE.

  Raises:
    ValueError: an argument has none of `prefixes`.
  """
  bindings = []
  for argument in rest:
    start, _, _ = argument.partition('.')
    if start not in (f'--{known}' for known in prefixes) or '=' not in argument:
      raise ValueError(
        f'unknown argument {argument!r}; bindings are --gin.NAME=VALUE, and '
        '--help lists the flags.'
      )
    if len(argument.splitlines()) > 1:  # Else gin reads more than one.
      raise ValueError(f'{argument!r} has several lines; an override has one.')
    if start == f'--{prefix}':
      bindings.append(argument.removeprefix(f'{start}.'))
  return bindings


def _check_processes(args: argparse.Namespace) -> None:
  """Raises ValueError where flags of several processes do not go together."""
  given = (args.num_processes, args.process_id)
  if args.coordinator in (None, 'auto'):
    if given != (None, None):
      raise ValueError(
        '--num_processes and --process_id belong to --coordinator=HOST:PORT; '
        "'auto' finds them on a pod, and one process needs none of these."
      )
  elif None in given:
    raise ValueError(
      '--coordinator needs --num_processes=N and --process_id=I.'
    )


def _prepare(args: argparse.Namespace) -> None:
  """Quiet libraries, a compilation cache, and the other processes."""
  if not args.verbose:
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
    import absl.logging

    # What a library logs as an error, it raises too, and that is one line.
    absl.logging.set_verbosity(absl.logging.FATAL)
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
