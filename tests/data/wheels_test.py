"""Corpora of wheels made for the purpose, fetched by pip from a folder."""

import csv
import hashlib
import re
import subprocess
import sys
import zipfile

import command
import pytest
from paths import ROOT

from sparse_experts.data import corpus, wheels

LONG = 'words of some length' * 6


def _wheel(folder, project, package, files):
  """Makes a wheel of files by name; returns its row of the list."""
  path = folder / f'{project}-1.0-py3-none-any.whl'
  info = f'{project}-1.0.dist-info'
  files = {f'{package}/{name}': text for name, text in files.items()} | {
    # As it is never installed, the last is no reason to refuse it.
    f'{info}/METADATA': 'Metadata-Version: 2.1\n'
    f'Name: {project}\nVersion: 1.0\nRequires-Python: <3\n',
    f'{info}/WHEEL': 'Wheel-Version: 1.0\nTag: py3-none-any\n',
    f'{info}/RECORD': '',
    'build/copy.py': f'"""{LONG} of what is not the package."""',
  }
  with zipfile.ZipFile(path, 'w') as archive:
    for name, text in files.items():
      archive.writestr(name, text)
  data = path.read_bytes()
  sha256 = hashlib.sha256(data).hexdigest()
  size = 'large' if package == 'gamma' else 'small'
  return (size, package, path.name, len(data), 'MIT', sha256)


@pytest.fixture
def index(tmp_path, monkeypatch):
  """A folder that pip takes three pinned wheels from, and an empty cache."""
  folder = tmp_path / 'index'
  folder.mkdir()
  rows = [
    _wheel(
      folder,
      'project_alpha',
      'alpha',
      {
        '__init__.py': f'"""{LONG} of alpha."""',
        'sub/deep.py': f'def f():\n  """{LONG} of a function."""',
        'sub/tests/deep_test.py': f'"""{LONG} of a test."""',
        'test_it.py': f'"""{LONG} of another test."""',
        'data.txt': LONG,
      },
    ),
    _wheel(folder, 'nltk', 'nltk', {'__init__.py': f'"""{LONG} of nltk."""'}),
    _wheel(
      folder,
      'gamma',
      'gamma',
      {
        '__init__.py': f'"""{LONG} of alpha."""',
        'more.py': f'"""{LONG} of gamma."""',
      },
    ),
  ]
  with (tmp_path / 'list.csv').open('w', newline='') as file:
    writer = csv.writer(file)
    writer.writerow(('size', 'domain', 'file', 'bytes', 'licence', 'sha256'))
    writer.writerows(rows)
  monkeypatch.setattr(wheels, 'LIST', corpus.epath.Path(tmp_path / 'list.csv'))
  monkeypatch.setattr(wheels, 'DIGESTS', dict.fromkeys(wheels.DIGESTS))
  monkeypatch.setenv('SPARSE_EXPERTS_CACHE', str(tmp_path / 'cache'))
  monkeypatch.setenv('PIP_NO_INDEX', '1')
  monkeypatch.setenv('PIP_FIND_LINKS', str(folder))
  return folder


def _names(name):
  return {d['name'] for s in corpus.SPLITS for d in corpus.documents(s, name)}


def test_wheels_are_fetched_once_and_their_packages_harvested(
  index, monkeypatch, capfd
):
  loaded = corpus.fetch('small')
  assert 'fetching 2 wheels' in capfd.readouterr().err
  assert loaded.versions == {'alpha': '1.0', 'nltk': '1.0'}
  # No tests, nothing of other folders.
  assert _names('small') == {'alpha', 'alpha.sub.deep.f', 'nltk'}
  assert loaded.counts['out_of_domain'] == {'nltk': 1}
  # The large one fetches what it has more; of equal texts the first stays.
  corpus.fetch('large')
  assert 'fetching 1 wheels' in capfd.readouterr().err
  assert _names('large') == {*_names('small'), 'gamma.more'}
  # From then on nobody asks pip, even if the wheels are gone.
  monkeypatch.setattr(sys, 'executable', 'no python')
  assert corpus.fetch('small') == loaded
  for path in corpus.wheel_folder().iterdir():
    path.unlink()
  assert corpus.fetch('small') == corpus.load('small') == loaded


def test_without_its_wheels_a_corpus_says_how_to_get_it(index, tmp_path):
  with pytest.raises(FileNotFoundError) as error:
    corpus.load('large')
  assert re.search(
    r'the large .* is not here: `python -m sparse_experts corpus large` .*'
    r'\(3 wheels, 0 MB, into .*\); without a package index .*docs_installed_',
    str(error.value),
  )
  assert not (tmp_path / 'cache').exists()


def test_a_cache_that_cannot_be_written_is_noticed_before_the_fetch(
  index, tmp_path, monkeypatch
):
  (tmp_path / 'file').touch()
  monkeypatch.setenv('SPARSE_EXPERTS_CACHE', str(tmp_path / 'file' / 'cache'))
  outcome = command.run('corpus')
  assert outcome.code == 2
  (error,) = outcome.stderr.splitlines()
  assert 'file/cache/wheels cannot be written (Not a directory): free' in error
  assert error.endswith('SPARSE_EXPERTS_CACHE.')


