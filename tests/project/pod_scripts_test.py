"""The scripts that start pods: what they would run, and what they refuse."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from paths import ROOT

SCRIPTS = ROOT / 'scripts'
POD = SCRIPTS / 'tpu_pod.sh'
JOBSET = SCRIPTS / 'gke_jobset.sh'
TPU = 'gcloud compute tpus tpu-vm'
POD_VARIABLES = {
  'PROJECT': 'p',
  'ZONE': 'us-central2-b',
  'NAME': 'switch',
  'ACCELERATOR': 'v4-8',
  'BUCKET': 'gs://b',
}
JOB_VARIABLES = {
  'NAME': 'switch',
  'IMAGE': 'registry/image',
  'TPU': 'tpu-v5p-slice',
  'TOPOLOGY': '2x2x2',
  'HOSTS': '2',
  'CHIPS_PER_HOST': '4',
  'BUCKET': 'gs://b',
}


def bash(script, *arguments, **variables) -> subprocess.CompletedProcess:
  path = {'PATH': os.environ['PATH'], 'HOME': os.environ.get('HOME', '/')}
  return subprocess.run(
    ['bash', str(script), *arguments],
    env={**path, **variables},
    capture_output=True,
    text=True,
    timeout=60,
  )


def dry_run(*arguments) -> list[str]:
  outcome = bash(POD, '--dry_run', *arguments, **POD_VARIABLES)
  assert (outcome.returncode, outcome.stderr) == (0, '')
  return outcome.stdout.splitlines()


@pytest.mark.parametrize('script', [POD, JOBSET], ids=lambda p: p.name)
def test_scripts_are_sound(script):
  assert os.access(script, os.X_OK)
  checked = subprocess.run(['bash', '-n', script], capture_output=True)
  assert checked.returncode == 0, checked.stderr
  shellcheck = pathlib.Path(sys.executable).parent / 'shellcheck'
  found = shellcheck if shellcheck.exists() else shutil.which('shellcheck')
  if found:
    checked = subprocess.run([found, script], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_dry_run_prints_every_command():
  where = '--project=p --zone=us-central2-b'
  assert dry_run('create') == [
    f'{TPU} create switch {where} --accelerator-type=v4-8 '
    '--version=tpu-ubuntu2204-base'
  ]
  (install,) = dry_run('install')
  assert install.startswith(f'{TPU} ssh switch {where} --worker=all ')
  assert 'pip install --quiet sparse_experts jax[tpu]' in install
  (run,) = dry_run('run', 'train', '--gin_file=a.gin')
  assert run == (
    f"{TPU} ssh switch {where} --worker=all '--command="
    'TFDS_DATA_DIR=gs://b/tensorflow_datasets env/bin/python -m sparse_experts '
    "train --gin_file=a.gin --coordinator=auto --gin.MODEL_DIR=gs://b/switch'"
  )
  assert dry_run('delete') == [f'{TPU} delete switch {where} --quiet']
  resumed = dry_run('resume', 'train', '--gin_file=a.gin')
  commands = [line for line in resumed if not line.startswith('#')]
  verbs = [command.split()[4] for command in commands]
  assert verbs == ['describe', 'delete', 'create', 'ssh', 'ssh']
  assert commands[-1] == run


def test_words_with_spaces_arrive_as_one(tmp_path):
  """What is typed here is what a worker's shell makes of it."""
  (run,) = dry_run('run', 'train', "--gin.MESH={'data': 1, 'model': 4}")
  fake = tmp_path / 'gcloud'
  fake.write_text('#!/bin/bash\nprintf "%s\\n" "${@: -1}"\n')
  fake.chmod(0o755)
  typed = subprocess.run(
    ['bash', '-c', run],
    env={'PATH': f'{tmp_path}:{os.environ["PATH"]}'},
    capture_output=True,
    text=True,
  ).stdout.removeprefix('--command=')
  words = typed.replace('env/bin/python', 'printf "[%s]"')
  seen = subprocess.run(['bash', '-c', words], capture_output=True, text=True)
  assert "[--gin.MESH={'data': 1, 'model': 4}]" in seen.stdout


