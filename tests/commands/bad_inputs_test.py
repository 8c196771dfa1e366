"""What is wrong with an input is one line, of every command; half is generated.

All in this process, one after another: what is tried fails before anything is
compiled.
"""

import collections
import contextlib
import io
import pathlib
import typing

import annotated_types
import command
import numpy as np
import pytest

import gin
from sparse_experts import cli, config
from sparse_experts.config import types

MODEL_DIR = '--gin.MODEL_DIR=NEW'
SWITCH = '--gin_file=gin/models/switch/base.gin'
POD = '--topology=v5p:4x4x4'
CLASSIFICATION = '--gin_file=gin/small/classification.gin'


def _train(*arguments):
  return ('train', command.TINY, MODEL_DIR, '--dry_run', *arguments)


def _run(name, *arguments):
  return (name, command.TINY, MODEL_DIR, *arguments)


# (arguments, what the line names); of a train's dry run where it is text.
BY_HAND = [
  # What a dry run once passed.
  (_train('--gin.MIXTURE_OR_TASK_NAME=tiny_sum'), "'tiny_sum'"),
  (_train("--gin.EVAL_SPLIT='tset'"), "no split 'tset'"),
  (_train('--gin.TRAIN_STEPS=0'), 'train_steps'),
  (_train('--gin.BATCH_SIZE=0'), 'BATCH_SIZE = 0'),
  (_train("--gin.MESH={'dat': 1}"), "'dat'; did you mean data?"),
  (_train('--gin.NUM_EMBEDDINGS=10'), 'embeds only 10'),
  (_train('--gin.BASE_LEARNING_RATE=-1'), 'base=-1'),
  (_train("--gin.SEED='a'"), "SEED = 'a'"),
  (_train("--gin.RULES={'embd': 'data'}"), 'did you mean embed?'),
  (_train('--gin.DROPOUT_RATE=2.0'), 'DROPOUT_RATE = 2.0'),
  (_train('--gin.MODEL_DIR='), 'no folder'),
  (_train('--gin.train.train.initial_checkpoint=/no'), 'checkpoint in /no'),
  # Paths.
  (_train('--gin.MODEL_DIR=1e5'), 'MODEL_DIR = 100000.0'),
  (_train('--gin.MODEL_DIR=5'), 'MODEL_DIR = 5'),
  (_train('--gin.MODEL_DIR=None'), 'MODEL_DIR = None'),
  (_train('--gin.MODEL_DIR=http://x/y'), 'http://'),
  (_train('--gin.MODEL_DIR=s3://x/y'), 's3://'),
  (_train('--gin.MODEL_DIR= '), 'no folder'),
  (_train('--gin.MODEL_DIR=FILE/run'), 'FILE is a file'),
  (_train('--gin.MODEL_DIR=RUN/checkpoints/1'), 'lies among the checkpoints'),
  (_train('--gin.MODEL_DIR=RUN/checkpoints/a/b'), 'lies among the checkpoints'),
  (_run('evaluate'), 'no complete checkpoint'),
  (_run('evaluate', '--dry_run'), 'no complete checkpoint'),
  (_run('infer', '--dry_run'), 'no complete checkpoint'),
  (_run('record', '--dry_run'), 'no complete checkpoint'),
  (_run('evaluate', '--gin.MODEL_DIR='), 'no folder'),
  (_run('infer', '--gin.MODEL_DIR=http://x'), 'http://'),
  (_run('record', '--gin.MODEL_DIR='), 'no folder'),
  (('report', ''), 'no folder'),
  (('report', 'NOWHERE'), 'no metrics.jsonl'),
  (('report', 'NOWHERE', '--dry_run'), 'no metrics.jsonl'),
  (('report', 'NOWHERE', '--gin.A=1'), 'MODEL_DIR alone'),
  (('inspect', '--checkpoint='), 'no folder'),
  (('inspect', '--checkpoint=NOWHERE'), 'NOWHERE'),
  (('inspect', '--checkpoint=RUN', '--gin.A=1'), '--checkpoint or --gin_file'),
  (('inspect', '--checkpoint=RUN', SWITCH), '--checkpoint or --gin_file'),
  (('list', '--gin.A=1'), 'no binding'),
  (('list', SWITCH), 'no gin file'),
  (('convert', '--input=NOWHERE', '--output=NEW'), 'NOWHERE'),
  (('convert', '--input=NOWHERE', '--output=RUN'), 'RUN is there already'),
  (
    ('convert', '--input=NOWHERE', '--output=RUN/checkpoints/9'),
    'lies among the checkpoints',
  ),
  (('convert', '--input=A', '--output=NEW', '--to=onnx'), "'onnx'"),
  (('convert', '--input=A', '--output=NEW', '--from=onnx'), "'onnx'"),
  (('convert', '--input=A', '--output=NEW', '--experts=a'), "'a'"),
  (('convert', '--input=A'), '--output'),
  (('convert', '--input=A', '--output='), 'no local folder'),
  (('convert', '--input=A', '--output=gs://b/run'), 'no local folder'),
  (
    _run('evaluate', '--gin.RANK_OPTIONS=True', '--reliability=a.gif'),
    'not a.gif',
  ),
  # What gin reads.
  (_train('--gin.TRAIN_STEPS=1\nEVAL_PERIOD=1'), 'several lines'),
  (_train('--gin_file=self.gin'), 'includes itself'),
  (_train('--gin_file=first.gin'), 'second.gin'),
  (_train('--gin_file=broken.gin'), 'broken.gin'),
  (_train('--gin_file=latin.gin'), 'latin.gin:2 has the byte 0xe9'),
  (_train('--gin_file=importing.gin'), 'importing.gin imports what cannot'),
  (_train('--gin_file=NOWHERE.gin'), "'NOWHERE.gin'"),
  (_train('--gin.NUM_LAYERS=10**12'), '10**12 is text'),
  (_train('--gin.NUM_LAYERS=2 2'), 'NUM_LAYERS=2 2'),
  (_train('--gin.NUM_LAYERS='), 'NUM_LAYERS= is text'),
  (_train('--gin.=3'), '--gin.'),
  (_train('--gin.ROUTER=@top_k.TopKK'), 'top_k.TopKK'),
  (_train('--gin.NO_MACRO=3'), 'NO_MACRO'),
  (_train('stray'), "'stray'"),
  # Of other values than types.
  (_train('--gin.NUM_LAYERS=1000000000000'), 'at most 1000'),
  (_train('--gin.NUM_LAYERS=True'), 'NUM_LAYERS = True'),
  (_train('--gin.SPARSE_LAYERS=-2'), 'sparse_layers=-2'),
  (_train('--gin.SPARSE_LAYERS=(0, 0)'), 'sparse_layers (0, 0) have one twice'),
  (_train('--gin.SEED=4294967296'), 'SEED = 4294967296'),
  (_train('--gin.TRAIN_STEPS=2147483648'), 'TRAIN_STEPS = 2147483648'),
  (_train('--gin.EOS_IDS=(True,)'), 'EOS_IDS = (True,)'),
  (_train('--gin.EOS_IDS=(1, 999)'), 'special tokens 999'),
  (_train('--gin.START_ID=-1'), 'special tokens -1'),
  (_train('--gin.SUPPRESSED_IDS=(0, -7)'), 'special tokens -7'),
  (_train("--gin.LOSS_WEIGHTS={'load_balance': 1e999}"), "balance': inf}"),
  (_train('--gin.SPARSE_LAYERS=3'), 'sparse_layers=3'),
  (_train('--gin.DROPOUT_RATE=-.5'), 'DROPOUT_RATE = -0.5'),
  (_train('--gin.DROPOUT_RATE=1'), 'below 1'),
  (_train('--gin.NUM_EXPERTS=0'), 'num_experts=0'),
  (_train('--gin.NUM_SELECTED_EXPERTS=9'), 'TopK lets later'),
  (_train('--gin.NUM_DATA_SHARDS=0'), 'NUM_DATA_SHARDS = 0'),
  (_train('--gin.NUM_DATA_SHARDS=3'), 'num_shards 3'),
  (_train('--gin.BATCH_SIZE=12'), 'batch_size=12'),
  (_train("--gin.MESH={'data': 0}"), "'data'"),
  (_train("--gin.MESH={'data': 3}"), 'data=3'),
  (_train("--gin.RULES={'embed': 'daat'}"), 'did you mean data?'),
  (_train("--gin.LOSS_WEIGHTS={'x': 1}"), "['x']"),
  (_train("--gin.TASK_FEATURE_LENGTHS={'input': 16}"), "['input']"),
  (_train('--gin.OPTIMIZER=@schedules.rsqrt'), 'OPTIMIZER = @schedules.rsqrt'),
  (_train('--gin.LEARNING_RATE=@schedules.rsqrt'), 'LEARNING_RATE'),
  (_train('--gin.STRATEGY=@schedules.rsqrt()'), 'STRATEGY'),
  (_train('--gin.MODEL=@schedules.rsqrt()'), 'MODEL = @schedules.rsqrt()'),
  (_train('--gin.ROUTER=@schedules.rsqrt'), 'ROUTER = @schedules.rsqrt'),
  (
    _train("--gin.TASK_MODULES=('no_module_',)"),
    "TASK_MODULES has 'no_module_'",
  ),
  (_train("--gin.REMAT='some'"), "'some'"),
  (_train("--gin.ACTIVATION='relux'"), "'relux'"),
  (_train("--gin.LAYER_REDUCTION='max'"), "'max'"),
  (_train('--gin.WARMUP_STEPS=-1'), 'warmup_steps=-1'),
  (_train('--gin.KEEP_CHECKPOINTS=0'), 'keep_checkpoints'),
  (_train('--gin.EVAL_PERIOD=0'), 'eval_period'),
  (_train('--profile=3:1'), '--profile'),
  (_train('--replay=0'), 'replay is a step'),
  (_train('--replay=x'), '--replay'),
  (_run('infer', '--gin.TEMPERATURE=-1'), 'temperature'),
  (_run('infer', '--gin.TOP_P=2'), 'top_p'),
  (_run('infer', '--input=NOWHERE'), 'no input file'),
  (_run('infer', '--input=blank.txt'), 'line 2 of blank.txt is blank'),
  (_run('infer', '--input=empty.txt'), 'empty'),
  (_run('infer', '--input=latin.txt'), 'not UTF-8'),
  (_run('infer', '--input=broken.jsonl'), 'line 1 of broken.jsonl'),
  (_run('evaluate', "--gin.PARAMETERS='x'"), "'x'"),
  (_run('evaluate', '--reliability=a.txt'), 'RANK_OPTIONS'),
  # Plans, and what measures.
  (('plan', SWITCH), '--topology'),
  (('plan', SWITCH, '--topology=v4:99999x99999x99999'), 'at most 1,048,576'),
  (('plan', SWITCH, '--topology=v4:0x1x1'), 'v4:0x1x1'),
  (('plan', SWITCH, '--topology=v9:1'), 'v9:1'),
  (('plan', POD), 'plan needs a model'),
  (('plan', POD, '--hours=1', SWITCH), '--gin_file or --hours'),
  (('plan', POD, '--hours=0'), '--hours'),
  (('plan', POD, '--hours=nan'), '--hours'),
  (('plan', POD, '--hours=1', '--watts=-1'), '--watts'),
  (('plan', POD, '--hours=1', '--pue=0'), '--pue'),
  (('plan', POD, '--hours=1', '--efficiency=2'), 'efficiency'),
  (('plan', POD, '--hours=1', '--chips=4'), '--chips=4'),
  (('plan', '--topology=v4', '--chips=0', '--hours=1'), '--chips=0'),
  (('plan', '--topology=v4', '--chips=9999999', '--hours=1'), '9,999,999'),
  (('plan', POD, SWITCH, '--gin.BATCH_SIZE=0'), 'BATCH_SIZE = 0'),
  (('precompile', POD, '--dry_run'), '--gin_file'),
  (('precompile', SWITCH), '--topology'),
  (('precompile', '--check_ledgers=NOWHERE'), 'NOWHERE'),
  (('precompile', POD, SWITCH, '--slices=0', '--dry_run'), '0 chips'),
  (('precompile', POD, SWITCH, '--step=x', '--dry_run'), "'x'"),
  (('precompile', SWITCH, '--topology=v4', '--dry_run'), 'v4'),
  (('bench',), 'what'),
  (('bench', 'layers'), "'layers'"),
  (('bench', 'layer', '--gin.ROUNDS=0'), 'ROUNDS = 0'),
  (('bench', 'layer', "--gin.DTYPE='int8'"), "DTYPE = 'int8'"),
  (('bench', 'layer', "--gin.DISPATCHERS=('x',)"), "'x'"),
  (('bench', 'layer', '--gin.CHOICES=(9,)', '--dry_run'), 'got 9'),
  (('bench', 'layer', '--topology=v9:1', '--dry_run'), 'v9:1'),
  (('bench', 'decode', '--gin.EXPERTS=5'), 'EXPERTS = 5'),
  (('bench', 'decode', '--gin.ROUNDS=0'), 'ROUNDS = 0'),
  (('bench', 'decode', POD), '--topology'),
  (('equivalence', "--gin.ROUTERS='x'"), "ROUTERS = 'x'"),
  (('equivalence', "--gin.ROUTERS=['x']"), 'gin/routers/x.gin'),
  (('equivalence', "--gin.DISPATCHERS=['x']"), "'x'"),
  (('equivalence', "--gin.MESHES=[{'dat': 2}]"), "'dat'"),
  (('table',), '--paper'),
  (('table', '--paper=x'), "'x'"),
  (('table', '--paper=switch_table9', '--gin.A=1'), '--paper=TABLE alone'),
  (('inspect', SWITCH, '--gin.MODEL=5'), 'MODEL = 5'),
  (('inspect', SWITCH, '--gin.NUM_LAYERS=1000000000000'), 'at most 1000'),
  (('inspect',), '--gin_file'),
  (('inspekt',), "'inspekt'"),
]


