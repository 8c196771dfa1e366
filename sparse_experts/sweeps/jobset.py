"""A run as a Kubernetes JobSet that Kueue queues, for more than one machine."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import shlex
from collections.abc import Mapping, Sequence

import yaml
from etils import epath

from sparse_experts import storage

_SCRIPT = """\
{command} &
run=$!
trap 'stopped=1; kill -TERM $run' TERM
wait $run
code=$?
if [ -n "${{stopped:-}}" ]; then
  wait $run
  exit 143  # Of a node that is taken away: the job starts again, and goes on.
fi
exit $code
"""


@dataclasses.dataclass(frozen=True)
class Slice:
  """Where each run of a sweep is to run.

  Attributes:
    image: of a container that has this package.
    queue: Kueue's, of the cluster's namespace.
    tpu: the accelerator, as GKE names it: 'tpu-v5p-slice'.
    topology: of its chips, such as '2x2x1'.
    hosts: of the slice, one pod on each.
    chips_per_host: of the slice.
    service_account: of its pods, such as one that may write a bucket.
  """

  image: str
  queue: str
  tpu: str
  topology: str
  hosts: int = 1
  chips_per_host: int = 4
  service_account: str | None = None

  def __post_init__(self):
    try:
      chips = math.prod(map(int, self.topology.split('x')))
    except ValueError:
      raise ValueError(
        f"--tpu_topology={self.topology} must be like '2x2x1'."
      ) from None
    if chips != self.hosts * self.chips_per_host:
      raise ValueError(
        f'--tpu_topology={self.topology} has {chips} chips, but --hosts='
        f'{self.hosts} of --chips_per_host={self.chips_per_host} have '
        f'{self.hosts * self.chips_per_host}; make them equal.'
      )


def manifest(name: str, arguments: Sequence[str], of: Slice) -> str:
  """The YAML of one run.

  Args:
    name: of the run, of letters, digits and dashes.
    arguments: of `python -m sparse_experts`; all pods find each other.
    of: where it runs.

  References:
    JobSet, https://jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2/; Kueue,
    https://kueue.sigs.k8s.io/docs/tasks/run/jobsets/.
  """
  words = ['python', '-m', 'sparse_experts', *arguments, '--coordinator=auto']
  chips = {'google.com/tpu': of.chips_per_host}
  container = {
    'name': 'sparse-experts',
    'image': of.image,
    'command': ['bash', '-c'],
    'args': [_SCRIPT.format(command=shlex.join(words))],
    'resources': {'requests': chips, 'limits': dict(chips)},
  }
  account = (
    {'serviceAccountName': of.service_account} if of.service_account else {}
  )
  pod = {
    'restartPolicy': 'Never',
    **account,
    'terminationGracePeriodSeconds': 300,
    'nodeSelector': {
      'cloud.google.com/gke-tpu-accelerator': of.tpu,
      'cloud.google.com/gke-tpu-topology': of.topology,
    },
    'containers': [container],
  }
  job = {
    'parallelism': of.hosts,
    'completions': of.hosts,
    'backoffLimit': 0,
    'template': {'spec': pod},
  }
  return yaml.safe_dump(
    {
      'apiVersion': 'jobset.x-k8s.io/v1alpha2',
      'kind': 'JobSet',
      'metadata': {
        'name': name,
        'labels': {'kueue.x-k8s.io/queue-name': of.queue},
        'annotations': {
          'alpha.jobset.sigs.k8s.io/exclusive-topology': (
            'cloud.google.com/gke-nodepool'
          )
        },
      },
      'spec': {
        'suspend': True,  # Until Kueue admits it.
        'failurePolicy': {'maxRestarts': 100},
        'replicatedJobs': [
          {'name': 'slice', 'replicas': 1, 'template': {'spec': job}}
        ],
      },
    },
    sort_keys=False,
    explicit_start=True,  # So that files may follow one another in a stream.
  )


def write(
  folder: epath.PathLike, runs: Mapping[str, Sequence[str]], of: Slice
) -> list[epath.Path]:
  """Writes FOLDER/jobsets/RUN.yaml for each run; other files there go.

  Args:
    folder: of a sweep.
    runs: arguments of `python -m sparse_experts`, by name.
    of: where they run.
  """
  into = epath.Path(folder) / 'jobsets'
  into.mkdir(parents=True, exist_ok=True)
  # A cluster has a name once, and one run may lie in several folders.
  place = hashlib.sha256(str(folder).encode()).hexdigest()[:6]
  paths = []
  for name, arguments in runs.items():
    paths.append(into / f'{name}.yaml')
    text = manifest(f'run-{name}-{place}', arguments, of)
    storage.replace(paths[-1], text.encode())
  for path in set(into.glob('*.yaml')) - set(paths):
    path.unlink()
  return paths
