"""Corpora of tiny packages made for the purpose, and the real one.

The packages are installed; wheels_test.py has wheels.
"""

import json
import pathlib
import subprocess
import sys
import threading

import pytest

from sparse_experts.data import corpus, installed, wheels
from sparse_experts.data.tasks import docs

# 20 characters, so that six of them make a document.
LONG = 'words of some length' * 6

ALPHA = f'''
"""{LONG} of the module."""

class Shape:
  """{LONG} of the class.

  Args:
    indented: it is.
  """

  def area(self):
    """Too short."""

  def name(self):
    """{LONG} of the method."""

if True:
  def nested():
    """{LONG} of the method."""
'''


def _install(site: pathlib.Path, package: str, version: str, source: str):
  (site / package).mkdir(parents=True)
  (site / package / '__init__.py').write_text(source)
  info = site / f'{package}-{version}.dist-info'
  info.mkdir()
  (info / 'METADATA').write_text(f'Name: {package}\nVersion: {version}\n')
  (info / 'top_level.txt').write_text(package)


@pytest.fixture
def site(tmp_path, monkeypatch):
  """A site folder with two packages, and an empty cache beside it."""
  site = tmp_path / 'site'
  _install(site, 'alpha', '1.0', ALPHA)
  _install(site, 'beta', '2.0', f'"""{LONG} of another subject."""')
  monkeypatch.syspath_prepend(str(site))
  monkeypatch.setenv('SPARSE_EXPERTS_CACHE', str(tmp_path / 'cache'))
  monkeypatch.setattr(installed, 'PACKAGES', ('alpha', 'beta', 'not_installed'))
  monkeypatch.setattr(corpus, 'OUT_OF_DOMAIN', 'beta')
  return site


def _all_documents():
  return {
    d['name']: d
    for s in corpus.SPLITS
    for d in corpus.documents(s, 'installed')
  }


def test_documents_are_docstrings_without_short_ones_and_duplicates(site):
  documents = _all_documents()
  # Not `Shape.area` (short), not `nested` (same text as `Shape.name`).
  assert set(documents) == {'alpha', 'alpha.Shape', 'alpha.Shape.name', 'beta'}
  assert documents['alpha.Shape']['text'] == (
    f'{LONG} of the class.\n\nArgs:\n  indented: it is.'
  )
  assert documents['alpha.Shape']['domain'] == 'alpha'


def test_held_out_package_is_out_of_domain_and_nothing_else_is(site):
  assert [
    d['name'] for d in corpus.documents('out_of_domain', 'installed')
  ] == ['beta']
  loaded = corpus.load('installed')
  assert loaded.counts['out_of_domain'] == {'beta': 1}
  in_domain = [loaded.counts[s] for s in corpus.SPLITS[:3]]
  assert sum(c.get('alpha', 0) for c in in_domain) == 3
  assert not any('beta' in c for c in in_domain)


def test_variants_of_one_text_share_a_split():
  texts = [
    f'Opening paragraph {i}.\n\nVariant {j}' for i in range(300) for j in 'ab'
  ]
  splits = [corpus.Document(t, 'alpha', '').split for t in texts]
  assert splits[::2] == splits[1::2]
  # 300 texts: 288, 6 and 6 expected; four standard deviations are 13.6 and 9.7.
  assert abs(splits[::2].count('train') - 288) < 14
  assert 0 < splits[::2].count('validation') < 16
  assert 0 < splits[::2].count('test') < 16


def test_equal_packages_give_equal_digests_and_a_new_version_a_new_folder(
  site, tmp_path, monkeypatch
):
  first = corpus.load('installed')
  monkeypatch.setenv('SPARSE_EXPERTS_CACHE', str(tmp_path / 'elsewhere'))
  again = corpus.load('installed')
  assert first.digest == again.digest
  assert first.path.name == again.path.name
  assert first.path != again.path

  (site / 'beta-2.0.dist-info').rename(site / 'beta-2.1.dist-info')
  metadata = site / 'beta-2.1.dist-info' / 'METADATA'
  metadata.write_text('Name: beta\nVersion: 2.1\n')
  assert corpus.load('installed').path.name != first.path.name
  assert corpus.load('installed').versions == {'alpha': '1.0', 'beta': '2.1'}


def test_cache_folder_follows_the_environment(tmp_path, monkeypatch):
  monkeypatch.delenv('SPARSE_EXPERTS_CACHE', raising=False)
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'xdg'))
  assert corpus._cache() == tmp_path / 'xdg' / 'sparse_experts'
  monkeypatch.setenv('SPARSE_EXPERTS_CACHE', str(tmp_path / 'own'))
  assert corpus._cache() == tmp_path / 'own'


def test_no_package_is_an_error_with_a_remedy(site, monkeypatch):
  monkeypatch.setattr(installed, 'PACKAGES', ('not_installed',))
  with pytest.raises(FileNotFoundError, match='pip install'):
    corpus.load('installed')


def test_no_documents_is_an_error_and_leaves_nothing(site, tmp_path):
  for package in ('alpha', 'beta'):
    (site / package / '__init__.py').write_text('x = 1\n')
  with pytest.raises(FileNotFoundError, match='no docstrings found'):
    corpus.load('installed')
  assert not (tmp_path / 'cache').exists()


