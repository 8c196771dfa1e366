"""Scaling laws: published fits from published losses, optima against grids."""

import math

import numpy as np
import pytest

from sparse_experts.planning import scaling_laws
from sparse_experts.planning.scaling_laws import (
  EPOCH,
  Chinchilla,
  Clark,
  Kaplan,
)

# a, b, c, d, and N_cutoff; Clark et al. 2022, table 3 and section 5.1.
PUBLISHED = {
  'S-Base': ((-0.082, -0.108, 0.009, 1.104), 937e9),
  'RL-R': ((-0.083, -0.126, 0.012, 1.111), 85e9),
  'Hash': ((-0.087, -0.136, 0.012, 1.157), 83e9),
}


@pytest.fixture(scope='module')
def laws() -> dict[str, Clark]:
  return {
    router: Clark.fit(*scaling_laws.losses(router)) for router in PUBLISHED
  }


@pytest.mark.parametrize('router', PUBLISHED)
def test_refit_agrees_with_the_paper(laws, router):
  law, (coefficients, cutoff) = laws[router], PUBLISHED[router]
  fitted = (law.a, law.b, law.c, law.d)
  np.testing.assert_allclose(fitted, coefficients, atol=0.012)
  assert 0.8 < law.cutoff / cutoff < 1.25
  assert 1 < law.E_start < 5 and 200 < law.E_max < 500


@pytest.mark.parametrize('router', PUBLISHED)
def test_effective_parameters_reproduce_the_losses(laws, router):
  law = laws[router]
  N, E, L = scaling_laws.losses(router)
  without_routing = law.loss(law.effective_params(N, E), 1)
  np.testing.assert_allclose(without_routing, law.loss(N, E), rtol=1e-9)
  errors = without_routing / L - 1
  assert np.sqrt(np.mean(errors**2)) < 0.01
  assert np.abs(errors).max() < 0.02


def test_the_table_of_losses():
  N, E, L = scaling_laws.losses('S-Base')
  # 6 sizes x 10 numbers of experts, but 130M without 1 and 256.
  assert N.size == 58
  assert L[(N == 368123904) & (E == 64)] == pytest.approx(2.211, abs=5e-4)
  assert L[(N == 1308819456) & (E == 1)] == pytest.approx(2.242, abs=5e-4)
  lines = scaling_laws.LOSSES.read_text().splitlines()
  assert 'CC-BY' in ''.join(lines[:9])
  assert sum(not line.startswith('#') for line in lines) == 1 + 223
  with pytest.raises(ValueError, match='Hash, RL-R, S-Base'):
    scaling_laws.losses('Dense')


def test_laws_by_hand():
  # 10^(-0.1 * 8 + 1.1) without experts; E = 10 takes 10^-0.05 off, and the
  # interaction 0.01 * 8 * 1 gives back more.
  simple, bilinear = Clark(-0.1, -0.05, 1.1), Clark(-0.1, -0.05, 1.1, 0.01)
  assert simple.loss(1e8, 1) == pytest.approx(10**0.3)
  assert simple.loss(1e8, 10) == pytest.approx(10**0.25)
  assert bilinear.loss(1e8, 10) == pytest.approx(10**0.33)
  assert (simple.cutoff, bilinear.cutoff) == (math.inf, pytest.approx(1e5))
  # 10^(8 + .05 / .1) parameters.
  assert simple.effective_params(1e8, 10) == pytest.approx(10**8.5)
  assert bilinear.effective_params(1e5, 64) == pytest.approx(1e5)
  # E' runs from E_start to E_max: 1 / (1/2 - 1/100) is 2.0408...
  saturating = Clark(-0.1, -0.05, 1.1, 0.0, E_start=2.0, E_max=100.0)
  assert saturating.saturated(1) == pytest.approx(2)
  assert saturating.saturated(3) == pytest.approx(1 / (1 / 4.040816327 + 0.01))
  assert saturating.saturated(1e9) == pytest.approx(100)
  assert Kaplan().loss(1e300, 1.8e13) == pytest.approx(1)
  assert Chinchilla(1, 10, 100, 0.5, 0.25).loss(100, 1e4) == pytest.approx(12)


@pytest.mark.parametrize('law', [Kaplan(), Chinchilla(), EPOCH])
def test_dense_laws_are_found_again(law):
  rng = np.random.default_rng(0)
  N, D = 10 ** rng.uniform(7, 10, 50), 10 ** rng.uniform(8.5, 11.5, 50)
  found = type(law).fit(N, D, law.loss(N, D))
  assert vars(found) == pytest.approx(vars(law), rel=1e-4)


@pytest.mark.parametrize('form', scaling_laws.FORMS)
def test_routed_laws_are_found_again(form):
  law = {
    'simple': Clark(-0.07, -0.03, 1.0),
    'bilinear': Clark(-0.08, -0.09, 1.1, 0.007),
    'saturating': Clark(-0.08, -0.11, 1.1, 0.009, 1.8, 314.0),
  }[form]
  N, E = (
    x.ravel()
    for x in np.meshgrid(10 ** np.arange(7, 10.5, 0.5), 2.0 ** np.arange(10))
  )
  assert vars(Clark.fit(N, E, law.loss(N, E), form)) == pytest.approx(
    vars(law), rel=1e-3
  )


@pytest.mark.parametrize('law', [Kaplan(), Chinchilla(), EPOCH])
def test_optimum_of_dense_laws(law):
  flops = 1e22
  best = law.optimal(flops)
  N = best.params * np.exp(np.linspace(-1, 1, 2001))
  losses = law.loss(N, flops / (6 * N))
  assert abs(np.argmin(losses) - 1000) <= 1
  assert best.loss == pytest.approx(losses.min())
  assert 6 * best.params * best.tokens == pytest.approx(flops)


def test_optimum_of_routed_laws(laws):
  law, flops = laws['S-Base'], 1e21
  best = law.optimal(flops, (1, 8, 64), EPOCH)
  N = best.params * np.exp(np.linspace(-1, 1, 2001))
  losses = {
    E: EPOCH.loss(law.effective_params(N, E), flops / (6 * N))
    for E in (1, 8, 64)
  }
  assert best.experts == 64 and losses[64].min() < losses[8].min()
  assert abs(np.argmin(losses[64]) - 1000) <= 1
  # One expert is the dense law's own optimum, found by search.
  alone = law.optimal(flops, (1,), EPOCH)
  assert alone == pytest.approx(EPOCH.optimal(flops), rel=1e-3)
  # Far above the cut-off experts harm.
  assert law.optimal(1e29, (1, 64), EPOCH).experts == 1


def test_errors_say_what_is_wrong():
  ones = np.ones(8)
  with pytest.raises(ValueError, match="simple, bilinear.*'cubic'"):
    Clark.fit(ones, ones, ones, 'cubic')
  for law in (Kaplan, Chinchilla, Clark):
    with pytest.raises(ValueError, match='equal length'):
      law.fit(ones, ones, ones[:7])
    with pytest.raises(ValueError, match='at least 6'):
      law.fit(ones[:3], ones[:3], ones[:3])
