"""GLaM's 29 benchmarks (Du et al. 2022, section 5.1), each with its metric.

  glam_*                    8 that are written (NLG), 21 with options (NLU)
  glam_nlg, glam_nlu, glam  mixtures of them

29 tables that are read side by side: hence its 375 lines.

All have a split 'validation', which stands for the test split where a source
has no other that is labelled, and where the paper asks it. `shots` are GPT-3's
(Brown et al. 2020, appendix H, table H.1, column K), which GLaM's are.

GLaM ranks options by log-probability over number of tokens; ReCoRD's and COPA's
by log-probability. The prompts are this project's, in the manner of GPT-3's
appendix G, as the paper prints none. GPT-3 and GLaM score Winograd schemata by
what follows the pronoun; here options are the noun and what follows. QuAC comes
without the dialogue before the question, which TFDS has not. DROP's, QuAC's and
CoQA's F1 are SQuAD's.

Decoders that are trained on targets alone continue a text: neither questions
nor answers end with the end of sequence, too long inputs lose their beginning,
and a written answer goes on, with shots as if with the next example. Metrics
see it up to a newline or 'Q:', of LAMBADA the first word. As T5's vocabulary
has no newlines, a next example that begins otherwise (SQuAD 2.0, DROP, QuAC,
CoQA) is not cut off before its 'Q:'. Beams are scored with all that they wrote.
"""

import re
from collections.abc import Mapping

import seqio
import tensorflow as tf

from sparse_experts.data import few_shot, metrics, mixing, vocabularies
from sparse_experts.data.tasks import finetuning, glue
from sparse_experts.data.tasks.benchmark import Benchmark, add

NO_ANSWER = 'unanswerable'

# Sources as they are asked.


@seqio.map_over_dataset
def answer_or_none(example):
  """SQuAD 2.0: 'answers', which is NO_ANSWER where there is none."""
  texts = example['answers']['text']
  none = tf.fill([tf.cast(tf.size(texts) == 0, tf.int32)], NO_ANSWER)
  return {**example, 'answers': tf.concat([texts, none], 0)}


@seqio.map_over_dataset
def last_word(example):
  """LAMBADA: a passage without its last word, and the word."""
  text = tf.strings.strip(example['passage'])
  return {
    'passage': tf.strings.regex_replace(text, r'\s+\S+$', ''),
    'word': tf.strings.regex_replace(text, r'^(.|\n)*\s', ''),
  }


@seqio.map_over_dataset
def all_answers(example):
  """DROP: the answer, and what validators wrote."""
  answers = tf.concat([[example['answer']], example['validated_answers']], 0)
  return {**example, 'answers': answers}


def turns(dataset: tf.data.Dataset) -> tf.data.Dataset:
  """CoQA: a question, after those before it with their answers."""

  def split(example):
    answers = example['answers']['input_text']
    number = tf.minimum(tf.size(example['questions']), tf.size(answers))
    asked = tf.strings.join(['Q: ', example['questions'][:number], '\nA:'])
    said = tf.strings.join([asked, ' ', answers[:number], '\n'])
    return tf.data.Dataset.range(tf.cast(number, tf.int64)).map(
      lambda i: {
        'text': tf.strings.join([
          example['story'], '\n', tf.strings.reduce_join(said[:i]), asked[i]
        ]),
        'answers': answers[i : i + 1],
      }
    )  # fmt: skip

  return dataset.flat_map(split)


def questions(dataset: tf.data.Dataset) -> tf.data.Dataset:
  """RACE: one question of an article."""

  def split(example):
    article, letters = example['article'], tf.constant(list('ABCD'))
    columns = [example[name] for name in ('questions', 'options', 'answers')]
    rows = tf.data.Dataset.zip(
      *map(tf.data.Dataset.from_tensor_slices, columns)
    )
    return rows.map(
      lambda question, options, answer: {
        'article': article,
        'question': question,
        'options': tf.convert_to_tensor(options),
        'label': _index(letters, answer),
      }
    )

  return dataset.flat_map(split)


@seqio.map_over_dataset
def schema(example):
  """Winograd schemata: 'options' are the noun and what follows the pronoun."""
  letters = tf.strings.unicode_split(example['text'], 'UTF-8')
  rest = tf.strings.reduce_join(letters[example['pronoun_end'] :])
  nouns = [example['option1'], example['option2']]
  return {
    'before': tf.strings.reduce_join(letters[: example['pronoun_start']]),
    'options': tf.strings.join([nouns, rest]),
    'label': example['label'],
  }


@seqio.map_over_dataset
def blank(example):
  """WinoGrande: 'options' are the noun and what follows the blank."""
  parts = tf.concat([tf.strings.split(example['sentence'], '_'), ['']], 0)
  nouns = [example['option1'], example['option2']]
  return {
    'before': parts[0],
    'options': tf.strings.join([nouns, parts[1]]),
    'label': example['label'],
  }


