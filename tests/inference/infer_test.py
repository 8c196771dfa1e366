"""infer: files in, JSON lines out, continued where it was stopped."""

import json

import command
import numpy as np
import pytest

from sparse_experts import config
from sparse_experts.data import dataset, prompts, vocabularies
from sparse_experts.data.features.text import Text
from sparse_experts.insight import likeliest
from sparse_experts.models.language_model import answered
from sparse_experts.training import checkpoints

QUESTIONS = [
  '8+1',
  '9+9',
  ' x',
  'wie geht es?',
  '8+1',
  '7',
  '3+3',
  '1+1',
  '2+2',
]
EOS = 1


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """The folder of a run of a few steps."""
  folder = tmp_path_factory.mktemp('infer')
  command.train(folder / 'TRAINED', '--gin.TRAIN_STEPS=2')
  return folder


def infer(trained, *arguments):
  return command.run(
    'infer', command.TINY, f'--gin.MODEL_DIR={trained / "TRAINED"}', *arguments
  )


def ask(trained, name, lines, *arguments):
  """The lines of the output, answering those of a file."""
  file, output = trained / name, trained / f'{name}.answers.jsonl'
  file.write_text(''.join(f'{line}\n' for line in lines))
  outcome = infer(trained, f'--input={file}', f'--output={output}', *arguments)
  assert outcome.code == 0, outcome.stderr
  return [json.loads(line) for line in output.read_text().splitlines()]


@pytest.fixture(scope='module')
def answers(trained):
  """Of QUESTIONS, of which there are more than a batch."""
  return ask(trained, 'questions.txt', QUESTIONS)


def test_every_line_is_answered_as_if_alone(trained, answers):
  assert [a['index'] for a in answers] == list(range(9))
  assert [a['inputs'] for a in answers] == QUESTIONS
  assert answers[0]['prediction'] == answers[4]['prediction']
  others = ask(trained, 'others.txt', [QUESTIONS[3], 'x'])
  assert others[0]['prediction'] == answers[3]['prediction']
  assert others[0]['log_prob'] == pytest.approx(
    answers[3]['log_prob'], abs=1e-5
  )


def test_nothing_may_be_asked_on_purpose(trained, answers):
  lines = [json.dumps({'inputs': text}) for text in ('', QUESTIONS[3])]
  nothing, other = ask(trained, 'nothing.jsonl', lines)
  assert nothing['inputs'] == ''
  assert other['prediction'] == answers[3]['prediction']


def test_token_ids_in_and_out(trained, answers):
  # Of the tiny task, whose inputs end with EOS: a text, and the same by all the
  # ids that a decoder reads of it.
  ids = vocabularies.byte().encode(QUESTIONS[0])
  lines = [
    json.dumps({'inputs': [0, *ids, EOS], 'targets': [*ids, EOS]}),
    json.dumps({'inputs': QUESTIONS[0], 'targets': QUESTIONS[0]}),
  ]
  by_ids, by_text = ask(trained, 'ids.jsonl', lines, '--score')
  assert by_ids['inputs'] == [0, *ids, EOS]
  assert by_text['prediction'] == answers[0]['prediction']
  predicted = by_ids['prediction']
  assert isinstance(predicted, list) and 0 not in predicted
  text = ''.join(
    '</s>' if i == EOS else vocabularies.byte().decode([i]) for i in predicted
  )
  assert text == by_text['prediction']
  for name in ('log_prob', 'target_log_prob'):
    assert by_ids[name] == pytest.approx(by_text[name], abs=1e-5)


def test_what_was_stopped_is_continued(trained, answers):
  output = trained / 'questions.txt.answers.jsonl'
  content = output.read_bytes()
  # Killed within the sixth line; of what is finished one line is marked.
  ends = [i for i, byte in enumerate(content) if byte == ord('\n')]
  marked = {**answers[1], 'prediction': 'mark'}
  lines = content[: ends[5] - 3].splitlines(keepends=True)
  lines[1] = json.dumps(marked).encode() + b'\n'
  output.write_bytes(b''.join(lines))
  again = ask(trained, 'questions.txt', QUESTIONS)
  assert again[1] == marked
  for found, expected in zip(again, answers, strict=True):
    assert found['index'] == expected['index']
    assert found['log_prob'] == pytest.approx(expected['log_prob'], abs=1e-5)
  output.write_bytes(content)