def test_without_an_index_the_command_says_so_in_one_line(index, tmp_path):
  (index / 'nltk-1.0-py3-none-any.whl').unlink()
  outcome = command.run('corpus')
  assert outcome.code == 2
  fetching, error = outcome.stderr.splitlines()
  assert fetching.startswith('fetching 2 wheels')
  assert re.search('pip could not .*nltk==1.0.*docs_installed_span', error)
  assert not (tmp_path / 'cache').exists()


def test_another_wheel_of_that_name_is_not_fetched(index, tmp_path):
  with zipfile.ZipFile(index / 'nltk-1.0-py3-none-any.whl', 'a') as archive:
    archive.writestr('nltk/more.py', '')
  with pytest.raises(FileNotFoundError, match='pip could not .*HASH|hash'):
    corpus.fetch()
  assert not (tmp_path / 'cache').exists()


def test_a_damaged_wheel_is_one_line_that_names_it(index):
  corpus.wheel_folder().mkdir(parents=True)
  for path in index.iterdir():
    (corpus.wheel_folder() / path.name).write_bytes(path.read_bytes()[:-1])
  outcome = command.run('corpus')
  assert outcome.code == 2 and outcome.stderr.count('\n') == 1
  path = corpus.wheel_folder() / 'project_alpha-1.0-py3-none-any.whl'
  assert f'{path} is damaged or another wheel' in outcome.stderr
  assert 'delete it' in outcome.stderr
  path.unlink()
  (corpus.wheel_folder() / 'nltk-1.0-py3-none-any.whl').unlink()
  assert command.run('corpus').code == 0


def test_a_harvest_that_is_not_the_pinned_one_is_refused(
  index, tmp_path, monkeypatch
):
  digest = corpus.fetch().digest
  monkeypatch.setitem(wheels.DIGESTS, 'small', digest)
  assert corpus.load().digest == digest
  monkeypatch.setitem(wheels.DIGESTS, 'small', 'another')
  with pytest.raises(ValueError, match=f'digest {digest}.*pinned one .another'):
    corpus.load()
  left = {path.name for path in (tmp_path / 'cache').iterdir()}
  assert not [name for name in left if re.match('corpus-.*\\.', name)]


def test_processes_may_fetch_at_once(index, tmp_path):
  code = (
    'from sparse_experts.data import corpus, wheels;'
    f'wheels.LIST = corpus.epath.Path({str(tmp_path / "list.csv")!r});'
    'wheels.fetch(wheels.pinned("small"), corpus.wheel_folder())'
  )
  processes = [
    subprocess.Popen([sys.executable, '-c', code], cwd=ROOT) for _ in range(2)
  ]
  assert [process.wait() for process in processes] == [0, 0]
  found, folder = wheels.pinned('small'), corpus.wheel_folder()
  wheels.check('small', found, folder)
  assert len([*folder.iterdir()]) == len(found) == 2


def test_a_dry_run_says_what_would_be_fetched(index, tmp_path):
  outcome = command.run('corpus', 'large', '--dry_run')
  assert outcome.code == 0 and outcome.stdout.startswith('3 wheels, 0 MB')
  assert not (tmp_path / 'cache').exists()


def test_the_list_is_within_its_limits():
  for name, most in (('small', 40e6), ('large', 150e6)):
    found = wheels.pinned(name)
    assert sum(wheel.bytes for wheel in found) <= most
    assert len({wheel.domain for wheel in found}) == len(found)
    assert corpus.OUT_OF_DOMAIN in corpus.domains(name)
    for wheel in found:
      assert wheel.file.endswith('-none-any.whl') and len(wheel.sha256) == 64
      assert wheel.licence
  assert wheels.pinned('large')[:24] == wheels.pinned('small')


@pytest.mark.parametrize('name', ['small', 'large'])
def test_gin_files_say_how_many_packages_there_are(name):
  prefix = f'docs_{name}' if name == 'large' else 'docs'
  files = [
    path
    for path in (ROOT / 'gin/tasks').glob(f'{prefix}_*.gin')
    if ('docs_large' in path.name) == (name == 'large')
  ]
  counts = {
    int(found)
    for path in files
    for found in re.findall(r'^NUM_TASKS = (\d+)', path.read_text(), re.M)
  }
  assert files and counts == {len(corpus.domains(name))}


def test_the_page_lists_the_wheels():
  page = (ROOT / 'docs/corpus.md').read_text()
  for wheel in wheels.pinned('large'):
    row = (
      f'| {wheel.domain} | {wheel.project} {wheel.version} | {wheel.licence} | '
      f'{wheel.bytes / 1e6:.1f} |'
    )
    assert row in page, row
  for digest in wheels.DIGESTS.values():
    assert digest in page
