"""BIG-bench's JSON tasks of multiple choice (Srivastava et al. 2022).

    {"examples": [{"input": "1 + 1 =", "target_scores": {"2": 1, "3": 0}}, ...],
     "example_input_prefix": "\\nQ: ", "example_output_prefix": "\\nA: ",
     "task_prefix": ""}

The last three are optional and have those values by default.
"""

from __future__ import annotations

import dataclasses
import json
import typing

from etils import epath

from sparse_experts import storage
from sparse_experts.data import host_tensorflow, metrics, vocabularies

if typing.TYPE_CHECKING:
  import seqio


@dataclasses.dataclass(frozen=True)
class Question:
  """A context, its options, and the index of the best of them."""

  context: str
  options: tuple[str, ...]
  label: int


_FILES: dict[str, str] = {}  # Of the tasks that `task` registered.


def read(file: epath.PathLike) -> list[Question]:
  """The questions of a file; of options with equal scores the first is best.

  Raises:
    FileNotFoundError: no such file.
    ValueError: it is no such JSON; the message says which example.
  """
  file = storage.given(file, 'BIG-bench')
  if not file.is_file():
    raise FileNotFoundError(
      f'no BIG-bench file {file}; give the path of a task.json.'
    )
  try:
    task = json.loads(file.read_bytes().decode())
    examples = task['examples']
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(
      f'{file} is no BIG-bench task ({error}); it is JSON in UTF-8 with '
      '"examples".'
    ) from error
  prefix = task.get('task_prefix', '')
  before = task.get('example_input_prefix', '\nQ: ')
  after = task.get('example_output_prefix', '\nA: ')
  questions = []
  for i, example in enumerate(examples):
    scores = example.get('target_scores') if isinstance(example, dict) else None
    if not isinstance(scores, dict) or not scores or 'input' not in example:
      raise ValueError(
        f'example {i} of {file} has no "input" or no "target_scores"; only '
        'tasks of multiple choice can be ranked.'
      )
    options = tuple(scores)
    label = options.index(max(options, key=scores.__getitem__))
    context = f'{prefix}{before}{example["input"]}{after}'
    questions.append(Question(context, options, label))
  if not questions:
    raise ValueError(f'{file} has no example; give a task that has some.')
  return questions


def task(
  file: epath.PathLike,
  vocabulary: seqio.Vocabulary | None = None,
  ends: bool = True,
) -> str:
  """Registers a file as a task with split 'test', and returns its name.

  The same file is the same task, so gin may call this where a task is named.

  Args:
    file: see `read`.
    vocabulary: T5's unless given.
    ends: see `tasks.benchmark`; False for decoders that continue a text.

  Raises:
    As `read`; ValueError where another is the task of that name.
  """
  tf = host_tensorflow.load()
  import seqio

  from sparse_experts.data.tasks import benchmark

  questions = read(file)
  path = epath.Path(file)
  stem = path.parent.name if path.stem == 'task' else path.stem
  name = 'bigbench_' + ''.join(c if c.isalnum() else '_' for c in stem)
  where = f'{path.absolute()} with ends={ends}'
  if name in seqio.TaskRegistry.names():
    if _FILES.get(name) != where:
      raise ValueError(
        f'there is a task {name!r} already, from {_FILES.get(name)}; rename '
        'the folder of one of them.'
      )
    return name
  _FILES[name] = where

  def examples(split, shuffle_files, seed=None):
    return tf.data.Dataset.from_generator(
      lambda: (
        {
          'inputs': q.context,
          'targets': q.options[q.label],
          'options': q.options,
          'label': q.label,
          'normalise': False,
        }
        for q in questions
      ),
      output_signature={
        'inputs': tf.TensorSpec([], tf.string),
        'targets': tf.TensorSpec([], tf.string),
        'options': tf.TensorSpec([None], tf.string),
        'label': tf.TensorSpec([], tf.int32),
        'normalise': tf.TensorSpec([], tf.bool),
      },
    )

  features = ('inputs', 'targets')
  vocabulary = vocabulary or vocabularies.t5()
  seqio.TaskRegistry.add(
    name,
    source=seqio.FunctionDataSource(
      examples,
      splits=('test',),
      num_input_examples={'test': len(questions)},
    ),
    preprocessors=[
      seqio.preprocessors.tokenize,
      seqio.preprocessors.append_eos_after_trim if ends else benchmark.keep_end,
    ],
    output_features={
      f: seqio.Feature(vocabulary, add_eos=ends) for f in features
    },
    metric_fns=[metrics.accuracy],
  )
  return name
