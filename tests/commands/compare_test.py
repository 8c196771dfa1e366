"""compare: tables, a page, and what it refuses."""

import json

import browser
import command
import made_run
import pytest


@pytest.fixture
def sweep(tmp_path):
  """The folder of a sweep that has three runs, of which two have finished."""
  for name, n in (('a', 4), ('b', 8), ('c', 16)):
    made_run.write(
      tmp_path / 'sweep/runs' / name, (9.0, 9.0 / n, 8.0 / n), NUM_EXPERTS=n
    )
  lines = [json.dumps({'run': name}) for name in 'ab']
  (tmp_path / 'sweep/results.jsonl').write_text('\n'.join(lines) + '\n')
  return tmp_path / 'sweep'


def test_runs_of_a_sweep_side_by_side(sweep):
  outcome = command.run('compare', str(sweep))
  assert outcome.code == 0, outcome.stderr
  # It cannot count what is no model, and says so, once a group.
  left, *said = outcome.stderr.splitlines()
  assert left.startswith(f'{sweep}: 1 runs have not finished') and ': c' in left
  assert [line.partition(':')[0] for line in said] == [
    f'no FLOPs of NUM_EXPERTS={n}' for n in (4, 8)
  ]
  groups, configuration, differences = outcome.stdout.split('\n\n')
  assert groups.splitlines()[2:] == [
    'NUM_EXPERTS=4      1     20  2.0000',
    'NUM_EXPERTS=8      1     20  1.0000',
  ]
  assert configuration.splitlines()[2].split() == ['NUM_EXPERTS', '4', '8']
  rows = [line.split() for line in differences.splitlines()[2:]]
  assert [row[2:5] for row in rows] == [
    ['steps', '20', '-1'],
    ['seconds', '2.5', '-1.25'],  # 8 / 8 less 9 / 4, which is of step 10.
  ]


def test_json_and_a_page(sweep, tmp_path):
  pytest.importorskip('matplotlib')
  page = tmp_path / 'new/page.html'
  runs = [str(sweep / 'runs' / name) for name in 'cab']
  outcome = command.run('compare', *runs, f'--output={page}', '--json')
  assert outcome.code == 0, outcome.stderr
  found = json.loads(outcome.stdout)
  assert found['path'] == str(page)
  assert found['settings'] == {'NUM_EXPERTS': ['16', '4', '8']}
  assert [group['runs'] for group in found['groups']] == [[x] for x in runs]
  assert [
    (row['of'], row['minus'], row['equal'], row['difference'])
    for row in found['differences']
    if row['equal'] == 'steps'
  ] == [
    ('NUM_EXPERTS=4', 'NUM_EXPERTS=16', 'steps', 1.5),
    ('NUM_EXPERTS=8', 'NUM_EXPERTS=16', 'steps', 0.5),
  ]
  text = page.read_text()
  assert text.count('<figure>') == 2  # By steps and by seconds.
  assert '>NUM_EXPERTS=16<' in text and '+1.5' in text


@pytest.mark.slow
@browser.needs_browser
def test_a_browser_has_nothing_to_complain_of(sweep, tmp_path):
  pytest.importorskip('matplotlib')
  page = tmp_path / 'page.html'
  command.run('compare', str(sweep), f'--output={page}')
  opened = browser.open_page(page, tmp_path)
  assert not opened.console and not opened.requests
  assert 'NUM_EXPERTS=8' in opened.dom


def test_what_it_refuses(sweep, tmp_path):
  one = str(sweep / 'runs/a')
  for arguments, message in (
    ([one, str(tmp_path / 'none')], 'none has no metrics.jsonl'),
    ([one, '--output=page.pdf'], '--output=page.pdf must end in .html'),
    ([one, '--gin.SEED=1'], 'compare takes runs alone'),
    ([one, '--gin_file=gin/quickstart.gin'], 'compare takes runs alone'),
  ):
    outcome = command.run('compare', *arguments)
    assert outcome.code == 2
    assert message in outcome.stderr and outcome.stderr.count('\n') == 1
  outcome = command.run(
    'compare', one, f'--output={tmp_path}/x.html', '--dry_run'
  )
  assert outcome.code == 0 and not (tmp_path / 'x.html').exists()
  (sweep / 'results.jsonl').write_text('')
  outcome = command.run('compare', str(sweep))
  assert outcome.stderr.endswith(f'error: {sweep} has no finished run yet.\n')
  outcome = command.run('compare', one)  # Nothing to compare it with.
  assert outcome.code == 0 and 'difference' not in outcome.stdout
