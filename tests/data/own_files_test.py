"""Files of one's own as tasks: splits, options, positions, vocabularies."""

import collections
import csv
import json
import os

import jax
import numpy as np
import pytest
import seqio

from sparse_experts.data import (
  mixing,
  own_files,
  streams,
  tasks,
  token_text,
  vocabularies,
)
from sparse_experts.data.features.text import Text, TextToText
from sparse_experts.data.special_tokens import NO_TOKEN, SpecialTokens
from sparse_experts.data.tasks.file_source import FileSource

pytestmark = pytest.mark.usefixtures('forget_new_tasks')

LENGTHS = {'inputs': 24, 'targets': 12}


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """The current folder, with 60 reviews."""
  monkeypatch.chdir(tmp_path)
  write('a.csv', [(i, f'film {i}', ('bad', 'good')[i % 2]) for i in range(60)])
  return tmp_path


def write(name, rows, header=('id', 'text', 'label')):
  with open(name, 'w', newline='') as file:
    csv.writer(file).writerows([header, *rows])


def task(files='a.csv', *, format='csv', vocabulary='bytes', **more):
  """The name of a task of files, of train unless they say."""
  files = files if isinstance(files, dict) else {'train': files}
  given = {'inputs': 'review: {text}', 'targets': '{label}', **more}
  return own_files.task(files, format, vocabulary=vocabulary, **given)


def examples(name, split='train'):
  found = tasks.find(name).get_dataset(
    LENGTHS, split, shuffle=False, try_in_mem_cache=False
  )
  return list(found.as_numpy_iterator())


def texts(name, split='train'):
  return [
    (e['inputs_pretokenized'].decode(), e['targets_pretokenized'].decode())
    for e in examples(name, split)
  ]


def test_a_table_is_a_task(folder):
  name = task({'train': 'a.csv', 'validation': 'b.csv'})
  write('b.csv', [('8', '{braces}, "quotes"', 'good')])
  assert name.startswith('csv_a_')
  assert texts(name, 'validation') == [('review: {braces}, "quotes"', 'good')]
  train = examples(name)
  assert len(train) == 60
  encode = vocabularies.byte().encode
  assert train[1]['inputs'].tolist() == [*encode('review: film 1'), 1]
  assert train[1]['targets'].tolist() == [*encode('good'), 1]
  assert train[1]['options'].tolist() == [b'bad', b'good']
  assert [e['label'] for e in train[:3]] == [0, 1, 0]
  assert tasks.find(name).num_input_examples('train') == 60


def test_templates(folder):
  write('b.csv', [('1', 'a', '{x}'), ('2', 'b', 'y')] * 2)
  name = task('b.csv', inputs='{{{id}}} {text}', targets='<{label}>')
  found = {t for split in ('train', 'validation') for t in texts(name, split)}
  assert found == {('{1} a', '<{x}>'), ('{2} b', '<y>')}
  (folder / 'c.jsonl').write_text(
    '{"a": {"b": 1.50}, "answer": true, "wrong": [1, "no"], "all": [true, 2]}\n'
    '{"a": {"b": "x"}, "answer": 2, "wrong": [3, "no"], "all": [true, 2]}\n'
  )
  given = {'format': 'jsonl', 'inputs': '{a/b}', 'targets': '{answer}'}
  files = {'test': 'c.jsonl'}
  name = task(files, options='all', **given)
  assert texts(name, 'test') == [('1.50', 'true'), ('x', '2')]
  assert [e['label'] for e in examples(name, 'test')] == [0, 1]
  name = task(files, options=('true', '{answer}'), **given)
  assert examples(name, 'test')[1]['options'].tolist() == [b'true', b'2']


def test_a_share_is_held_out(folder, capsys):
  rows = [(i % 50, f'film {i % 50}', 'good') for i in range(150)]
  write('a.csv', rows)
  name = task()
  held_out, kept = texts(name, 'validation'), texts(name)
  assert len(held_out) + len(kept) == 150
  assert held_out and not set(held_out) & set(kept)  # Equal rows stay together.
  said = capsys.readouterr().err
  assert f'a.csv: examples {len(kept)} in train, {len(held_out)} in val' in said
  write('b.csv', [*reversed(rows), (99, 'film 99', 'bad')])
  moved = set(texts(task('b.csv'), 'validation')) - {('review: film 99', 'bad')}
  assert moved == set(held_out)
  # Of few rows one is; one row is too few.
  write('c.csv', [(1, 'a', 'x'), (2, 'b', 'y')])
  assert len(texts(task('c.csv'), 'validation')) == 1
  write('d.csv', [(1, 'a', 'x')])
  with pytest.raises(ValueError, match='d.csv has 1 different example'):
    texts(task('d.csv'))


