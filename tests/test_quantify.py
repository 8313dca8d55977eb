"""Laws of quantification: Table 2's printed ratios, open tables against it, fractions, thresholds, refusals."""

import subprocess
import sys

import numpy as np
import pytest

from engine import phantoms_hebt, physics, quantify
from engine.data import DataError, DataWarning
from engine.quantify import Film

AGAU = physics.emissions(phantoms_hebt.ELEMENTS, phantoms_hebt.BEAM_KEV, phantoms_hebt.LINES)
COZN = physics.emissions(("Co", "Zn"), 80.0)


@pytest.fixture(scope="module")
def particle():
    """The particle's partial densities and its weight fractions, (element, z, y, x), of whole voxels' worth."""
    truth = phantoms_hebt.phantom(48, planes=12)
    truth = np.where(phantoms_hebt.fractions(truth) > 0, truth, 0)
    return truth, phantoms_hebt.fractions(truth)


# ---- Cross sections


def test_table_2_gives_the_printed_factors_and_ratios():
    """HEBT 3.2.3: z_Co, z_Zn, f_Co, f_Zn and the ratio of the partial cross sections."""
    z, f = quantify.haadf_factors(COZN), quantify.xray_factors(COZN, physics.PAPER_EFFICIENCY)
    assert [f"{value:.2e}" for value in z] == ["9.49e+04", "9.96e+04"]
    assert [f"{value:.2f}" for value in f] == ["2.25", "1.84"]
    co, zn = (line.partial(0.7, physics.PAPER_EFFICIENCY) for line in COZN)
    assert f"{co / zn:.2f}" == "1.10"
    assert co / zn == pytest.approx(f[0] * COZN[0].weight / (f[1] * COZN[1].weight))


@pytest.mark.parametrize("paper", physics.PAPER.values(), ids=lambda line: f"{line.element}-{line.line}")
def test_browning_is_what_table_2_was_made_with(paper):
    assert physics.elastic(physics.atomic_number(paper.element), paper.beam) == pytest.approx(paper.elastic, rel=0.02)


def test_ionisation_has_a_threshold_a_maximum_and_falls():
    edge = 7.7
    found = [physics.ionisation(edge, 2, u * edge) for u in (0.5, 1, 1.2, 3, 10, 40)]
    assert found[0] == found[1] == 0 and 0 < found[2] < found[3] > found[4] > found[5]
    assert physics.ionisation(edge, 4, 80.0) == pytest.approx(2 * physics.ionisation(edge, 2, 80.0))


def test_open_tables_agree_with_table_2():
    """K lines within 10 %; the subshell's own ionisation for Ag La within 2 %, and 1.3 times that with what L1 and L2
    hand down."""
    x = pytest.importorskip("xraylib")
    for paper in COZN:
        own = physics.emission(paper.element, paper.beam, paper.line)
        assert own.f() == pytest.approx(paper.f(), rel=0.1) and own.z == pytest.approx(paper.z, rel=0.02)
        assert own.weight == pytest.approx(paper.weight, rel=1e-3)
    alone = physics.ionisation(x.EdgeEnergy(47, x.L3_SHELL), 4, 100.0)
    assert alone == pytest.approx(AGAU[0].ionisation, rel=0.02)
    assert physics.emission("Ag", 100.0, "La").f() / AGAU[0].f() == pytest.approx(1.3, abs=0.05)


def test_open_tables_follow_the_beam_energy():
    pytest.importorskip("xraylib")
    found = [physics.emission("Co", beam, "Ka") for beam in (60.0, 100.0, 200.0)]
    assert (np.diff([line.f() for line in found]) < 0).all() and (np.diff([line.z for line in found]) < 0).all()


