"""What docs/own_data.md shows, from the files to answers."""

import json
import random
import re
import shlex
import subprocess
import sys

import command
import documents
import pytest
from command import run
from paths import ROOT

from sparse_experts.insight import records, specialisation

PAGE = ROOT / 'docs/own_data.md'
# The same commands on a model and a batch that take seconds.
TINY = [
  f'--gin.{binding}'
  for binding in (
    *('EMBED_DIM=16', 'HEAD_DIM=8', 'NUM_HEADS=2', 'MLP_DIM=32'),
    *('BATCH_SIZE=16', 'EVAL_BATCHES=2', 'LOG_PERIOD=10', 'EVAL_PERIOD=100'),
    *('TRAIN_STEPS=30', 'CHECKPOINT_PERIOD=100', 'BASE_LEARNING_RATE=0.3'),
  )
]
LENGTHS = {
  'text': "--gin.TASK_FEATURE_LENGTHS={'inputs': 32, 'targets': 12}",
  'rows': "--gin.TASK_FEATURE_LENGTHS={'inputs': 24, 'targets': 4}",
}


def commands():
  """The words of each command of the page, in order."""
  blocks = re.findall(r'```sh\n(.*?)```', PAGE.read_text(), re.DOTALL)
  lines = '\n'.join(blocks).replace('\\\n', ' ').splitlines()
  return [shlex.split(line) for line in lines if line]


def made(name, *beside):
  """The page's command whose words have these, tiny."""
  (words,) = [
    words
    for words in commands()
    if name in words and all(b in ' '.join(words) for b in beside)
  ]
  lengths = LENGTHS['text' if 'text_file' in ' '.join(words) else 'rows']
  return [*words[words.index(name) :], *TINY, lengths]


def succeed(*arguments):
  outcome = run(*arguments)
  assert outcome.code == 0, outcome.stderr
  return outcome


@pytest.fixture
def folder(python_folder, monkeypatch):
  """The current folder, with a chapter, and reviews of which a word tells."""
  monkeypatch.chdir(python_folder)
  pages = ('finetuning', 'training', 'pods')
  chapter = ''.join((ROOT / f'docs/{p}.md').read_text() for p in pages)
  (python_folder / 'chapter.txt').write_text(chapter, newline='\r\n')
  draw = random.Random(0)
  words = re.findall(r'[a-z]{3,}', chapter)
  rows = ['\ufefftext,label']
  for i in range(400):
    label, mood = (('negative', 'dull'), ('positive', 'fine'))[i % 2]
    rows.append(f'"{mood}, {" ".join(draw.sample(words, 3))}\n!",{label}')
  (python_folder / 'reviews.csv').write_text('\n'.join(rows), newline='\r\n')
  return python_folder


@pytest.mark.slow
def test_a_table_from_file_to_answers(folder, forget_new_tasks):
  train = made('train', 'csv.gin')
  outcome = succeed(*train)
  assert 'reviews.csv: examples' in outcome.stderr
  config = (folder / 'runs/reviews/config.gin').read_text()
  assert "FILES = {'train': 'reviews.csv'}" in config
  assert '@own_files.task()' in config
  # What the page says of a file of one's own is the same run.
  page = re.search(r"```\n(include 'gin/quick.*?)```", PAGE.read_text(), re.S)
  (folder / 'reviews.gin').write_text(page[1])
  ours = ['--gin_file=reviews.gin', *TINY, LENGTHS['rows']]
  outcome = succeed('train', *ours, '--gin.TRAIN_STEPS=60')
  assert 'resumed at step 30' in outcome.stderr
  ranked = succeed(*made('evaluate', 'csv.gin'), '--json')
  results = json.loads(ranked.stdout)
  (ranking,) = results['ranking'].values()
  assert ranking['examples'] > 10
  assert results['calibration'] and 'accuracy' in results['task_metrics']
  written = [*made('evaluate', 'csv.gin'), '--gin.RANK_OPTIONS=False', '--json']
  assert 'accuracy' in json.loads(succeed(*written).stdout)['task_metrics']
  answers = json.loads(succeed(*made('infer', 'csv.gin'), '--json').stdout)
  targets = {answer['targets'].removesuffix('</s>') for answer in answers}
  assert targets <= {'negative', 'positive'}
  assert answers[0]['inputs'].startswith('classify: ')
  recorded = json.loads(succeed('record', *ours, '--json').stdout)
  found = records.load(recorded['path'])
  for layer, facts in recorded['layers'].items():
    table = specialisation.expert_table(found, layer)
    assert [tuple(row['tokens']) for row in facts['experts']] == [
      expert.tokens for expert in table
    ]
  succeed('report', 'runs/reviews')
  with open('reviews.csv', 'a') as file:
    file.write('\nfine,positive')
  refused = run('train', *ours, '--gin.TRAIN_STEPS=61')
  assert refused.code == 2 and "have corpus {'csv_reviews" in refused.stderr
  assert refused.stderr.count('\nerror') + refused.stderr.count('Trace') == 1


@pytest.mark.slow
def test_a_text_from_file_to_answers(folder, forget_new_tasks):
  for words in commands():
    if words[1].startswith('scripts'):
      words = [sys.executable, ROOT / words[1], *words[2:]]
      subprocess.run(words, check=True)
  given = ['--gin.VOCABULARY=mine.model', '--gin.NUM_EMBEDDINGS=600']
  train = [*made('train', 'text_file'), *given]
  assert 'chapter.txt: examples' in succeed(*train).stderr
  assert 'resumed' in succeed(*train, '--gin.TRAIN_STEPS=40').stderr
  infer = [*made('infer', 'text_file'), *given]
  answers = json.loads(succeed(*infer, '--json').stdout)
  assert '<extra_id_0>' in answers[0]['inputs']
  refused = run(*train, '--gin.NUM_EMBEDDINGS=599')
  assert refused.code == 2
  assert 'has 600 token ids, but the model embeds only 599' in refused.stderr
  lm = [word for word in train if 'FILES' in word]
  outcome = succeed(
    *('train', command.TINY, '--gin_file=gin/tasks/text_file.gin', *lm),
    *('--gin.VOCABULARY=bytes', "--gin.TASK_FEATURE_LENGTHS={'targets': 32}"),
    *('--gin.MODEL_DIR=runs/lm', '--gin.TRAIN_STEPS=2'),
  )
  assert 'held-out loss' in outcome.stdout


@pytest.mark.slow
def test_a_module_of_ones_own(folder, forget_new_tasks):
  (block,) = documents.blocks(PAGE)
  (folder / 'my_tasks.py').write_text(block)
  outcome = succeed(*made('train', 'my_tasks'), '--gin.TRAIN_STEPS=2')
  assert 'held-out loss' in outcome.stdout