def _wrong(hint) -> object:
  """A value that is of no type that parameters have, but in its kind close."""
  text = types._text(hint)
  return [['x']] if 'str' in text or "'" in text else 'x'


def _out_of_range(hint) -> object | None:
  """The nearest number beyond the bounds that a hint says, if it says any."""
  for part in (hint, *typing.get_args(hint)):
    if typing.get_origin(part) is typing.Annotated:
      for bound in part.__metadata__:
        if isinstance(bound, annotated_types.Ge):
          return bound.ge - 1
        if isinstance(bound, annotated_types.Gt) and np.isfinite(bound.gt):
          return bound.gt
        if isinstance(bound, annotated_types.Le):
          return bound.le + 1
  return None


# Which command a parameter's binding is given to.
RECIPES = {
  'train': ('train', '--dry_run', command.TINY, MODEL_DIR),
  'classification': ('train', '--dry_run', CLASSIFICATION, MODEL_DIR),
  'bench': ('bench', 'layer', '--gin_file=gin/bench/layer.gin'),
  'plan': ('plan', SWITCH, '--gin_file=gin/runs/precompile.gin', POD),
}


def generated() -> list[tuple[tuple[str, ...], str]]:
  """Every parameter that recipes bind, with a wrong type and out of range."""
  found = collections.OrderedDict()
  for command_line in RECIPES.values():
    files = [a.split('=', 1)[1] for a in command_line if 'gin_file' in a]
    given = ['MODEL_DIR=NEW'] if MODEL_DIR in command_line else []
    config.parse(files, given, [])
    for (scope, selector), bindings in list(gin.config._CONFIG.items()):
      if selector == 'gin.macro':
        continue
      takes = types._parameters(gin.config._REGISTRY[selector].wrapped)
      function = '.'.join(selector.split('.')[-2:])
      name = f'{scope}/{function}' if scope else function
      for argument in bindings:
        if argument not in takes or types._text(takes[argument].hint) == 'Any':
          continue
        hint = takes[argument].hint
        for value in (_wrong(hint), _out_of_range(hint)):
          if value is not None:
            binding = f'--gin.{name}.{argument}={value!r}'
            line = f'{name}.{argument} = {value!r}'
            found.setdefault(binding, ((*command_line, binding), line))
  return list(found.values())