@seqio.map_over_dataset
def entities(example):
  """ReCoRD: 'options' are the entity and what follows the placeholder."""
  parts = tf.concat(
    [tf.strings.split(example['query'], '@placeholder'), ['']], 0
  )
  return {
    'before': tf.strings.join([example['passage'], '\n', parts[0]]),
    'options': tf.strings.join([example['entities'], parts[1]]),
    'answers': tf.strings.join([example['answers'], parts[1]]),
  }


@seqio.map_over_dataset
def from_zero(example):
  """StoryCloze, whose labels are 1 and 2."""
  return {**example, 'label': example['label'] - 1}


@seqio.map_over_dataset
def because(example):
  """COPA: the premise without its stop, and 'because' or 'so'."""
  is_cause = tf.equal(example['question'], 'cause')
  premise = tf.strings.regex_replace(example['premise'], r'\.$', '')
  word = tf.where(is_cause, ' because', ' so')
  return {**example, 'premise': tf.strings.join([premise, word])}


def _index(values: tf.Tensor, value: tf.Tensor) -> tf.Tensor:
  """Where `value` is among `values`; -1 where it is not."""
  is_it = tf.equal(values, value)
  return tf.where(tf.reduce_any(is_it), tf.argmax(is_it), -1)


# What is read of written answers.


def before_next(text: str, example: Mapping) -> str:
  """An answer without the next example.

  >>> before_next('Paris Q: Who wrote Emma? A: Jane Austen', {})
  'Paris'
  """
  return re.split(r'\n|\bQ:', text.strip(), maxsplit=1)[0].strip()


def first_word(text: str, example: Mapping) -> str:
  """LAMBADA: a word without what follows it.

  >>> first_word("Zoë's. Then", {})
  "Zoë's"
  """
  found = re.match(r"[\w'-]*\w", text.strip())
  return found[0] if found else ''


# The rows.


def _only(metric, name):
  """The number of a metric that the paper prints."""

  def one(targets, predictions):
    return {name: metric(targets, predictions)[name]}

  return (one,)


_ACCURACY = (metrics.accuracy,)
_EM = _only(metrics.squad, 'em')
_F1 = _only(metrics.squad, 'f1')
_QA = 'Q: {question}\nA:'
_NLI = '{premise}\nquestion: {hypothesis} true, false or neither?\nanswer:'
_TRAIN_VALIDATION = ('train', 'validation')
_DEV = {'train': 'train', 'validation': 'dev'}
_TEST = {'train': 'train', 'validation': 'test'}
_DEV_SHOTS = {'shots': 'validation', 'validation': 'test'}


def _nlg(name, source, inputs, **more):
  more = {'read': before_next, **more}
  return Benchmark(name, source, inputs, ends=False, **more)


def _nlu(name, source, inputs, options, splits=None, **more):
  more = {'metrics': _ACCURACY, 'shots': 32, **more}
  if splits:
    more['splits'] = splits
  return Benchmark(name, source, inputs, options=options, ends=False, **more)


def _arc(name, config):
  return _nlu(
    name, f'ai2_arc/{config}:1.0.0', 'Question: {question}\nAnswer:',
    'choices/text', prepare=finetuning.listed_choices, shots=50,
  )  # fmt: skip


def _race(name, config):
  return _nlu(
    name, f'race/{config}:2.0.0', '{article}\n' + _QA, 'options',
    {**_DEV, 'test': 'test'}, prepare=questions, shots=10,
  )  # fmt: skip


NLG = (
  _nlg(
    'glam_triviaqa', 'trivia_qa/unfiltered.nocontext:1.1.0', _QA,
    targets='{answer/value}', answers='answer/aliases',
    metrics=_only(metrics.trivia_qa, 'em'), shots=64,
  ),
  _nlg(
    'glam_nq', 'natural_questions_open:1.0.0', _QA, answers='answer',
    metrics=_EM, splits=_TRAIN_VALIDATION, shots=64,
  ),
  _nlg(
    'glam_webqs', 'web_questions:1.0.0', _QA, answers='answers', metrics=_EM,
    splits=_TEST, shots=64,
  ),
  _nlg(
    'glam_squadv2', 'squad/v2.0:3.0.0', '{title}\n{context}\n' + _QA,
    answers='answers', metrics=_F1, prepare=answer_or_none,
    splits=_TRAIN_VALIDATION, shots=16,
  ),
  _nlg(
    'glam_lambada', 'lambada:1.0.0', '{passage}', targets='{word}',
    metrics=_ACCURACY, prepare=last_word, read=first_word, splits=_DEV_SHOTS,
    shots=15,
  ),
  _nlg(
    'glam_drop', 'drop:2.0.0', '{passage}\n' + _QA, answers='answers',
    metrics=_F1, prepare=all_answers, splits=_DEV, shots=20,
  ),
  _nlg(
    'glam_quac', 'quac:1.0.0', '{title}: {section_title}\n{context}\n' + _QA,
    answers='answers/text', metrics=_F1, splits=_TRAIN_VALIDATION, shots=5,
  ),
  _nlg(
    'glam_coqa', 'coqa:1.0.0', '{text}', answers='answers', metrics=_F1,
    prepare=turns, splits=_TEST, shots=5,
  ),
)  # fmt: skip

