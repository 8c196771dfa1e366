"""A `models.Objective` as a model of T5X."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import clu.metrics
import jax
import jax.numpy as jnp
from flax import linen as nn
from t5x import metrics as t5x_metrics
from t5x import models as t5x_models
from t5x import optimizers as t5x_optimizers

from sparse_experts.data import tasks, token_text
from sparse_experts.data.features.text import Text, TextToText
from sparse_experts.letters import Array
from sparse_experts.models.decoding import GREEDY, BeamSearch, Sampling
from sparse_experts.models.language import Language
from sparse_experts.moe.router import Router
from sparse_experts.t5x_adapter import metrics, predict, variables

Batch = Mapping[str, Array]


class SparseModel(t5x_models.BaseTransformerModel):
  """An encoder-decoder or a decoder alone, as `model` is.

  Loss, scores and answers are those of `model`, so they are what our own runner
  computes. T5X's losses, `z_loss` and normalising factors have no part in them.

  Args:
    model: the model.
    task: name of a seqio task or mixture, whose vocabularies the model has.
    optimizer_def: see `optimizers`.
    microbatches: the `num_microbatches` of the trainer. Losses are means over
      targets, which T5X adds over microbatches; this makes it their mean.
    strategy: how answers are chosen, by `Objective.decode`.
    max_tokens: of an answer, at most; None: as many as decoder features have.
    decode_fn: one of T5X's, such as `t5x.decoding.temperature_sample`, in the
      place of `strategy`. It takes `decoder_params`, and prompt and answer
      together are as long as decoder features, as in T5X.
    task_ids: batches say the task of every token, for routers that ask.
    task_modules: Python modules that register further tasks.
  """

  def __init__(
    self,
    model: Language,
    task: str,
    optimizer_def: t5x_optimizers.OptimizerDef | None = None,
    *,
    microbatches: int | None = None,
    strategy: Sampling | BeamSearch = GREEDY,
    max_tokens: int | None = None,
    decode_fn: t5x_models.DecodeFnCallable | None = None,
    task_ids: bool = False,
    task_modules: Sequence[str] = (),
  ):
    alone = ('group', 'microbatch')
    if (microbatches or 1) == 1:
      alone += ('batch', 'batch_so_far')
    if model.balance_over not in alone:
      raise ValueError(
        'T5X shows a model one microbatch at a time: balance_over must be one '
        f'of {", ".join(alone)} with microbatches={microbatches}, not '
        f'{model.balance_over!r}.'
      )
    if task_ids == 'mixture':
      raise ValueError(
        "T5X mixes tasks itself and numbers none: task_ids='mixture' is of the "
        'training here; give T5X tasks whose tokens say theirs, with True.'
      )
    token_text.check_vocabulary(
      task, model.module.embed.vocab_size, task_modules, model.special_tokens
    )
    features = tasks.find(task, task_modules).output_features
    super().__init__(
      module=model.module,
      input_vocabulary=features.get('inputs', features['targets']).vocabulary,
      output_vocabulary=features['targets'].vocabulary,
      optimizer_def=optimizer_def,
      decode_fn=decode_fn,
    )
    self.model = model
    self._microbatches = microbatches or 1
    self._strategy, self._max_tokens = strategy, max_tokens
    self.FEATURE_CONVERTER_CLS = functools.partial(
      _feature_converter, model.features, task_ids
    )

  def get_initial_variables(
    self,
    rng: Array,
    input_shapes: Mapping[str, tuple[int, ...]],
    input_types: Mapping[str, Any] | None = None,
  ) -> dict[str, Any]:
    """'params' and their axes, and 'router_state' where there is such.

    Args:
      rng: a key.
      input_shapes: of a batch's features, by name.
      input_types: their dtypes; int32 unless given.
    """
    types = input_types or {}
    shapes = {
      name: jax.ShapeDtypeStruct(shape, types.get(name, jnp.int32))
      for name, shape in input_shapes.items()
    }
    needs = set()

    def look(method, args, kwargs, context):
      if isinstance(context.module, Router):
        needs.update(context.module.needs)
      return method(*args, **kwargs)

    with nn.intercept_methods(look):
      boxed = self.model.init(rng, shapes)
    loads = None
    if self.model.bias_rate:
      _, sums = jax.eval_shape(
        functools.partial(self.model.loss, train=False), nn.unbox(boxed), shapes
      )
      loads = {
        name: layer['chosen_E'] for name, layer in sums['layers'].items()
      }
    return variables.collections(boxed, loads, 'step' in needs)

  def loss_fn(
    self,
    params,
    batch: Batch,
    dropout_rng: Array | None,
    flax_mutables=None,
  ):
    """`Objective.loss`: in training with a `dropout_rng`, else in evaluation.

    Args:
      params: T5X's parameters.
      batch: features [B, L].
      dropout_rng: a key; None: evaluation.
      flax_mutables: T5X's, which hold 'router_state' where the model has it.

    Returns:
      The loss; metrics, or where there are `flax_mutables`, metrics and the
      mutables after.
    """
    train = dropout_rng is not None
    params = variables.join(params, flax_mutables)
    state = (flax_mutables or {}).get(variables.STATE, {})
    step = state['calls'] // self._microbatches if 'calls' in state else None
    loss, sums = self.model.loss(
      params, batch, dropout_rng, train=train, step=step if train else None
    )
    if train:
      loss /= self._microbatches
    measured = self._metrics(loss, sums, batch, train)
    if not flax_mutables:
      return loss, measured
    if train:
      flax_mutables = variables.advance(
        params,
        flax_mutables,
        sums['layers'],
        self.model.bias_rate,
        self._microbatches,
      )
    return loss, (measured, flax_mutables)

  def eval_fn(self, params, batch: Batch, flax_mutables=None):
    """Loss and metrics at evaluation's capacity, without dropout.

    Args:
      params, batch, flax_mutables: as of `loss_fn`.
    """
    loss, measured = self.loss_fn(params, batch, None, flax_mutables)
    return loss, measured[0] if flax_mutables else measured

  def score_batch(self, params, batch: Batch, flax_mutables=None) -> Array:
    """Exact log-probability of each row's targets, float32 [B], in nats.

    Args:
      params, batch, flax_mutables: as of `loss_fn`.
    """
    return self.model.score(variables.join(params, flax_mutables), batch)

  def _compute_logits(self, params, batch: Batch, dropout_rng=None) -> Array:
    if dropout_rng is not None:
      raise ValueError('logits are of evaluation: dropout_rng must be None.')
    return self.model.logits(params, batch)

  def predict_batch(
    self, params, batch: Batch, rng: Array | None = None, flax_mutables=None
  ) -> Array:
    """Answers, int32 [B, T].

    Args:
      params, batch, rng, flax_mutables: as of `predict_batch_with_aux`.
    """
    return self.predict_batch_with_aux(
      params, batch, rng, flax_mutables=flax_mutables
    )[0]

  def predict_batch_with_aux(
    self,
    params,
    batch: Batch,
    rng: Array | None = None,
    decoder_params: Mapping[str, Any] | None = None,
    return_all_decodes: bool = False,
    num_decodes: int | None = None,
    flax_mutables=None,
  ) -> tuple[Array, dict[str, Array]]:
    """Answers to inputs or prompts, and their scores.

    Args:
      params: T5X's parameters.
      batch: features, not packed.
      rng: a key, for sampling.
      decoder_params: for `decode_fn`.
      return_all_decodes: return the W answers, the best last, or it alone.
      num_decodes: W; None: the width of the beam, or 1.
      flax_mutables: T5X's.

    Returns:
      int32 [B, T] or [B, W, T] and 'scores' [B] or [B, W]. After an end they
      are padded; by the vocabulary's EOS where the model's padding is not the
      vocabulary's, since T5X makes text of all before the first EOS.
    """
    if decoder_params and self.decode_fn is None:
      raise ValueError(
        f'decoder_params {sorted(decoder_params)} are for a decode_fn of T5X, '
        'and the model has none: set strategy, or give it a decode_fn.'
      )
    params = variables.join(params, flax_mutables)
    if self.decode_fn is None:
      tokens_BxWxT, score_BxW = predict.by_strategy(
        self.model,
        params,
        batch,
        rng,
        num_decodes,
        strategy=self._strategy,
        max_tokens=self._max_tokens,
      )
    else:
      tokens_BxWxT, score_BxW = predict.by_t5x(
        self.model,
        params,
        batch,
        num_decodes or 1,
        decode_fn=self.decode_fn,
        **{'decode_rng': rng, **(decoder_params or {})},
      )
    pad, vocabulary = self.model.special_tokens.pad, self.output_vocabulary
    if vocabulary.eos_id is not None and pad != vocabulary.pad_id:
      tokens_BxWxT = jnp.where(
        tokens_BxWxT == pad, vocabulary.eos_id, tokens_BxWxT
      )
    if return_all_decodes:
      return tokens_BxWxT, {'scores': score_BxW}
    return tokens_BxWxT[:, -1], {'scores': score_BxW[:, -1]}

  def _metrics(self, loss, sums, batch: Batch, train: bool) -> dict[str, Any]:
    """Under T5X's names where they are T5X's, and of every layer."""
    targets_BxL = batch['decoder_target_tokens']
    per_step = t5x_metrics.AveragePerStep
    rate = t5x_metrics.TimeRate.from_model_output
    rows, positions = targets_BxL.shape[0], targets_BxL.size
    parts = self._microbatches if train else 1
    average = clu.metrics.Average
    targets, means = sums['counts']['targets'], sums['means']
    measured = {
      'loss': per_step(total=loss),
      'cross_ent_loss': average(total=means['loss'].total, count=targets),
      'accuracy': average(total=sums['means']['accuracy'].total, count=targets),
      'non_padding_fraction/loss_weights': average(
        total=targets, count=jnp.float32(positions)
      ),
      'timing/seconds': t5x_metrics.Time(),
      'timing/steps_per_second': t5x_metrics.StepsPerTime.from_model_output(),
      'timing/seqs_per_second': rate(numerator=jnp.float32(rows)),
      'timing/target_tokens_per_second': rate(numerator=jnp.float32(positions)),
    }
    for name, value in sums['aux_losses'].items():
      measured[f'aux_losses/{name}'] = per_step(total=value / parts)
    return measured | metrics.of_layers(sums['layers'])


def _feature_converter(
  features: Text | TextToText,
  task_ids: bool,
  *,
  pack: bool = False,
  use_custom_packing_ops: bool = False,
):
  """Called as T5X calls a class of seqio's converters."""
  if use_custom_packing_ops:
    raise ValueError(
      "use_custom_packing_ops=True needs Google's own TensorFlow; set "
      'utils.DatasetConfig.use_custom_packing_ops = False.'
    )
  return features.seqio_converter(pack=pack, task_ids=task_ids)
