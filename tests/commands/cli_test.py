"""The commands: what they print, write and leave alone."""

import json
import pathlib

import command
import numpy as np
import pytest

from sparse_experts import cli, config

QUICKSTART = '--gin_file=gin/quickstart.gin'


@pytest.fixture(scope='module')
def trained(tmp_path_factory) -> tuple[pathlib.Path, command.Outcome]:
  """A run of 20 steps, and what its command printed."""
  model_dir = tmp_path_factory.mktemp('cli') / '7'  # No step of a run.
  outcome = command.run(
    'train', command.TINY, f'--gin.MODEL_DIR={model_dir}', '--profile=2:4'
  )
  assert outcome.code == 0, outcome.stderr
  return model_dir, outcome


def _on_trained(name: str, trained, *arguments: str) -> command.Outcome:
  outcome = command.run(
    name, command.TINY, f'--gin.MODEL_DIR={trained[0]}', *arguments
  )
  assert outcome.code == 0, outcome.stderr
  return outcome


def _metrics(model_dir: pathlib.Path) -> dict[tuple[str, int], dict]:
  lines = (model_dir / 'metrics.jsonl').read_text().splitlines()
  records = map(json.loads, lines)
  return {(record['name'], record['step']): record for record in records}


def test_alone_it_lists_its_commands():
  outcome = command.run()
  assert (outcome.code, outcome.stderr) == (0, '')
  for name, text in cli.COMMANDS.items():
    assert f'  {name:13}{text}\n' in outcome.stdout


def test_list_names_recipes_tasks_and_routers():
  outcome = command.run('list', '--json')
  assert (outcome.code, outcome.stderr) == (0, '')
  names = json.loads(outcome.stdout)
  assert 'gin/quickstart.gin' in names['recipes']
  assert 'docs_span_corruption' in names['tasks']
  assert {'switch', 'soft_moe'} <= set(names['routers'])
  assert names['dispatchers'] == [
    'all_experts',
    'einsum',
    'gather',
    'gather_dropless',
    'grouped',
  ]
  text = command.run('list').stdout
  for title in names:
    listed = ''.join(f'  {name}\n' for name in names[title])
    assert f'{title}:\n{listed}' in text


def test_inspect_counts_in_any_folder_and_without_tensorflow(tmp_path):
  script = (
    'import sys, time; from sparse_experts import cli;'
    f'code = cli.main(["inspect", "{QUICKSTART}", "--json"]);'
    'print(time.process_time(), file=sys.stderr);'
    'sys.exit("tensorflow" in sys.modules or code)'
  )
  process = command.start('-c', script, devices=1, cwd=tmp_path)
  stdout, stderr = process.communicate()
  assert process.returncode == 0, stderr
  assert float(stderr) < 10  # Nothing but the seconds.
  facts = json.loads(stdout)
  assert facts['total_params'] == sum(facts['components'].values())
  # One sparse block a stack, 8 experts of 128 x 512 and 512 x 128.
  assert facts['sparse_params'] == 2 * 8 * 2 * 128 * 512
  # Of which a token meets one.
  assert (
    facts['total_params'] - facts['active_params']
    == facts['sparse_params'] * 7 // 8
  )
  assert facts['train_flops_per_token'] > 0
  assert facts['feature_lengths'] == {'inputs': 256, 'targets': 58}


def test_table_prints_published_beside_computed():
  outcome = command.run('table', '--paper=t5_checkpoints')
  assert (outcome.code, outcome.stderr) == (0, '')
  title, heading, _, base, large, xxl, reason = outcome.stdout.splitlines()
  assert title == 'T5 1.1, released checkpoints'
  assert heading.split() == ['model', 'published', 'computed', 'difference']
  columns = ['t5.1.1.base', 'parameters', '250M', '247,577,856', '-1.0%']
  assert base.split() == columns
  assert (large.split()[-1], xxl.split()[-1]) == ('*', '+1.2%')
  assert reason.startswith('* parameters of t5.1.1.large: ')
  as_json = command.run('table', '--paper=t5_checkpoints', '--json').stdout
  facts = json.loads(as_json)
  assert (facts['table'], facts['title']) == ('t5_checkpoints', title)
  assert facts['rows'][0] == {
    'model': 't5.1.1.base',
    'recipe': 'gin/models/t5_1_1/base.gin',
    'bindings': [],
    'values': [
      {
        'quantity': 'parameters',
        'published': '250M',
        'computed': 247577856,
        'difference': pytest.approx(247577856 / 250e6 - 1),
        'agrees': True,
        'because': None,
      }
    ],
  }


