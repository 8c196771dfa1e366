"""A JobSet has the fields that its schema requires."""

import shlex

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