def test_equal_objects_stay_together_however_they_are_written(folder):
  rows = [f'"text": "film {i}", "label": 1' for i in range(60)]
  other = [f'"label":1,   "text":"film {i}"' for i in range(60)]
  (folder / 'a.jsonl').write_text(''.join(f'{{{r}}}\n' for r in rows + other))
  held_out = texts(task('a.jsonl', format='jsonl'), 'validation')
  counts = collections.Counter(held_out)
  assert counts and set(counts.values()) == {2}


def labels(*values):
  return [(i, f'film {i}', value) for i, value in enumerate(values)]


def test_options(folder, capsys):
  def options(rows, **more):
    write('b.csv', rows)
    more = {'vocabulary': 'bytes', **more}
    example = examples(task({'train': 'b.csv', 'validation': 'a.csv'}, **more))
    return [t.decode() for t in example[0].get('options', ())]

  assert options(labels('good', 'bad', 'bad', 'bad')) == ['bad', 'good']
  assert options(labels('good', 'bad'), options=('bad', 'good'))
  assert options(labels('good', 'bad') * 2, options=()) == []
  # As many examples as twice the options; at most 100; at least 2.
  assert not options(labels('good', 'bad', 'x'))
  assert not options(labels(*map(str, range(101))) * 2)
  assert len(options(labels(*map(str, range(100))) * 2)) == 100
  assert not options(labels('good', 'good'))
  # What train has not.
  capsys.readouterr()
  name = task({'train': 'b.csv', 'validation': 'a.csv'})
  write('b.csv', labels('good', 'fine') * 2)
  name = task({'train': 'b.csv', 'validation': 'a.csv'})
  (bad, *_) = examples(name, 'validation')
  assert bad['label'] == -1 and bad['targets_pretokenized'] == b'bad'
  said = capsys.readouterr().err
  assert '30 of 60 targets in validation are none of the 2 options' in said
  assert 'a.csv:2' in said
  with pytest.raises(ValueError, match=r"a.csv:3: TARGETS is 'good', which is"):
    examples(task('a.csv', options=('bad', 'fine')))


@pytest.mark.parametrize(
  'given,message',
  [
    ({'files': {}}, "must say where each split is, such as {'train'"),
    ({'files': {'train': ()}}, r"FILES\['train'\] = \(\) must be a path"),
    ({'files': {'train': 3}}, r"FILES\['train'\] = 3 must be a path"),
    ({'files': {'my train': 'a.csv'}}, "the split 'my train'; a split is a"),
    ({'format': 'tsv'}, "format has 'tsv'; did you mean 'csv'?"),
    ({'inputs': '{text'}, "INPUTS: '{text' has a brace without its other"),
    ({'inputs': 3}, 'INPUTS has 3, which is no text'),
    ({'targets': 'label'}, "TARGETS = 'label' has no {field}"),
    ({'metrics': ('acuracy',)}, "did you mean 'accuracy'?"),
    ({'metrics': 'accuracy'}, r"METRICS are several: write \('accuracy',\)"),
    ({'metrics': ('f1',)}, r"'f1' needs 'positive': write METRICS = \(@metr"),
    ({'metrics': ('squad',)}, "'squad' judges several answers"),
    ({'options': ('a', 'b', 'a')}, "'b', 'a'\\) has one twice"),
    ({'vocabulary': 'http://a/b.model'}, "VOCABULARY has 'http://a/b.model'"),
    ({'vocabulary': '/dev/zero'}, 'VOCABULARY has /dev/zero, a pipe or a de'),
    ({'options': 'all'}, "OPTIONS = 'all' names a list, which CSV has none"),
    ({'vocabulary': 'byte'}, "VOCABULARY = 'byte' is no file, and none of"),
    ({'vocabulary': 'a.csv'}, 'neither a SentencePiece .model nor a'),
    ({'vocabulary': 'bad.model'}, 'bad.model is no SentencePiece model'),
  ],
)  # fmt: skip
def test_wrong_arguments(given, message, folder):
  (folder / 'bad.model').write_text('a')
  with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
    task(**given)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  'files,message',
  [
    ('b.csv', "'b.csv' is no file and matches none; paths are relative to"),
    ({'train': '*.csv', 'test': 'a.csv'}, 'is in FILES twice, in train and in'),
    ('http://a/b.csv', "FILES has 'http://a/b.csv': files are read from the"),
    ('file:///b.csv', 'or from gs://, not file://; copy it here first'),
    ('/dev/zero', 'FILES has /dev/zero, a pipe or a device'),
    ('pipe', 'pipe, a pipe or a device, and such files are read more than'),
    ('pip?', 'pipe, a pipe or a device, and such files are read more than'),
    ('empty.csv', 'empty.csv is empty'),
    ('header.csv', 'header.csv has no row'),
    ('other.csv', "other.csv:1 has no column 'text'"),
  ],
)
def test_wrong_files(files, message, folder):
  """They are an error when they are read."""
  os.mkfifo(folder / 'pipe')
  for name, text in (('empty', ''), ('header', 'text,label\n'), ('other', 'x')):
    (folder / f'{name}.csv').write_text(text)
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    examples(task(files))


