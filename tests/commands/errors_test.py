"""Mistakes of users: one line that starts with 'error: ', and no traces."""

import json
import pathlib
import shutil
import subprocess
import sys

import command
import pytest
from paths import ROOT

from sparse_experts.training import checksums

# Outside of pytest, which would hide what libraries log. No corpus is there, no
# package to make one of.
RUN_ALL = """
import json, os, pathlib, sys, traceback
from sparse_experts import cli
from sparse_experts.data import installed

def files():
  return {
    str(path): path.is_file() and path.read_bytes()
    for path in pathlib.Path().rglob('*')
  }

installed.PACKAGES = ()
os.environ['SPARSE_EXPERTS_CACHE'] = 'nothing'
ends, before = [], files()
for arguments in json.load(sys.stdin):
  try:
    code = cli.main(arguments)
  except SystemExit as end:
    code = end.code
  except BaseException:
    traceback.print_exc()
    code = 1
  after = files()
  ends.append([code, sorted(str(f[0]) for f in before.items() ^ after.items())])
  before = after
  for stream in (sys.stdout, sys.stderr):
    print('END OF A COMMAND', file=stream, flush=True)
print(json.dumps(ends))
"""


def _run(name: str, *arguments: str, model_dir: str = 'NEW') -> list[str]:
  return [name, command.TINY, f'--gin.MODEL_DIR={model_dir}', *arguments]


def _train(*arguments: str, model_dir: str = 'NEW') -> list[str]:
  return _run('train', command.NO_EVALUATION, *arguments, model_dir=model_dir)


