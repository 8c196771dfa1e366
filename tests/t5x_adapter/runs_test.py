"""Under T5X our models do what they do under our own runner."""

import dataclasses
import functools
import json
import os
import subprocess
import sys

import pytest
from paths import ROOT

pytest.importorskip('t5x', reason='T5X is not installed; see docs/t5x.md')

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import seqio
import t5x.checkpoints
import t5x.contrib.moe.training_utils
import t5x.decoding
import t5x.trainer
import t5x.utils
import tiny_models
from flax import traverse_util
from jax.sharding import PartitionSpec

from sparse_experts import convert, sharding
from sparse_experts.data import streams
from sparse_experts.data.features.text import Text
from sparse_experts.data.special_tokens import NO_TOKEN, SpecialTokens
from sparse_experts.models import language
from sparse_experts.models import sums as sums_module
from sparse_experts.models.decoding import BeamSearch, Sampling
from sparse_experts.moe.routers.deepseek import DeepSeek
from sparse_experts.moe.routers.dense_to_sparse import DenseToSparse
from sparse_experts.t5x_adapter import (
  models,
  optimizers,
  partitioner,
  variables,
)
from sparse_experts.training import optimizers as ours
from sparse_experts.training import step as step_module
from sparse_experts.training.state import TrainState

E = 4
partial = functools.partial

seqio.TaskRegistry.add(
  't5x_adapter_test',
  source=seqio.FunctionDataSource(
    lambda split, shuffle_files: None, splits=('train',)
  ),
  preprocessors=[],
  output_features={
    name: seqio.Feature(seqio.PassThroughVocabulary(tiny_models.VOCAB, 1))
    for name in ('inputs', 'targets')
  },
)


@pytest.fixture(autouse=True)
def promote_ranks():
  """T5X's own code does."""
  with jax.numpy_rank_promotion('allow'):
    yield


MODELS = {
  'encoder_decoder': partial(tiny_models.make_model, layers=2),
  'decoder': partial(tiny_models.make_model, layers=2, encoder=False, k=2),
  'scanned': partial(
    tiny_models.make_model,
    layers=2,
    sparse_layers=1,
    encoder=False,
    scan=True,
  ),
}
UNSCANNED = ['encoder_decoder', 'decoder']


def adapt(model, optimizer_def=None, **arguments):
  return models.SparseModel(
    model, 't5x_adapter_test', optimizer_def, **arguments
  )


@functools.cache
def case(name):
  """A model, a batch, and parameters."""
  model = MODELS[name](dropout_rate=0.1)
  batch = tiny_models.make_batch(encoder=model.module.encoder is not None)
  if model.module.encoder is None:
    prompts = (jnp.arange(8) % 3 + 1)[:, None] > jnp.arange(8)[None]
    batch['decoder_causal_attention'] = prompts.astype(jnp.int32)
  return model, batch, tiny_models.make_params(model, batch)


def make_state(adapted, batch, where=None, params=None):
  """T5X's train state, on our mesh, and its axes."""
  alone = sharding.Placement(devices=DEVICES[:1])
  where = where or partitioner.Partitioner(alone)
  initializer = t5x.utils.TrainStateInitializer(
    optimizer_def=adapted.optimizer_def,
    init_fn=adapted.get_initial_variables,
    input_shapes={name: x.shape for name, x in batch.items()},
    partitioner=where,
  )
  state = initializer.from_scratch(jax.random.PRNGKey(0))
  if params is not None:
    state = state.replace_params(flax.core.freeze(params))
  return state, initializer.train_state_axes


DEVICES = jax.devices()
# Of another family's model, but that many tokens end an answer.
OTHERS = SpecialTokens(
  pad=NO_TOKEN, eos=tuple(range(1, 64, 4)), start=1, suppressed=()
)


def flat(tree):
  return traverse_util.flatten_dict(jax.tree.map(lambda x: x, tree), sep='/')


def assert_close(got, expected, rtol=1e-5, atol=1e-6):
  got, expected = (
    jax.tree.map(np.asarray, flax.core.unfreeze(x)) for x in (got, expected)
  )
  jax.tree.map(
    partial(np.testing.assert_allclose, rtol=rtol, atol=atol), got, expected
  )


