"""GLUE and SuperGLUE in T5's text (Raffel et al. 2020, appendix D).

  glue_*, super_glue_*           a task each; WNLI and WSC's training see below
  super_glue_*_1_sentinel        with a sentinel after the inputs and before the
                                 targets (ST-MoE, table 7)
  glue, super_glue               mixtures in proportion to tokens (Switch,
                                 section 4.2)
  super_glue_capped,             in proportion to examples, 65,536 at most
  super_glue_1_sentinel          (ST-MoE)

WSC is T5's: the pronoun is marked and the noun it stands for is written, so
only sentences with the right noun train (super_glue_wsc_train), and an answer
that has the noun's words counts as True (super_glue_wsc_eval). T5 trains on DPR
beside it, which is not here, and leaves out WNLI, as these mixtures do.
"""

import functools

import seqio
import tensorflow as tf

from sparse_experts.data import metrics, mixing, vocabularies
from sparse_experts.data.tasks.benchmark import Benchmark, add

MAXIMUM = 65536

_DETERMINERS = {
  *('a', 'an', 'each', 'every', 'few', 'her', 'his', 'many', 'much', 'my'),
  *('our', 'some', 'that', 'the', 'their', 'these', 'this', 'those', 'which'),
  *('whose', 'your'),
}

# Sources as they are asked.


@seqio.map_over_dataset
def rounded(example):
  """STS-B's 'label', from 0 to 5, as a text in steps of 0.2."""
  label = tf.round(example['label'] * 5) / 5
  return {**example, 'score': tf.strings.as_string(label, precision=1)}


@seqio.map_over_dataset
def without_markup(example):
  """MultiRC without its <b> and <br>."""

  def clean(text):
    text = tf.strings.regex_replace(text, '<br>', ' ')
    return tf.strings.regex_replace(text, '</?b>', '')

  texts = ('paragraph', 'question', 'answer')
  return {**example, **{name: clean(example[name]) for name in texts}}


def one_answer_each(dataset: tf.data.Dataset) -> tf.data.Dataset:
  """ReCoRD: an example for each of its 'answers'; highlights as sentences."""

  def split(example):
    passage = tf.strings.regex_replace(
      example['passage'], r'([.?!"\'])\n@highlight\n', r'\1 '
    )
    passage = tf.strings.regex_replace(passage, r'\n@highlight\n', '. ')
    entities = tf.strings.reduce_join(example['entities'], separator=', ')
    rest = {**example, 'passage': passage, 'entities': entities}
    none = tf.fill([tf.cast(tf.size(example['answers']) == 0, tf.int32)], '')
    answers = tf.concat([example['answers'], none], 0)
    return tf.data.Dataset.from_tensor_slices(answers).map(
      lambda answer: {**rest, 'answer': answer}
    )

  return dataset.flat_map(split)


@seqio.map_over_dataset
def mark_pronoun(example):
  """WSC's 'text' with stars around its pronoun."""
  words = tf.strings.split(example['text'], ' ')
  index = example['span2_index']
  pronoun = tf.strings.join(['*', example['span2_text'], '*'])
  words = tf.concat([words[:index], [pronoun], words[index + 1 :]], 0)
  return {**example, 'text': tf.strings.reduce_join(words, separator=' ')}


def right_nouns(dataset: tf.data.Dataset) -> tf.data.Dataset:
  """`mark_pronoun` of those whose noun is the one the pronoun stands for."""
  return mark_pronoun(dataset.filter(lambda example: example['label'] == 1))


def same_noun(prediction: str, example) -> str:
  """'True' where the words of prediction or noun are among the other's.

  >>> same_noun('The bunny', {'targets_pretokenized': b'fuzzy bunny'})
  'True'
  """

  def words(text):
    return set(text.strip().lower().split()) - _DETERMINERS

  noun = tf.compat.as_text(example['targets_pretokenized'])
  ours, theirs = words(prediction), words(noun)
  if not ours:
    return ''  # Wrong, whatever the label is.
  if not theirs:
    return 'False'
  # "Bob" is not "Bob's hat".
  same_owner = ("'" in prediction) == ("'" in noun)
  return str(same_owner and (ours <= theirs or theirs <= ours))


# The rows.

_ACCURACY = (metrics.accuracy,)
_SIMILARITY = (metrics.pearson, metrics.spearman)
_NLI = ('entailment', 'neutral', 'contradiction')
_RTE = ('entailment', 'not_entailment')
_YES_NO = ('False', 'True')
_CB = (functools.partial(metrics.macro_f1, classes=_NLI), metrics.accuracy)
_WSC = ('super_glue/wsc.fixed:1.0.2', 'wsc: {text}', '{span1_text}')


