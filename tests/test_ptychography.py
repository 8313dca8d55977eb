"""Multislice ptychography: planted slices, probes, places and modes are found; windows are where they belong."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from engine import ptychography
from engine.data import DataError
from engine.diffraction import DiffractionSeries
from engine.iterate import Keep
from engine.multislice import Optics, beam
from engine.ptychography import Settings, levelled, reconstruct, windows
from tests.specimens import distance

SIZE, PIXEL, DEPTH = 24, 0.04, 4.0  # [pixel], [nm], [nm]
OPTICS = Optics(defocus=-10.0)


def raster(rows=8, step=0.1):
    axis = (np.arange(rows) - (rows - 1) / 2) * step
    return np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)


def specimen(slices=2, strength=0.6, field=None):
    """Blurred random phases in the middle of the field, others in each slice."""
    size = field or windows(raster(), SIZE, PIXEL)[0][0]
    axis = np.arange(size) - (size - 1) / 2
    q2 = np.add.outer(np.fft.fftfreq(size) ** 2, np.fft.fftfreq(size) ** 2)
    noise = np.random.default_rng(1).standard_normal((slices, size, size))
    blurred = np.fft.ifft2(np.fft.fft2(noise) * np.exp(-2 * (np.pi * 2.0) ** 2 * q2)).real
    inside = 1 / (1 + np.exp((np.hypot(*np.meshgrid(axis, axis)) - 11) * 2))
    shape = inside * np.clip(blurred / blurred.std() + 1.5, 0, None)
    return strength * shape / slices


def measured(phases, positions=None, optics=OPTICS, modes=None):
    """Patterns of a scan by Fourier transforms of numpy, window by window: what the solver's program should see."""
    positions = raster() if positions is None else positions
    slices = len(phases)
    made = beam(SIZE, PIXEL, optics, DEPTH / slices)
    spectra = [np.asarray(made.spectrum, complex)] if modes is None else modes(np.asarray(made.spectrum, complex))
    carry, q = np.asarray(made.propagator, complex), np.fft.fftfreq(SIZE)
    patterns = []
    for place in positions / PIXEL + (phases.shape[1] - 1) / 2:
        first = np.round(place - (SIZE - 1) / 2).astype(int)
        y, x = place - first
        shifted = np.exp(-2j * np.pi * (np.add.outer(q * y, q * x)))
        pattern = np.zeros((SIZE, SIZE))
        for spectrum in spectra:
            psi = np.fft.ifft2(spectrum * shifted, norm="ortho")
            for layer in phases:
                seen = layer[first[0]:first[0] + SIZE, first[1]:first[1] + SIZE]
                psi = np.fft.ifft2(carry * np.fft.fft2(np.exp(1j * seen) * psi))
            pattern += np.abs(np.fft.fft2(psi, norm="ortho")) ** 2
        patterns.append(np.fft.fftshift(pattern))
    return DiffractionSeries(np.array([patterns]), np.zeros(1), positions, PIXEL, optics)


@pytest.fixture(scope="module")
def series():
    return measured(specimen())


ASKED = Settings(slices=2, depth=DEPTH, iterations=40, group=16, refine=())


@pytest.fixture(scope="module")
def found(series):
    return reconstruct(series, 0, ASKED)


def likeness(solution, phases):
    """Correlation of the summed phases where the scan has lit the field, less the planes that no scan tells of."""
    lit = solution.fields["light"] > 0.1
    ours, true = (levelled(image.sum(0), lit)[0][lit] for image in (solution.volume[0], phases))
    return np.corrcoef(ours, true)[0, 1]


def test_the_phase_of_a_specimen_is_found(found):
    assert found.ok and found.volume.shape == (1, 2, *specimen().shape[1:])
    assert (np.diff(found.history["error"][1:]) < 1e-6).all()
    assert found.metrics["error"] < 2e-3 * found.history["error"][0]
    assert likeness(found, specimen()) > 0.995


def test_the_truth_stays_where_it_is(series):
    true = specimen()
    way, problem, _ = ptychography.build(series, series.patterns[0], ASKED)
    state = ptychography._start(way, problem)._replace(object=jnp.asarray(true[None], jnp.float32))
    assert float(ptychography._misfit(way, problem, state)) < 1e-9
    after = ptychography._iteration(way, problem, state._replace(before=state.object), jnp.int32(0))[0]
    assert distance(after.object[0], true) < 1e-3


def test_two_slices_explain_two_slices_better_than_one(series, found):
    one = reconstruct(series, 0, replace(ASKED, slices=1))
    assert found.metrics["error"] < 0.2 * one.metrics["error"]


def test_poissons_likelihood_has_the_same_end(series, found):
    poisson = reconstruct(series, 0, replace(ASKED, loss="poisson", iterations=80))
    assert distance(poisson.volume.sum(1), found.volume.sum(1)) < 0.1


