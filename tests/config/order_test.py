"""Overlays before what they change are refused; all else is not."""

import pytest
from paths import ROOT

import gin
from sparse_experts import config
from sparse_experts.config import order

OVERLAYS = sorted(
  str(path.relative_to(ROOT))
  for path in ROOT.glob('gin/**/*.gin')
  if '\n# After: ' in path.read_text()
)
KINDS = {
  *(f'gin/{kind}/' for kind in ('routers', 'tasks', 'finetune', 'meshes')),
  *('gin/distillation.gin', 'gin/ema.gin', 'gin/modern.gin', 'gin/spikes.gin'),
}
RECIPE = 'gin/quickstart.gin'
OF_RECIPE = 'gin/tasks/docs_span_corruption.gin'  # Its values are these.


def check(*files):
  gin.clear_config()  # Locked by whoever parsed before.
  order.check(config.trace(files, [], []))


def test_every_overlay_says_what_it_comes_after():
  for path in ROOT.glob('gin/**/*.gin'):
    file = str(path.relative_to(ROOT))
    if any(file.startswith(kind) for kind in KINDS):
      by_include = file.startswith('gin/tasks/glam/')
      assert file in OVERLAYS or by_include, file
  for kind in KINDS:
    assert any(file.startswith(kind) for file in OVERLAYS), kind


@pytest.mark.parametrize('overlay', OVERLAYS)
def test_an_overlay_comes_after_a_recipe(overlay):
  for line in (ROOT / overlay).read_text().splitlines():
    for file in line.removeprefix('# After: ').split(', '):
      assert not line.startswith('# After: ') or (ROOT / file).exists()
  check(RECIPE, overlay)
  if overlay != OF_RECIPE:
    with pytest.raises(ValueError) as error:
      check(overlay, RECIPE)
    assert str(error.value).startswith(f'{overlay} must come after {RECIPE}, ')
    meant = f'--gin_file={RECIPE} --gin_file={overlay}.'
    assert str(error.value).endswith(meant)


SWITCH = 'gin/models/switch/base.gin'
FINETUNED = 'gin/finetune/switch.gin'


@pytest.mark.parametrize(
  'first, second',
  [
    ('gin/routers/hash.gin', 'gin/models/mixtral/8x7b.gin'),
    ('gin/routers/hash.gin', 'gin/modern.gin'),
    ('gin/tasks/c4.gin', 'gin/models/glam/8b.gin'),
    ('gin/tasks/glam/all.gin', 'gin/runs/default.gin'),
    ('gin/tasks/docs_masked.gin', 'gin/runs/pretrain.gin'),
    ('gin/ema.gin', 'gin/runs/default.gin'),
    ('gin/ema.gin', FINETUNED),  # It includes a run.
    (FINETUNED, 'gin/modern.gin'),
    ('gin/routers/sentence.gin', 'gin/runs/default.gin'),
    ('gin/meshes/switch/base_v4_2x2x1.gin', 'gin/runs/default.gin'),
  ],
)
def test_pairs(first, second):
  check(SWITCH, second, first)
  with pytest.raises(ValueError, match='must come after'):
    check(SWITCH, first, second)


@pytest.mark.parametrize(
  'files',
  [
    ('gin/models/mixtral/8x7b.gin', RECIPE),  # Two recipes, with their routers.
    ('gin/models/switch/base.gin', 'gin/modern.gin'),
    ('gin/routers/hash.gin', SWITCH, 'gin/routers/hash.gin'),
    ('gin/tasks/c4.gin', SWITCH),  # The same lengths.
    ('gin/routers/hash.gin', 'gin/equivalence.gin'),
  ],
)
def test_what_changes_nothing_is_not_refused(files):
  check(*files)


def test_files_of_users(tmp_path):
  def write(name, text):
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)

  router, recipe = 'gin/routers/hash.gin', SWITCH
  # What has no header is never refused, whatever undoes it.
  plain = write('plain.gin', 'ROUTER = None\nLOSS_WEIGHTS = {}\n')
  check(plain, recipe)
  check(recipe, router, plain)
  # What includes a recipe is one, and what includes a router has one.
  mine = write('mine.gin', f"include '{recipe}'\nEMBED_DIM = 8\n")
  bundle = write('bundle.gin', f"include '{router}'\nEMBED_DIM = 8\n")
  check(mine, bundle)
  for files in ((router, mine), (bundle, mine), (bundle, recipe)):
    with pytest.raises(ValueError, match=f'^{router} must come after'):
      check(*files)
  # A header of one's own, and the order of includes.
  overlay = write('o.gin', f'# Mine.\n#\n# After: {mine}\n\nEMBED_DIM = 9\n')
  check(mine, overlay)
  with pytest.raises(ValueError, match='o.gin must come after'):
    check(overlay, mine)
  both = write('both.gin', f"include '{router}'\ninclude '{recipe}'\n")
  with pytest.raises(ValueError) as error:
    check(both)
  assert str(error.value).endswith(
    f"the order meant is include '{recipe}', then '{router}', in {both}."
  )
  check(write('right.gin', f"include '{recipe}'\ninclude '{router}'\n"))
