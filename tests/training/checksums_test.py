"""Damage to a step is found, named, and never deleted or skipped."""

import json
import random
import shlex
import shutil
import subprocess

import command
import pytest

from sparse_experts.training import checkpoints, checksums


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """MODEL_DIR with steps 1 and 2."""
  model_dir = tmp_path_factory.mktemp('trained')
  command.train(model_dir, '--gin.TRAIN_STEPS=2', '--gin.CHECKPOINT_PERIOD=1')
  return model_dir


@pytest.fixture
def run(trained, tmp_path):
  """A copy of it."""
  return shutil.copytree(trained, tmp_path / 'run')


def inspect(path) -> command.Outcome:
  return command.run('inspect', '--json', f'--checkpoint={path}')


def go_on(model_dir, *arguments: str) -> command.Outcome:
  return command.run(
    *('train', command.TINY, f'--gin.MODEL_DIR={model_dir}'),
    *(command.NO_EVALUATION, '--gin.TRAIN_STEPS=2', *arguments),
  )


def flip(file, bit: int) -> None:
  content = bytearray(file.read_bytes())
  content[bit // 8] ^= 1 << bit % 8
  file.write_bytes(content)


def files(model_dir) -> list:
  step = model_dir / 'checkpoints' / '2'
  return sorted(path for path in step.rglob('*') if path.is_file())


def test_forty_flipped_bits_are_found_or_harmless(run, tmp_path):
  """At least one in every file; the others anywhere, all bits alike.

  How many files there are is orbax's choice, and differs from run to run.
  """
  whole = command.saved(run, 2)
  draw = random.Random(0)
  chosen = files(run)
  marks = sum(file.parent.name == '2' for file in chosen) - 1
  chosen += draw.choices(
    chosen,
    [file.stat().st_size for file in chosen],
    k=max(40 - len(chosen), 10),
  )
  found = 0
  for file in chosen:
    content = file.read_bytes()
    flip(file, draw.randrange(8 * len(content)))
    step = run / 'checkpoints' / '2'
    inside = file.relative_to(step).as_posix()
    if damage := checksums.damage(step):
      assert inside.startswith(damage.split()[0]) or inside == checksums.NAME
      outcome = inspect(run)
      assert outcome.code == 2 and outcome.stdout == ''
      assert outcome.stderr.count('\n') == 1
      assert 'checkpoints/2 is damaged or incomplete' in outcome.stderr
      found += 1
    else:
      # Orbax's marks of a commit, which a restore goes without.
      assert '/' not in inside
      assert inspect(run).code == 0
      outcome = go_on(run)
      assert outcome.code == 0, outcome.stderr
      command.assert_same_bits(whole, command.saved(run, 2))
    file.write_bytes(content)
  assert marks <= 2 and found >= len(chosen) - marks - 1
  assert inspect(run).code == 0


def test_a_damaged_step_is_named_and_the_one_before_offered(run):
  [file] = [f for f in files(run) if f.name == 'batches.json']
  flip(file, 100)
  before = {f: f.read_bytes() for f in run.rglob('*') if f.is_file()}
  outcomes = [inspect(run), go_on(run)]
  for outcome in outcomes:
    assert outcome.code == 2 and outcome.stderr.count('\n') == 1
    assert 'data/batches.json is not what was written' in outcome.stderr
    assert f'step 1 before it is whole: read {run}/checkpoints/1' in (
      outcome.stderr
    )
  after = {f: f.read_bytes() for f in run.rglob('*') if f.is_file()}
  assert before == after

  # The step before, by what the line says.
  assert inspect(run / 'checkpoints' / '1').code == 0
  offered = outcomes[0].stderr.split('`')[1]
  subprocess.run(shlex.split(offered), check=True)
  outcome = go_on(run)
  assert outcome.code == 0 and 'resumed at step 1\n' in outcome.stderr
  assert (run / 'damaged-2' / 'data' / 'batches.json').exists()


def test_no_step_is_offered_that_is_damaged_too(run):
  for file in run.glob('checkpoints/*/params/_METADATA'):
    flip(file, 8)
  outcome = inspect(run)
  assert outcome.code == 2
  assert 'no step before it is whole' in outcome.stderr


@pytest.mark.parametrize('how', ['cut', 'gone'])
def test_what_is_cut_or_gone_is_named(run, how):
  [file] = [f for f in files(run) if f.name.endswith('.index')]
  if how == 'gone':
    file.unlink()
  else:
    file.write_bytes(file.read_bytes()[:-1])
  outcome = inspect(run)
  assert outcome.code == 2
  assert f'data/{file.name} has ' in outcome.stderr


def test_a_step_of_before_there_were_checksums_loads(run):
  for file in run.glob('checkpoints/*/checksums.json'):
    file.unlink()
  said = 'checkpoints/2 has no checksums.json: what is read of it is not verif'
  outcome = inspect(run)
  assert outcome.code == 0 and outcome.stderr.count(said) == 1
  assert json.loads(outcome.stdout)['checksums'] == 'not verified'
  outcome = command.run('inspect', f'--checkpoint={run}')
  assert 'checksums: not verified\n' in outcome.stdout
  outcome = command.train(run, '--gin.TRAIN_STEPS=3')
  assert 'resumed at step 2\n' in outcome.stderr
  assert outcome.stderr.count(said) == 1
  outcome = inspect(run)
  assert json.loads(outcome.stdout)['checksums'] == 'verified'
  assert outcome.stderr == ''


@pytest.mark.parametrize('named', ['nothing', 'others'])
def test_a_file_that_has_no_checksum_is_damage(run, named):
  sums = run / 'checkpoints' / '2' / checksums.NAME
  content = json.loads(sums.read_text()) if named == 'others' else {}
  sums.write_text(json.dumps({f'x{name}': of for name, of in content.items()}))
  outcome = inspect(run)
  assert outcome.code == 2 and outcome.stderr.count('\n') == 1
  assert 'checkpoints/2 is damaged or incomplete' in outcome.stderr
  assert ' is not in checksums.json)' in outcome.stderr
  assert 'step 1 before it is whole' in outcome.stderr


@pytest.mark.parametrize('name', ['\u00b2', '007', 'copy_2'])
def test_a_folder_that_is_no_step_is_named(run, name):
  (run / 'checkpoints' / '2').rename(run / 'checkpoints' / name)
  for outcome in (inspect(run), go_on(run)):
    assert outcome.code == 2 and outcome.stderr.count('\n') == 1
    assert f'checkpoints/{name} is no step of a run' in outcome.stderr


def test_a_file_where_steps_lie_is_named(tmp_path):
  (tmp_path / 'checkpoints').touch()
  for outcome in (inspect(tmp_path), go_on(tmp_path)):
    assert outcome.code == 2 and outcome.stderr.count('\n') == 1
    assert 'checkpoints is a file, where the steps of a run' in outcome.stderr
  assert [path.name for path in tmp_path.iterdir()] == ['checkpoints']


def test_parts_of_a_large_file_have_their_own(tmp_path, monkeypatch):
  monkeypatch.setattr(checksums, '_PART', 100)
  (tmp_path / 'params').mkdir()
  (tmp_path / 'params' / 'a').write_bytes(bytes(range(250)))
  (tmp_path / 'params' / 'empty').touch()
  checksums.write(tmp_path)
  sums = json.loads((tmp_path / checksums.NAME).read_text())
  assert [len(file['crc32']) for file in sums.values()] == [3, 1]
  assert checksums.damage(tmp_path) is None
  flip(tmp_path / 'params' / 'a', 8 * 203)
  assert checksums.damage(tmp_path) == (
    'params/a is not what was written, from byte 200 on'
  )
  assert checksums.damage(tmp_path, ['optimizer']) is None


def test_copies_and_conversions_have_checksums(run, tmp_path):
  outcome = command.run(
    *('convert', '--from=native', '--to=native', f'--input={run}'),
    f'--output={tmp_path / "converted"}',
  )
  assert outcome.code == 0, outcome.stderr
  step = tmp_path / 'converted' / 'checkpoints' / '2'
  [file] = step.glob('params/*wi_0*/0.0')
  assert checksums.damage(step) is None
  flip(file, 77)
  assert 'wi_0' in checksums.damage(step)
  with pytest.raises(ValueError, match='is damaged or incomplete .*wi_0'):
    checkpoints.load_params(tmp_path / 'converted')