def test_counts_and_shares_are_one_data_set(series):
    counts = replace(series, patterns=900 * series.patterns, electrons=900.0)
    a, b = (reconstruct(s, 0, replace(ASKED, iterations=3)).volume for s in (series, counts))
    assert distance(a, b) < 1e-4


def test_a_wrong_defocus_is_found(series):
    told = replace(series, optics=replace(OPTICS, defocus=-8.5))
    plain, refined = (reconstruct(told, 0, replace(ASKED, refine=what)) for what in ((), ("probe",)))
    assert abs(refined.metrics["defocus"] + 10) < 0.5
    assert refined.metrics["error"] < 0.2 * plain.metrics["error"]
    assert likeness(refined, specimen()) > likeness(plain, specimen())


def test_probes_that_stood_elsewhere_are_found(series):
    moves = 0.01 * np.random.default_rng(2).standard_normal(series.positions.shape)
    told = replace(series, positions=series.positions + moves)
    # The field grows with the outermost probe, so that windows begin elsewhere.
    refined = reconstruct(told, 0, replace(ASKED, refine=("positions",)))
    left = refined.fields["positions"] - series.positions
    moves, left = (a - a.mean(0) for a in (moves, left))
    assert np.sqrt((left**2).mean()) < 0.3 * np.sqrt((moves**2).mean())


def test_a_probe_of_two_modes_takes_two():
    """A source as wide as a pixel: the probe stands to one side in half of the electrons, to the other in the rest."""
    q = np.fft.fftfreq(SIZE)

    def jumping(spectrum):
        ramp = np.exp(-2j * np.pi * np.add.outer(0.2 * q, q) * 0.6)
        return [spectrum * np.sqrt(0.5) * ramp, spectrum * np.sqrt(0.5) / ramp]

    data = measured(specimen(), modes=jumping)
    one, two = (reconstruct(data, 0, replace(ASKED, refine=("probe",), modes=modes, iterations=100))
                for modes in (1, 2))
    assert two.metrics["error"] < 0.2 * one.metrics["error"]
    assert likeness(two, specimen()) > likeness(one, specimen())
    assert two.fields["probe"].shape == (2, 2, SIZE, SIZE)
    assert (two.fields["probe"][:, 0] ** 2).sum() == pytest.approx(1, rel=1e-4)


def test_an_absorbing_slice_is_told_from_a_phase():
    shadow = np.zeros(windows(raster(), SIZE, PIXEL)[0], complex)
    middle = len(shadow) // 2
    shadow[middle - 4:middle + 4, middle - 4:middle + 4] = 0.3j
    data = measured(shadow[None])
    asked = replace(ASKED, slices=1, absorption=True)
    result = reconstruct(data, 0, asked)
    lit = result.fields["light"] > 0.1
    assert np.corrcoef(result.fields["absorption"][0][lit], shadow.imag[lit])[0, 1] > 0.9
    assert result.fields["absorption"].min() >= 0
    assert np.abs(levelled(result.volume[0, 0], lit)[0][lit]).max() < 0.1
    assert result.metrics["error"] < 0.1 * reconstruct(data, 0, replace(asked, absorption=False)).metrics["error"]