@pytest.mark.parametrize('name', UNSCANNED)
def test_loss_gradients_and_metrics(name):
  model, batch, params = case(name)
  adapted, rng = adapt(model), jax.random.PRNGKey(3)
  for dropout_rng in (rng, None):
    (loss, metrics), gradients = jax.jit(
      jax.value_and_grad(adapted.loss_fn, has_aux=True)
    )(params, batch, dropout_rng)
    (our_loss, sums), our_gradients = jax.jit(
      jax.value_and_grad(
        partial(model.loss, train=dropout_rng is not None), has_aux=True
      )
    )(params, batch, dropout_rng)
    assert_close(loss, our_loss)
    assert_close(gradients, our_gradients)
  summary = sums_module.summary(sums)
  values = {
    name: metric.compute_value().value
    for name, metric in jax.device_get(metrics).items()
    if not name.startswith('timing')
  }
  assert values['cross_ent_loss'] == pytest.approx(summary['loss'], rel=1e-5)
  assert values['accuracy'] == pytest.approx(summary['accuracy'])
  assert values['aux_losses/load_balance'] == pytest.approx(
    summary['load_balance'], rel=1e-5
  )
  layer = 'decoder/layers_1'
  for name in ('imbalance', 'dropped', 'confidence'):
    assert values[f'{layer}/{name}'] == pytest.approx(
      summary['layers'][layer][name], rel=1e-4
    )


@pytest.mark.parametrize('name', UNSCANNED)
def test_scores(name):
  model, batch, params = case(name)
  assert_close(
    jax.jit(adapt(model).score_batch)(params, batch),
    jax.jit(model.score)(params, batch),
  )


@pytest.mark.parametrize('name', UNSCANNED)
@pytest.mark.parametrize(
  'strategy', [Sampling(1.0, top_k=5), BeamSearch(3)], ids=['sampling', 'beam']
)
def test_answers(name, strategy):
  model, batch, params = case(name)
  rng = jax.random.PRNGKey(5)
  adapted = adapt(model, strategy=strategy, max_tokens=5)
  tokens, aux = jax.jit(
    partial(adapted.predict_batch_with_aux, return_all_decodes=True)
  )(params, batch, rng)
  keys_B = jnp.stack([jax.random.fold_in(rng, i) for i in range(8)])
  expected, scores = jax.jit(
    partial(model.decode, max_tokens=5, strategy=strategy)
  )(params, batch, keys_B)
  expected = expected.reshape(8, -1, 5)[:, ::-1]  # T5X's best are the last.
  np.testing.assert_array_equal(tokens, expected)
  assert_close(aux['scores'], scores.reshape(8, -1)[:, ::-1])
  best = jax.jit(adapted.predict_batch)(params, batch, rng)
  np.testing.assert_array_equal(best, tokens[:, -1])


def test_several_samples_of_each_row():
  model, batch, params = case('decoder')
  adapted = adapt(model, strategy=Sampling(1.0), max_tokens=5)
  tokens, aux = jax.jit(
    partial(
      adapted.predict_batch_with_aux, num_decodes=3, return_all_decodes=True
    )
  )(params, batch, jax.random.PRNGKey(0))
  assert tokens.shape == (8, 3, 5)
  assert (np.diff(aux['scores'], axis=1) >= 0).all()
  assert len({tuple(row) for row in np.asarray(tokens).reshape(-1, 5)}) > 8


@pytest.mark.parametrize('name', MODELS)
def test_t5x_decodes_greedily_over_our_cache(name):
  model, batch, params = case(name)
  decode = partial(t5x.decoding.temperature_sample, temperature=0.0, topk=0)
  adapted = adapt(model, decode_fn=decode)
  tokens = np.asarray(jax.jit(adapted.predict_batch)(params, batch))
  expected, _ = jax.jit(partial(model.decode, max_tokens=8))(params, batch)
  prompts = batch.get('decoder_causal_attention', jnp.zeros((8, 8), int))
  # T5X's prompt, without its start token, and answer are 8 tokens together.
  room = 8 - np.maximum(np.asarray(prompts.sum(1)) - 1, 0)
  assert len(set(tokens[:, 0])) > 1
  for row in range(8):
    np.testing.assert_array_equal(
      tokens[row, : room[row]], expected[row, : room[row]]
    )