# name: (arguments, parts of the line); NEW is not there, see `folder`.
MISTAKES = {
  'macro': (
    _train('--gin.TRAIN_STEPZ=3'),
    ['--gin.TRAIN_STEPZ', 'did you mean TRAIN_STEPS?'],
  ),
  'binding': (
    _train('--gin.train.train.train_stepz=3'),
    [
      "'train.train' doesn't have a parameter named 'train_stepz'",
      'did you mean train_steps?',
    ],
  ),
  'scope': (
    _train('--gin.evl/dataset.Dataset.num_batches=1'),
    ['no gin file has the scope evl', 'did you mean eval?'],
  ),
  'function': (
    _train('--gin.trian.train.train_steps=3'),
    ["No configurable matching 'trian.train'", 'did you mean train.train?'],
  ),
  'reference': (
    _train('--gin.OPTIMIZER=@optimizers.adamm'),
    ["No configurable matching reference '@optimizers.adamm'"],
  ),
  'gin file': (
    ['train', '--gin_file=gin/tiny.gin'],
    ["'gin/tiny.gin' is not in", '--gin_search_paths'],
  ),
  'no gin file': (['train'], ['train needs --gin_file=FILE']),
  'no runner': (
    ['train', '--gin_file=gin/tasks/docs_lm.gin'],
    ['give train no model, model_dir,', '--gin_file=gin/runs/default.gin'],
  ),
  'no MODEL_DIR': (
    ['train', command.TINY],
    ['require MODEL_DIR', '--gin.NAME=VALUE'],
  ),
  'text': (
    _train('--gin.TRAIN_STEPS=ten'),
    ['--gin.TRAIN_STEPS=ten is text', 'TRAIN_STEPS = 20'],
  ),
  'no steps': (
    _train('--gin.TRAIN_STEPS=0'),
    ['TRAIN_STEPS = 0 (train.train.train_steps) must be int at least 1'],
  ),
  'half a step': (
    _train('--gin.TRAIN_STEPS=1.5'),
    ['TRAIN_STEPS = 1.5 (train.train.train_steps) must be int'],
  ),
  'no checkpoint kept': (
    _train('--gin.KEEP_CHECKPOINTS=0'),
    ['keep_checkpoints must be a whole number, at least 1, got 0'],
  ),
  'NaN learning rate': (
    _train('--gin.BASE_LEARNING_RATE=nan'),
    ['--gin.BASE_LEARNING_RATE=nan', 'BASE_LEARNING_RATE = 0.1'],
  ),
  'infinite learning rate': (
    _train('--gin.BASE_LEARNING_RATE=1e999'),
    ['learning rate is a finite number', 'base=inf', 'give a base'],
  ),
  'task': (
    _train('--gin.MIXTURE_OR_TASK_NAME=tiny_sum'),
    ["unknown task 'tiny_sum'", "did you mean 'tiny_sums'?"],
  ),
  'module': (
    _train("--gin.TASK_MODULES=('no_such_module',)"),
    ["No module named 'no_such_module'"],
  ),
  'vocabulary': (
    _train('--gin.NUM_EMBEDDINGS=300'),
    ["'tiny_sums' has 359 token ids", 'embeds only 300', 'at least 359'],
  ),
  'no corpus': (
    _train(
      '--gin.MIXTURE_OR_TASK_NAME=docs_domain', '--gin.NUM_EMBEDDINGS=8192'
    ),
    [
      'the small documentation corpus is not here',
      '`python -m sparse_experts corpus small`',
      'docs_installed_',
    ],
  ),
  'empty corpus': (
    _train(
      '--gin.MIXTURE_OR_TASK_NAME=docs_installed_domain',
      '--gin.NUM_EMBEDDINGS=8192',
    ),
    ["the corpus needs 'nltk'", 'only [] are installed', 'pip install'],
  ),
  'batch': (
    _train('--gin.BATCH_SIZE=12'),
    ['batch_size=12', '8 data shards', 'a multiple of 8'],
  ),
  'batch of an evaluation': (
    _run('evaluate', '--gin.BATCH_SIZE=12', model_dir='TRAINED'),
    ['size 12 does not divide', 'a multiple of 8'],
  ),
  'microbatches': (
    _train('--gin.MICROBATCHES=3'),
    ['batch_size=8', '3 microbatches', 'a multiple of 24'],
  ),
  'experts': (
    _train("--gin.MESH={'data': 1, 'expert': 8}"),
    ["/wi_0/kernel: axis 'expert' of size 4", 'expert=8', 'a multiple of 8'],
  ),
  'mesh': (
    _train("--gin.MESH={'data': 3}"),
    ['data=3 x expert=1 x model=1 on 8 devices', 'set one to -1'],
  ),
  'router': (
    _train('--gin.NUM_SELECTED_EXPERTS=2'),
    ['TopK lets later tokens decide', 'allow_non_causal_routing=True'],
  ),
  'groups': (
    _train('--gin.GROUP_SIZE=5'),
    ['group_size=5 does not fit 8 sequences of 32', 'must divide 256'],
  ),
  'not writable': (
    _train(model_dir='FILE/run'),
    ['FILE/run cannot be written', '--gin.MODEL_DIR'],
  ),
  'other architecture': (
    _train('--gin.MLP_DIM=64', model_dir='TRAINED'),
    [
      'params/decoder/layers_0/mlp/wi_0/kernel is (16, 32) there',
      '(16, 64) in this model',
      'another MODEL_DIR',
    ],
  ),
  'other architecture to evaluate': (
    _run('evaluate', '--gin.MLP_DIM=64', model_dir='TRAINED'),
    ['of another architecture', 'is (16, 32) there and (16, 64)'],
  ),
  'other optimizer': (
    _train('--gin_file=adam.gin', model_dir='TRAINED'),
    ['of another architecture: optimizer/opt_state/', 'absent'],
  ),
  'other seed': (
    _train('--gin.SEED=1', model_dir='TRAINED'),
    ['have seed 0, these have 1', 'restore with the saved value'],
  ),
  'other corpus': (
    _train(model_dir='OTHER_CORPUS'),
    ["have corpus {'tiny_sums': 'other sums'}", "'sums of two digits'"],
  ),
  'truncated parameters': (
    _train(model_dir='TRUNCATED'),
    ['TRUNCATED/checkpoints/2 is damaged', 'begin another MODEL_DIR'],
  ),
  'truncated parameters to evaluate': (
    _run('evaluate', model_dir='TRUNCATED'),
    ['TRUNCATED/checkpoints/2 is damaged', 'begin another MODEL_DIR'],
  ),
  'no optimizer': (
    _train(model_dir='NO_OPTIMIZER'),
    ['NO_OPTIMIZER/checkpoints/2 is damaged or incomplete'],
  ),
  'truncated data': (
    _train(model_dir='TRUNCATED_DATA'),
    ['TRUNCATED_DATA/checkpoints/2 is damaged or incomplete'],
  ),
  'nothing to evaluate': (
    _run('evaluate'),
    ['no complete checkpoint in', 'give a MODEL_DIR that was trained in'],
  ),
  'nothing to infer with': (
    _run('infer'),
    ['no complete checkpoint in', 'give a MODEL_DIR that was trained in'],
  ),
  'nothing to inspect': (
    ['inspect', '--json', '--checkpoint=TRAINED/checkpoints/7'],
    ['no complete checkpoint in', 'TRAINED/checkpoints/7'],
  ),
  'packed questions': (
    _run('infer', '--gin.infer/dataset.Dataset.pack=True', model_dir='TRAINED'),
    ['infer takes examples one by one', 'pack=False'],
  ),
  'profile': (
    _train('--profile=4:2'),
    ["--profile takes START:STOP in steps, not '4:2'"],
  ),
  'optimizer that is text': (
    _train("--gin.OPTIMIZER='adam'"),
    ["OPTIMIZER = 'adam'", 'must be Callable[..., GradientTransformation]'],
  ),
  'seed that is text': (
    _train("--gin.train.train.seed='a'"),
    ["train.train.seed = 'a' must be int"],
  ),
  'hooks that are none': (
    _train('--gin.HOOKS=[3]'),
    ['HOOKS = [3]', 'must be Sequence[Callable[[Run], None]]'],
  ),
  'weights of losses': (
    _train('--gin.LOSS_WEIGHTS=3'),
    ['LOSS_WEIGHTS = 3', 'loss_weights) must be Mapping[str, float finite]'],
  ),
  'modules that are one text': (
    _train("--gin.TASK_MODULES='tiny_tasks'"),
    ["TASK_MODULES = 'tiny_tasks'", 'must be Sequence[str]'],
  ),
  'dropout': (
    _train('--gin.DROPOUT_RATE=1.5'),
    ['DROPOUT_RATE = 1.5', 'dropout_rate) must be float at least 0, below 1'],
  ),
  'no experts': (
    _train('--gin.NUM_EXPERTS=0'),
    ['num_experts=0 must be at least 1', 'SPARSE_LAYERS = 0'],
  ),
  'sparse layers': (
    _train('--gin.SPARSE_LAYERS=-2'),
    ['sparse_layers=-2 must be 0'],
  ),
  'task of another objective': (
    [
      'train',
      '--gin_file=gin/small/classification.gin',
      '--gin.MODEL_DIR=NEW',
      command.NO_EVALUATION,
      '--gin.MIXTURE_OR_TASK_NAME=docs_lm',
    ],
    ["the model reads 'label'", "'docs_lm' has targets: take a task"],
  ),
  'what a file names and none binds': (
    [
      'inspect',
      '--gin_file=gin/small/classification.gin',
      '--gin_file=gin/routers/thor.gin',
    ],
    ['Language.__init__() missing 1 required', "'module'", 'bind it'],
  ),
  'processes': (
    _train('--coordinator=127.0.0.1:1'),
    ['--coordinator needs --num_processes=N and --process_id=I'],
  ),
  'processes without a coordinator': (
    _train('--num_processes=2'),
    ['--num_processes and --process_id belong to --coordinator=HOST:PORT'],
  ),
  'processes of a pod': (
    _train('--coordinator=auto', '--process_id=0'),
    ["'auto' finds them on a pod"],
  ),
  '~ of a run': (
    _train(model_dir='~/NEW'),
    ["'~/NEW' begins with ~", 'write $HOME'],
  ),
  '~ of a checkpoint': (
    ['inspect', '--checkpoint=~/NEW'],
    ["'~/NEW' begins with ~", 'write $HOME'],
  ),
  '~ of a report': (['report', '~/NEW'], ["'~/NEW' begins with ~"]),
  '~ of answers': (
    _run('infer', '--output=~/NEW', model_dir='TRAINED'),
    ["'~/NEW' begins with ~"],
  ),
  '~ of a picture': (
    _run('evaluate', '--reliability=~/NEW.png', '--gin.RANK_OPTIONS=True'),
    ["'~/NEW.png' begins with ~"],
  ),
  '~ of a conversion': (
    ['convert', '--to=native', '--input=TRAINED', '--output=~/NEW'],
    ["'~/NEW' begins with ~"],
  ),
  '~ of figures': (
    ['report', 'TRAINED', '--figures=~/NEW'],
    ["'~/NEW' begins with ~"],
  ),
  'figures in a file': (
    ['report', 'TRAINED', '--figures=FILE'],
    ['FILE cannot be written', 'by --figures'],
  ),
  'a text and a file of texts': (
    _run('record', '--text=a', '--input=FILE', model_dir='TRAINED'),
    ['record takes --text or --input, not both'],
  ),
  'a blank text': (
    _run('record', '--text= ', model_dir='TRAINED'),
    ['--text is blank'],
  ),
  'a text of other bytes': (
    _run('record', '--text=a\udce9', model_dir='TRAINED'),
    ['--text is not UTF-8 from character 2'],
  ),
  'a text for what reads images': (
    [
      'record',
      '--gin_file=gin/small/classification.gin',
      '--gin.MODEL_DIR=TRAINED',
      '--text=a',
    ],
    ['which a text alone is not: record a split of its task'],
  ),
  'argument': (_train('--stepz=3'), ["unknown argument '--stepz=3'", '--help']),
  'word': (
    _train('TRAIN_STEPS=3'),
    ["unknown argument 'TRAIN_STEPS=3'", '--gin.NAME=VALUE'],
  ),
  'command': (['trian'], ["invalid choice: 'trian'", "'train'", '--help']),
  'flag': (
    _train('--num_processes=two'),
    ["--num_processes: invalid int value: 'two'", '--help'],
  ),
}