def test_resume_makes_a_preempted_pod_anew(tmp_path):
  """A gcloud of which the first run is preempted, though it ends well."""
  fake = tmp_path / 'gcloud'
  fake.write_text(f"""#!/bin/bash
cd {tmp_path}
echo "$4 $*" >> log
case $4 in
  describe) cat state 2> /dev/null || exit 1 ;;
  create) echo READY > state ;;
  delete) rm state ;;
  ssh)
    case $* in
      *train*)
        if [ ! -e ran ]; then
          touch ran
          echo PREEMPTED > state
        fi ;;
    esac ;;
esac
""")
  fake.chmod(0o755)
  outcome = bash(
    POD,
    *('resume', 'train', '--gin_file=a.gin'),
    **{**POD_VARIABLES, 'RETRY_SECONDS': '0'},
    PATH=f'{tmp_path}:{os.environ["PATH"]}',
  )
  assert (outcome.returncode, outcome.stderr) == (0, '')
  log = (tmp_path / 'log').read_text().splitlines()
  verbs = [line.split()[0] for line in log if not line.startswith('describe')]
  once = ['create', 'ssh', 'ssh']  # Make, install, train.
  assert verbs == [*once, 'delete', *once]


@pytest.mark.parametrize(
  'arguments, variables, words',
  [
    (['fly'], POD_VARIABLES, "no command 'fly'"),
    (['create'], {}, 'PROJECT is not set'),
    (['run'], POD_VARIABLES, 'takes a command'),
    (['run', 'train'], {**POD_VARIABLES, 'BUCKET': '/tmp'}, 'gs://'),
  ],
)
def test_mistakes_are_one_line(arguments, variables, words):
  outcome = bash(POD, '--dry_run', *arguments, **variables)
  assert (outcome.returncode, outcome.stdout) == (2, '')
  assert outcome.stderr.count('\n') == 1 and words in outcome.stderr


def manifest(*arguments) -> dict:
  outcome = bash(JOBSET, '--dry_run', *arguments, **JOB_VARIABLES)
  assert (outcome.returncode, outcome.stderr) == (0, '')
  assert '${' not in outcome.stdout.replace('${stopped:-}', '')
  return yaml.safe_load(outcome.stdout)


def test_manifest_is_filled_in():
  filled = manifest('train', '--gin_file=a.gin')
  assert (filled['kind'], filled['metadata']['name']) == ('JobSet', 'switch')
  job = filled['spec']['replicatedJobs'][0]['template']['spec']
  assert (job['parallelism'], job['completions']) == (2, 2)
  pod = job['template']['spec']
  assert pod['nodeSelector'] == {
    'cloud.google.com/gke-tpu-accelerator': 'tpu-v5p-slice',
    'cloud.google.com/gke-tpu-topology': '2x2x2',
  }
  (container,) = pod['containers']
  assert container['resources']['limits'] == {'google.com/tpu': 4}
  (script,) = container['args']
  assert 'sparse_experts train --gin_file=a.gin ' in script
  assert '--coordinator=auto --gin.MODEL_DIR=gs://b/switch' in script
  template = (SCRIPTS / 'gke_jobset.yaml').read_text()
  assert yaml.safe_load(template)['kind'] == 'JobSet'
  missing = {**JOB_VARIABLES}
  del missing['IMAGE']
  outcome = bash(JOBSET, '--dry_run', 'train', **missing)
  assert outcome.returncode == 2 and 'IMAGE is not set' in outcome.stderr


@pytest.mark.parametrize('stop, code', [(False, 3), (True, 143)])
def test_a_stopped_pod_asks_to_be_started_again(tmp_path, stop, code):
  """The run in a pod ends well on SIGTERM; the pod must not."""
  pod = manifest('train')['spec']['replicatedJobs'][0]['template']['spec']
  (container,) = pod['template']['spec']['containers']
  fake = tmp_path / 'python'
  fake.write_text("""#!/bin/bash
trap 'echo saved; exit 0' TERM
echo started
for _ in $(seq 100); do [ -n "$STOP" ] || exit 3; sleep 0.1; done
""")
  fake.chmod(0o755)
  process = subprocess.Popen(
    [*container['command'], *container['args']],
    env={
      'PATH': f'{tmp_path}:{os.environ["PATH"]}',
      'STOP': 'x' if stop else '',
    },
    stdout=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == 'started\n'
  if stop:
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
  rest, _ = process.communicate(timeout=30)
  assert (process.returncode, rest) == (code, 'saved\n' if stop else '')