@pytest.mark.parametrize('name', MODELS)
def test_t5x_beams_move_rows_of_our_cache(name):
  """As without a cache: all logits anew from the sequences so far."""
  model, batch, params = case(name)
  batch = {k: v for k, v in batch.items() if k != 'decoder_causal_attention'}
  adapted = adapt(model, decode_fn=t5x.decoding.beam_search)
  tokens, aux = jax.jit(
    partial(
      adapted.predict_batch_with_aux, num_decodes=3, return_all_decodes=True
    )
  )(params, batch)

  def tokens_to_logits(state):
    again = {
      'decoder_input_tokens': state.sequences[:, :8],
      'decoder_target_tokens': jnp.ones_like(state.sequences[:, :8]),
    }
    if 'encoder_input_tokens' in batch:
      again['encoder_input_tokens'] = jnp.repeat(
        batch['encoder_input_tokens'], 3, 0
      )
    logits = model.logits(params, again)
    logits = logits[:, state.cur_index].at[:, 0].set(t5x.decoding.NEG_INF_VALUE)
    return logits, state.cache

  expected, scores = jax.jit(
    lambda: t5x.decoding.beam_search(
      inputs=jnp.zeros((8, 8), int),
      cache={},
      tokens_to_logits=tokens_to_logits,
      eos_id=1,
      num_decodes=3,
    )
  )()
  np.testing.assert_array_equal(tokens, expected)
  assert_close(aux['scores'], scores, rtol=1e-4)


def test_sharded_gradients_are_exact():
  """So T5X's MoeTrainer, which multiplies them, would make them too large."""
  model = tiny_models.make_model(layers=2, num_experts=8)
  batch = tiny_models.make_batch()
  params = tiny_models.make_params(model, batch)

  def gradients(placement):
    adapted = adapt(model, optimizers.Optax(lambda names: optax.sgd(1.0)))
    where = partitioner.Partitioner(placement)
    _, axes = make_state(adapted, batch, where)
    return where.partition(
      jax.grad(lambda *args: adapted.loss_fn(*args)[0]),
      in_axis_resources=(axes.params, where.data_partition_spec, None),
      out_axis_resources=axes.params,
    )(flax.core.freeze(params), batch, jax.random.PRNGKey(0))

  alone = gradients(sharding.Placement(devices=DEVICES[:1]))
  sharded = gradients(sharding.Placement({'data': 2, 'expert': 4}))
  placed = sharded['decoder']['layers_1']['moe']['expert']['wi']['kernel']
  assert placed.sharding.spec[0] == 'expert'
  assert_close(sharded, alone, rtol=1e-4)
  moe = t5x.contrib.moe.training_utils
  scaled = moe.scale_sharded_grads(
    {'expert': {'kernel': jnp.ones(2)}}, moe.match_fn(r'.*expert.*'), 8.0
  )
  assert scaled['expert']['kernel'].tolist() == [8.0, 8.0]


def test_axes_are_checked():
  model, batch, _ = case('encoder_decoder')
  adapted = adapt(model, optimizers.Adafactor())
  with pytest.raises(ValueError, match='does not divide over model=4'):
    where = sharding.Placement({'model': 4, 'data': 2})
    make_state(adapted, batch, partitioner.Partitioner(where))


