"""What T5X is given keeps its contract; needs no t5x. docs/t5x.md has it."""

import ast
import doctest
import functools
import pathlib

import clu.metrics
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from flax import traverse_util
from flax.linen import partitioning

from sparse_experts import sharding
from sparse_experts.models import sums as sums_module
from sparse_experts.models.balance_bias import update_biases
from sparse_experts.moe.routers.deepseek import BIAS, DeepSeek
from sparse_experts.t5x_adapter import metrics, variables
from sparse_experts.training.optimizers import ROLES

ADAPTER = pathlib.Path(variables.__file__).parent

# Leaves that T5X's decoding treats differently from all others.
SPECIAL = {'cache_index', 'cached_bias', 'position_embedder_index'}

E = 4


def make_loss_free(**arguments):
  return tiny_models.make_model(
    encoder=False,
    num_experts=E,
    make_router=functools.partial(
      DeepSeek, num_experts=E, k=2, scores='sigmoid', balance_bias=True
    ),
    loss_weights={},
    bias_rate=0.1,
    **arguments,
  )


MODELS = {
  'encoder_decoder': tiny_models.make_model,
  'decoder': functools.partial(tiny_models.make_model, encoder=False, k=2),
  'scanned': functools.partial(tiny_models.make_model, scan=True),
  'loss_free': make_loss_free,
}


def make(name):
  """A model, a batch, and T5X's collections of it, all abstract."""
  model = MODELS[name]()
  batch = tiny_models.make_batch(encoder=model.module.encoder is not None)

  def collections(key):
    loads = None
    if model.bias_rate:
      loads = {f'decoder/layers_{i}': jnp.zeros(E) for i in (1, 3)}
    return variables.collections(model.init(key, batch), loads, False)

  return model, batch, jax.eval_shape(collections, jax.random.key(0))


def flat(tree):
  return traverse_util.flatten_dict(tree, sep='/')


@pytest.mark.parametrize('name', MODELS)
def test_every_array_has_axes_that_have_rules(name):
  _, _, collections = make(name)
  for collection, tree in list(collections.items()):
    if collection.endswith('_axes'):
      continue
    names = flat(partitioning.get_axis_names(collections[f'{collection}_axes']))
    arrays = flat(tree)
    assert names.keys() == arrays.keys()
    for path, leaf in arrays.items():
      assert len(names[path]) == leaf.ndim, path
      assert set(names[path]) <= sharding.RULES.keys() & ROLES.keys(), path
  params = collections['params']
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


def test_what_has_no_gradient_is_not_a_parameter():
  model, batch, collections = make('loss_free')
  assert BIAS not in {
    path.split('/')[-1] for path in flat(collections['params'])
  }
  assert set(flat(collections[variables.STATE])) == {
    f'biases/decoder/layers_1/moe/router/{BIAS}',
    f'biases/decoder/layers_3/moe/router/{BIAS}',
    'chosen/decoder/layers_1',
    'chosen/decoder/layers_3',
    'calls',
  }
  # Nor is there any state where no router has any: T5X's own models then serve.
  assert set(make('decoder')[2]) == {'params', 'params_axes'}
  # Put together they are the model's parameters again.
  params = jax.eval_shape(model.init, jax.random.key(0), batch)
  names = sharding.names_of(params)
  joined = variables.join(
    collections['params'], {variables.STATE: collections[variables.STATE]}
  )
  assert jax.tree.structure(joined) == jax.tree.structure(
    names, is_leaf=lambda x: isinstance(x, tuple)
  )