def _truncate(path: pathlib.Path) -> None:
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> pathlib.Path:
  """TRAINED, a run of two steps; damaged copies of it; a FILE; adam.gin."""
  folder = tmp_path_factory.mktemp('errors')
  command.train(folder / 'TRAINED', '--gin.TRAIN_STEPS=2')

  def copied(name) -> pathlib.Path:
    shutil.copytree(folder / 'TRAINED', folder / name)
    return folder / name / 'checkpoints' / '2'

  for path in (copied('TRUNCATED') / 'params').rglob('d/*'):
    _truncate(path)
  for path in (copied('TRUNCATED_DATA') / 'data').glob('*.data-*'):
    _truncate(path)
  shutil.rmtree(copied('NO_OPTIMIZER') / 'optimizer')
  identity = copied('OTHER_CORPUS') / 'data' / 'batches.json'
  saved = json.loads(identity.read_text())
  identity.write_text(
    json.dumps({**saved, 'corpus': {'tiny_sums': 'other sums'}})
  )
  checksums.write(identity.parent.parent)
  (folder / 'FILE').touch()
  (folder / 'adam.gin').write_text(
    'from __gin__ import dynamic_registration\n'
    'from sparse_experts.training import optimizers\n'
    'OPTIMIZER = @optimizers.adam\n'
  )
  return folder


