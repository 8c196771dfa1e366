"""The examples in docstrings run, and print what they say."""

import doctest
import importlib
import pkgutil

import pytest

import sparse_experts

# All but those that read data, which need TensorFlow and files, or need T5X.
MODULES = [
  module.name
  for module in pkgutil.walk_packages(
    sparse_experts.__path__, 'sparse_experts.'
  )
  if not module.name.startswith(
    ('sparse_experts.data', 'sparse_experts.t5x_adapter', 'sparse_experts.__')
  )
]


def examples(name):
  module = importlib.import_module(name)
  return [
    test for test in doctest.DocTestFinder().find(module) if test.examples
  ]


@pytest.mark.parametrize('name', MODULES)
def test_examples(name):
  for test in examples(name):
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    output = []
    runner.run(test, out=output.append)
    assert not runner.failures, ''.join(output)


def test_there_are_examples():
  found = {name: len(examples(name)) for name in MODULES}
  assert found['sparse_experts.moe.routers.top_k'] == 2