@pytest.fixture
def folder(tmp_path, monkeypatch) -> pathlib.Path:
  """Where the inputs lie."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'RUN/checkpoints').mkdir(parents=True)
  (tmp_path / 'RUN/config.gin').touch()
  (tmp_path / 'FILE').touch()
  (tmp_path / 'self.gin').write_text("include 'self.gin'\n")
  (tmp_path / 'first.gin').write_text("include 'second.gin'\n")
  (tmp_path / 'second.gin').write_text("include 'first.gin'\n")
  (tmp_path / 'broken.gin').write_text('A = = 3\n')
  (tmp_path / 'latin.gin').write_bytes(b'A = 3\n# caf\xe9\n')
  (tmp_path / 'importing.gin').write_text('import no_module_\n')
  (tmp_path / 'blank.txt').write_text('1+1\n \n2+2\n')
  (tmp_path / 'empty.txt').touch()
  (tmp_path / 'latin.txt').write_bytes(b'caf\xe9\n')
  (tmp_path / 'broken.jsonl').write_text('{"inputs": 3}\n')
  return tmp_path


def _said(arguments) -> tuple[int, str, str]:
  stdout, stderr = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
    try:
      code = cli.main(arguments)
    except SystemExit as end:
      code = end.code
  return code, stdout.getvalue(), stderr.getvalue()


@pytest.mark.parametrize('which', ['by hand', 'generated'])
def test_a_bad_input_gets_its_line_and_leaves_nothing(which, folder):
  inputs = BY_HAND if which == 'by hand' else generated()
  assert len(inputs) >= 120
  before, wrong = sorted(folder.rglob('*')), []
  for arguments, named in inputs:
    code, stdout, stderr = _said(arguments)
    lines = stderr.splitlines()
    if not (
      code == 2
      and len(lines) == 1
      and lines[0].startswith('error: ')
      and named in lines[0]
      and 'internal' not in lines[0]
      and stdout == ''
    ):
      wrong.append(
        (' '.join(arguments), named, code, stdout[:80], stderr[-500:])
      )
  assert not wrong, '\n'.join(map(str, wrong))
  assert sorted(folder.rglob('*')) == before
