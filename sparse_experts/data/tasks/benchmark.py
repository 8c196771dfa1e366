"""A benchmark as a row: its source in TFDS, its text, its metrics.

    Benchmark(
      'glue_rte', 'glue/rte:2.0.0',
      inputs='rte sentence1: {sentence1} sentence2: {sentence2}',
      options=('entailment', 'not_entailment'), metrics=(metrics.accuracy,),
    )

Everything else about a task follows from the row: see `add`. A template's
{field} is a field of the source's examples, {outer/inner} of a nested one.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence

import seqio
import tensorflow as tf

from sparse_experts.data import metrics

NO_LABEL = '<unk>'  # The target of a test split without labels, as in T5.


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """What is asked, what is answered, and how answers are judged.

  Attributes:
    name: of the task.
    source: TFDS name with its version.
    inputs: template.
    targets: template; where it is empty, the next two say what to write.
    options: templates of the answers to choose from, or the field that lists
      them. Without `answers`, the target, and what metrics see, is the one with
      index `label`.
    label: field.
    answers: field that lists good answers; the target is the first, and
      metrics see all.
    group: template, equal for examples that are judged together.
    metrics: seqio metrics, see `data.metrics`.
    prepare: dataset -> dataset, before the templates, for sources whose fields
      are not what is asked.
    read: (prediction, example) -> text that metrics compare.
    ends: texts end with the end of sequence, and too long ones lose their end,
      as T5's. Where not, targets continue inputs, as a decoder does, which lose
      their beginning: the question is at their end.
    normalise: options are ranked by log-probability per token, not in total;
      an example says so. With `targets`, which are no option, they are not
      ranked, and an example does not have it.
    shots: examples in a prompt of the few-shot setting, see `data.few_shot`.
    splits: of the source; or their names there, by ours.
  """

  name: str
  source: str
  inputs: str
  targets: str = ''
  options: str | tuple[str, ...] = ()
  label: str = 'label'
  answers: str = ''
  group: str = ''
  metrics: tuple[Callable, ...] = ()
  prepare: Callable[[tf.data.Dataset], tf.data.Dataset] | None = None
  read: Callable[[str, Mapping], str] | None = None
  ends: bool = True
  normalise: bool = True
  shots: int = 0
  splits: Sequence[str] | Mapping[str, str] = ('train', 'validation', 'test')


class Source(seqio.TfdsDataSource):
  """TFDS data that is prepared; where it is not, one line says what to do.

  TFDS itself would try to download it, in each process of a run.
  """

  def __init__(self, name: str, splits: Sequence[str] | Mapping[str, str]):
    super().__init__(name, splits=splits, read_only=True)

  def get_dataset(self, split=None, *args, **kwargs):
    try:
      return super().get_dataset(split, *args, **kwargs)
    except (AssertionError, ValueError, OSError) as error:
      name = self.tfds_dataset.name
      raise FileNotFoundError(
        f'split {split!r} of {name} is not in '
        f'{self.tfds_dataset.builder.data_dir}; prepare it by `tfds build '
        f'{name}`, or point $TFDS_DATA_DIR at where it is.'
      ) from error


ROWS: dict[str, Benchmark] = {}  # Of registered tasks, by name.


def add(
  benchmark: Benchmark,
  vocabulary: seqio.Vocabulary,
  ask: Callable[..., tf.data.Dataset] | None = None,
) -> seqio.Task:
  """Registers a benchmark as a task.

  Its examples have the features 'inputs' and 'targets', their texts, and where
  the row has them, 'options' (texts), 'normalise', 'label' (index), 'answers'
  (texts) and 'group' (text).

  Args:
    benchmark: the row. `dataclasses.replace` makes another of it.
    vocabulary: of inputs and targets.
    ask: a further preprocessor, of the texts.
  """
  ROWS[benchmark.name] = benchmark
  return seqio.TaskRegistry.add(
    benchmark.name,
    source=Source(benchmark.source, splits=benchmark.splits),
    preprocessors=[
      functools.partial(as_text, benchmark=benchmark),
      *([ask] if ask else []),
      functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=True),
      seqio.preprocessors.append_eos_after_trim if benchmark.ends else keep_end,
    ],
    output_features={
      feature: seqio.Feature(vocabulary, add_eos=benchmark.ends)
      for feature in ('inputs', 'targets')
    },
    metric_fns=list(benchmark.metrics),
    postprocess_fn=functools.partial(_judged, benchmark),
  )


def keep_end(
  dataset: tf.data.Dataset, sequence_length: Mapping[str, int] | None
) -> tf.data.Dataset:
  """A seqio preprocessor: of inputs that are too long, the last tokens."""
  length = (sequence_length or {}).get('inputs')
  if not length:
    return dataset
  return dataset.map(lambda e: {**e, 'inputs': e['inputs'][-length:]})


def texts(benchmark: Benchmark, split: str) -> tf.data.Dataset:
  """The texts of a split, in order."""
  source = Source(benchmark.source, splits=benchmark.splits)
  return as_text(source.get_dataset(split, shuffle=False), benchmark)


def as_text(dataset: tf.data.Dataset, benchmark: Benchmark) -> tf.data.Dataset:
  """Examples of text by the row's templates."""
  dataset = benchmark.prepare(dataset) if benchmark.prepare else dataset

  def texts(example):
    result = {'inputs': fill(benchmark.inputs, example)}
    if benchmark.options:
      if isinstance(benchmark.options, str):
        options = field(example, benchmark.options)
      else:
        options = tf.stack([fill(t, example) for t in benchmark.options])
      result['options'] = options
      if not benchmark.targets:  # Which are no option.
        result['normalise'] = benchmark.normalise
    if benchmark.answers:
      answers = field(example, benchmark.answers)
      result['answers'] = answers
      result['targets'] = tf.concat([answers, [NO_LABEL]], 0)[0]
    elif benchmark.options:
      label = tf.cast(field(example, benchmark.label), tf.int32)
      result['label'] = label
      known = (label >= 0) & (label < tf.size(options))
      result['targets'] = tf.where(
        known, tf.gather(options, tf.where(known, label, 0)), NO_LABEL
      )
    if benchmark.targets:
      result['targets'] = fill(benchmark.targets, example)
    if benchmark.group:
      result['group'] = fill(benchmark.group, example)
    return result

  return dataset.map(texts, num_parallel_calls=tf.data.AUTOTUNE)


def fill(template: str, example: Mapping) -> tf.Tensor:
  """A template with the example's fields in their places."""
  parts = re.split(r'\{([^{}]+)\}', template)
  return tf.strings.join(
    [_text(field(example, p)) if i % 2 else p for i, p in enumerate(parts)]
  )


def field(example: Mapping, path: str):
  """The field at `outer/inner`."""
  for name in path.split('/'):
    example = example[name]
  return example


def _text(value: tf.Tensor) -> tf.Tensor:
  return value if value.dtype == tf.string else tf.strings.as_string(value)


def _judged(benchmark, text, example=None, is_target=False):
  """What metrics see of a target or a prediction."""
  if not is_target:
    return benchmark.read(text, example) if benchmark.read else text
  if benchmark.answers:
    text = [tf.compat.as_text(a) for a in example['answers']] or [NO_LABEL]
  elif benchmark.options and 0 <= example['label'] < len(example['options']):
    text = tf.compat.as_text(example['options'][example['label']])
  if benchmark.group:
    return metrics.Member(tf.compat.as_text(example['group']), text)
  return text
