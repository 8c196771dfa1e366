"""Which tokens an expert is for: domains, spelling, vocabulary.

References:
  Zoph et al. 2022 (ST-MoE), https://arxiv.org/abs/2202.08906, section 7.
  Muennighoff et al. 2024 (OLMoE), https://arxiv.org/abs/2409.02060, section 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sparse_experts.insight.records import Records
from sparse_experts.insight.routing import Matrix, chosen, experts, is_padding
from sparse_experts.insight.token_classes import CLASSES, classify
from sparse_experts.models.layout import LayerId
from sparse_experts.moe import Record


def share_by_label(
  record: Record, label_BxL: np.ndarray, names: Sequence[str]
) -> Matrix:
  """Of the tokens with each label, the share that chose each expert.

  N_{e, label} / N_label of OLMoE, sections 5.3 and 5.4, over all K choices, so
  a row sums to the mean number of choices; by chance an entry is that over E.

  Args:
    record: of a layer.
    label_BxL: indices of `names`; others and padding are left out.
    names: of the labels. Those without a token have no row.
  """
  counts_RxE, tokens_R = _count_labels(record, label_BxL, len(names))
  seen = np.flatnonzero(tokens_R).tolist()
  return Matrix(
    tuple(names[i] for i in seen),
    experts(record),
    counts_RxE[seen] / tokens_R[seen, None],
  )


def by_domain(records: Records, layer: str) -> Matrix:
  """Domain specialisation of a layer (OLMoE, section 5.3): rows are domains.

  Raises:
    ValueError: the records know no domains.
  """
  domain_BxL = records.domains.get(_stack(layer))
  if domain_BxL is None:
    raise ValueError(
      'these records know no domains: record a task that does, such as '
      'docs_span_corruption, or batches with task ids.'
    )
  return share_by_label(
    records.layers[layer],
    domain_BxL,
    records.domain_names or list(map(str, range(domain_BxL.max() + 1))),
  )


def by_class(records: Records, layer: str) -> Matrix:
  """Specialisation by spelling: rows are `token_classes.CLASSES`."""
  return share_by_label(
    records.layers[layer], _classes(records, layer), CLASSES
  )


def by_token(records: Records, layer: str, least: int = 8) -> Matrix:
  """Vocabulary specialisation of a layer (OLMoE, section 5.4).

  Rows are the tokens that occur at least so often, the most frequent first.

  Args:
    records: of a split.
    layer: its name.
    least: occurrences of a token.
  """
  tokens_BxL = records.tokens[_stack(layer)]
  size = int(tokens_BxL.max()) + 1
  record = records.layers[layer]
  counts_VxE, tokens_V = _count_labels(record, tokens_BxL, size)
  order = np.argsort(-tokens_V, kind='stable')
  order = order[tokens_V[order] >= max(least, 1)]
  return Matrix(
    tuple(piece(records, layer, i) for i in order),
    experts(record),
    counts_VxE[order] / tokens_V[order, None],
  )


def vocabulary_specialisation(
  records: Records, layer: str, least: int = 8
) -> float:
  """How far a token's identity decides its expert, from k / E (not) to 1.

  The mean over tokens of the vocabulary that occur at least so often of the
  share that goes to the most frequent expert of each.

  Args:
    records, layer, least: as of `by_token`.
  """
  values_VxE = by_token(records, layer, least).values
  return float(values_VxE.max(1).mean()) if len(values_VxE) else 0.0


def row_entropy(matrix: Matrix) -> dict[str, float]:
  """Entropy in nats of each row over its columns (ST-MoE, Table 14).

  log(E) is routing that does not care, 0 is one expert.
  """
  total = matrix.values.sum(1, keepdims=True)
  share = matrix.values / np.where(total, total, 1)
  terms = share * np.log(np.where(share > 0, share, 1))
  return dict(zip(matrix.rows, (-terms.sum(1)).tolist()))


class Expert(NamedTuple):
  """What one expert is fed; see `expert_table`."""

  expert: int
  load: float
  label: str
  tokens: tuple[str, ...]


def expert_table(records: Records, layer: str, tokens: int = 8) -> list[Expert]:
  """What each expert of a layer is fed (ST-MoE, Tables 13 and 15).

  Its `tokens` are those that say most about it, by their terms in the
  divergence of its tokens from all tokens,

      p(token | expert) log(p(token | expert) / p(token)),

  and its `label` is the class (`token_classes`) with the largest such term, ''
  where no class has more than its share.

  Args:
    records: of a split.
    layer: its name.
    tokens: of each expert, at most.
  """
  record = records.layers[layer]
  ids_BxL = records.tokens[_stack(layer)]
  counts_VxE, _ = _count_labels(record, ids_BxL, int(ids_BxL.max()) + 1)
  counts_RxE, _ = _count_labels(record, _classes(records, layer), len(CLASSES))
  load_E = counts_VxE.sum(0) / max(counts_VxE.sum(), 1)
  terms_VxE, terms_RxE = _divergence(counts_VxE), _divergence(counts_RxE)
  result = []
  for e in range(record.num_experts):
    kind = terms_RxE[:, e].argmax()
    best = np.argsort(-terms_VxE[:, e], kind='stable')[:tokens]
    result.append(
      Expert(
        expert=e,
        load=float(load_E[e]),
        label=CLASSES[kind] if terms_RxE[kind, e] > 0 else '',
        tokens=tuple(
          piece(records, layer, i) for i in best if terms_VxE[i, e] > 0
        ),
      )
    )
  return result


def piece(records: Records, layer: str, token_id: int) -> str:
  """The text of a token; its number where that is not recorded.

  Args:
    records: that have the texts, by stack.
    layer: one of their layers: what tokens are is its stack's.
    token_id: of that stack's tokens.
  """
  pieces = records.pieces.get(_stack(layer), {})
  return pieces.get(int(token_id), str(token_id))


def _stack(layer: str) -> str:
  return LayerId.parse(layer).stack


def _classes(records: Records, layer: str) -> np.ndarray:
  """The class of each token, an index of `CLASSES`."""
  ids_BxL = records.tokens[_stack(layer)]
  unique, inverse = np.unique(ids_BxL, return_inverse=True)
  kinds = [CLASSES.index(classify(piece(records, layer, i))) for i in unique]
  return np.array(kinds)[inverse].reshape(ids_BxL.shape)


def _count_labels(
  record: Record, label_BxL: np.ndarray, num_labels: int
) -> tuple[np.ndarray, np.ndarray]:
  """Tokens of each label that chose each expert [R, E], and all of it [R]."""
  counts_BxL = ~is_padding(record) & (label_BxL >= 0) & (label_BxL < num_labels)
  label_I = label_BxL[counts_BxL]
  counts_RxE = np.zeros((num_labels, record.num_experts))
  np.add.at(counts_RxE, label_I, chosen(record)[counts_BxL])
  return counts_RxE, np.bincount(label_I, minlength=num_labels)


def _divergence(counts_RxE: np.ndarray) -> np.ndarray:
  """Terms p(r | e) log(p(r | e) / p(r)) of each label r and expert e."""
  total_E, total_R = counts_RxE.sum(0), counts_RxE.sum(1)
  of_expert_RxE = counts_RxE / np.maximum(total_E, 1)
  of_all_Rx1 = (total_R / max(total_R.sum(), 1))[:, None]
  ratio_RxE = of_expert_RxE / np.where(of_all_Rx1 > 0, of_all_Rx1, 1)
  return of_expert_RxE * np.log(np.where(ratio_RxE > 0, ratio_RxE, 1))