def test_a_file_is_one_however_it_is_spelt(folder):
  (folder / 'link.csv').symlink_to(folder / 'a.csv')
  os.link(folder / 'a.csv', folder / 'hard.csv')
  spelt = (folder / 'a.csv', f'../{folder.name}/a.csv')
  for other in (*spelt, 'link.csv', 'hard.csv'):
    with pytest.raises(ValueError, match='is in FILES twice, in train and in'):
      examples(task({'train': 'a.csv', 'test': str(other)}))


def test_a_vocabulary_is_also_what_is_beside_it(tmp_path):
  file = tmp_path / 'tokenizer.json'
  file.write_text('{}')
  alone = vocabularies.digest(str(file))
  (tmp_path / 'tokenizer_config.json').write_text('{"eos_token": "a"}')
  assert vocabularies.digest(str(file)) != alone


def test_too_large_files_are_refused(folder):
  with open('large.csv', 'w') as file:
    file.truncate((1 << 30) + 1)  # A hole; nothing is written or read.
  with pytest.raises(ValueError, match='large.csv have 1.0 GiB.*TFRecord'):
    examples(task('large.csv'))


def test_metrics(folder):
  from sparse_experts import config

  given = {'targets': ['good', 'bad'], 'predictions': ['good', 'good']}
  (folder / 'f1.gin').write_text(
    'from __gin__ import dynamic_registration\n'
    'from sparse_experts.data import metrics\n'
    "include 'gin/tasks/csv.gin'\n"
    "METRICS = ('accuracy', @metrics.f1)\nmetrics.f1.positive = 'good'\n"
    "VOCABULARY = 'bytes'\nFILES = {'train': 'a.csv'}\n"
    "INPUTS = '{text}'\nTARGETS = '{label}'\n"
  )
  config.parse(['f1.gin'], [], [])
  found = tasks.find(config.value('MIXTURE_OR_TASK_NAME'))
  assert [metric(**given) for metric in found.metric_fns] == [
    {'accuracy': 50.0},
    {'f1': pytest.approx(200 / 3)},
  ]


def batches(name, **more):
  more = {'features': TextToText(), 'seed': 0, **more}
  return streams.Batches(name, 'train', LENGTHS, 8, **more)


def seen(stream, count):
  """How often each text was, in so many batches."""
  decode = vocabularies.byte().decode
  found = collections.Counter()
  for _ in range(count):
    found.update(decode(row) for row in next(stream)['encoder_input_tokens'])
  return found


