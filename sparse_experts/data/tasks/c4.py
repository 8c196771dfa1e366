"""Tasks on C4, the corpus of T5 (Raffel et al. 2020, section 2.2).

Read through TFDS, which does not download C4: prepare it once as its catalogue
says and point $TFDS_DATA_DIR at it. The vocabulary is T5's.

  c4_span_corruption  the objective of T5 and the Switch Transformer
  c4_prefix_lm        a text and its continuation; inputs and targets
  c4_lm               language modelling; targets only
"""

from collections.abc import Callable, Sequence

import seqio

from sparse_experts.data import preprocessors, vocabularies
from sparse_experts.data.tasks.benchmark import Source

TFDS_NAME = 'c4/en:3.1.0'


def add_c4_task(
  name: str,
  objective: Callable,
  vocabulary: seqio.Vocabulary,
  features: Sequence[str] = ('inputs', 'targets'),
  ends: bool = True,
) -> seqio.Task:
  """Registers a task on C4.

  Args:
    name: of the task.
    objective: one of `objectives`.
    vocabulary: of all features.
    features: what the objective yields.
    ends: they end as texts do, with EOS.
  """
  return seqio.TaskRegistry.add(
    name,
    source=Source(TFDS_NAME, splits=('train', 'validation')),
    preprocessors=preprocessors.from_text(objective),
    output_features=dict.fromkeys(
      features, seqio.Feature(vocabulary, add_eos=ends)
    ),
    metric_fns=[],
  )


add_c4_task(
  'c4_span_corruption', preprocessors.span_corruption, vocabularies.t5()
)
add_c4_task(
  'c4_prefix_lm', preprocessors.prefix_lm, vocabularies.t5(), ends=False
)
add_c4_task('c4_lm', preprocessors.lm, vocabularies.t5(), features=('targets',))