@pytest.mark.parametrize('arguments', [[], ['--paper=table9'], [QUICKSTART]])
def test_table_says_which_there_are(arguments):
  outcome = command.run('table', *arguments)
  assert (outcome.code, outcome.stdout) == (2, '')
  assert outcome.stderr.count('\n') == 1
  assert '--paper' in outcome.stderr


def test_inspect_has_what_papers_print_about_a_recipe():
  recipe = '--gin_file=gin/models/switch/base.gin'

  def printed(*arguments):
    outcome = command.run('inspect', recipe, *arguments, '--json')
    values = json.loads(outcome.stdout).get('published', ())
    return [(v['quantity'], v['published']) for v in values]

  assert printed() == [
    ('parameters', '7.4B'),  # Table 7.
    ('parameters', '7B'),  # Table 9, and the next.
    ('FLOPs/sequence', '124B'),
  ]
  assert printed('--gin.NUM_EXPERTS=16') == [('parameters', '1.1B')]
  assert printed('--gin.NUM_EXPERTS=17') == []
  text = command.run('inspect', recipe, '--gin.NUM_EXPERTS=16').stdout
  assert '1.1B' in text.splitlines()[-1]
  assert '1,072,397,568' in text.splitlines()[-1]


@pytest.mark.parametrize('name', ['train', 'evaluate', 'infer', 'record'])
@pytest.mark.parametrize('new', [True, False])
def test_dry_run_counts_and_leaves_nothing(name, new, tmp_path, trained):
  """Of a run that is there and of one that is not."""
  model_dir = tmp_path / 'run' if new else trained[0]
  arguments = (name, command.TINY, f'--gin.MODEL_DIR={model_dir}', '--dry_run')
  before = sorted(model_dir.rglob('*'))
  outcome = command.run(*arguments)
  assert sorted(model_dir.rglob('*')) == before
  assert list(tmp_path.iterdir()) == []
  if new and name != 'train':
    assert outcome.code == 2
    assert 'no complete checkpoint' in outcome.stderr
    return
  assert (outcome.code, outcome.stderr) == (0, '')
  facts = json.loads(command.run(*arguments, '--json').stdout)
  assert f'{facts["total_params"]:,}' in outcome.stdout


def test_search_paths_and_the_current_folder_find_gin_files(
  tmp_path, monkeypatch
):
  there, here = tmp_path / 'there', tmp_path / 'here'
  there.mkdir()
  here.mkdir()
  (there / 'wide.gin').write_text('MLP_DIM = 64\n')
  (there / 'mine.gin').write_text("include 'gin/quickstart.gin'\n")
  (here / 'narrow.gin').write_text("include 'wide.gin'\nEMBED_DIM = 8\n")
  monkeypatch.chdir(here)

  def inspect(*arguments):
    return command.run('inspect', '--json', *arguments)

  assert inspect('--gin_file=mine.gin').code == 2
  search = f'--gin_search_paths=/nowhere,{there}'
  quickstart = json.loads(inspect(QUICKSTART).stdout)
  assert json.loads(inspect('--gin_file=mine.gin', search).stdout) == quickstart
  # An included file is looked for in the same folders; later files win.
  both = inspect('--gin_file=mine.gin', '--gin_file=narrow.gin', search)
  assert json.loads(both.stdout)['sparse_params'] == 2 * 8 * 2 * 8 * 64


@pytest.mark.parametrize(
  'text,value',
  [
    ('/tmp/a run', '/tmp/a run'),
    ("'/tmp/run'", '/tmp/run'),
    ('runs/7b-1', 'runs/7b-1'),
    ('7b/run', '7b/run'),
    ('gs://bucket/run=1', 'gs://bucket/run=1'),
  ],
)
def test_a_shell_may_eat_quotes(text, value):
  config.parse(['gin/quickstart.gin'], [f'MODEL_DIR={text}'], [])
  assert config.value('MODEL_DIR') == value