def test_finer_waves_keep_apart_what_misses_the_detector():
    """Patterns of a specimen on pixels half as wide, of which the detector sees the inner half: with waves no wider
    than the detector what lies beyond folds back."""
    size, pixel = 2 * SIZE, PIXEL / 2
    field = windows(raster(), size, pixel, 2)[0][0]
    axis = np.arange(field) - (field - 1) / 2
    near = np.exp(-((axis[:, None] - 7) ** 2 + (axis - 3) ** 2) / 8) + np.exp(-((axis[:, None] + 9) ** 2 + axis**2) / 8)
    made, q = beam(size, pixel, OPTICS, DEPTH), np.fft.fftfreq(size)
    patterns = []
    for place in raster() / pixel + (field - 1) / 2:
        first = np.round(place - (size - 1) / 2).astype(int)
        ramps = [np.exp(-2j * np.pi * q * v) for v in place - first]
        psi = np.fft.ifft2(np.asarray(made.spectrum, complex) * np.outer(*ramps), norm="ortho")
        seen = near[first[0]:first[0] + size, first[1]:first[1] + size]
        patterns.append(np.fft.fftshift(np.abs(np.fft.fft2(np.exp(1j * 1.5 * seen) * psi, norm="ortho")) ** 2))
    inner = np.array([patterns])[:, :, SIZE // 2:3 * SIZE // 2, SIZE // 2:3 * SIZE // 2]
    data = DiffractionSeries(inner, np.zeros(1), raster(), PIXEL, OPTICS)
    plain, fine = (reconstruct(data, 0, replace(ASKED, slices=1, iterations=60, finer=n)) for n in (1, 2))
    assert fine.metrics["error"] < 0.2 * plain.metrics["error"]
    assert fine.volume.shape[2] == field // 2 and fine.volume.shape[2] % 2 == 0
    truth = near.reshape(field // 2, 2, field // 2, 2).mean((1, 3))
    lit = fine.fields["light"] > 0.1
    assert np.corrcoef(fine.volume[0, 0][lit], truth[lit])[0, 1] > 0.98


def test_coupled_slices_differ_less(series):
    def rough(coupling):
        volume = reconstruct(series, 0, replace(ASKED, slices=4, iterations=5, coupling=coupling)).volume[0]
        return np.square(np.diff(volume, axis=0)).sum() / np.square(volume).sum()

    assert rough(1.0) < 0.5 * rough(0.0)


def test_held_out_patterns_are_not_seen(series):
    fitted = np.random.default_rng(0).random(len(series.positions)) > 0.2
    spoiled = series.patterns.copy()
    spoiled[:, ~fitted] *= np.linspace(0, 2, SIZE, dtype=np.float32)
    a, b = (reconstruct(s, 0, replace(ASKED, iterations=3), fitted=fitted)
            for s in (series, replace(series, patterns=spoiled)))
    np.testing.assert_array_equal(a.volume, b.volume)
    assert a.metrics["held_out_error"] < b.metrics["held_out_error"]


def test_electrons_on_the_field_are_those_of_the_probes(series):
    way, problem, chosen = ptychography.build(series, series.patterns[0], replace(ASKED, group=5))
    state = ptychography._start(way, problem)
    light = np.asarray(ptychography._lit(way, problem, state))
    assert light.sum() == pytest.approx(len(series.positions), rel=1e-4)
    assert sorted(chosen[chosen >= 0]) == list(range(len(series.positions)))
    assert light.shape == way.field and light[:ptychography.MARGIN].max() == 0


def test_a_solve_is_taken_up_again(series, tmp_path):
    keep = Keep(tmp_path / "state.npz", "label", seconds=0.0)
    whole = reconstruct(series, 0, replace(ASKED, iterations=12)).volume

    def stop(n, volume):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reconstruct(series, 0, replace(ASKED, iterations=12), keep=keep, checkpoints=[11], observe=stop)
    assert keep.path.exists()
    assert distance(reconstruct(series, 0, replace(ASKED, iterations=12), keep=keep).volume, whole) < 1e-5


@pytest.mark.parametrize("rows", [1, 3, 6])
def test_every_window_lies_in_the_field(rows):
    positions = raster(rows, 0.13) + [0.01, -0.02]
    field, corners, places = windows(positions, SIZE, PIXEL)
    assert (corners >= 0).all() and (corners + SIZE <= np.array(field)).all()
    assert np.abs(places).max() <= PIXEL / 2 + 1e-6
    again = (corners + (SIZE - 1) / 2 - (np.array(field) - 1) / 2) * PIXEL + places
    np.testing.assert_allclose(again, positions, atol=1e-6)


def test_a_plane_through_the_vacuum_is_taken_off():
    image = 3 * specimen()[0]
    y, x = np.indices(image.shape) - (len(image) - 1) / 2
    seen = np.hypot(y, x) < 20
    plane = np.array([0.4, 0.01, -0.02])
    flat, told = levelled(image + plane[0] + plane[1] * y + plane[2] * x, seen)
    np.testing.assert_allclose(told, plane, atol=2e-3)
    assert np.abs(flat - image)[seen].max() < 0.05


def test_a_film_without_vacuum_is_levelled_as_a_whole():
    film = np.random.default_rng(0).standard_normal((40, 40))
    y, x = np.indices(film.shape) - 19.5
    flat, told = levelled(film + 2 + 0.1 * y, np.ones(film.shape, bool))
    np.testing.assert_allclose(told, [2, 0.1, 0], atol=0.1)
    assert abs(flat.mean()) < 1e-5


def test_what_cannot_be_solved_is_refused(series):
    with pytest.raises(DataError, match="slices"):
        reconstruct(series, 0, replace(ASKED, slices=0))
    with pytest.raises(DataError, match="empty"):
        reconstruct(replace(series, patterns=0 * series.patterns), 0, ASKED)
    for wrong in ({"refine": ("probes",)}, {"refine": "probe"}, {"loss": "Amplitude"}):
        with pytest.raises(DataError, match="refine is a list"):
            reconstruct(series, 0, replace(ASKED, **wrong))
    for wrong in ({"modes": 0}, {"group": -1}, {"step": -1.0}, {"iterations": 0}):
        with pytest.raises(DataError, match="are the least"):
            reconstruct(series, 0, replace(ASKED, **wrong))
    with pytest.raises(DataError, match="marked in shape"):
        reconstruct(series, 0, ASKED, fitted=np.ones(3, bool))
    with pytest.raises(DataError, match="no pixel"):
        levelled(np.zeros((4, 4)), np.zeros((4, 4), bool))