@pytest.mark.parametrize('shards', [1, 2])
def test_positions_are_exact(shards, folder):
  files = {'train': 'a.csv', 'validation': 'b.csv'}
  write('b.csv', labels('good'))
  write('a.csv', labels(*['bad', 'good'] * 32))
  name = task(files)
  stream = batches(name, pack=False, num_shards=shards)
  first = seen(stream, 5)
  stream.save(folder / 'saved')
  size = sum(path.stat().st_size for path in (folder / 'saved').iterdir())
  assert size < 50_000 * shards
  rest = seen(stream, 3)
  # An epoch has each row once; streams have different ones.
  assert first + rest == collections.Counter(
    f'review: film {i}' for i in range(64)
  )
  continued = batches(name, pack=False, num_shards=shards)
  continued.restore(folder / 'saved')
  assert seen(continued, 3) == rest
  with pytest.raises(ValueError, match="have corpus {'csv_a_"):
    write('a.csv', labels(*['bad', 'good'] * 32, 'bad'))
    batches(task(files), pack=False, num_shards=shards).restore(
      folder / 'saved'
    )


def test_the_same_files_are_the_same_task(folder):
  name = task()
  assert task() == name
  assert tasks.find(name) is tasks.find(task())
  others = {
    task(inputs='{text}'),
    task(options=('bad', 'good')),
    task({'train': 'a.csv', 'test': 'a.csv'}),
    task(vocabulary='docs'),
    task(metrics=('rouge',)),
  }
  assert len({name, *others}) == 6
  mixture = mixing.mixture('own_both', [name, task(inputs='{text}')])
  count = seqio.get_mixture_or_task(mixture).num_input_examples
  assert count('train') + count('validation') == 120


def text_of_batches(name, lengths, features, count=4):
  stream = streams.Batches(name, 'train', lengths, 2, features, seed=0)
  return [next(stream) for _ in range(count)]


def test_texts(folder):
  paragraphs = [f'Paragraph {i}\r\nof two lines.' for i in range(40)]
  (folder / 'book.txt').write_text('\r\n\r\n'.join(paragraphs), newline='')

  def text_task(objective='lm', **more):
    files = {'train': 'book.txt'}
    return own_files.text_task(files, objective, vocabulary='bytes', **more)

  lengths = {'targets': 64}
  found = text_of_batches(text_task(), lengths, Text())
  joined = ''.join(
    token_text.decode_tokens(text_task(), 'targets', row)
    for batch in found
    for row in batch['decoder_target_tokens']
  )
  assert '\nof two lines.</s>Paragraph ' in joined and '\r' not in joined
  lengths = {'inputs': 32, 'targets': 12}
  (batch, *_) = text_of_batches(
    text_task('span_corruption'), lengths, TextToText()
  )
  assert (batch['encoder_input_tokens'] == 358).any()  # A sentinel.
  source = tasks.find(text_task(documents='line')).source
  assert sum(len(source.tensors[s]['text']) for s in source.splits) == 80
  with pytest.raises(ValueError, match="DOCUMENTS has 'lines'; did you mean"):
    text_task(documents='lines')
  with pytest.raises(ValueError, match="objective has 'ml'"):
    text_task('ml')


def test_a_source_by_itself(folder):
  source = FileSource({'test': 'a.csv'}, 'csv', ('label',))
  assert source.splits == ('test',)
  first = next(source.get_dataset('test', shuffle=False).as_numpy_iterator())
  assert first == {'label': b'bad'}
  assert source.place('test', 0) == 'a.csv:2'


def test_a_sentencepiece_file(folder):
  import sentencepiece

  (folder / 'text.txt').write_text('some words of a text\n' * 3)
  for name, ids in (('ours', (0, 1, 2, -1)), ('theirs', (-1, 2, 0, 1))):
    sentencepiece.SentencePieceTrainer.train(
      input='text.txt', model_prefix=name, vocab_size=16, minloglevel=2,
      **dict(zip(('pad_id', 'eos_id', 'unk_id', 'bos_id'), ids)),
    )  # fmt: skip
  name = task(vocabulary='ours.model')
  assert token_text.vocabulary_size(name) == 116
  with pytest.raises(ValueError, match='116 token ids.*embeds only 115'):
    token_text.check_vocabulary(name, 115)
  with pytest.raises(ValueError, match='has padding -1 and end of sequence 2'):
    task(vocabulary='theirs.model')
  # Another file under this name is another vocabulary.
  sentencepiece.SentencePieceTrainer.train(
    input='text.txt', model_prefix='ours', vocab_size=15, minloglevel=2,
    pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
  )  # fmt: skip
  assert task(vocabulary='ours.model') != name