def test_sources_are_not_mixed():
    """Table 2 and the open tables differ by 1.3 for an L line, which no ratio may see."""
    pytest.importorskip("xraylib")
    assert {line.source for line in AGAU} == {"HEBT, Table 2 (MC X-ray)"}
    mixed = physics.emissions(("Ag", "Pt"), 100.0, {"Ag": "La", "Pt": "Ma"})
    assert len({line.source for line in mixed}) == 1 and "xraylib" in mixed[0].source
    with pytest.raises(DataError, match="has no Pt"):
        physics.emissions(("Ag", "Pt"), 100.0, source="paper")


def test_lines_that_are_not_are_refused():
    with pytest.raises(DataError, match="no element"):
        physics.atomic_number("Xx")
    pytest.importorskip("xraylib")
    with pytest.raises(DataError, match="not known"):
        physics.emission("Co", 80.0, "Kx")
    with pytest.raises(DataError, match="gives no Ka"):
        physics.emission("Au", 60.0, "Ka")  # its K edge lies at 81 keV
    with pytest.raises(DataError, match="gives no Ma"):
        physics.emission("O", 80.0, "Ma")


def test_without_xraylib_the_paper_is_quantified_and_the_rest_refused_and_jax_is_not_needed():
    code = ("import sys\nfor name in ('jax', 'jaxlib', 'xraylib'): sys.modules[name] = None\n"
            "import numpy as np\nfrom engine import physics, quantify\n"
            "lines = physics.emissions(('Co', 'Zn'), 80.0)\n"
            "v = np.zeros((2, 9, 9, 1)); v[:, 2:7, 2:7] = 1\n"
            "print(quantify.quantify(v, ('Co', 'Zn'), quantify.xray_factors(lines)).weight.sum())\n"
            "try: physics.emission('Fe', 80.0)\nexcept ValueError as error: print(error)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("25.0") and "tomoatlas[tables]" in done.stdout


# ---- Fractions


def test_fractions_come_back_and_sum_to_one_on_the_mask(particle):
    truth, share = particle
    found = quantify.quantify(truth, ("Ag", "Au"), np.ones(2))
    assert found.threshold.ok
    np.testing.assert_allclose(found.weight.sum(0)[found.mask], 1, rtol=1e-6)
    np.testing.assert_allclose(found.atomic.sum(0)[found.mask], 1, rtol=1e-6)
    assert not found.weight[:, ~found.mask].any() and not found.atomic[:, ~found.mask].any()
    np.testing.assert_allclose(found.weight[:, found.mask], share[:, found.mask], atol=1e-6)
    silver, gold = (share[k][found.mask] / AGAU[k].weight for k in (0, 1))
    np.testing.assert_allclose(found.atomic[0][found.mask], silver / (silver + gold), rtol=1e-5)


def test_every_kind_of_factor_gives_the_same_fractions(particle):
    """Counts, HAADF, k, zeta, partial cross sections and atoms are ways to say one thing (Eqs. 1-3, 7, 14)."""
    truth, _ = particle
    names, f, z = ("Ag", "Au"), quantify.xray_factors(AGAU), quantify.haadf_factors(AGAU)
    wanted = quantify.quantify(truth, names, np.ones(2)).weight
    counts, bright = (truth * a[:, None, None, None] for a in (f, z))
    atoms = truth / physics.atomic_weights(names)[:, None, None, None]
    partial = [line.partial(0.7) for line in AGAU]
    for volume, factors in ((counts, f), (bright, z), (counts, quantify.k_factors(f[0] / f)),
                            (counts, quantify.zeta_factors(7 / f)), (atoms, quantify.atom_factors(names)),
                            (counts, quantify.partial_factors(partial, names))):
        np.testing.assert_allclose(quantify.quantify(volume, names, factors).weight, wanted, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e8])
def test_scale_changes_nothing(particle, scale):
    truth, _ = particle
    plain = quantify.quantify(truth, ("Ag", "Au"), np.ones(2))
    scaled = quantify.quantify(scale * truth.astype(float), ("Ag", "Au"), 3 * np.ones(2))
    np.testing.assert_allclose(scaled.weight, plain.weight, atol=1e-6)
    assert scaled.threshold.voxels == plain.threshold.voxels