def test_damage_is_an_error_that_names_the_folder(site):
  loaded = corpus.load('installed')
  file = loaded.files['train']
  whole = file.read_bytes()
  file.write_bytes(whole[:-1])
  with pytest.raises(ValueError, match='damaged') as error:
    corpus.load('installed')
  assert str(loaded.path) in str(error.value)
  assert f'{len(whole) - 1} bytes instead of {len(whole)}' in str(error.value)
  file.write_bytes(whole)
  assert corpus.load('installed') == loaded
  (loaded.path / 'corpus.json').write_text('{"digest": ')
  with pytest.raises(ValueError, match='no valid corpus'):
    corpus.load('installed')
  (loaded.path / 'corpus.json').write_text('{"digest": "a"}')
  with pytest.raises(ValueError, match='no valid corpus'):
    corpus.load('installed')


def test_a_flipped_bit_in_the_documents_is_named(site):
  source = docs.DocumentSource('installed')
  file = pathlib.Path(source.list_shards('train')[0])
  whole = bytearray(file.read_bytes())
  whole[len(whole) // 2] ^= 1
  file.write_bytes(whole)
  with pytest.raises(ValueError, match='train.tfrecord.* delete the folder'):
    source.get_dataset('train')


def test_failure_while_writing_leaves_nothing(site, tmp_path, monkeypatch):
  def full_disk(*_):
    raise OSError('no space left on device')

  monkeypatch.setattr(corpus.json, 'dumps', full_disk)
  folder = corpus.epath.Path(tmp_path / 'cache' / 'corpus')
  with pytest.raises(OSError, match='no space'):
    corpus._write(corpus._of_installed, {}, folder)
  assert not (tmp_path / 'cache').exists()


def test_a_cache_that_cannot_be_written_is_noticed_before_the_harvest(
  site, tmp_path, monkeypatch, capsys
):
  (tmp_path / 'file').touch()
  monkeypatch.setenv('SPARSE_EXPERTS_CACHE', str(tmp_path / 'file' / 'cache'))
  with pytest.raises(OSError, match='cannot be written .Not a directory'):
    corpus.load('installed')
  assert 'harvesting' not in capsys.readouterr().err


def test_threads_that_race_agree_and_leave_one_folder(site, tmp_path):
  loaded = []
  threads = [
    threading.Thread(target=lambda: loaded.append(corpus.load('installed')))
    for _ in range(4)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(loaded) == 4
  assert len({c.digest for c in loaded}) == 1
  assert [f.name for f in (tmp_path / 'cache').iterdir()] == [
    loaded[0].path.name
  ]


def test_processes_that_race_agree_and_leave_one_folder(site, tmp_path):
  script = (
    'from sparse_experts.data import corpus, installed;'
    'installed.PACKAGES = ("alpha", "beta");'
    'corpus.OUT_OF_DOMAIN = "beta";'
    'print(corpus.load("installed").digest)'
  )
  root = str(pathlib.Path(corpus.__file__).parents[2])
  processes = [
    subprocess.Popen(
      [sys.executable, '-c', script],
      stdout=subprocess.PIPE,
      env=corpus.os.environ | {'PYTHONPATH': f'{site}:{root}'},
      text=True,
    )
    for _ in range(2)
  ]
  digests = [process.communicate()[0] for process in processes]
  assert [process.returncode for process in processes] == [0, 0]
  assert digests[0] == digests[1] == corpus.load('installed').digest + '\n'
  assert len(list((tmp_path / 'cache').iterdir())) == 1


def test_loading_a_cached_corpus_imports_no_tensorflow(site):
  corpus.load('installed')
  script = (
    'import sys;'
    'from sparse_experts.data import corpus, installed;'
    'installed.PACKAGES = ("alpha", "beta");'
    'corpus.OUT_OF_DOMAIN = "beta";'
    'corpus.load("installed");'
    'print("tensorflow" in sys.modules)'
  )
  root = str(pathlib.Path(corpus.__file__).parents[2])
  printed = subprocess.check_output(
    [sys.executable, '-c', script],
    env=corpus.os.environ | {'PYTHONPATH': f'{site}:{root}'},
    text=True,
  )
  assert printed == 'False\n'


def _is_as_pinned(name):
  loaded = corpus.load(name)
  assert loaded.digest == wheels.DIGESTS[name]
  domains = [loaded.counts[split] for split in corpus.SPLITS]
  assert set().union(*domains) == set(corpus.domains(name))
  assert set(loaded.counts['out_of_domain']) == {corpus.OUT_OF_DOMAIN}
  assert not any(corpus.OUT_OF_DOMAIN in counts for counts in domains[:3])
  description = json.loads((loaded.path / 'corpus.json').read_text())
  assert description['digest'] == loaded.digest
  return {
    document['text']: split
    for split in corpus.SPLITS
    for document in corpus.documents(split, name)
  }


def test_the_small_corpus_is_as_pinned():
  splits = _is_as_pinned('small')
  assert 20e6 < sum(map(len, splits)) < 25e6
  assert list(splits.values()).count('out_of_domain') > 2000


def test_the_large_corpus_is_as_pinned_and_has_the_small_one():
  if corpus.to_fetch('large'):
    pytest.skip('not here: `python -m sparse_experts corpus large` fetches it')
  splits = _is_as_pinned('large')
  assert sum(map(len, splits)) > 60e6
  for split in corpus.SPLITS:
    for document in corpus.documents(split):
      assert splits[document['text']] == split


@pytest.mark.slow
def test_the_small_corpus_is_harvested_as_pinned(tmp_path, monkeypatch):
  there = corpus.wheel_folder()
  if wheels.missing(wheels.pinned('small'), there):
    pytest.skip('only its harvest is here, not its wheels')
  monkeypatch.setenv('SPARSE_EXPERTS_CACHE', str(tmp_path))
  (tmp_path / 'wheels').symlink_to(there)
  assert corpus.load().digest == wheels.DIGESTS['small']
