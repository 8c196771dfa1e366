"""Who knows the features of a batch by name: few, and they are listed."""

import ast

from rooms import FILES, PACKAGE

from sparse_experts.data.features.text import Text, TextToText

# Objectives and modules; features; what asks a model and reads its answers.
ROOMS = ('models', 'data/features', 'inference', 'evaluation', 't5x_adapter')
BESIDES = {
  'bench/decode.py',  # Questions of its own, to time a decoder by.
}


def named(path):
  """What a file says of features: their names, or the ends of them."""
  lengths = {'inputs': 2, 'targets': 2}
  names = {
    name
    for features in (Text(), TextToText())
    for name in features.shapes(lengths, 1, pack=True, task_ids=True)
  }
  ends = {'_' + name.partition('_')[2] for name in names} - {'_positions'}
  names |= {'frame_lengths', 'label_lengths'}  # Others' are common words.
  tree = ast.parse(path.read_text())
  documentation = {
    node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)
  }
  texts = {
    node.value
    for node in ast.walk(tree)
    if isinstance(node, ast.Constant)
    and isinstance(node.value, str)
    and node not in documentation
  }
  return {
    text
    for text in texts
    if text in names or text in ends - {'_task_ids', '_segment_ids'}
  }


def test_few_files_name_a_feature():
  found = {
    str(path.relative_to(PACKAGE))
    for path in FILES
    if not str(path.relative_to(PACKAGE)).startswith(ROOMS) and named(path)
  }
  assert found == BESIDES


def test_objectives_name_theirs():
  # Or this would find nothing anywhere.
  assert named(PACKAGE / 'models/language.py') >= {'decoder_target_tokens'}