def test_adafactor_of_t5x():
  """It factors as ours by its rules, and its state is sharded."""
  model = tiny_models.make_model(layers=2)
  batch = tiny_models.make_batch()
  params = tiny_models.make_params(model, batch)
  adapted = adapt(model, optimizers.Adafactor())
  where = partitioner.Partitioner(sharding.Placement({'data': 2, 'expert': 4}))
  state, axes = make_state(adapted, batch, where, params)
  specs = flat(axes.state_dict()['state']['param_states'])
  kernel = 'decoder/layers_1/moe/expert/wi/kernel'
  assert specs[f'{kernel}/v_row'] == PartitionSpec('expert', None)
  assert specs[f'{kernel}/v_col'] == PartitionSpec('expert', 'model')
  gradients = jax.jit(jax.grad(lambda p: model.loss(p, batch, train=False)[0]))(
    params
  )
  boxed = jax.eval_shape(model.init, jax.random.key(0), batch)
  tx = ours.adafactor(sharding.names_of(boxed), learning_rate=0.1)

  @jax.jit
  def both(state, params):
    opt_state = tx.init(params)
    for _ in range(2):
      state = state.apply_gradient(gradients, learning_rate=0.1)
      updates, opt_state = tx.update(gradients, opt_state, params)
      params = optax.apply_updates(params, updates)
    return state.params, params

  got, expected = map(flat, both(state, params))
  compared = [path for path, leaf in got.items() if leaf.ndim > 2]
  assert kernel in compared
  # Matrices T5X factors by size, of at least 128.
  for path in compared:
    assert_close(got[path], expected[path])


def test_our_optimizers_under_t5x():
  model, batch, params = case('decoder')
  make = partial(ours.adafactor, learning_rate=0.1, beta1=0.9)
  adapted = adapt(model, optimizers.Optax(make))
  where = partitioner.Partitioner(sharding.Placement({'data': 2, 'expert': 4}))
  state, axes = make_state(adapted, batch, where, params)
  specs = flat(axes.state_dict()['state']['param_states'])
  moments = {path: s for path, s in specs.items() if 'expert/wi' in path}
  assert moments
  for path, spec in moments.items():
    assert spec[0] == 'expert', path
  rng = jax.random.PRNGKey(0)
  trained = where.partition(
    lambda state, batch: t5x.trainer.train_with_lr(
      state, batch, 0.0, rng, adapted, None
    )[0],
    in_axis_resources=(axes, where.data_partition_spec),
    out_axis_resources=axes,
  )(state, batch)
  boxed = jax.eval_shape(model.init, jax.random.key(0), batch)
  tx = make(sharding.names_of(boxed))

  @jax.jit
  def expected(params):
    loss = lambda params: model.loss(params, batch, rng, train=True)[0]
    updates, _ = tx.update(jax.grad(loss)(params), tx.init(params), params)
    return optax.apply_updates(params, updates)

  assert_close(trained.params, expected(params), rtol=1e-4, atol=1e-5)
  assert int(trained.step) == 1


@pytest.mark.parametrize('microbatches', [1, 2])
def test_loss_free_balancing(microbatches):
  """Three steps move parameters and biases as our own runner moves them."""
  model = tiny_models.make_model(
    layers=2,
    encoder=False,
    num_experts=E,
    make_router=partial(
      DeepSeek, num_experts=E, k=2, scores='sigmoid', balance_bias=True
    ),
    loss_weights={},
    bias_rate=0.1,
  )
  batch = tiny_models.make_batch(encoder=False)
  # As many targets in each microbatch: T5X knows nothing of the others'.
  batch = jax.tree.map(lambda x: jnp.concatenate([x[:4], x[:4][::-1]]), batch)
  batch['decoder_input_tokens'] = batch['decoder_input_tokens'].at[4:, 1].set(7)
  adapted = adapt(
    model,
    optimizers.Optax(lambda names: optax.sgd(0.1)),
    microbatches=microbatches,
  )
  state, _ = make_state(adapted, batch)
  params = variables.join(state.params, state.flax_mutables)
  optimizer = optax.sgd(0.1)
  zero = jnp.int32(0)
  own = TrainState(zero, params, optimizer.init(params), zero)
  own_step = jax.jit(
    partial(
      step_module.train_step,
      model=model,
      optimizer=optimizer,
      key=jax.random.key(0),
      microbatches=microbatches,
    )
  )
  t5x_step = jax.jit(
    lambda state: t5x.trainer.train_with_lr(
      state, batch, 0.1, jax.random.PRNGKey(0), adapted, microbatches
    )
  )
  for _ in range(3):
    own, sums = own_step(own, batch)
    state, metrics = t5x_step(state)
  got = variables.join(state.params, state.flax_mutables)
  assert_close(got, own.params, rtol=1e-4, atol=1e-5)
  biases = flat(state.flax_mutables[variables.STATE]['biases'])
  assert all(np.abs(bias).max() > 0.05 for bias in biases.values())
  loss = metrics['loss'].replace_steps(1).compute()
  assert_close(loss, sums['objective'] / microbatches)
  # Inference is given the biases too.
  score = adapted.score_batch(state.params, batch, state.flax_mutables)
  assert_close(score, model.score(own.params, batch), rtol=1e-3)