@pytest.fixture(scope='module')
def outcomes(folder) -> dict[str, tuple[command.Outcome, list[str]]]:
  """What each mistake led to, and the files that it changed."""
  process = command.start('-c', RUN_ALL, cwd=folder)
  commands = [arguments for arguments, _ in MISTAKES.values()]
  streams = process.communicate(json.dumps(commands))
  assert process.returncode == 0, streams[1]
  *stdouts, ends = streams[0].split('END OF A COMMAND\n')
  *stderrs, rest = streams[1].split('END OF A COMMAND\n')
  assert not rest
  return {
    name: (command.Outcome(code, stdout, stderr), changed)
    for name, (code, changed), stdout, stderr in zip(
      MISTAKES, json.loads(ends), stdouts, stderrs, strict=True
    )
  }


@pytest.mark.parametrize('name', MISTAKES)
def test_a_mistake_gets_one_line_and_changes_nothing(name, outcomes):
  (code, stdout, stderr), changed = outcomes[name]
  assert code == 2, stderr
  assert stderr.startswith('error: ')
  assert stderr.count('\n') == 1 and stderr.endswith('\n'), stderr
  assert stdout == ''
  assert changed == []
  for part in MISTAKES[name][1]:
    assert part in stderr


def test_verbose_adds_the_traceback(folder):
  outcome = command.run(*_train('--gin.TRAIN_STEPS=0'), '--verbose')
  assert outcome.code == 2
  assert outcome.stderr.startswith('Traceback (most recent call last)')
  assert outcome.stderr.splitlines()[-1].startswith('error: TRAIN_STEPS = 0')


@pytest.mark.slow
@pytest.mark.parametrize('damage', [_truncate, pathlib.Path.unlink])
def test_a_damaged_step_is_refused_or_whole(damage, folder, tmp_path):
  """Whatever file it is: some hold nothing that a restore needs."""

  def inspect(path):
    return command.run('inspect', '--json', f'--checkpoint={path}')

  whole = inspect(folder / 'TRAINED')
  assert whole.code == 0
  step = folder / 'TRAINED' / 'checkpoints' / '2'
  files = [f.relative_to(folder) for f in step.rglob('*') if f.is_file()]
  refused = set()
  for i, file in enumerate(files):
    copy = tmp_path / str(i)
    shutil.copytree(folder / 'TRAINED', copy / 'TRAINED')
    damage(copy / file)
    outcomes = [
      inspect(copy / 'TRAINED'),
      command.run(*_train('--gin.TRAIN_STEPS=2', model_dir=copy / 'TRAINED')),
    ]
    for outcome in outcomes:
      if outcome.code:
        assert outcome.code == 2
        assert 'checkpoints/2 is damaged or incomplete' in outcome.stderr
        assert outcome.stderr.count('\n') == 1
        refused.add(file.relative_to(step.relative_to(folder)).parts[0])
    if outcomes[0].code == 0:
      there, before = (json.loads(o.stdout) for o in (outcomes[0], whole))
      told = there.pop('checksums'), before.pop('checksums')
      assert there == before
      assert (told[0] == told[1]) == (file.name != checksums.NAME)
    shutil.rmtree(copy)
  # Without checksums, a step of before there were any, all else tells.
  cut = {'checksums.json'} if damage is _truncate else set()
  assert refused == {'params', 'optimizer', 'data', *cut}


def test_a_python_without_the_libraries_is_named():
  ended = subprocess.run(
    [sys.executable, '-S', '-m', 'sparse_experts', 'train'],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert ended.returncode == 2 and not ended.stdout
  (line,) = ended.stderr.splitlines()
  assert line.startswith(f'error: {sys.executable} lacks a library')