def test_biases_move_once_a_step_by_the_load_of_all_its_microbatches():
  params = {'decoder': {'layers_1': {'router': {BIAS: jnp.zeros(3)}}}}
  path = 'biases/decoder/layers_1/router/' + BIAS
  state = {
    'biases': params,
    'chosen': {'decoder': {'layers_1': jnp.zeros(3)}},
    'calls': jnp.int32(0),
  }
  mutables = {variables.STATE: state}
  seen = []
  # Apart, either half moves another way than both do: (5, 4, 3), mean 4.
  for load in ([5.0, 0, 1], [0.0, 4, 2], [0.0, 0, 3], [0.0, 3, 0]):
    sums = {'decoder/layers_1': {'chosen_E': jnp.array(load)}}
    joined = variables.join({}, mutables)
    mutables = variables.advance(joined, mutables, sums, 0.5, 2)
    seen.append(flat(mutables[variables.STATE])[path].tolist())
  first = [-0.5, 0, 0.5]
  # The second step: (0, 3, 3), mean 2.
  second = [0.0, -0.5, 0.0]
  assert seen == [[0, 0, 0], first, first, second]
  chosen = mutables[variables.STATE]['chosen']['decoder']['layers_1']
  assert chosen.tolist() == [0, 0, 0]
  assert int(mutables[variables.STATE]['calls']) == 4
  moved = update_biases(
    params, {'decoder/layers_1': {'chosen_E': jnp.array([5.0, 4, 3])}}, 0.5
  )
  assert flat(moved)['decoder/layers_1/router/' + BIAS].tolist() == first


@pytest.mark.parametrize('name', ['encoder_decoder', 'decoder', 'scanned'])
def test_cache_is_of_rows(name):
  model, batch, collections = make(name)
  rows = len(batch['decoder_input_tokens'])
  _, started = jax.eval_shape(
    lambda params, batch: model.module.apply(
      {'params': params}, batch, 8, method='start', mutable=['cache']
    ),
    collections['params'],
    batch,
  )
  cache = jax.eval_shape(variables.batch_major, started['cache'])
  leaves = flat(cache)
  assert not {path.split('/')[-1] for path in leaves} & SPECIAL
  assert {path for path in leaves if path.endswith('cached_key')}
  for path, leaf in leaves.items():
    assert leaf.shape[0] == rows, path
  back = jax.eval_shape(variables.batch_major, cache)
  assert back == started['cache']


def test_metrics_are_summed_before_they_are_divided():
  model, batch, _ = make('encoder_decoder')
  params = tiny_models.make_params(model, batch)
  loss = jax.jit(functools.partial(model.loss, train=False))
  made, sums = [], []
  for seed in (0, 1):
    _, of_batch = loss(params, tiny_models.make_batch(seed=seed))
    made.append(metrics.of_layers(of_batch['layers']))
    sums.append(of_batch)
  expected = sums_module.summary(jax.tree.map(jnp.add, *sums))['layers']
  numbers = {
    f'{layer}/{name}': value
    for layer, summary in expected.items()
    for name, value in summary.items()
    if np.ndim(value) == 0
  }
  assert made[0].keys() == numbers.keys()
  assert 'decoder/layers_3/imbalance' in numbers
  for name, value in numbers.items():
    both = made[0][name].merge(made[1][name])
    assert isinstance(both, clu.metrics.Metric)
    assert both.compute() == pytest.approx(value, rel=1e-5), name
    assert both.compute_value().value == both.compute()
    # T5X fills fields that have a shape by zeros, and copies the others.
    assert [leaf.shape for leaf in jax.tree.leaves(both)] == [both.sums.shape]


def test_methods_are_called_as_t5x_calls_them():
  tree = ast.parse((ADAPTER / 'models.py').read_text())
  (cls,) = [node for node in tree.body if isinstance(node, ast.ClassDef)]
  arguments = {
    node.name: [arg.arg for arg in node.args.args][1:]
    for node in cls.body
    if isinstance(node, ast.FunctionDef)
  }
  for name, expected in {
    'get_initial_variables': ['rng', 'input_shapes', 'input_types'],
    'loss_fn': ['params', 'batch', 'dropout_rng', 'flax_mutables'],
    'eval_fn': ['params', 'batch', 'flax_mutables'],
    'score_batch': ['params', 'batch', 'flax_mutables'],
    'predict_batch': ['params', 'batch', 'rng', 'flax_mutables'],
    'predict_batch_with_aux': [
      'params',
      'batch',
      'rng',
      'decoder_params',
      'return_all_decodes',
      'num_decodes',
      'flax_mutables',
    ],
  }.items():
    assert arguments[name] == expected, name


def test_examples():
  result = doctest.testmod(metrics)
  assert (result.failed, result.attempted > 0) == (0, True)