def test_a_subset_is_normalised_among_itself(particle):
    """Zn / (Zn + Co): carbon is in the volume and has no say."""
    truth, share = particle
    carbon = np.random.default_rng(0).random((1, *truth.shape[1:])).astype(np.float32) * 50
    found = quantify.quantify(np.concatenate([carbon, truth]), ("C", "Ag", "Au"), np.ones(3), over=("Au", "Ag"))
    assert found.elements == ("Au", "Ag")
    np.testing.assert_allclose(found.weight[::-1][:, found.mask], share[:, found.mask], atol=1e-6)


def test_a_mask_or_a_threshold_may_be_given(particle):
    truth, _ = particle
    mask = np.zeros(truth.shape[1:], bool)
    mask[20:30, 20:30] = True
    assert (quantify.quantify(truth, ("Ag", "Au"), np.ones(2), mask=mask).mask == mask & (truth.sum(0) > 0)).all()
    found = quantify.quantify(truth, ("Ag", "Au"), np.ones(2), threshold=5.0)
    assert (found.mask == (truth.sum(0) > 5)).all() and found.threshold.voxels == found.mask.sum()


def test_what_cannot_be_quantified_is_refused(particle):
    truth, _ = particle
    for wrong, factors, over in (("Cu cannot", (1, 1), ("Cu",)), ("one each", (1, 1, 1), None),
                                 ("positive", (1, 0), None), ("no element", (1, 1), ())):
        with pytest.raises(DataError, match=wrong):
            quantify.quantify(truth, ("Ag", "Au"), factors, over=over)


# ---- Thresholds


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.15])
def test_the_edge_spread_threshold_finds_the_particle(particle, noise):
    from scipy.ndimage import gaussian_filter

    total = particle[0].sum(0)
    inside = total > total.max() / 3
    seen = gaussian_filter(total, 0.7) + noise * total.max() * np.random.default_rng(1).normal(size=total.shape)
    found = quantify.edge_spread(seen)
    assert found.ok, found.status
    assert abs(found.voxels / inside.sum() - 1) < 0.1


def test_a_threshold_without_a_plateau_says_so():
    """Noise alone, and nothing at all, are no particle."""
    noise = np.abs(np.random.default_rng(0).normal(size=(30, 30, 30)))
    found = quantify.edge_spread(noise)
    assert not found.ok and "no plateau" in found.status and found.voxels == (noise > found.value).sum()
    assert quantify.LOW <= found.value / found.level <= quantify.HIGH
    empty = quantify.edge_spread(np.zeros((9, 9, 1)))
    assert not empty.ok and empty.voxels == 0
    assert not quantify.quantify(np.zeros((1, 9, 9, 1)), ("Co",), [1.0]).weight.any()


# ---- Thin films


def test_thick_specimens_are_warned_of(particle):
    pytest.importorskip("xraylib")
    truth, _ = particle
    film = Film(3.0, phantoms_hebt.LINES)
    found = quantify.quantify(truth, ("Ag", "Au"), np.ones(2), film=film)
    thin = found.absorbed
    assert 0.1 < thin["Ag"] < thin["Au"] < 0.2  # 96 nm: both lose a sixth, which their ratio does not see
    with pytest.warns(DataWarning, match="Au loses about .* of its X-rays"):
        thick = quantify.quantify(truth, ("Ag", "Au"), np.ones(2), film=Film(100.0, phantoms_hebt.LINES)).absorbed
    assert np.log1p(-thick["Au"]) == pytest.approx(np.log1p(-thin["Au"]) * 100 / 3, rel=1e-3)
    half = quantify.quantify(truth, ("Ag", "Au"), np.ones(2), film=Film(3.0, phantoms_hebt.LINES, density=7.0))
    assert half.absorbed["Ag"] < thin["Ag"]
