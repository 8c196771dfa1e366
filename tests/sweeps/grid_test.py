"""Combinations of values, and what a run is a function of."""

import importlib

import pytest

from sparse_experts.sweeps import grid, identity


def digest(text, data):
  return identity.digest(text, identity.inputs(text, data))


def test_every_combination_has_every_seed():
  found = grid.points(['NUM_EXPERTS=2,4', 'router.k=1, 2'], [7, 8])
  assert [point.bindings for point in found] == [
    [f'NUM_EXPERTS={n}', f'router.k={k}', f'SEED={seed}']
    for n in (2, 4)
    for k in (1, 2)
    for seed in (7, 8)
  ]
  (alone,) = grid.points([], [0])
  assert alone.bindings == ['SEED=0'] and alone.name == 'seed 0'


@pytest.mark.parametrize(
  'text,values',
  [
    ('2', ['2']),
    ("'a,b',{'c': (1, 2)}", ["'a,b'", "{'c': (1, 2)}"]),
    ('(0,),[1, (2, 3)]', ['(0,)', '[1, (2, 3)]']),
    ('"(",2', ['"("', '2']),
  ],
)
def test_commas_inside_brackets_and_quotes_part_nothing(text, values):
  assert grid.split(text) == values


@pytest.mark.parametrize(
  'axes,message',
  [
    (['A=1', 'A=2'], '--grid.A is there twice'),
    (['SEED=1,2'], '--grid.SEED: seeds are --seeds=N'),
    (['MODEL_DIR=a'], '--grid.MODEL_DIR: a sweep says where'),
    (['A='], '--grid.A= must have values, each once'),
    (['A=1,,2'], 'must have values, each once'),
    (['A=1,2,1'], 'must have values, each once'),
  ],
)
def test_wrong_grids(axes, message):
  with pytest.raises(ValueError, match=message):
    grid.points(axes, [0])


def test_a_digest_is_of_all_that_a_run_is_a_function_of(monkeypatch):
  text = "A = 3\nMODEL_DIR = 'x'\nB = 4\n"
  ours = digest(identity.configuration(text), {'task': 'a'})
  assert len(ours) == 12
  moved = identity.configuration(text.replace("'x'", "'elsewhere'"))
  assert digest(moved, {'task': 'a'}) == ours
  others = {
    digest(identity.configuration(text), {'task': 'b'}),
    digest(identity.configuration('A = 2\nB = 4\n'), {'task': 'a'}),
  }
  monkeypatch.setattr(identity, 'code', lambda: 'other')
  others.add(digest(moved, {'task': 'a'}))
  assert len(others | {ours}) == 4


def test_a_digest_is_of_files_and_modules_that_values_name(
  tmp_path, python_folder
):
  file, module = tmp_path / 'words.model', python_folder / 'my_router.py'
  file.write_text('a')
  module.write_text('K = 1\n')
  importlib.import_module('my_router')
  text = f"import my_router\nFILES = {{'train': ('{file}',)}}\n"
  digests = [digest(text, {})]
  file.write_text('b')
  digests.append(digest(text, {}))
  module.write_text('K = 2\n')
  digests.append(digest(text, {}))
  step = tmp_path / 'teacher/checkpoints/3'
  step.mkdir(parents=True)
  (step / 'commit_success.txt').touch()
  (step / 'checksums.json').write_text('{}')
  text += f"TEACHER = '{tmp_path / 'teacher'}'\n"
  digests.append(digest(text, {}))
  (step / 'checksums.json').write_text('{"params/x": {}}')
  digests.append(digest(text, {}))
  assert len(set(digests)) == 5
  assert identity.inputs(text, {}) == identity.inputs(f'A = 1\n{text}', {})
  assert identity.inputs(text, {}) != identity.inputs(text, {'task': 'b'})
  assert digest(text, {}) == digests[-1]