def _f1_and_accuracy(positive):
  return functools.partial(metrics.f1, positive=positive), metrics.accuracy


def _row(name, source, fields, options=(), measures=_ACCURACY, **more):
  """A row whose text is the config's name and the fields, in T5's order."""
  word = source.partition('/')[2].partition(':')[0]
  inputs = ' '.join([word, *(f'{f}: {{{f}}}' for f in fields.split())])
  return Benchmark(
    name, source, inputs, options=options, metrics=measures, **more
  )


GLUE = (
  _row(
    'glue_cola', 'glue/cola:2.0.0', 'sentence', ('unacceptable', 'acceptable'),
    (metrics.matthews,),
  ),
  _row('glue_sst2', 'glue/sst2:2.0.0', 'sentence', ('negative', 'positive')),
  _row(
    'glue_mrpc', 'glue/mrpc:2.0.0', 'sentence1 sentence2',
    ('not_equivalent', 'equivalent'), _f1_and_accuracy('equivalent'),
  ),
  _row(
    'glue_qqp', 'glue/qqp:2.0.0', 'question1 question2',
    ('not_duplicate', 'duplicate'), _f1_and_accuracy('duplicate'),
  ),
  _row(
    'glue_stsb', 'glue/stsb:2.0.0', 'sentence1 sentence2', (), _SIMILARITY,
    targets='{score}', prepare=rounded,
  ),
  _row(
    'glue_mnli', 'glue/mnli:2.0.0', 'hypothesis premise', _NLI,
    splits={
      'train': 'train', 'validation': 'validation_matched',
      'test': 'test_matched',
    },
  ),
  _row(
    'glue_mnli_mismatched', 'glue/mnli:2.0.0', 'hypothesis premise', _NLI,
    splits={
      'validation': 'validation_mismatched', 'test': 'test_mismatched',
    },
  ),
  _row('glue_qnli', 'glue/qnli:2.0.0', 'question sentence', _RTE),
  _row('glue_rte', 'glue/rte:2.0.0', 'sentence1 sentence2', _RTE),
)  # fmt: skip

SUPER_GLUE = (
  _row(
    'super_glue_boolq', 'super_glue/boolq:1.0.2', 'passage question', _YES_NO
  ),
  _row(
    'super_glue_cb', 'super_glue/cb:1.0.2', 'hypothesis premise',
    ('entailment', 'contradiction', 'neutral'), _CB,
  ),
  _row(
    'super_glue_copa', 'super_glue/copa:1.0.2',
    'choice1 choice2 premise question', ('choice1', 'choice2'),
  ),
  _row(
    'super_glue_multirc', 'super_glue/multirc:1.0.2',
    'question answer paragraph', _YES_NO, (metrics.multirc,),
    prepare=without_markup, group='{idx/paragraph} {idx/question}',
  ),
  _row(
    'super_glue_record', 'super_glue/record:1.0.2', 'query entities passage',
    (), (metrics.squad_by_group,), prepare=one_answer_each, targets='{answer}',
    answers='answers', group='{idx/passage} {idx/query}',
  ),
  _row('super_glue_rte', 'super_glue/rte:1.0.2', 'hypothesis premise', _RTE),
  _row(
    'super_glue_wic', 'super_glue/wic:1.0.2', 'sentence1 sentence2 word',
    _YES_NO,
  ),
  Benchmark(
    'super_glue_wsc_train', *_WSC, prepare=right_nouns, splits=('train',)
  ),
  Benchmark(
    'super_glue_wsc_eval', *_WSC, _YES_NO, metrics=_ACCURACY, read=same_noun,
    prepare=mark_pronoun, splits=('validation', 'test'),
  ),
)  # fmt: skip


def _with_sentinel(task: seqio.Task) -> seqio.Task:
  before = set(seqio.TaskRegistry.names())
  seqio.experimental.add_task_with_sentinels(task.name)
  (name,) = set(seqio.TaskRegistry.names()) - before
  return seqio.TaskRegistry.get(name)


_glue = [add(row, vocabularies.t5()) for row in GLUE]
_super_glue = [add(row, vocabularies.t5()) for row in SUPER_GLUE]

mixing.add('glue', _glue, 'tokens')
mixing.add('super_glue', _super_glue, 'tokens')
mixing.add('super_glue_capped', _super_glue, maximum=MAXIMUM)
mixing.add(
  'super_glue_1_sentinel',
  [_with_sentinel(task) for task in _super_glue],
  maximum=MAXIMUM,
)
