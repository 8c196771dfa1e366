"""Hash layers: tables that are fixed, balanced, dispersed, and looked up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_experts.moe.routers.hash import (
  BalancedTable,
  DispersedTable,
  Hash,
  RandomTable,
  k_means,
)

V, E = 200, 8


def test_random_tables_are_the_same_everywhere_and_use_all_experts():
  table = RandomTable()(V, E, 3)
  np.testing.assert_array_equal(table, RandomTable()(V, E, 3))
  assert table.shape == (V, 3) and table.dtype == np.int32
  assert table.min() == 0 and table.max() == E - 1
  assert all(len(set(row)) == 3 for row in table)
  assert (table != RandomTable(seed=1)(V, E, 3)).mean() > 0.5
  # Uniform: of 40,000 a choice, each expert has 5,000 with deviation 66.
  for column in RandomTable()(40_000, E, 3).T:
    assert np.abs(np.bincount(column, minlength=E) - 5000).max() < 300
  # As many choices as experts: every token has a permutation.
  assert (np.sort(RandomTable()(V, E, E), 1) == np.arange(E)).all()


def test_a_random_table_is_what_it_has_always_been():
  # Checkpoints depend on it: `Generator.integers` of PCG64 is kept by numpy.
  # Drawn here from the definition of the choice, not from the function.
  draws = np.random.default_rng(5)
  first, second = draws.integers(4, size=6), draws.integers(3, size=6)
  expected = [
    (a, [e for e in range(4) if e != a][b]) for a, b in zip(first, second)
  ]
  assert RandomTable(seed=5)(6, 4, 2).tolist() == [list(e) for e in expected]


def test_balanced_by_hand():
  # Tokens by count: 2 (9), 0 (5), 4 (5), 1 (3), 3 (2), then 5, never seen.
  # Loads of experts 0, 1 and what is given: 2 -> 0 (9, 0); 0 -> 1 (9, 5);
  # 4 -> 1 (9, 10); 1 -> 0 (12, 10); 3 -> 1 (12, 12); 5 -> the first turn, 0.
  counts = [5, 3, 9, 2, 5, 0]
  table = BalancedTable(counts=counts)(6, 2)
  assert table[:, 0].tolist() == [1, 0, 0, 1, 1, 0]
  # The two least loaded of three: 2 -> 0, 1 (9, 9, 0); 0 -> 2, 0 (14, 9, 5);
  # 4 -> 2, 1 (14, 14, 10); 1 -> 2, 0 (17, 14, 13); 3 -> 2, 1; 5 -> 0, 1.
  table = BalancedTable(counts=counts)(6, 3, 2)
  assert table.tolist() == [[2, 0], [2, 0], [0, 1], [2, 1], [2, 1], [0, 1]]


def test_balanced_is_greedy_and_nearly_equal():
  # Counts as words have them: the v-th of frequency 1 / v.
  random = np.random.default_rng(0)
  counts = random.permutation(1e6 // np.arange(1, V + 1))
  table = BalancedTable(counts=counts)(V, E)[:, 0]
  loads = np.zeros(E)
  for v in sorted(range(V), key=lambda v: (-counts[v], v)):
    assert table[v] == loads.argmin()
    loads[table[v]] += counts[v]
  # The largest word alone is more than an eighth; the others share the rest.
  rest = np.delete(loads, loads.argmax())
  assert rest.max() / rest.min() < 1.01
  assert loads.max() == counts.max()
  # A random table is far from that.
  random_loads = np.bincount(RandomTable()(V, E)[:, 0], counts, E)
  assert random_loads.max() / random_loads.min() > 2


def test_unseen_tokens_are_dealt_out():
  counts = np.zeros(V // 2)
  table = BalancedTable(counts=counts)(V, E)[:, 0]
  assert (np.bincount(table, minlength=E) == V // E).all()


def test_counts_from_a_file(tmp_path):
  path = tmp_path / 'counts.txt'
  path.write_text('5\n3\n9\n2\n5\n')
  np.testing.assert_array_equal(
    BalancedTable(counts=str(path))(6, 2),
    BalancedTable(counts=(5, 3, 9, 2, 5, 0))(6, 2),
  )


def clustered_embeddings(seed=0):
  """Four far-apart bunches of token ids, of 70, 60, 40, 30."""
  random = np.random.default_rng(seed)
  bunch = np.repeat(np.arange(4), [70, 60, 40, 30])
  centres = 10 * np.eye(4, 6)
  return bunch, centres[bunch] + 0.1 * random.normal(size=(V, 6))


def test_k_means_finds_bunches():
  bunch, embeddings = clustered_embeddings()

  # From one row of each bunch; random first rows may share one.
  class OneOfEach:
    def choice(self, *_, **__):
      return np.array([0, 100, 150, 199])

  cluster = k_means(embeddings, 4, OneOfEach())
  np.testing.assert_array_equal(cluster, bunch)


def test_a_k_means_step_never_raises_the_error():
  random = np.random.default_rng(1)
  x = random.normal(size=(V, 3))

  def error(rounds):
    cluster = k_means(x, 7, np.random.default_rng(2), max_rounds=rounds)
    return sum(
      ((x[cluster == c] - x[cluster == c].mean(0)) ** 2).sum()
      for c in np.unique(cluster)
    )

  errors = [error(rounds) for rounds in (1, 2, 4, 8, 50)]
  assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0]
  # At the end every row is with its nearest centre.
  cluster = k_means(x, 7, np.random.default_rng(2), max_rounds=500)
  centres = np.stack([x[cluster == c].mean(0) for c in range(7)])
  nearest = ((x[:, None] - centres) ** 2).sum(-1).argmin(1)
  np.testing.assert_array_equal(nearest, cluster)


def test_dispersed_spreads_every_cluster(tmp_path):
  bunch, embeddings = clustered_embeddings()
  table = DispersedTable(embeddings=embeddings, clusters=12)(V, E)
  assert (np.bincount(table[:, 0], minlength=E) == V // E).all()
  cluster = k_means(embeddings, 12, np.random.default_rng(0))
  for c in range(12):
    sizes = np.bincount(table[cluster == c, 0], minlength=E)
    assert sizes.max() - sizes.min() <= 1
  # The bunches too, which random tables do not spread.
  for b in range(4):
    sizes = np.bincount(table[bunch == b, 0], minlength=E)
    assert sizes.max() - sizes.min() <= 12
  np.save(tmp_path / 'e.npy', embeddings)
  np.testing.assert_array_equal(
    table,
    DispersedTable(embeddings=str(tmp_path / 'e.npy'), clusters=12)(V, E),
  )
  pairs = DispersedTable(embeddings=embeddings)(V, E, 2)
  assert (pairs[:, 0] != pairs[:, 1]).all()


def test_lookup_by_hand():
  # Ids 4 and -1 are outside of a table of 4; the masked token is nobody's.
  table = np.array([[0, 2], [1, 0], [2, 1], [0, 1]])
  router = Hash(3, k=2, vocab_size=4, table=lambda *_: table)
  ids = jnp.array([[3, 1, 3, 4, 0], [2, -1, 2, 2, 3]])
  mask = jnp.array([[True] * 4 + [False], [True] * 5])
  x = jnp.full((2, 5, 4), jnp.nan)
  assignment, aux = jax.jit(router.apply)(
    {}, x, token_ids_GxS=ids, mask_GxS=mask
  )
  none = [3, 3]
  assert assignment.expert_GxSxK.tolist() == [
    [[0, 1], [1, 0], [0, 1], none, none],
    [[2, 1], none, [2, 1], [2, 1], [0, 1]],
  ]
  # In token order: 0, 1 | 1, 0 | 0, 1 are places 0, 0 | 1, 1 | 2, 2.
  assert assignment.position_GxSxK.tolist() == [
    [[0, 0], [1, 1], [2, 2], [0, 0], [0, 0]],
    [[0, 0], [0, 0], [1, 1], [2, 2], [0, 3]],
  ]
  gate = np.where(assignment.expert_GxSxK == 3, 0.0, 1.0)
  np.testing.assert_array_equal(assignment.gate_GxSxK, gate)
  assert aux.losses == {} and aux.metrics == {}


def test_nothing_is_learned():
  router = Hash(E, vocab_size=V)
  x, ids = jnp.ones((1, 3, 4)), jnp.array([[0, 1, 2]])
  assert not router.init(jax.random.key(0), x, token_ids_GxS=ids)
  assert router.is_causal and router.needs == ('token_ids',)


@pytest.mark.parametrize(
  'make, message',
  [
    (lambda: BalancedTable([1, 2, 3])(2, 2), 'at most vocab_size=2'),
    (lambda: BalancedTable([1, -2])(2, 2), 'at least 0.*smallest -2'),
    (
      lambda: DispersedTable(embeddings=np.ones((2, 4)))(3, 2),
      r'vocab_size=3 rows, got shape \(2, 4\)',
    ),
    (
      lambda: DispersedTable(embeddings=np.ones((3, 4)), clusters=4)(3, 2),
      '4 clusters of vocab_size=3',
    ),
    (lambda: route(Hash(2)), 'Hash needs vocab_size'),
    (lambda: route(Hash(2, k=3, vocab_size=9)), 'k must be from 1 to'),
    (
      lambda: route(Hash(2, vocab_size=9, table=lambda *_: np.ones(9))),
      r'table must return shape \(9, 1\), got \(9,\)',
    ),
  ],
)
def test_wrong_arguments_are_named(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def route(router):
  return router.apply({}, jnp.ones((1, 1, 2)), token_ids_GxS=jnp.ones((1, 1)))