NLU = (
  _nlu(
    'glam_hellaswag', 'hellaswag:1.1.0', '{activity_label}: {context}',
    'endings', shots=20,
  ),
  _nlu(
    'glam_storycloze', 'story_cloze/2016:1.0.0', '{context}', 'endings',
    _DEV_SHOTS, prepare=from_zero, shots=70,
  ),
  _nlu(
    'glam_winograd', 'wsc273:1.0.0', '{before}', 'options',
    {'validation': 'test'}, prepare=schema, shots=7,
  ),
  _nlu(
    'glam_winogrande', 'winogrande:1.2.0', '{before}', 'options',
    {'train': 'train_xl', 'validation': 'validation', 'test': 'test'},
    prepare=blank, shots=50,
  ),
  _nlu(
    'glam_piqa', 'piqa:1.0.0', 'Question: {goal}\nAnswer:',
    ('{sol1}', '{sol2}'), _TRAIN_VALIDATION, shots=50,
  ),
  _arc('glam_arc_e', 'ARC-Easy'),
  _arc('glam_arc_c', 'ARC-Challenge'),
  _nlu(
    'glam_openbookqa', 'openbookqa:0.1.0', '{question/stem}',
    tuple(f'{{question/choice_{letter}}}' for letter in 'ABCD'),
    label='answerKey', shots=100,
  ),
  _nlu(
    'glam_boolq', 'super_glue/boolq:1.0.2',
    '{passage}\nquestion: {question}?\nanswer:', ('no', 'yes'),
  ),
  _nlu(
    'glam_copa', 'super_glue/copa:1.0.2', '{premise}',
    ('{choice1}', '{choice2}'), prepare=because, normalise=False,
  ),
  _nlu(
    'glam_rte', 'super_glue/rte:1.0.2',
    '{premise}\nquestion: {hypothesis} True or False?\nanswer:',
    ('True', 'False'),
  ),
  _nlu(
    'glam_wic', 'super_glue/wic:1.0.2',
    "{sentence1}\n{sentence2}\nquestion: Is the word '{word}' used in the same "
    'sense in the two sentences above?\nanswer:', ('no', 'yes'),
  ),
  _nlu(
    'glam_multirc', 'super_glue/multirc:1.0.2',
    '{paragraph}\nquestion: {question}\nanswer: {answer}\nTrue or False?',
    ('False', 'True'), prepare=glue.without_markup,
    group='{idx/paragraph} {idx/question}',
    metrics=_only(metrics.multirc, 'f1a'),
  ),
  _nlu(
    'glam_wsc', 'super_glue/wsc.fixed:1.0.2',
    '{text}\nquestion: Does the pronoun "{span2_text}" between stars refer to '
    '"{span1_text}"?\nanswer:', ('no', 'yes'), prepare=glue.mark_pronoun,
  ),
  _nlu(
    'glam_record', 'super_glue/record:1.0.2', '{before}', 'options',
    answers='answers', metrics=_EM, prepare=entities, normalise=False,
  ),
  _nlu(
    'glam_cb', 'super_glue/cb:1.0.2', _NLI, ('true', 'false', 'neither')
  ),
  *(
    _nlu(
      f'glam_anli_r{i}', f'anli/r{i}:0.1.0',
      _NLI.replace('premise', 'context'), ('true', 'neither', 'false'),
      shots=50,
    )
    for i in (1, 2, 3)
  ),
  _race('glam_race_m', 'middle'),
  _race('glam_race_h', 'high'),
)  # fmt: skip


def averages(
  scores: Mapping[str, Mapping[str, float]],
) -> dict[str, float]:
  """The paper's averages: unweighted means over tasks of NLG, NLU and all 29.

  Args:
    scores: metrics of each task by its name, with shots or without; a group of
      which one is missing has no average.
  """
  scores = {few_shot.asked(name): found for name, found in scores.items()}
  groups = {'nlg': NLG, 'nlu': NLU, 'all': (*NLG, *NLU)}
  return {
    group: metrics.average({row.name: scores[row.name] for row in rows})
    for group, rows in groups.items()
    if all(row.name in scores for row in rows)
  }


_nlg_tasks = [add(row, vocabularies.t5()) for row in NLG]
_nlu_tasks = [add(row, vocabularies.t5()) for row in NLU]
mixing.add('glam_nlg', _nlg_tasks, 'equal')
mixing.add('glam_nlu', _nlu_tasks, 'equal')
mixing.add('glam', [*_nlg_tasks, *_nlu_tasks], 'equal')
