"""A version is said in one place, and other files say the same."""

import re

import yaml
from paths import ROOT

import sparse_experts


def read(file):
  return yaml.safe_load((ROOT / file).read_text())


def test_the_version_has_a_dated_section_and_a_citation():
  sections = re.findall(
    r'^## (\S+)(?: \((\S+)\))?$', (ROOT / 'CHANGELOG.md').read_text(), re.M
  )
  assert sections[0] == ('Unreleased', '')
  assert all(re.fullmatch(r'\d{4}-\d\d-\d\d', date) for _, date in sections[1:])
  citation = read('CITATION.cff')
  newest = (citation['version'], str(citation['date-released']))
  assert sections[1] == newest
  assert newest[0] == sparse_experts.__version__


def test_other_hosts_run_what_ci_runs():
  jobs = read('.github/workflows/tests.yml')['jobs']
  pythons = jobs['default']['strategy']['matrix']['python']
  oldest = re.search(
    r"python_requires='>=(.*?)'", (ROOT / 'setup.py').read_text()
  )
  assert pythons[0] == oldest[1]
  run = {
    name: [step['run'].split()[-1] for step in job['steps'] if 'run' in step]
    for name, job in jobs.items()
  }
  assert run == {'default': ['scripts/test.sh'], 'all': ['.ci/run']}
  (python,) = (
    step['with']['python-version']
    for step in jobs['all']['steps']
    if 'python-version' in step.get('with', {})
  )
  assert python == oldest[1]


def test_hooks_check_parts_that_there_are():
  import docs

  (hooks,) = (
    repo['hooks'] for repo in read('.pre-commit-config.yaml')['repos']
  )
  *_, entry = (hook['entry'] for hook in hooks)
  _, script, check, *parts = entry.split()
  assert (ROOT / script).exists() and check == '--check'
  assert {*parts} == {*docs.PARTS, *docs.FILES} - {'papers'}
