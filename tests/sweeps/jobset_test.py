"""A JobSet has the fields that its schema requires."""

import shlex

import pytest
import yaml

from sparse_experts.sweeps import jobset


def test_a_manifest():
  of = jobset.Slice('me/image', 'research', 'tpu-v5p-slice', '2x2x2', hosts=2)
  arguments = ['train', "--gin.TASK_FEATURE_LENGTHS={'inputs': 3}"]
  found = yaml.safe_load(jobset.manifest('run-a1', arguments, of))
  assert found['apiVersion'] == 'jobset.x-k8s.io/v1alpha2'
  assert found['kind'] == 'JobSet'
  assert found['metadata']['name'] == 'run-a1'
  labels = found['metadata']['labels']
  assert labels == {'kueue.x-k8s.io/queue-name': 'research'}
  (replicated,) = found['spec']['replicatedJobs']
  assert replicated['name'] and replicated['replicas'] == 1
  job = replicated['template']['spec']
  assert job['parallelism'] == job['completions'] == 2
  pod = job['template']['spec']
  assert pod['restartPolicy'] == 'Never'
  (container,) = pod['containers']
  assert container['image'] == 'me/image'
  chips = container['resources']
  assert chips['limits'] == chips['requests'] == {'google.com/tpu': 4}
  (script,) = container['args']
  words = shlex.split(script.splitlines()[0])
  assert words == [
    *('python', '-m', 'sparse_experts', *arguments, '--coordinator=auto', '&')
  ]


def test_manifests_may_follow_one_another():
  of = jobset.Slice('i', 'q', 't', '2x2', service_account='writer')
  text = ''.join(jobset.manifest(f'run-{i}', ['train'], of) for i in range(3))
  found = list(yaml.safe_load_all(text))
  assert [x['metadata']['name'] for x in found] == ['run-0', 'run-1', 'run-2']
  job = found[0]['spec']['replicatedJobs'][0]['template']['spec']
  assert job['template']['spec']['serviceAccountName'] == 'writer'


@pytest.mark.parametrize(
  'topology,message',
  [('4x4', 'has 16 chips, but --hosts=1 of'), ('small', 'must be like')],
)
def test_a_slice_has_the_chips_of_its_topology(topology, message):
  with pytest.raises(ValueError, match=message):
    jobset.Slice('i', 'q', 't', topology)