@pytest.fixture
def tokenizer_json(folder):
  """Writes a tokenizer.json with these special tokens; ids are their order."""
  tokenizers = pytest.importorskip('tokenizers')
  from tokenizers import decoders, models, pre_tokenizers, trainers

  def save(*special, last=()):
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
      vocab_size=280,
      special_tokens=list(special),
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
    )
    tokenizer.train_from_iterator(['review: film', 'good bad'] * 3, trainer)
    tokenizer.add_special_tokens(list(last))
    tokenizer.save('tokenizer.json')
    return vocabularies.named('tokenizer.json')

  return save


def test_a_tokenizer_json(tokenizer_json, folder):
  vocabulary = tokenizer_json('<pad>', '</s>', '<unk>')
  assert (vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id) == (0, 1, 2)
  for text in ('review: film', 'ä\n\n  \u2028 </s> \U0001f600', ''):
    ids = vocabulary.encode(text)
    assert vocabulary.decode(ids) == text and 1 not in ids
    assert vocabulary.encode_tf(text).numpy().tolist() == ids
  name = task(vocabulary='tokenizer.json')
  token_text.check_vocabulary(name, vocabulary.vocab_size)
  assert texts(name)[1] == ('review: film 1', 'good')
  (example, *_) = examples(name)
  assert example['inputs'].tolist() == [*vocabulary.encode('review: film 0'), 1]
  assert example['options'].tolist() == [b'bad', b'good']
  stream = batches(name)  # Its position can be saved, though it is Python.
  next(stream)
  stream.save(folder / 'saved')
  expected = next(stream)
  continued = batches(name)
  continued.restore(folder / 'saved')
  jax.tree.map(np.testing.assert_array_equal, next(continued), expected)
  pieces = token_text.token_pieces(
    name, 'targets', [1, expected_id(vocabulary)]
  )
  assert pieces == {1: '</s>', expected_id(vocabulary): 'f'}
  (folder / 'book.txt').write_text('a film\n\na good film\n\n' * 9 + 'bad')
  text = own_files.text_task(
    {'train': 'book.txt'}, 'lm', vocabulary='tokenizer.json'
  )
  (batch, *_) = text_of_batches(text, {'targets': 16}, Text())
  assert '</s>' in token_text.decode_tokens(
    text, 'targets', batch['decoder_target_tokens'][0]
  )


def expected_id(vocabulary):
  return vocabulary.encode('f')[0]


def test_special_tokens_of_a_tokenizer_json(tokenizer_json, folder):
  vocabulary = tokenizer_json('<|endoftext|>')
  assert (vocabulary.pad_id, vocabulary.eos_id) == (NO_TOKEN, 0)
  name = task(vocabulary='tokenizer.json')
  ours = SpecialTokens(pad=NO_TOKEN, eos=0, start=0)
  token_text.check_vocabulary(name, 300, special_tokens=ours)
  with pytest.raises(ValueError, match='id 0, which pads.*PAD_ID = -1'):
    token_text.check_vocabulary(name, 300)
  with pytest.raises(ValueError, match=r'EOS_IDS = \(0,\)'):
    others = SpecialTokens(pad=NO_TOKEN, eos=1)
    token_text.check_vocabulary(name, 300, special_tokens=others)
  with pytest.raises(ValueError, match='does not say which token ends a text'):
    tokenizer_json('<end of all>')
  (folder / 'tokenizer_config.json').write_text(
    json.dumps({'eos_token': {'content': '<end of all>'}, 'pad_token': None})
  )
  assert vocabularies.named('tokenizer.json').eos_id == 0
  (folder / 'tokenizer_config.json').write_text('{"eos_token": 5}')
  with pytest.raises(ValueError, match='eos_token is 5, and no text'):
    vocabularies.named('tokenizer.json')
  (folder / 'tokenizer_config.json').unlink()
  vocabulary = tokenizer_json(
    '<pad>', '</s>', last=['<extra_id_1>', '<extra_id_0>']
  )
  assert vocabulary.extra_ids == 2
  assert vocabulary.encode('a <extra_id_0>')[-1] != vocabulary.vocab_size - 1
  (folder / 'tokenizer.json').write_text('{}')
  with pytest.raises(ValueError, match='tokenizer.json is no tokenizer.json'):
    vocabularies.named('tokenizer.json')
