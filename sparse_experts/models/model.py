"""Model: the one seam under every runner. init, loss, score, decode."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparse_experts import moe
from sparse_experts.data.special_tokens import SpecialTokens
from sparse_experts.letters import Array
from sparse_experts.models import auxiliary, policy_gradient
from sparse_experts.models.auxiliary import Totals
from sparse_experts.models.decoding import GREEDY, BeamSearch, Sampling
from sparse_experts.models.layout import LayerId
from sparse_experts.models.transformer import map_rows
from sparse_experts.moe.outputs import Aux

Batch = Mapping[str, Array]
Sums = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Model:
  """A module, and what its outputs mean.

      loss = CE + z_loss * mean log(Z)^2
             + sum over names w_name * (over layers) aux_name

  CE is a mean over target tokens, in nats. Routers that learn from reward have
  further auxiliary losses, 'policy' and 'value', see `policy_gradient.losses`.

  Attributes:
    module: maps batches to logits and Aux, see `language_model.LanguageModel`.
    loss_weights: weight of each auxiliary loss the routers return, by name.
    layer_reduction: auxiliary losses are combined over sparse layers by 'sum'
      (Mesh TF, so Switch and ST-MoE as published), 'mean' (flaxformer,
      MegaBlocks), or 'joint': the balance loss is of all tokens of a stack's
      layers together, whose f and P are averaged before they are multiplied;
      other losses are the mean over a stack's layers, and stacks add
      (transformers: Mixtral, OLMoE, Switch).
    balance_over: the tokens that f and P of the balance loss are means over.
      'group': each group of a layer, as routers return it (Mesh TF,
        DeepSeek-V3's sequences).
      'microbatch': what one forward pass sees, on all devices (transformers,
        MegaBlocks, Megatron: there, on one device); microbatches weigh alike.
      'batch': all tokens of a step (Qiu et al. 2025,
        https://arxiv.org/abs/2501.11873), exactly: with microbatches, a first
        forward pass over all of them, up to the last router, counts choices,
        with the same draws. It costs a third of a step at most, a quarter where
        remat makes a step of four passes.
      'batch_so_far': the step's microbatches up to this one, an approximation
        that costs nothing (their buffer; Megatron's `global_aux_loss`).
      'last_step': f of the step before and P of this one, an approximation
        that costs a state of E counts a layer.
      Without microbatches the three in the middle are one.
    z_loss: weight of log(Z)^2 of the output softmax (1e-4 in T5X).
    capacity_factor_train, capacity_factor_eval: of sparse layers; None drops
      nothing. Decoding always drops nothing.
    consistency: alpha of THOR (Zuo et al. 2021,
      https://arxiv.org/abs/2110.04260): above 0, training runs every batch
      twice with different draws, at twice the cost, and

          loss = loss_1 + loss_2 + alpha * (KL(p_1, p_2) + KL(p_2, p_1)) / 2,

      p the predictions and the last term a mean over target tokens.
    bias_rate: how far routers' balance biases move after each training step
      (`balance_bias.update_biases`); 0 for routers that have none.

  Example: docs/architecture.md builds and runs one; tests run that.
  """

  module: nn.Module
  loss_weights: Mapping[str, float] = dataclasses.field(
    default_factory=lambda: {'load_balance': 1e-2}
  )
  layer_reduction: str = 'sum'
  balance_over: str = 'group'
  z_loss: float = 0.0
  capacity_factor_train: float | None = 1.25
  capacity_factor_eval: float | None = 2.0
  consistency: float = 0.0
  bias_rate: float = 0.0

  def __post_init__(self):
    auxiliary.check(self.layer_reduction, self.balance_over)
    if self.consistency and self.balance_over not in ('group', 'microbatch'):
      raise ValueError(
        f'balance_over={self.balance_over!r} is of one pass over a batch, and '
        f'consistency={self.consistency} makes two: set consistency=0, or '
        "balance_over='group' or 'microbatch'."
      )

  @property
  def converter(self) -> str:
    """Which of seqio's feature converters makes the batches."""
    return self.module.converter

  @property
  def special_tokens(self) -> SpecialTokens:
    """Which token ids are padding, an end, a decoder's first input."""
    return self.module.special_tokens

  def target_weights(self, batch: Batch) -> Array:
    """How much each target counts, float32 [B, L]."""
    weights_BxL = batch.get('decoder_loss_weights')
    if weights_BxL is None:
      weights_BxL = self.special_tokens.is_token(batch['decoder_target_tokens'])
    return weights_BxL.astype(jnp.float32)

  def init(self, rng: Array, shapes: Mapping[str, jax.ShapeDtypeStruct]):
    """Boxed parameters (with axis names) for batches of these shapes.

    Under `jax.eval_shape` it costs nothing at any size; under `jax.jit` with
    out_shardings the parameters are created where they live.
    """
    batch = {k: jnp.zeros(v.shape, v.dtype) for k, v in shapes.items()}
    return self.module.init(rng, batch)['params']

  def loss(
    self,
    params,
    batch: Batch,
    rng: Array | None = None,
    *,
    train: bool,
    step: Array | None = None,
    totals: Totals | None = None,
  ) -> tuple[Array, Sums]:
    """The training objective and sums that metrics are read from.

    Args:
      params: unboxed parameters.
      batch: features; `decoder_loss_weights` says which targets count.
      rng: for dropout, jitter and noise; required in training.
      train: training's capacity, policies and dropout, or evaluation's.
      step: int32 training step, for routers with a schedule.
      totals: what losses are divided by, the batch's own by default. A
        microbatch is given the mean of all, so that the mean over microbatches
        is the whole batch's loss.

    Returns:
      Scalar loss; sums (see `summary`), which add over batches. Of two passes
      they are the mean, with an auxiliary loss 'consistency' added. 'balance',
      among the sums, is what `counts` returns.
    """
    if totals is None:
      totals = self.totals(batch)
    one_pass = functools.partial(
      self._one_pass,
      params,
      batch,
      train=train,
      step=step,
      totals=totals,
    )
    if not (train and self.consistency):
      loss, sums, _ = one_pass(rng)
      return loss, sums
    loss_1, sums_1, logits_1 = one_pass(jax.random.fold_in(rng, 0))
    loss_2, sums_2, logits_2 = one_pass(jax.random.fold_in(rng, 1))
    weights_BxL = self.target_weights(batch)
    divergence = (_symmetric_kl(logits_1, logits_2) * weights_BxL).sum()
    divergence /= auxiliary.or_one(totals.targets)
    sums = jax.tree.map(lambda a, b: (a + b) / 2, sums_1, sums_2)
    sums['aux_losses']['consistency'] = divergence
    return loss_1 + loss_2 + self.consistency * divergence, sums

  def _one_pass(
    self, params, batch: Batch, rng: Array | None, *, train, step, totals
  ) -> tuple[Array, Sums, Array]:
    """Loss, sums and logits of one pass, as `loss` describes them."""
    logits_BxLxV, auxes = self._apply(
      params,
      batch,
      train=train,
      rng=rng,
      step=step,
      factor=self.capacity_factor_train if train else self.capacity_factor_eval,
    )
    weights_BxL = self.target_weights(batch)
    log_probs_BxL, log_z_BxL, correct_BxL = _read(
      logits_BxLxV, batch['decoder_target_tokens']
    )
    num_targets = auxiliary.or_one(totals.targets)
    cross_entropy = -(log_probs_BxL * weights_BxL).sum()
    square_z = (jnp.square(log_z_BxL) * weights_BxL).sum()
    counted = auxiliary.counts(auxes)
    auxes = auxiliary.of_layers(auxes, self.balance_over, totals)
    auxes = policy_gradient.losses(
      auxes,
      batch,
      log_probs_BxL,
      weights_BxL,
      num_targets,
      special_tokens=self.special_tokens,
    )
    self._check_weights(auxes)
    aux_losses = auxiliary.over_layers(
      auxes, self.layer_reduction, self.balance_over, totals
    )
    loss = (cross_entropy + self.z_loss * square_z) / num_targets
    for name, value in aux_losses.items():
      loss += self.loss_weights.get(name, 0.0) * value
    sums = {
      'batches': jnp.float32(1),
      'targets': weights_BxL.sum(),
      'cross_entropy': cross_entropy,
      'correct': (correct_BxL * weights_BxL).sum(),
      'aux_losses': aux_losses,
      'layers': {name: aux.metrics for name, aux in auxes.items()},
      'balance': counted,
    }
    return loss, sums, logits_BxLxV

  def totals(self, batch: Batch) -> Totals:
    """What the losses of a batch are divided by."""
    weights_BxL = self.target_weights(batch)
    return Totals(
      targets=weights_BxL.sum(),
      tokens={
        stack: mask.sum().astype(jnp.float32)
        for stack, mask in self.module.masks(batch).items()
      },
    )

  def counts(
    self, params, batch: Batch, rng: Array | None = None, *, step=None
  ) -> dict[str, moe.losses.Balance]:
    """Which experts training would choose for a batch, by sparse layer.

    A forward pass with the draws of `loss`; arguments as there.
    """
    _, auxes = self._apply(
      params,
      batch,
      train=True,
      rng=rng,
      step=step,
      factor=self.capacity_factor_train,
    )
    return auxiliary.counts(auxes)

  def score(
    self, params, batch: Batch, *, capacity_factor: float | None = None
  ) -> Array:
    """Log-probability of each row's targets, float32 [B].

    Exact by default: nothing is dropped, so a row's score does not depend on
    its neighbours. A capacity_factor scores as the papers evaluate.
    """
    logits_BxLxV, _ = self._apply(
      params, batch, train=False, factor=capacity_factor
    )
    log_probs_BxL, _, _ = _read(logits_BxLxV, batch['decoder_target_tokens'])
    return (log_probs_BxL * self.target_weights(batch)).sum(-1)

  def logits(self, params, batch: Batch) -> Array:
    """Exact logits [B, L, V]: nothing is dropped; zeros where no target is.

    Args:
      params: unboxed parameters.
      batch: features. Without `decoder_target_tokens` every position counts.
        Tokens of a decoder alone may be called `tokens`; `encoder_mask` may be
        added, 0 where an input is to be ignored.
    """
    batch = {name: jnp.asarray(value) for name, value in batch.items()}
    if 'tokens' in batch:
      batch['decoder_input_tokens'] = batch.pop('tokens')
    pad = self.special_tokens.pad
    if 'encoder_mask' in batch:
      batch['encoder_input_tokens'] = jnp.where(
        batch.pop('encoder_mask') > 0, batch['encoder_input_tokens'], pad
      )
    any_token_BxL = jnp.full_like(batch['decoder_input_tokens'], pad + 1)
    targets_BxL = batch.setdefault('decoder_target_tokens', any_token_BxL)
    logits_BxLxV, _ = self._apply(params, batch, train=False, factor=None)
    return logits_BxLxV * self.special_tokens.is_token(targets_BxL)[..., None]

  def record(
    self,
    params,
    batch: Batch,
    rng: Array | None = None,
    *,
    train: bool = False,
    step: Array | None = None,
  ) -> dict[str, moe.Record]:
    """What every sparse layer does with every token, by layer.

    Args:
      params: unboxed parameters.
      batch: features. Tokens of 'encoder/...' are its `encoder_input_tokens`,
        of 'decoder/...' its `decoder_input_tokens`.
      rng, step: as in `loss`.
      train: at training's capacity, with its draws, or at evaluation's.
    """
    _, auxes = self._apply(
      params,
      batch,
      train=train,
      rng=rng,
      step=step,
      factor=self.capacity_factor_train if train else self.capacity_factor_eval,
      record=True,
    )
    return {name: aux.record for name, aux in auxes.items()}

  def decode(
    self,
    params,
    batch: Batch,
    keys_B: Array | None = None,
    *,
    max_tokens: int,
    strategy: Sampling | BeamSearch = GREEDY,
  ) -> tuple[Array, Array]:
    """Answers to inputs or prompts, with a cache and without capacity.

    Args:
      params: unboxed parameters.
      batch: `encoder_input_tokens`; for a decoder alone `decoder_input_tokens`
        with `decoder_causal_attention` marking the prompt.
      keys_B: a key per row, for sampling above temperature 0.
      max_tokens: T, tokens written at most.
      strategy: how tokens are chosen; greedy by default.

    Returns:
      tokens [B, T], padded after EOS, and their log-probabilities [B]; of a
      beam search of width N, tokens [B, N, T], the best first, and scores
      [B, N].
    """
    prompt = 1
    if self.converter == 'decoder':
      prompt = batch['decoder_input_tokens'].shape[1]
    logits_BxV, variables = self.module.apply(
      {'params': params},
      batch,
      prompt + max_tokens,
      method='start',
      mutable=['cache'],
    )

    def step(cache, tokens_B):
      logits_BxV, variables = self.module.apply(
        {'params': params, 'cache': cache},
        tokens_B,
        method='step',
        mutable=['cache'],
      )
      return variables['cache'], logits_BxV

    return strategy(
      logits_BxV,
      step,
      variables['cache'],
      keys_B,
      max_tokens=max_tokens,
      map_rows=map_rows,
      special_tokens=self.special_tokens,
    )

  def _apply(
    self, params, batch, *, train, factor, rng=None, step=None, record=False
  ):
    return self.module.apply(
      {'params': params},
      batch,
      step=step,
      capacity_factor=factor,
      deterministic=not train,
      record=record,
      rngs=None if rng is None else {'dropout': rng},
    )

  def _check_weights(self, auxes: Mapping[str, Aux]) -> None:
    """Raises ValueError if a weighed loss is no router's."""
    there = {name for aux in auxes.values() for name in aux.losses}
    unknown = set(self.loss_weights) - there
    if auxes and unknown:
      raise ValueError(
        f'loss_weights names {sorted(unknown)}, which no router returns; they '
        f'return {sorted(there)}.'
      )


def summary(sums: Sums) -> dict[str, Any]:
  """Metrics from the sums of `Model.loss`, added over any number of batches.

  Returns:
    loss: nats per target token; accuracy; one mean per auxiliary loss; layers:
    name -> `moe.summary` of that layer.
  """
  targets = max(float(sums['targets']), 1.0)
  return {
    'loss': float(sums['cross_entropy']) / targets,
    'accuracy': float(sums['correct']) / targets,
    'targets': float(sums['targets']),
    **{
      name: float(value) / float(sums['batches'])
      for name, value in sums['aux_losses'].items()
    },
    'layers': {
      name: moe.summary(layer)
      for name, layer in sorted(
        sums['layers'].items(), key=lambda item: LayerId.parse(item[0])
      )
    },
  }


def _read(logits_BxLxV: Array, targets_BxL: Array):
  """Log-probability of the target, log Z and whether argmax hits, [B, L]."""
  logits_BxLxV = logits_BxLxV.astype(jnp.float32)
  log_z_BxL = jax.nn.logsumexp(logits_BxLxV, -1)
  # One-hot, not a lookup: its gradient is no scatter and shards over V.
  onehot_BxLxV = jax.nn.one_hot(
    targets_BxL, logits_BxLxV.shape[-1], dtype=jnp.float32
  )
  target_BxL = (logits_BxLxV * onehot_BxLxV).sum(-1)
  correct_BxL = jnp.argmax(logits_BxLxV, -1) == targets_BxL
  return target_BxL - log_z_BxL, log_z_BxL, correct_BxL


def _symmetric_kl(logits_1: Array, logits_2: Array) -> Array:
  """(KL(p_1, p_2) + KL(p_2, p_1)) / 2 of the softmax of logits, [B, L].

  References:
    Zuo et al. 2021, `symmetric_KL_loss` of their code, `translation_thor.py`.
  """
  log_1, log_2 = (
    jax.nn.log_softmax(logits.astype(jnp.float32))
    for logits in (logits_1, logits_2)
  )
  return 0.5 * ((jnp.exp(log_1) - jnp.exp(log_2)) * (log_1 - log_2)).sum(-1)
