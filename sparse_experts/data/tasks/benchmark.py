"""A benchmark as a row: its source, its text, its metrics.

    Benchmark(
      'glue_rte', 'glue/rte:2.0.0',
      inputs='rte sentence1: {sentence1} sentence2: {sentence2}',
      options=('entailment', 'not_entailment'), metrics=(metrics.accuracy,),
    )

Everything else about a task follows from the row: see `add`. A template's
{field} is a field of the source's examples, {outer/inner} of a nested one; {{
and }} are braces.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import seqio
import tensorflow as tf

from sparse_experts.data import metrics, preprocessors
from sparse_experts.data.tasks import arrays

NO_LABEL = '<unk>'  # The target of a test split without labels, as in T5.


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """What is asked, what is answered, and how answers are judged.

  Attributes:
    name: of the task.
    source: TFDS name with its version, or any source of seqio.
    inputs: template.
    targets: template; where it is empty, the next two say what to write.
    options: templates of the answers to choose from, or the field that lists
      them, or a function that returns one of these when data is first read.
      Without `answers`, the target, and what metrics see, is the one with index
      `label`.
    label: field; where it is empty, the index of `targets` among the options.
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
      an example says so. With a `label` and `targets`, which are then no
      option, they are not ranked, and an example does not have it.
    shots: examples in a prompt of the few-shot setting, see `data.few_shot`.
    splits: of the source, if it is a TFDS name; or their names there, by ours.
  """

  name: str
  source: str | seqio.DataSource
  inputs: str
  targets: str = ''
  options: str | tuple[str, ...] | Callable[[], str | tuple[str, ...]] = ()
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
  source = source_of(benchmark)
  features = {
    feature: seqio.Feature(vocabulary, add_eos=benchmark.ends)
    for feature in ('inputs', 'targets')
  }
  # Of a source in memory positions are small; those of TFDS stay as they were.
  in_memory = isinstance(source, arrays.ArraySource)
  tokenize = preprocessors if in_memory else seqio.preprocessors
  steps = [
    functools.partial(as_text, benchmark=benchmark),
    *([ask] if ask else []),
    functools.partial(tokenize.tokenize, copy_pretokenized=True),
  ]
  if arrays.is_python(vocabulary) and ask is None:
    source, steps = arrays.TokenSource(source, steps[0], features), []
  end = seqio.preprocessors.append_eos_after_trim
  # A source that shuffles completely needs no buffer, which checkpoints hold.
  shuffles = source.performs_internal_shuffling
  return seqio.TaskRegistry.add(
    benchmark.name,
    source=source,
    preprocessors=[*steps, end if benchmark.ends else keep_end],
    output_features=features,
    metric_fns=list(benchmark.metrics),
    postprocess_fn=functools.partial(_judged, benchmark),
    **({'shuffle_buffer_size': None} if shuffles else {}),
  )


def source_of(benchmark: Benchmark) -> seqio.DataSource:
  """What a benchmark's examples are read from."""
  if isinstance(benchmark.source, seqio.DataSource):
    return benchmark.source
  return Source(benchmark.source, splits=benchmark.splits)


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
  source = source_of(benchmark)
  return as_text(source.get_dataset(split, shuffle=False), benchmark)


def as_text(dataset: tf.data.Dataset, benchmark: Benchmark) -> tf.data.Dataset:
  """Examples of text by the row's templates."""
  dataset = benchmark.prepare(dataset) if benchmark.prepare else dataset
  templates = benchmark.options
  templates = templates() if callable(templates) else templates

  def texts(example):
    result: dict[str, Any] = {'inputs': fill(benchmark.inputs, example)}
    if templates:
      if isinstance(templates, str):
        options = field(example, templates)
      else:
        options = tf.stack([fill(t, example) for t in templates])
      result['options'] = options
      if not (benchmark.label and benchmark.targets):  # Which are no option.
        result['normalise'] = benchmark.normalise
    if benchmark.answers:
      answers = field(example, benchmark.answers)
      result['answers'] = answers
      result['targets'] = tf.concat([answers, [NO_LABEL]], 0)[0]
    elif templates and benchmark.label:
      label = tf.cast(field(example, benchmark.label), tf.int32)
      result['label'] = label
      known = (label >= 0) & (label < tf.size(options))
      result['targets'] = tf.where(
        known, tf.gather(options, tf.where(known, label, 0)), NO_LABEL
      )
    if benchmark.targets:
      result['targets'] = fill(benchmark.targets, example)
    if templates and not benchmark.label:
      is_it = tf.equal(options, result['targets'])
      known = tf.reduce_any(is_it)
      result['label'] = tf.where(known, tf.argmax(is_it, 0, tf.int32), -1)
    if benchmark.group:
      result['group'] = fill(benchmark.group, example)
    return result

  return dataset.map(texts, num_parallel_calls=tf.data.AUTOTUNE)


def fill(template: str, example: Mapping) -> tf.Tensor:
  """A template with the example's fields in their places."""
  texts, names = split(template)
  values = [_text(field(example, name)) for name in names]
  return tf.strings.join([texts[0], *itertools.chain(*zip(values, texts[1:]))])


def split(template: str) -> tuple[list[str], list[str]]:
  """The texts between a template's fields, and the names of the fields.

  >>> split('q: {question} a: {{{answer}}}')
  (['q: ', ' a: {', '}'], ['question', 'answer'])

  Raises:
    ValueError: a brace has no other.
  """
  texts, names = [''], []
  for part in re.split(r'(\{\{|\}\}|\{[^{}]+\})', template):
    if re.fullmatch(r'\{[^{}]+\}', part):
      names.append(part[1:-1])
      texts.append('')
    elif part in ('{{', '}}'):
      texts[-1] += part[0]
    elif '{' in part or '}' in part:
      raise ValueError(
        f'{template!r} has a brace without its other; a field is {{field}}, '
        'and {{ and }} are braces.'
      )
    else:
      texts[-1] += part
  return texts, names


def field(example: Mapping, path: str) -> Any:
  """The field of that name, or at `outer/inner`."""
  if path in example:
    return example[path]
  for name in path.split('/'):
    example = example[name]
  return example


def _text(value: tf.Tensor) -> tf.Tensor:
  return value if value.dtype == tf.string else tf.strings.as_string(value)


def _judged(benchmark, text, example: Any = None, is_target=False):
  """What metrics see of a target or a prediction."""
  if not is_target:
    return benchmark.read(text, example) if benchmark.read else text
  if benchmark.answers:
    text = [tf.compat.as_text(a) for a in example['answers']] or [NO_LABEL]
  elif 'label' in example and 0 <= example['label'] < len(example['options']):
    text = tf.compat.as_text(example['options'][example['label']])
  if benchmark.group:
    return metrics.Member(tf.compat.as_text(example['group']), text)
  return text
