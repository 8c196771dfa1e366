"""Tasks that papers of sparse models fine-tune on, beside GLUE and SuperGLUE.

  squad                              reading, T5's text
  xsum, cnn_dailymail                summaries, T5's text
  anli_r1, anli_r2, anli_r3; anli    inference; the mixture of the three
  winogrande, arc_easy, arc_challenge    the text of an option
  closed_book_{web_questions,natural_questions,trivia_qa}
  wmt14_ende, wmt14_enfr, wmt16_enro     translation, T5's text

The texts of ANLI, WinoGrande and ARC are this project's, in T5's manner; those
of closed-book questions are T5's (Roberts et al. 2020). WMT's English-German
comes as WMT 14 was prepared for Tensor2Tensor.
"""

import seqio
import tensorflow as tf

from sparse_experts.data import metrics, mixing, vocabularies
from sparse_experts.data.tasks.benchmark import Benchmark, add

LANGUAGES = {'en': 'English', 'de': 'German', 'fr': 'French', 'ro': 'Romanian'}


@seqio.map_over_dataset
def spaced_punctuation(example):
  """SQuAD with spaces around punctuation, as T5 has it."""

  def spaced(text):
    text = tf.strings.regex_replace(text, r'([[:punct:]])', r' \1 ')
    return tf.strings.regex_replace(text, r'\s+', ' ')

  return {
    'question': spaced(example['question']),
    'context': spaced(example['context']),
    'answers': spaced(example['answers']['text']),
  }


def _anli(number):
  return Benchmark(
    f'anli_r{number}',
    f'anli/r{number}:0.1.0',
    inputs='anli hypothesis: {hypothesis} premise: {context}',
    options=('entailment', 'neutral', 'contradiction'),
    metrics=(metrics.accuracy,),
  )


def _arc(name, config):
  return Benchmark(
    f'arc_{name}',
    f'ai2_arc/{config}:1.0.0',
    inputs='arc question: {question} options: {options}',
    options='choices/text',
    metrics=(metrics.accuracy,),
    prepare=listed_choices,
  )


@seqio.map_over_dataset
def listed_choices(example):
  """ARC: all choices in 'options'; 'label', the index of the right one."""
  choices = example['choices']
  options = tf.strings.reduce_join(choices['text'], separator=', ')
  is_it = tf.equal(choices['label'], example['answerKey'])
  label = tf.where(tf.reduce_any(is_it), tf.argmax(is_it), -1)
  return {**example, 'options': options, 'label': label}


def _closed_book(name, source, question, answers, metric, splits, targets=''):
  return Benchmark(
    f'closed_book_{name}',
    source,
    inputs=question + ' question: {question}',
    targets=targets,
    answers=answers,
    metrics=(metric,),
    splits=splits,
  )


def _translation(name, source, to):
  return Benchmark(
    name,
    source,
    inputs=f'translate English to {LANGUAGES[to]}: {{en}}',
    targets=f'{{{to}}}',
    metrics=(metrics.bleu,),
  )


BENCHMARKS = (
  Benchmark(
    'squad',
    'squad/v1.1:3.0.0',
    inputs='question: {question} context: {context}',
    answers='answers',
    metrics=(metrics.squad,),
    prepare=spaced_punctuation,
    splits=('train', 'validation'),
  ),
  Benchmark(
    'xsum',
    'xsum:1.1.0',
    inputs='summarize: {document}',
    targets='{summary}',
    metrics=(metrics.rouge,),
  ),
  Benchmark(
    'cnn_dailymail',
    'cnn_dailymail:3.4.0',
    inputs='summarize: {article}',
    targets='{highlights}',
    metrics=(metrics.rouge,),
  ),
  *map(_anli, (1, 2, 3)),
  Benchmark(
    'winogrande',
    'winogrande:1.2.0',
    inputs='winogrande sentence: {sentence} options: {option1}, {option2}',
    options=('{option1}', '{option2}'),
    metrics=(metrics.accuracy,),
    splits={'train': 'train_xl', 'validation': 'validation', 'test': 'test'},
  ),
  _arc('easy', 'ARC-Easy'),
  _arc('challenge', 'ARC-Challenge'),
  _closed_book(
    'web_questions', 'web_questions:1.0.0', 'wq', 'answers', metrics.squad,
    ('train', 'test'),
  ),
  _closed_book(
    'natural_questions', 'natural_questions_open:1.0.0', 'nq', 'answer',
    metrics.squad, ('train', 'validation'),
  ),
  _closed_book(
    'trivia_qa', 'trivia_qa/unfiltered.nocontext:1.1.0', 'trivia_qa',
    'answer/aliases', metrics.trivia_qa, ('train', 'validation', 'test'),
    targets='{answer/value}',
  ),
  _translation('wmt14_ende', 'wmt_t2t_translate/de-en:1.0.0', 'de'),
  _translation('wmt14_enfr', 'wmt14_translate/fr-en:1.0.0', 'fr'),
  _translation('wmt16_enro', 'wmt16_translate/ro-en:1.0.0', 'ro'),
)  # fmt: skip

_tasks = {row.name: add(row, vocabularies.t5()) for row in BENCHMARKS}
mixing.add('anli', [_tasks[f'anli_r{i}'] for i in (1, 2, 3)])