@pytest.mark.parametrize('task_ids', [False, True])
@pytest.mark.parametrize(
  'special_tokens', [SpecialTokens(), OTHERS], ids=['t5', 'others']
)
def test_rows_of_t5x_s_pipeline(special_tokens, task_ids):
  lengths = {'targets': 48}
  module = tiny_models.make_model(encoder=False).module
  module = module.clone(
    embed=module.embed.clone(vocab_size=9000), special_tokens=special_tokens
  )
  adapted = models.SparseModel(
    language.Language(module), 'docs_lm', task_ids=task_ids
  )
  rows = t5x.utils.get_dataset(
    t5x.utils.DatasetConfig(
      'docs_lm', lengths, 'validation', batch_size=4, shuffle=False, seed=0
    ),
    shard_id=0,
    num_shards=1,
    feature_converter_cls=adapted.FEATURE_CONVERTER_CLS,
    num_epochs=1,
  )
  expected = streams.eval_batches(
    'docs_lm',
    'validation',
    lengths,
    4,
    Text(special_tokens),
    task_ids=task_ids,
    num_batches=3,
  )
  rows = rows.take(3).as_numpy_iterator()
  for batch, of_t5x in zip(expected, rows, strict=True):
    assert batch.keys() == of_t5x.keys()
    assert ('decoder_task_ids' in batch) == task_ids
    assert (batch['decoder_input_tokens'][:, 0] == special_tokens.start).all()
    for name, x in batch.items():
      np.testing.assert_array_equal(of_t5x[name], x, err_msg=name)


def test_answers_of_other_special_tokens_are_text_to_t5x():
  """They go on with EOS of the vocabulary: T5X reads up to the first."""
  model, batch, params = case('decoder')
  module = model.module.clone(special_tokens=OTHERS)
  model = dataclasses.replace(model, module=module)
  tokens = jax.jit(adapt(model).predict_batch)(params, batch)
  expected, _ = jax.jit(partial(model.decode, max_tokens=8))(params, batch)
  assert (expected == NO_TOKEN).any()
  filled = jnp.where(expected == NO_TOKEN, 1, expected)
  np.testing.assert_array_equal(tokens, filled)
  with pytest.raises(ValueError, match=r'begins with 1 .* set strategy'):
    adapt(model, decode_fn=t5x.decoding.beam_search).predict_batch(
      params, batch
    )


@pytest.mark.parametrize(
  'balance_over, microbatches',
  [('batch', 2), ('batch_so_far', 2), ('last_step', 2), ('last_step', None)],
)
def test_balance_over_what_t5x_does_not_show(balance_over, microbatches):
  model = tiny_models.make_model(balance_over=balance_over)
  with pytest.raises(ValueError, match='balance_over must be one') as raised:
    adapt(model, microbatches=microbatches)
  message = str(raised.value)
  assert message.endswith(f'microbatches={microbatches}, not {balance_over!r}.')
  assert '\n' not in message


