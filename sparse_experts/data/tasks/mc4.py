"""Multilingual C4, the corpus of mT5 (Xue et al. 2021), and of mSwitch.

  mc4_LANGUAGE    span corruption in one of 107 languages, such as mc4_en; '-'
                  becomes '_': mc4_ja_Latn
  mc4             all but those in Latin script that another one is written in,
                  mixed by examples with alpha = 0.3 (mT5, section 3.1)

Read through TFDS, which does not download C4: see `c4`. The vocabulary is
mT5's, 250,000 pieces.
"""

import seqio

from sparse_experts.data import mixing, preprocessors, vocabularies
from sparse_experts.data.tasks.benchmark import Source

TFDS_NAME = 'c4/multilingual:3.1.0'
ALPHA = 0.3
LANGUAGES = (
  'af', 'am', 'ar', 'az', 'be', 'bg', 'bg-Latn', 'bn', 'ca', 'ceb', 'co', 'cs',
  'cy', 'da', 'de', 'el', 'el-Latn', 'en', 'eo', 'es', 'et', 'eu', 'fa', 'fi',
  'fil', 'fr', 'fy', 'ga', 'gd', 'gl', 'gu', 'ha', 'haw', 'hi', 'hi-Latn',
  'hmn', 'ht', 'hu', 'hy', 'id', 'ig', 'is', 'it', 'iw', 'ja', 'ja-Latn', 'jv',
  'ka', 'kk', 'km', 'kn', 'ko', 'ku', 'ky', 'la', 'lb', 'lo', 'lt', 'lv', 'mg',
  'mi', 'mk', 'ml', 'mn', 'mr', 'ms', 'mt', 'my', 'ne', 'nl', 'no', 'ny', 'pa',
  'pl', 'ps', 'pt', 'ro', 'ru', 'ru-Latn', 'sd', 'si', 'sk', 'sl', 'sm', 'sn',
  'so', 'sq', 'sr', 'st', 'su', 'sv', 'sw', 'ta', 'te', 'tg', 'th', 'tr', 'uk',
  'ur', 'uz', 'vi', 'xh', 'yi', 'yo', 'zh', 'zh-Latn', 'zu',
)  # fmt: skip


def add_mc4_task(language: str, vocabulary: seqio.Vocabulary) -> seqio.Task:
  """Registers span corruption in one of LANGUAGES."""
  splits = {'train': language, 'validation': f'{language}-validation'}
  return seqio.TaskRegistry.add(
    'mc4_' + language.replace('-', '_'),
    source=Source(TFDS_NAME, splits=splits),
    preprocessors=preprocessors.from_text(preprocessors.span_corruption),
    output_features={
      feature: seqio.Feature(vocabulary) for feature in ('inputs', 'targets')
    },
    metric_fns=[],
  )


_tasks = {name: add_mc4_task(name, vocabularies.mt5()) for name in LANGUAGES}
mixing.add(
  'mc4',
  [task for name, task in _tasks.items() if not name.endswith('-Latn')],
  temperature=1 / ALPHA,
)
