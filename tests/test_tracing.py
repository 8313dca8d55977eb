"""Atoms are found where they are, told apart by their brightness, and counted as the paper counts them."""

import itertools

import numpy as np
import pytest

from engine.atoms import Atoms, nanoparticle, potential
from engine.data import DataError
from engine.tracing import HEAVY, LIGHT, NON_ATOM, compare, match, otsu, trace, traced_xyz

PIXEL = 0.04
HEIGHT = {"Cu": 1.0, "Au": 2.5}


def drawn(atoms, size=48, sigma=0.05, heights=HEIGHT):
    """A Gaussian per atom; its widths, unlike a parabola's, are known."""
    volume = np.zeros((size,) * 3)
    axis = (np.arange(size) - (size - 1) / 2) * PIXEL
    for symbol, place in zip(atoms.symbols, atoms.positions):
        z, y, x = (np.exp(-((axis - p) ** 2) / (2 * sigma**2)) for p in place)
        volume += heights[symbol] * z[:, None, None] * y[None, :, None] * x[None, None, :]
    return volume


@pytest.fixture(scope="module")
def particle():
    return nanoparticle("cuau", 0.65)


@pytest.fixture(scope="module")
def found(particle):
    return trace(drawn(particle), PIXEL)


def ghosts(volume, count, height, seed=0):
    """The volume with weak blobs in its corners, which no atom is."""
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0.72, 0.8, (count, 3)) * np.array(list(itertools.islice(
        itertools.product((-1, 1), repeat=3), count)))
    return volume + height * drawn(Atoms(["Cu"] * count, corners))


def test_atoms_are_found_within_a_picometre(particle):
    traced = trace(ghosts(drawn(particle), 8, 0.3), PIXEL)
    result = compare(traced.atoms("Cu", "Au"), particle)
    assert result.rmsd < 1.0
    assert result.tracing_error == 0 and result.classification == 1
    assert (traced.classes == NON_ATOM).sum() == 8
    assert result.found == {s: int((particle.symbols == s).sum()) for s in ("Cu", "Au")}
    assert traced.intensities[traced.classes == LIGHT].max() < traced.intensities[traced.classes == HEAVY].min()


def test_traced_atoms_are_read_back_from_their_text(particle):
    traced = trace(ghosts(drawn(particle), 8, 0.3), PIXEL)
    lines = traced_xyz(traced, 48 * PIXEL, "Cu", "Au").splitlines()
    assert int(lines[0]) == len(lines) - 2 == len(particle)
    read = [line.split() for line in lines[2:]]
    places = np.array([[float(v) for v in row[1:4]] for row in read])[:, ::-1] / 10 - 24 * PIXEL
    assert compare(Atoms([row[0] for row in read], places), particle).classification == 1
    intensities = np.array([float(row[4]) for row in read])
    assert (np.diff(intensities) <= 0).all() and (intensities > 0).all()


def test_a_gaussian_is_located_exactly():
    place = [0.0131, -0.1177, 0.2044]
    lonely = Atoms(["Cu"] * 3, [place, [0.4, 0.4, 0.41], [-0.4, -0.41, -0.4]])
    traced = trace(drawn(lonely), PIXEL)
    assert np.abs(traced.positions - place).sum(1).min() < 1e-4


def test_gain_changes_nothing(particle, found):
    again = trace(7.5 * drawn(particle), PIXEL)
    np.testing.assert_allclose(again.positions, found.positions, atol=1e-9)
    np.testing.assert_array_equal(again.classes, found.classes)


def test_a_shift_of_the_volume_shifts_the_atoms(particle, found):
    moved = trace(np.roll(drawn(particle), (1, -2, 3), (0, 1, 2)), PIXEL)
    assert compare(Atoms(["Cu"] * len(moved.positions), moved.positions - PIXEL * np.array([1, -2, 3])),
                   Atoms(["Cu"] * len(found.positions), found.positions)).rmsd < 1e-3


def test_what_is_weak_or_too_close_is_not_traced(particle):
    count = len(particle)
    assert len(trace(ghosts(drawn(particle), 3, 0.05), PIXEL).positions) == count  # below 8 %
    assert len(trace(ghosts(drawn(particle), 3, 0.05), PIXEL, threshold=0.01).positions) == count + 3
    beside = Atoms(["Cu", "Cu"], [[0.7, 0.7, 0.65], [0.7, 0.7, 0.77]])  # 0.12 nm apart, resolved by the smoothing
    assert len(trace(drawn(particle, sigma=0.03) + drawn(beside, sigma=0.03), PIXEL).positions) == count + 1


