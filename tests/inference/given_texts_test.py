"""Texts without targets: what their decoder is given."""

import jax
import numpy as np
import pytest
import tiny_models

from sparse_experts import sharding
from sparse_experts.data.dataset import Dataset
from sparse_experts.data.prompts import Tokenized
from sparse_experts.inference import given_texts

EOS, T = 1, 8
DATASET = Dataset('tiny_sums', {'inputs': 12, 'targets': T}, batch_size=8)
ALONE, WITH_TARGETS = (
  Tokenized({}, dict.fromkeys(names, 'a'))
  for names in (('inputs',), ('inputs', 'targets'))
)


@pytest.mark.slow  # It compiles a decoder.
def test_an_encoder_decoder_reads_its_greedy_answer():
  model = tiny_models.make_model(layers=2, num_experts=4)
  batch = {
    name: np.array(x)
    for name, x in tiny_models.make_batch(rows=8, targets=T).items()
  }
  params = tiny_models.make_params(model, batch)
  # One text without targets, one with them, and six rows that fill up.
  for name, x in batch.items():
    x[2:] = 0
    if name.startswith('decoder'):
      x[0] = 0
  mesh = sharding.make_mesh(8, 1, 1)
  with sharding.use_mesh(mesh):
    (found,) = given_texts.answered(
      iter([batch]), [ALONE, WITH_TARGETS], model, params, mesh, DATASET
    )
  for name, x in batch.items():
    assert (found[name].dtype, found[name].shape) == (x.dtype, x.shape)
    np.testing.assert_array_equal(found[name][1:], x[1:], err_msg=name)
  answer_T = found['decoder_target_tokens'][0]
  answer = answer_T[: (answer_T > 0).sum()]
  assert len(answer) == T or answer[-1] == EOS
  assert EOS not in answer[:-1]
  # Each is the most probable token after those before it; padding is none.
  logits_BxTxV, _ = jax.jit(model.apply)(params, found)
  best_T = np.argmax(logits_BxTxV[0, :, 1:], -1) + 1
  np.testing.assert_array_equal(answer, best_T[: len(answer)])


def test_a_decoder_alone_reads_its_text():
  model = tiny_models.make_model(layers=2, encoder=False)
  batch = tiny_models.make_batch(encoder=False)
  found = given_texts.answered(
    iter([batch]), [ALONE], model, None, None, DATASET
  )
  assert [*found] == [batch]
