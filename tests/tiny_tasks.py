"""A task of sums, in bytes: no corpus and no vocabulary file."""

import seqio
import tensorflow as tf

from sparse_experts.data import metrics, mixing, vocabularies


class Sums(seqio.FunctionDataSource):
  """'3+4' -> '7': 80 for training, the 20 with a larger first term held out."""

  digest = 'sums of two digits'

  def __init__(self):
    super().__init__(self._examples, splits=('train', 'validation'))

  def _examples(self, split, shuffle_files, seed=None):
    first = range(8, 10) if split == 'validation' else range(8)
    sums = [(f'{a}+{b}', f'{a + b}') for a in first for b in range(10)]
    inputs, targets = zip(*sums)
    return tf.data.Dataset.from_tensor_slices(
      {'inputs': list(inputs), 'targets': list(targets)}
    )


seqio.TaskRegistry.add(
  'tiny_sums',
  source=Sums(),
  preprocessors=[
    seqio.preprocessors.tokenize,
    seqio.preprocessors.append_eos_after_trim,
  ],
  output_features={
    feature: seqio.Feature(vocabularies.byte())
    for feature in ('inputs', 'targets')
  },
  metric_fns=[metrics.accuracy],
)


@seqio.map_over_dataset
def with_options(example):
  """The sums that there are, of which one is right."""
  return {
    **example,
    'options': [str(i) for i in range(19)],
    'label': tf.strings.to_number(example['targets'], tf.int32),
    'normalise': False,
  }


_sums = seqio.TaskRegistry.get('tiny_sums')
seqio.TaskRegistry.add(
  'tiny_choices',
  source=_sums.source,
  preprocessors=[with_options, *_sums.preprocessors],
  output_features=_sums.output_features,
  metric_fns=[metrics.accuracy],
)
mixing.add(
  'tiny_mixture', [_sums, seqio.TaskRegistry.get('tiny_choices')], 'equal'
)
