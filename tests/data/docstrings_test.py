"""Docstrings of files, and which texts say what was said before."""

from sparse_experts.data import docstrings

LONG = 'words of some length ' * 5


def test_docstrings_are_found_at_any_depth_in_the_order_of_the_file():
  source = f'''"""{LONG} of the module."""
if True:
  class A:
    """{LONG} of the class."""

    async def f(self):
      """{LONG} of the method."""
try:
  pass
except ValueError:
  def g():
    """{LONG} of the function."""
def short():
  """See f."""
'''
  found = dict(docstrings.docstrings(source.encode(), 'p.m'))
  assert list(found) == ['p.m', 'p.m.A', 'p.m.A.f', 'p.m.g']
  assert found['p.m.A.f'] == f'{LONG} of the method.'


def test_a_file_that_does_not_parse_has_none():
  assert not [*docstrings.docstrings(b'{{ template }} of', 'p.m')]


def test_what_says_little_that_is_new_is_left_out():
  a, b, c, d = ('x' * 10, 'y' * 10, 'z' * 10, 'w' * 9)

  def kept(*texts):
    return [*docstrings.without_near_duplicates(texts, '\n'.join)]

  # Nothing is new: 0 of 10 characters.
  assert kept([a], [a]) == [[a]]
  # Half of 20 are new, then 9 of 19, which is less.
  assert kept([a], [a, b]) == [[a], [a, b]]
  assert kept([a], [a, d]) == [[a]]
  # A line counts once, however often and however far indented it is there:
  # 10 of 20 new characters, not 10 of 30.
  assert kept([a], [a, f'    {a}', '', b]) == [[a], [a, f'    {a}', '', b]]
  # What is left out is not said: b is as new to the third as to the second.
  assert kept([a, c], [a, c, b], [b, d]) == [[a, c], [b, d]]