def test_other_settings_continue_nothing(trained, answers):
  output = trained / 'questions.txt.answers.jsonl'
  before = output.read_bytes()
  for change, says in (
    (['--gin.TEMPERATURE=1.0'], 'Sampling(temperature=1.0'),
    (['--gin.SEED=3'], 'made with seed 0, now it is 3'),
  ):
    outcome = infer(
      trained,
      f'--input={trained / "questions.txt"}',
      f'--output={output}',
      *change,
    )
    assert outcome.code == 2
    assert says in outcome.stderr and 'another output file' in outcome.stderr
    assert outcome.stderr.count('\n') == 1
  assert output.read_bytes() == before


def test_another_run_continues_nothing(trained, answers, tmp_path):
  """Also of the same step."""
  output = trained / 'questions.txt.answers.jsonl'
  before = output.read_bytes()
  command.train(tmp_path, '--gin.TRAIN_STEPS=2', '--gin.SEED=1')
  outcome = command.run(
    *('infer', command.TINY, f'--gin.MODEL_DIR={tmp_path}'),
    *(f'--input={trained / "questions.txt"}', f'--output={output}'),
  )
  assert outcome.code == 2
  assert 'was made with checkpoint_saved_at' in outcome.stderr
  assert output.read_bytes() == before


def test_scores_and_routing(trained):
  questions = [
    {'inputs': '8+1', 'targets': '9'},
    {'inputs': '9+9', 'targets': '18'},
    {'inputs': 'no target'},
    {'inputs': 'too long', 'targets': 'x' * 20},
  ]
  lines = map(json.dumps, questions)
  found = ask(trained, 'pairs.jsonl', lines, '--score', '--routing')
  assert found[2]['target_log_prob'] is None
  assert found[3]['targets_cut'] == 20 - 15  # Of 16 tokens one is EOS.
  assert found[3]['target_log_prob'] is None
  config.parse(
    [command.TINY.partition('=')[2]], [f'MODEL_DIR={trained / "TRAINED"}'], []
  )
  model = config.value('MODEL')
  params, _ = checkpoints.load_params(trained / 'TRAINED')
  for question, line in zip(questions[:2], found):
    # By hand: bytes begin at 3; EOS ends both sides.
    asked = [byte + 3 for byte in question['inputs'].encode()] + [EOS]
    wanted = [byte + 3 for byte in question['targets'].encode()] + [EOS]
    batch = {
      'decoder_input_tokens': np.array([[0, *asked]]),
      'decoder_causal_attention': np.ones((1, 1 + len(asked)), int),
    }
    log_prob = model.score(params, answered(batch, np.array([wanted])))[0]
    assert line['target_log_prob'] == pytest.approx(float(log_prob), abs=1e-4)
  for line in found:
    # One choice of every token of the question, EOS and the answer's; the
    # model wrote `targets` tokens at most, none of them EOS unless it ended.
    (counts,) = line['routing'].values()
    assert len(counts) == 4
    asked = len(line['inputs'].encode()) + 1
    assert asked < sum(counts) <= asked + 16