def test_a_mask_drops_what_is_outside_the_particle(particle):
    noisy = ghosts(drawn(particle), 4, 0.25)
    assert len(trace(noisy, PIXEL).positions) == len(particle) + 4
    assert len(trace(noisy, PIXEL, masked=True).positions) == len(particle)


def test_a_mask_keeps_a_dark_core():
    """As the dark field sees copper in gold; 64^3 voxels hold a shell that is closed."""
    atoms = nanoparticle("cuau", 0.9)
    volume = drawn(atoms, size=64, heights={"Cu": 0.2, "Au": 1.0})
    assert len(trace(volume, PIXEL, masked=True).positions) == len(trace(volume, PIXEL).positions) == len(atoms)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("model", "radius", "light", "heavy"), [("cuau", 0.65, "Cu", "Au"), ("bao", 0.75, "O", "Ba")])
def test_atoms_of_their_own_potential_are_all_found(model, radius, light, heavy, masked):
    """No non-atoms are there to be a class: the elements are not parted instead."""
    pytest.importorskip("gemmi")
    atoms = nanoparticle(model, radius)
    traced = trace(potential(atoms, 48, PIXEL, thermal=0.0085), PIXEL, masked=masked)
    result = compare(traced.atoms(light, heavy), atoms)
    assert result.rmsd < 2.5
    assert (result.tracing_error, result.classification) == pytest.approx((0, 1), abs=0.05 if masked else 0)
    assert not (traced.classes == NON_ATOM).any() and traced.thresholds[0] == 0


def test_errors_are_counted_as_the_paper_counts():
    truth = Atoms(["Cu", "Cu", "Au", "Au"], [[0, 0, 0], [0, 0, 0.5], [0, 0.5, 0], [0.5, 0, 0]])
    # One right, one of the wrong element 30 pm off, one missing, one displaced beyond reach, one too many.
    traced = Atoms(["Cu", "Au", "Au", "Cu"], [[0, 0, 0], [0.03, 0, 0.5], [0, 0.6, 0], [-0.5, 0, 0]])
    result = compare(traced, truth)
    assert result.rmsd == pytest.approx(30 / np.sqrt(2))
    assert result.tracing_error == pytest.approx((2 + 2) / 4)
    assert result.classification == pytest.approx(1 / 4)
    assert result.found == {"Au": 0, "Cu": 1}
    nothing = compare(Atoms([], np.zeros((0, 3))), truth)
    assert np.isnan(nothing.rmsd) and nothing.tracing_error == 1 and nothing.classification == 0


def test_matching_is_unique_and_the_best_of_all():
    rng = np.random.default_rng(4)
    for _ in range(20):
        a, b = rng.random((5, 3)), rng.random((4, 3))
        pairs = match(a, b, 0.5)
        assert len(set(pairs[:, 0])) == len(set(pairs[:, 1])) == len(pairs)
        square = ((a[:, None] - b[None]) ** 2).sum(2)

        def cost(chosen, square=square):
            kept = [square[i, j] for i, j in chosen if square[i, j] < 0.25]
            return (-len(kept), sum(kept))

        best = min(cost(list(zip(order, range(4)))) for order in itertools.permutations(range(5), 4))
        assert cost(pairs) == (best[0], pytest.approx(best[1]))


def test_otsu_agrees_with_trying_everything():
    rng = np.random.default_rng(1)
    for _ in range(10):
        values = np.sort(np.concatenate([rng.normal(m, 0.3, k) for m, k in ((0, 7), (2, 9), (5, 6))]))
        for classes in (2, 3):
            parts = [np.split(values, cut) for cut in itertools.combinations(range(1, len(values)), classes - 1)]
            best = min(parts, key=lambda p: sum(((c - c.mean()) ** 2).sum() for c in p))
            between = [(p.max() + q.min()) / 2 for p, q in itertools.pairwise(best)]
            np.testing.assert_allclose(otsu(rng.permutation(values), classes), between)


def test_otsu_of_a_volume_takes_its_histogram():
    rng = np.random.default_rng(1)
    values = np.concatenate([rng.normal(0, 0.1, 20_000), rng.normal(3, 0.1, 5_000)])
    assert 0.5 < otsu(values, 2)[0] < 2.5


def test_an_empty_volume_is_refused():
    with pytest.raises(DataError, match="0 atoms"):
        trace(np.zeros((16, 16, 16)), PIXEL)
    with pytest.raises(DataError, match="no atoms"):
        compare(Atoms(["Cu"], [[0, 0, 0]]), Atoms([], np.zeros((0, 3))))