def test_train_logs_lines_on_stderr_and_says_where_things_are(trained):
  model_dir, outcome = trained
  for line in (
    'step 0  held-out loss ',
    'step 5/20  loss ',
    'step 20/20  loss ',
    'step 20  held-out loss ',
    'saved step 10\n',
    'saved step 20\n',
  ):
    assert line in outcome.stderr
  assert 'loss' in outcome.stdout
  assert f'{model_dir}/checkpoints/20\n' in outcome.stdout
  assert (model_dir / 'checkpoints' / '20').is_dir()


def test_train_writes_metrics_twice(trained):
  from tensorboard.backend.event_processing import event_accumulator
  from tensorboard.util import tensor_util

  model_dir, _ = trained
  metrics = _metrics(model_dir)
  assert set(metrics) == {
    *(('train', step) for step in (5, 10, 15, 20)),
    *(('eval', step) for step in (0, 10, 20)),
  }
  for record in metrics.values():
    loads = [record[f'layers/decoder/layers_1/load_E/{e}'] for e in range(4)]
    np.testing.assert_allclose(sum(loads), 1, rtol=1e-5)
  assert metrics['train', 20]['loss'] < metrics['train', 5]['loss']
  assert metrics['train', 20]['skipped'] == 0
  # 0.1 / sqrt(step) after a warm-up of 10; the last step has index 19.
  np.testing.assert_allclose(
    metrics['train', 20]['learning_rate'], 0.1 / 19**0.5, rtol=1e-6
  )
  for name in ('train', 'eval'):
    events = event_accumulator.EventAccumulator(
      str(model_dir / 'tensorboard' / name), {'tensors': 0}
    ).Reload()
    losses = {e.step: e.tensor_proto for e in events.Tensors('loss')}
    assert losses.keys() == {s for n, s in metrics if n == name}
    for step, proto in losses.items():
      loss = tensor_util.make_ndarray(proto)
      np.testing.assert_allclose(loss, metrics[name, step]['loss'], rtol=1e-6)


def test_train_writes_a_profile(trained):
  traces = (trained[0] / 'profile').rglob('*.xplane.pb')
  assert [trace.stat().st_size > 0 for trace in traces] == [True]


def test_the_operative_config_describes_the_run(trained):
  """It is a gin file by which the run goes on."""
  model_dir, _ = trained
  text = (model_dir / 'config.gin').read_text()
  assert f"MODEL_DIR = '{model_dir}'" in text
  config.parse([str(model_dir / 'config.gin')], [], [])
  again = config.value('MODEL')
  config.parse([command.TINY.partition('=')[2]], [f'MODEL_DIR={model_dir}'], [])
  assert repr(again) == repr(config.value('MODEL'))
  outcome = command.run(
    'train', f'--gin_file={model_dir / "config.gin"}', '--json'
  )
  assert outcome.code == 0, outcome.stderr
  assert 'resumed at step 20\n' in outcome.stderr
  assert 'nothing left to train' in outcome.stderr
  results = json.loads(outcome.stdout)
  assert (results['step'], results['train']) == (20, None)
  assert results['eval']['loss'] == _metrics(model_dir)['eval', 20]['loss']


def test_inspect_reads_a_checkpoint(trained):
  model_dir, _ = trained
  facts = json.loads(
    command.run('inspect', f'--checkpoint={model_dir}', '--json').stdout
  )
  assert facts['step'] == 20
  shapes = facts['tree'].values()
  assert facts['total_params'] == sum(map(np.prod, shapes))
  counted = _on_trained('inspect', trained, '--json')
  assert facts['total_params'] == json.loads(counted.stdout)['total_params']

  earlier = f'--checkpoint={model_dir}/checkpoints/10'
  before = json.loads(command.run('inspect', earlier, '--json').stdout)
  assert (before['step'], before['tree']) == (10, facts['tree'])
  assert before['params_sha256'] != facts['params_sha256']
  text = command.run('inspect', earlier).stdout
  assert 'decoder/layers_1/moe/expert/wi_0/kernel  4 x 16 x 32\n' in text
  assert f'params_sha256: {before["params_sha256"]}\n' in text


@pytest.fixture(scope='module')
def answers(trained) -> tuple[list[dict], str]:
  """Greedy answers to sixteen sums, and what `infer` printed."""
  infer = ('infer', trained, '--gin.infer.infer.num_examples=16')
  outcome = _on_trained(*infer)
  file = trained[0] / 'inferences' / 'tiny_sums-validation-20.jsonl'
  return [*map(json.loads, file.read_text().splitlines())], outcome.stdout