@pytest.mark.parametrize('microbatches', [None, 1])
def test_balance_over_a_batch(microbatches):
  """T5X shows it at once, our own runner in halves: the loss is the same."""
  make = partial(
    tiny_models.make_model, encoder=False, layers=2, capacity_factor_train=None
  )
  model = make(balance_over='batch')
  batch = tiny_models.make_batch(encoder=False)
  params = tiny_models.make_params(model, batch)
  rng = jax.random.PRNGKey(0)
  adapted = adapt(model, microbatches=microbatches)
  loss, gradients = jax.jit(
    jax.value_and_grad(lambda *args: adapted.loss_fn(*args)[0])
  )(params, batch, rng)
  zero = jnp.int32(0)
  state = TrainState(zero, params, (), zero)

  def in_halves(model):
    step = partial(
      step_module.gradients, model=model, key=jax.random.key(0), microbatches=2
    )
    gradients, sums = jax.jit(step)(state, batch)
    return sums['objective'] / 2, gradients

  assert_close((loss, gradients), in_halves(model), rtol=1e-4)
  apart, _ = in_halves(make(balance_over='microbatch'))
  assert abs(apart - loss) > 1e-3


def test_routers_are_told_the_step():
  model = tiny_models.make_model(
    layers=2,
    encoder=False,
    make_router=partial(
      DenseToSparse, num_experts=E, decay_steps=4, noise=False
    ),
    loss_weights={},
    capacity_factor_train=None,
  )
  batch = tiny_models.make_batch(encoder=False)
  params = tiny_models.make_params(model, batch)
  adapted = adapt(model, microbatches=2)
  mutables = adapted.get_initial_variables(
    jax.random.PRNGKey(0), {name: x.shape for name, x in batch.items()}
  )
  mutables = {variables.STATE: mutables[variables.STATE]}
  rng, step = jax.random.PRNGKey(0), jax.jit(adapted.loss_fn)
  for call in range(5):
    loss, (_, mutables) = step(params, batch, rng, mutables)
    expected, _ = model.loss(
      params, batch, rng, train=True, step=jnp.int32(call // 2)
    )
    assert_close(2 * loss, expected)


def test_t5x_reads_what_convert_writes(tmp_path):
  source = ROOT / 'tests/data/hf_switch_tiny'
  convert.convert(source, tmp_path / 'output', target='t5x')
  state = t5x.checkpoints.load_t5x_checkpoint(
    str(tmp_path / 'output/checkpoint_0')
  )
  target, params = state['target'], convert.load(source)[1]
  assert state['state']['step'] == 0
  np.testing.assert_array_equal(
    target['decoder']['layers_1']['mlp']['expert']['wi']['kernel'],
    params['decoder']['layers_1']['moe']['expert']['wi']['kernel'],
  )
  assert len(flat(target)) == len(flat(params))


def test_errors():
  model, batch, params = case('decoder')
  with pytest.raises(ValueError, match='are for a decode_fn of T5X'):
    adapt(model).predict_batch_with_aux(
      params, batch, decoder_params={'temperature': 1.0}
    )
  with pytest.raises(ValueError, match='use_custom_packing_ops'):
    adapt(model).FEATURE_CONVERTER_CLS(pack=True, use_custom_packing_ops=True)
  with pytest.raises(ValueError, match='embeds only'):
    models.SparseModel(model, 'docs_lm')

  def of(special_tokens):
    module = model.module.clone(special_tokens=special_tokens)
    return dataclasses.replace(model, module=module)

  with pytest.raises(ValueError, match='with token 1, but .* with 2'):
    adapt(of(SpecialTokens(eos=2)))
  for special_tokens in (
    SpecialTokens(pad=NO_TOKEN),
    SpecialTokens(start=3),
    SpecialTokens(eos=(1, 2)),
  ):
    decode = adapt(of(special_tokens), decode_fn=t5x.decoding.beam_search)
    with pytest.raises(ValueError, match="T5X's functions pad and begin"):
      decode.predict_batch(params, batch)


ENCODER_DECODER = """
include 'gin/models/encoder_decoder.gin'
include 'gin/tasks/docs_span_corruption.gin'
TASK_FEATURE_LENGTHS = {'inputs': 64, 'targets': 20}
NUM_SELECTED_EXPERTS = 1
"""

DECODER = """
from __gin__ import dynamic_registration
from sparse_experts.moe.routers import top_k
include 'gin/models/decoder_only.gin'
include 'gin/tasks/docs_lm.gin'
TASK_FEATURE_LENGTHS = {'targets': 64}
NUM_SELECTED_EXPERTS = 2
top_k.TopK.priority = 'token'
"""

TINY = """
BATCH_SIZE = 8
NUM_EMBEDDINGS = 8192
NUM_LAYERS = 2
EMBED_DIM = 16
NUM_HEADS = 2
HEAD_DIM = 8
MLP_DIM = 32
NUM_EXPERTS = 4
SPARSE_LAYERS = 2
MESH = {'data': 2, 'expert': 4, 'model': 1}
MAX_TOKENS = 4
"""


def run_t5x(script, *files, **macros):
  """Runs `python -m t5x.SCRIPT` as a user does; its log."""
  macros = [f'--gin.{name}={value!r}' for name, value in macros.items()]
  files = [f'--gin_file={file}' for file in files]
  process = subprocess.run(
    [
      sys.executable,
      '-m',
      f't5x.{script}',
      '--gin_search_paths=.',
      *files,
      *macros,
    ],
    cwd=ROOT,
    env={**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert process.returncode == 0, process.stderr[-4000:]
  return process.stderr


def losses(directory):
  """Loss by step, of T5X's TensorBoard files."""
  import tensorflow as tf
  from tensorboard.backend.event_processing import event_accumulator

  events = event_accumulator.EventAccumulator(
    str(directory), size_guidance={'tensors': 0}
  )
  events.Reload()
  return {
    event.step: float(tf.make_ndarray(event.tensor_proto))
    for event in events.Tensors('loss')
  }


@pytest.mark.slow
@pytest.mark.parametrize(
  'recipe', [ENCODER_DECODER, DECODER], ids=['top_1', 'decoder_top_2']
)
def test_forty_steps_by_the_command_line(recipe, tmp_path):
  """Trained, evaluated, saved, restored, evaluated again and used."""
  model = tmp_path / 'model.gin'
  model.write_text(recipe)
  tiny = tmp_path / 'tiny.gin'
  tiny.write_text(TINY)
  run = str(tmp_path / 'run')
  train = partial(
    run_t5x,
    'train',
    model,
    'gin/t5x/pretrain.gin',
    tiny,
    MODEL_DIR=run,
    RANDOM_SEED=0,
    TRAIN_DATA_SEED=0,
    WARMUP_STEPS=2500,  # A rate of 0.02: still falling after 20 steps.
    EVAL_PERIOD=20,
    EVAL_STEPS=2,
    CHECKPOINT_PERIOD=20,
  )
  train(TRAIN_STEPS=20)
  log = train(TRAIN_STEPS=40)
  assert 'steps 20-40' in log
  steps = losses(tmp_path / 'run/train')
  assert set(steps) == {20, 40}
  assert steps[40] < steps[20]
  (name,) = [path.name for path in (tmp_path / 'run/training_eval').iterdir()]
  held_out = losses(tmp_path / 'run/training_eval' / name)
  assert held_out[40] < held_out[20]
  again = {'CHECKPOINT_PATH': f'{run}/checkpoint_40'}
  run_t5x(
    'eval',
    model,
    'gin/tasks/docs_domain.gin',
    'gin/t5x/eval.gin',
    tiny,
    EVAL_OUTPUT_DIR=str(tmp_path / 'eval'),
    EVALUATOR_NUM_EXAMPLES=16,
    **again,
  )
  (file,) = (tmp_path / 'eval/inference_eval').glob('*-metrics.jsonl')
  assert 0 <= json.loads(file.read_text())['accuracy'] <= 100
  for mode in ('predict', 'score'):
    out = tmp_path / mode
    run_t5x(
      'infer',
      model,
      'gin/t5x/infer.gin',
      tiny,
      INFER_OUTPUT_DIR=str(out),
      INFER_MODE=mode,
      **again,
    )
    (file,) = [p for p in out.iterdir() if p.name.endswith('-of-00001')]
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) > 100
    if mode == 'score':
      assert all(-1000 < row['score'] < 0 for row in rows)
    else:
      assert any(row['prediction'] for row in rows)