def test_likeliest_tokens_are_those_of_the_softmax(trained):
  """Of targets, of targets by ids, and of the answer where there are none."""
  word, more = ([byte + 3 for byte in text] for text in (b'9', b'97'))
  asked = [byte + 3 for byte in b'8+1'] + [EOS]
  questions = [
    {'inputs': '8+1', 'targets': '9'},
    {'inputs': '8+1', 'targets': '97'},
    {'inputs': '8+1'},
    {'inputs': [0, *asked], 'targets': [*word, EOS]},
    {'inputs': '8+1', 'targets': 'x' * 20},
    {'inputs': '8+1', 'targets': []},
  ]
  found = ask(trained, 'top.jsonl', map(json.dumps, questions), '--top=3')
  config.parse(
    [command.TINY.partition('=')[2]], [f'MODEL_DIR={trained / "TRAINED"}'], []
  )
  model = config.value('MODEL')
  params, _ = checkpoints.load_params(trained / 'TRAINED')
  inputs_L = np.array([0, *asked, *more])
  logits_LxV = np.asarray(model.logits(params, {'tokens': inputs_L[None]})[0])
  exp_LxV = np.exp(logits_LxV.astype(float) - logits_LxV.max())
  # Of '9', of '7' and of what follows them, EOS.
  probs_LxV = (exp_LxV / exp_LxV.sum(-1, keepdims=True))[len(asked) :]
  for line, ids in ((found[1], [*more, EOS]), (found[0], [*word, EOS])):
    assert len(line['top']) == len(ids)
    for place, token, prob_V in zip(line['top'], ids, probs_LxV):
      text = '</s>' if token == EOS else chr(token - 3)
      assert place['token'] == text
      assert place['probability'] == pytest.approx(prob_V[token], rel=1e-4)
      best_3 = sorted(prob_V.tolist(), reverse=True)[:3]
      shown = [x['probability'] for x in place['likeliest']]
      assert shown == pytest.approx(best_3, rel=1e-4)
  best = int(probs_LxV[0].argmax())
  assert found[3]['top'][0]['likeliest'][0]['token'] == best
  assert [x['id'] for x in found[3]['top']] == [*word, EOS]
  assert [x['token'] for x in found[3]['top']] == [*word, '</s>']
  assert 'top' not in found[4]  # It was cut.
  assert found[5]['top'] == found[2]['top']
  # Later tokens change nothing; without targets they are the answer's.
  assert found[0]['top'][0] == found[1]['top'][0]
  assert len(found[2]['top']) == 16
  for place in found[2]['top']:  # Greedy.
    assert place['token'] == place['likeliest'][0]['token']


def test_likely_tokens_are_told_apart_by_their_ids():
  def token(id, text):
    return {'id': id, 'token': text, 'probability': 0.5}

  # Bytes without a text, and ids beyond the vocabulary; a tag; a word and the
  # same letters within one; an end.
  pairs = [
    (token(198, ''), token(172, '')),
    (token(9000, '<unk>'), token(9001, '<unk>')),
    (token(7, '<b>'), token(8, '</b>')),
    (token(9, '▁file'), token(10, 'file')),
    (token(1, '</s>'), token(1, '</s>')),
  ]
  top = [{**own, 'likeliest': [other]} for own, other in pairs]
  assert likeliest.places(top) == [
    ('#198 50.0%', '#172 50.0%'),
    ('<unk>#9000 50.0%', '<unk>#9001 50.0%'),
    ('<b> 50.0%', '</b> 50.0%'),
    ('▁file 50.0%', 'file 50.0%'),
  ]
  results = [{'targets': 'é', 'top': top}, {'targets': [], 'top': top}]
  assert likeliest.summary(results) == (
    '0% of 4 tokens are the likeliest, 0% among the 1 likeliest'
  )


def test_what_is_likely_is_printed_without_the_end_of_sequence(trained):
  stdout = infer(trained, '--gin.infer.infer.top=2').stdout
  assert 'inputs:     8+0\ntargets:    8\n  8 ' in stdout
  assert '</s>' not in stdout and 'prediction' not in stdout
  # The targets are 8, 9, 10 and 11.
  assert 'of 6 tokens are the likeliest' in stdout


def test_the_best_of_several(trained):
  found = ask(
    trained,
    'best.txt',
    ['8+1', '9+9'],
    '--gin.STRATEGY=@decoding.BeamSearch()',
    '--gin.BEAMS=3',
  )
  for line in found:
    scores = [hypothesis['score'] for hypothesis in line['n_best']]
    assert len(scores) == 3 and scores == sorted(scores, reverse=True)
    assert line['score'] == scores[0]
    assert line['prediction'] == line['n_best'][0]['prediction']