def test_infer_prints_and_writes_its_answers(answers):
  answers, stdout = answers
  sums = [(a['inputs'], a['targets']) for a in answers]
  assert (
    sums
    == [(f'{a}+{b}</s>', f'{a + b}</s>') for a in (8, 9) for b in range(10)][
      :16
    ]
  )
  for answer in answers:
    assert answer['log_prob'] < 0
    assert (
      f'inputs:     {answer["inputs"].removesuffix("</s>")}\n'
      f'prediction: {answer["prediction"].removesuffix("</s>")}\n'
      f'targets:    {answer["targets"].removesuffix("</s>")}\n'
      f'log prob:   {answer["log_prob"]:.1f} nats\n'
    ) in stdout


def test_sampled_answers_depend_on_the_example_alone(trained, answers):
  def sample(count):
    sampled = ('--gin.TEMPERATURE=1.0', '--json')
    number = f'--gin.infer.infer.num_examples={count}'
    return json.loads(_on_trained('infer', trained, *sampled, number).stdout)

  nine = sample(9)  # Two batches of eight, seven of them filling.
  assert sample(2) == nine[:2]
  greedy = [answer['prediction'] for answer in answers[0][:9]]
  assert greedy != [answer['prediction'] for answer in nine]


def test_evaluate_is_repeatable_and_uses_the_tasks_own_metrics(
  trained, answers
):
  model_dir, _ = trained
  text = _on_trained('evaluate', trained).stdout
  assert 'tiny_sums, validation split, step 20, capacity factor 2\n' in text
  for name in ('loss', 'accuracy', 'task/accuracy', 'decoder/layers_1'):
    assert any(line.split()[:1] == [name] for line in text.splitlines())
  file = model_dir / 'evaluation' / 'tiny_sums-validation-20.json'
  before = file.read_text()
  results = json.loads(_on_trained('evaluate', trained, '--json').stdout)
  assert file.read_text() == before

  loss = _metrics(model_dir)['eval', 20]['loss']
  record = _metrics(model_dir)['evaluation/tiny_sums-validation', 20]
  assert (results['step'], results['capacity_factor']) == (20, 2.0)
  assert results['metrics']['loss'] == record['loss'] == loss
  assert json.loads(before)['metrics']['loss'] == loss

  # Two batches of eight: the examples that `infer` answered.
  right = [a['prediction'] == a['targets'] for a in answers[0]]
  accuracy = 100 * sum(right) / 16
  assert results['task_metrics'] == {'accuracy': accuracy}
  assert json.loads(before)['task_metrics'] == {'accuracy': accuracy}
  assert record['task/accuracy'] == accuracy


@pytest.mark.slow
def test_an_encoder_decoder_is_fine_tuned_on_docs_domain(tmp_path, capfd):
  """The recipe of the quickstart, small, on the task with accuracy."""
  arguments = (
    QUICKSTART,
    '--gin_file=gin/tasks/docs_domain.gin',
    f'--gin.MODEL_DIR={tmp_path}',
    '--gin.EMBED_DIM=16',
    '--gin.MLP_DIM=32',
    '--gin.TRAIN_STEPS=2',
    '--gin.EVAL_BATCHES=1',
    '--json',
  )
  outcome = command.run('train', *arguments)
  assert outcome.code == 0, outcome.stderr
  outcome = command.run('evaluate', *arguments)
  assert outcome.code == 0, outcome.stderr
  accuracy = json.loads(outcome.stdout)['task_metrics']['accuracy']
  infer = ('infer', *arguments, '--gin.infer.infer.num_examples=16')
  answers = json.loads(command.run(*infer).stdout)
  right = [a['prediction'] == a['targets'] for a in answers]
  assert accuracy == 100 * sum(right) / 16
  assert all(a['inputs'].startswith('domain: ') for a in answers)
  # Nor did a library written in C++ say anything.
  assert capfd.readouterr() == ('', '')


def test_a_stray_word_is_an_error():
  outcome = command.run('list', 'routers')
  assert outcome.code == 2
  assert outcome.stderr.startswith("error: unknown argument 'routers'; ")