def test_what_does_not_fit_is_said(trained):
  file = trained / 'long.jsonl'
  file.write_text(json.dumps({'inputs': 'x' * 20, 'targets': 'y' * 18}))
  folder = trained / 'TRAINED/inferences'
  of_splits = {path: path.read_bytes() for path in folder.glob('*.json*')}
  shown = infer(trained, f'--input={file}').stdout.splitlines()
  # Of 16 tokens one is EOS.
  assert shown[1].strip() == '(5 tokens of the inputs did not fit)'
  assert shown[2].strip() == '(3 tokens of the targets did not fit)'
  assert shown[-2:] == [
    '1 of 1 inputs were cut to TASK_FEATURE_LENGTHS',
    '1 of 1 targets were cut to TASK_FEATURE_LENGTHS and are not scored',
  ]
  # And answers to texts lie apart from those to a split.
  (path,) = (folder / 'texts').glob('tiny_sums-????????-2.jsonl')
  assert json.loads(path.read_text())['inputs_cut'] == 5
  now = {path: path.read_bytes() for path in folder.glob('*.json*')}
  assert now == of_splits


def test_a_language_model_continues_its_prompt():
  of_targets = dataset.Dataset('docs_lm', {'targets': 6}, 2, pack=False)
  texts = [{'inputs': 'Returns', 'targets': 'an array'}]
  (example,) = prompts.of_file(texts, of_targets, Text())
  tokens = vocabularies.docs().encode('Returns')
  n = len(tokens)
  assert example.features['decoder_input_tokens'].tolist() == (
    [0, *tokens] + [0] * (6 - n)  # No EOS: the text goes on.
  )
  assert example.features['decoder_causal_attention'].sum() == n + 1
  assert example.targets.tolist()[-1] == EOS


# name: (content of the input, arguments, parts of the error).
MISTAKES = {
  'none of the likeliest': (b'1+1\n', ['--top=0'], ['top=0', '1 to 384']),
  'empty': (b'', [], ['input file', 'is empty']),
  'long line': (
    b'1+1\n' + b'x' * 10_000_000,
    [],
    ['line 2 of', '10,000,000 bytes', 'at most 1,000,000'],
  ),
  'not UTF-8': (b'1+1\na\xff\n', [], ['line 2 of', 'not UTF-8 from byte 1']),
  'not JSON': (
    b'{"inputs": "1"}\nwhat',
    ['.jsonl'],
    ['line 2 of', 'no JSON object with a text "inputs"'],
  ),
  'JSON of something else': (b'{"inputs": 3}\n', ['.jsonl'], ['line 1 of']),
  'half a character': (
    b'{"inputs": "\\ud800"}\n',
    ['.jsonl'],
    ['line 1 of', 'no JSON object'],
  ),
  'no file': (None, [], ['there is no input file']),
  'an id too many': (
    b'{"inputs": [5, 9999]}\n',
    ['.jsonl'],
    ['token 9999', 'tokens 0 to'],
  ),
  'task': (
    b'1+1\n',
    ['--gin.MIXTURE_OR_TASK_NAME=tiny_sum'],
    ["unknown task 'tiny_sum'", "did you mean 'tiny_sums'?"],
  ),
  'other model': (
    b'1+1\n',
    ['--gin.MLP_DIM=64'],
    ['of another architecture', '(16, 64)'],
  ),
  'no checkpoint': (
    b'1+1\n',
    ['--gin.MODEL_DIR=NOWHERE'],
    ['no complete checkpoint'],
  ),
}


@pytest.mark.parametrize('name', MISTAKES)
def test_a_mistake_gets_one_line_and_leaves_answers_alone(
  name, trained, answers, tmp_path
):
  content, arguments, parts = MISTAKES[name]
  suffix = '.txt'
  if arguments and arguments[0].startswith('.'):
    suffix, *arguments = arguments
  file = tmp_path / f'input{suffix}'
  if content is not None:
    file.write_bytes(content)
  output = trained / 'questions.txt.answers.jsonl'
  before = output.read_bytes()
  outcome = infer(trained, f'--input={file}', f'--output={output}', *arguments)
  assert outcome.code == 2
  assert outcome.stderr.startswith('error: ')
  assert outcome.stderr.count('\n') == 1
  for part in parts:
    assert part in outcome.stderr
  assert output.read_bytes() == before


def test_a_split_that_is_none_leaves_nothing_behind(trained, tmp_path):
  output = tmp_path / 'new' / 'answers.jsonl'
  outcome = infer(trained, f'--output={output}', '--gin.EVAL_SPLIT=tset')
  assert outcome.code == 2
  assert "'tiny_sums' has no split 'tset'" in outcome.stderr
  assert not output.parent.exists()
