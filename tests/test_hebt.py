"""Laws of HEBT: decoupled channels, fixed points, what must not matter, what must come out, refusals."""

import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine import hebt, measured, metrics, phantoms_hebt, physics, quantify, regions, responses, signals
from engine.data import DataError, DataWarning, MultiModal
from engine.hebt import Settings, reconstruct, reconstruct_batch
from launch import devices
from tests.specimens import distance, with_images, with_maps

ROOT = Path(__file__).resolve().parent.parent
NAMES = tuple(phantoms_hebt.ELEMENTS)
LINES = physics.emissions(NAMES, phantoms_hebt.BEAM_KEV, phantoms_hebt.LINES)


def simulated(size=97, planes=1, **more):
    """HEBT's particle at its angles; counts that the paper's optima appear at."""
    pixel = phantoms_hebt.FIELD_NM / size
    return signals.bimodal(phantoms_hebt.phantom(size, planes), LINES, pixel_size=pixel,
                           **{"chem_angles": phantoms_hebt.ANGLES} | more)


@pytest.fixture(scope="module")
def small():
    return simulated(32)


@pytest.fixture(scope="module")
def paper():
    return simulated()


def ssim(volume, truth):
    return np.array([metrics.ssim_structure(v, t) for v, t in zip(volume, truth)])


# ---- The two channels


def test_the_channels_decouple():
    """The closed form, at 1e-10 in double precision: sums at rate 1, differences at (1 - alpha) or their own."""
    done = subprocess.run([sys.executable, "-m", "tests.decoupling"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
    assert len(found) == 16
    for total, apart, kind in found:
        assert float(total) < 1e-10 and float(apart) < 1e-10, kind


def test_the_two_meanings_of_alpha_are_one_share(small):
    """alpha of plain rows is the row-scaled one with (1 - a)^2 : k a^2 = (1 - alpha) : alpha; 0.59 is 0.8."""
    plain = 0.586
    row = 2 * plain**2 / ((1 - plain) ** 2 + 2 * plain**2)
    assert row == pytest.approx(0.8, abs=1e-3)
    one, other = (reconstruct(small, Settings(form="paper", scaling=scaling, alpha=alpha, iterations=60)).volume
                  for scaling, alpha in (("plain", plain), ("row", row)))
    assert distance(one, other) < 1e-4


def test_without_weight_haadf_has_no_say(small):
    """alpha = 0 is the tomography of the maps alone, in either form's units."""
    alone = reconstruct(small, Settings(method="eds", form="paper", iterations=30)).volume
    both = reconstruct(small, Settings(form="paper", alpha=0.0, iterations=30)).volume
    assert distance(both, alone) < 1e-4


@pytest.mark.parametrize("method", ["eds", "hebt"])
@pytest.mark.parametrize("form", ["paper", "preconditioned"])
def test_a_volume_that_explains_the_data_is_a_fixed_point(method, form):
    """Clean data bring the truth, and the residual goes on falling; the paper's form is slow to get there."""
    data = simulated(24, noise=False)
    solution = reconstruct(data, Settings(method=method, form=form, alpha=0.5, prefilter=0, iterations=2000))
    print(form, method, distance(solution.volume, data.truth), solution.history["total"][[0, -1]])
    assert distance(solution.volume, data.truth) < (0.06 if form == "paper" else 0.02)
    assert solution.history["total"][-1] < 1e-4 * solution.history["total"][0]


def test_the_cost_of_the_papers_form_falls(small):
    for scaling in ("row", "plain"):
        total = reconstruct(small, Settings(form="paper", scaling=scaling)).history["total"]
        assert (np.diff(total) <= 1e-6 * total[0]).all()


def test_angles_of_their_own_agree_with_shared_ones(small):
    """An image more, far from the others, sends the solve down the road for lists of angles that differ."""
    index = list(range(small.haadf.tilts))
    with_one = replace(small.haadf, projections=small.haadf.projections[:, index + [0]],
                       angles=np.append(small.haadf.angles, small.haadf.angles[0]))
    for form in ("paper", "preconditioned"):
        shared, own = (reconstruct(data, Settings(form=form)).volume
                       for data in (small, replace(small, haadf=with_one)))
        assert 0 < distance(own, shared) < 0.03


# ---- What must not matter


@pytest.mark.parametrize("form", ["paper", "preconditioned"])
def test_gain_dose_and_solid_angle_change_nothing(small, form):
    """HAADF gain x 1000, and counts x 7 with the sensitivity they come from, give one volume, one composition."""
    def fractions(data):
        volume = reconstruct(data, Settings(form=form, responses=())).volume
        return quantify.quantify(volume, NAMES, np.ones(2)).weight

    louder = with_images(small, projections=1000 * small.haadf.projections, units="intensity")
    richer = replace(with_maps(small, projections=7 * small.chem.projections), sensitivity=7 * small.sensitivity)
    unknown = quantify.quantify(reconstruct(replace(small, sensitivity=None), Settings(form=form)).volume, NAMES,
                                quantify.xray_factors(LINES)).weight
    plain = fractions(small)
    np.testing.assert_allclose(fractions(louder), plain, atol=1e-3)
    np.testing.assert_allclose(unknown, plain, atol=1e-3)
    # Seven times as many counts that are no better would be fitted as such: the ratios are, by their own noise.
    assert np.abs(fractions(richer) - plain).mean() < 5e-3


def test_scattering_is_in_units_of_haadf(small):
    solution = reconstruct(small, Settings(iterations=80))
    louder = reconstruct(with_images(small, projections=10 * small.haadf.projections), Settings(iterations=80))
    assert distance(louder.volume, solution.volume) < 1e-3
    assert distance(hebt.scattering(louder, NAMES), 10 * hebt.scattering(solution, NAMES)) < 1e-3
    # Eq. 18 with z, and Eq. 12 with f, tell the same composition where the response ratios are right (Eq. 16).
    by_z = quantify.quantify(hebt.scattering(solution, NAMES), NAMES, quantify.haadf_factors(LINES))
    by_f = quantify.quantify(solution.volume, NAMES, np.ones(2))
    both = by_z.mask & by_f.mask
    assert np.abs(by_z.weight - by_f.weight)[:, both].max() < 0.02


def test_a_mirrored_specimen_gives_the_mirrored_volume(small):
    def flipped(series):
        return replace(series, projections=np.flip(series.projections, 2), angles=-series.angles)

    other = replace(small, chem=flipped(small.chem), haadf=flipped(small.haadf))
    plain, mirrored = (reconstruct(data, Settings()).volume for data in (small, other))
    assert distance(np.flip(mirrored, 2), plain) < 1e-3


def test_a_batch_is_its_members(small):
    settings = [Settings(alpha=a, relaxation=r, differences=d) for a, r, d in ((0.5, 1.0, 0.3), (0.9, 0.8, 1.0))]
    seen = []
    batch = reconstruct_batch(small, settings, checkpoints=[10], observe=lambda k, n, v: seen.append((k, n, v)))
    assert [each[:2] for each in seen] == [(0, 10), (1, 10)]
    for k, each in enumerate(settings):
        assert distance(batch[k].volume, reconstruct(small, each).volume) < 1e-5
        assert distance(seen[k][2], reconstruct(small, replace(each, iterations=10)).volume) < 1e-5
    with pytest.raises(ValueError, match="alpha, relaxation, differences alone"):
        reconstruct_batch(small, [settings[0], replace(settings[0], prefilter=0.0)])


def test_planes_do_not_know_each_other():
    """Without the filter along x a volume is its planes."""
    data = simulated(24, planes=4)
    settings = Settings(form="paper", prefilter=0.0, responses=(439.0, 446.0))
    whole = reconstruct(data, settings).volume
    part = replace(data, chem=replace(data.chem, projections=data.chem.projections[..., 1:3]), truth=None,
                   haadf=replace(data.haadf, projections=data.haadf.projections[..., 1:3]), shape=(24, 24, 2))
    assert distance(reconstruct(part, settings).volume, whole[..., 1:3]) < 1e-4


@pytest.mark.slow
def test_slabs_give_what_one_device_gives():
    given = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "NPROC", "OMP_NUM_THREADS")}
    env = devices.environment(0, 1, given | {"JAX_PLATFORMS": "cpu"}, share=3)
    done = subprocess.run([sys.executable, "-m", "tests.hebt_slabs"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [float(line.split()[0]) for line in done.stdout.splitlines()]
    assert len(found) == 5 and max(found) < 1e-4


# ---- What must come out


def test_hebt_beats_the_maps_alone_as_in_the_paper(paper):
    """Fig. 8: at its best n the maps alone stay behind HEBT at alpha = 0.8 and n = 200, for both elements."""
    alone, both = {}, {}
    for settings, into in ((Settings(method="eds", form="paper", iterations=100), alone),
                           (Settings(form="paper", iterations=200), both)):
        reconstruct(paper, settings, checkpoints=[10, 15, 20, 30, 40, 50, 70, 100, 200],
                    observe=lambda n, volume, into=into: into.__setitem__(n, ssim(volume, paper.truth)))
    best = np.max(list(alone.values()), axis=0)
    assert (both[200] > best + 0.003).all()
    assert all(alone[n][0] < best[0] for n in (10, 100)) and alone[100][1] < best[1]


def test_preconditioned_is_as_good_in_a_tenth_of_the_iterations(paper):
    ours = ssim(reconstruct(paper, Settings()).volume, paper.truth)
    theirs = ssim(reconstruct(paper, Settings(form="paper", iterations=200)).volume, paper.truth)
    print(f"n = {Settings().iterations}: SSIM {ours}; the paper's form at n = 200: {theirs}")
    assert Settings().iterations == 20 and (ours > theirs - 0.005).all()


@pytest.mark.parametrize(("method", "factors"), [("eds", "f"), ("hebt", "f"), ("hebt", "z")])
def test_noise_free_projections_return_the_fractions(method, factors):
    """Closure: of core and shell within 2 %, away from the interface, with the factors of Table 2."""
    data = simulated(49, noise=False)
    solution = reconstruct(replace(data, sensitivity=None),
                           Settings(method=method, alpha=0.5, prefilter=0, iterations=300))
    volume, scale = solution.volume, quantify.xray_factors(LINES)
    if factors == "z":
        volume, scale = hebt.scattering(solution, NAMES), quantify.haadf_factors(LINES)
    found = quantify.quantify(volume, NAMES, scale)
    assert found.threshold.ok
    silver = phantoms_hebt.fractions(data.truth)[0]
    for content in (phantoms_hebt.CORE, phantoms_hebt.SHELL):
        inside = np.abs(silver - content["Ag"]) < 1e-6
        assert found.weight[0][inside & found.mask].mean() == pytest.approx(content["Ag"], abs=0.02)


def test_three_dimensions_are_as_good_as_one_plane():
    """The particle whole, with a quarter of the images having maps: HEBT ahead of the maps alone by more."""
    data = simulated(32, planes=32, chem_angles=phantoms_hebt.ANGLES[::4], haadf_angles=phantoms_hebt.ANGLES)
    alone: dict[int, np.ndarray] = {}
    reconstruct(data, Settings("eds", "paper", iterations=100), checkpoints=[10, 20, 30, 50, 100],
                observe=lambda n, volume: alone.update({n: ssim(volume, data.truth)}))
    both = ssim(reconstruct(data, Settings()).volume, data.truth)
    print(f"3D: HEBT {both}, maps alone {np.max(list(alone.values()), axis=0)}")
    assert (both > np.max(list(alone.values()), axis=0) + 0.01).all() and both.min() > 0.97


def test_checkpoints_show_the_way(small):
    seen = {}
    reconstruct(small, Settings(iterations=30), checkpoints=[5, 20], observe=seen.__setitem__)
    assert list(seen) == [5, 20]
    assert distance(seen[20], reconstruct(small, Settings(iterations=20)).volume) < 1e-5


def test_haadf_alone_is_a_reference(small):
    solution = reconstruct(small, Settings(method="haadf", form="paper"))
    z = np.array([line.z for line in LINES])
    assert solution.volume.shape == (1, *small.shape)
    assert metrics.correlation(solution.volume[0], np.tensordot(z, small.truth, 1)) > 0.97


def test_no_voxel_is_negative_unless_asked(small):
    assert reconstruct(small, Settings()).volume.min() >= 0
    assert reconstruct(small, Settings(positive=False)).volume.min() < 0


def test_maps_left_out_are_not_looked_at(small):
    spoilt = small.chem.projections.copy()
    spoilt[:, 3] = 1000
    one, other = (reconstruct(data, Settings(), held_out=(3,)).volume
                  for data in (small, with_maps(small, projections=spoilt)))
    assert distance(one, other) < 1e-6


# ---- Response ratios


@pytest.mark.parametrize("dose", [0.1, 1.0, 10.0])
def test_response_ratios_come_back(dose):
    """Within 5 %, also from maps of a few counts, whose noise would bring the ratios down."""
    data = simulated(64, dose=dose * signals.DOSE)
    z = np.array([line.z for line in LINES])
    wanted = signals.HAADF_DOSE * signals.COLLECTED * physics.AVOGADRO * data.chem.pixel_size * z / data.sensitivity
    found = responses.fit(data, prefilter=0.8)
    np.testing.assert_allclose(found.values, wanted, rtol=0.05)
    assert found.r_squared < found.r_squared_smooth > 0.9


def test_a_missing_element_is_noticed_and_named(small):
    """A support of a third element, beside the particle."""
    post = np.zeros_like(small.truth[:1])
    post[:, 4:8, :12] = 25.0
    truth = np.concatenate([small.truth, post, 0.02 * small.truth[:1]])
    lines = [*LINES, replace(LINES[1], element="Pt"), replace(LINES[0], element="Cd")]
    whole = signals.bimodal(truth, lines, pixel_size=small.chem.pixel_size, chem_angles=phantoms_hebt.ANGLES)

    def part(index):
        return replace(whole.chem, projections=whole.chem.projections[index],
                       elements=tuple(whole.chem.elements[k] for k in index))

    data = replace(whole, chem=part([0, 1]), numbers=(47, 79), sensitivity=whole.sensitivity[:2], truth=None)
    with pytest.warns(DataWarning, match="an element that scatters is not among them"):
        reconstruct(data, Settings(iterations=2))
    with pytest.warns(DataWarning, match="most likely Pt"):
        reconstruct(data, Settings(iterations=2), candidates=part([2, 3]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reconstruct(whole, Settings(iterations=2))


def test_a_level_of_the_detector_is_told_from_an_element(small):
    """HAADF that is bright in vacuum is no sum of maps either; subtracted, it is."""
    level = 0.5 * float(small.haadf.projections.max())
    lifted = with_images(small, projections=small.haadf.projections + level)
    with pytest.warns(DataWarning, match="give it as data.haadf.background"):
        reconstruct(lifted, Settings(iterations=2))
    told = with_images(lifted, background=level)
    assert distance(reconstruct(told, Settings()).volume, reconstruct(small, Settings()).volume) < 1e-3


@pytest.mark.parametrize("how", ["equal", "haadf"])
def test_a_detector_that_is_hidden_at_some_tilts_is_made_up_for(how):
    """Down to a third of the counts: factors within 10 %, and volumes nearly as good as with an open detector."""
    visible = 0.65 + 0.35 * np.cos(np.deg2rad(3 * phantoms_hebt.ANGLES))
    data, open_ = simulated(48, 6, visible=visible), simulated(48, 6)
    solution = reconstruct(data, Settings(tilts=how))
    product = solution.fields["tilt_factors"] * visible
    print(how, np.abs(product / product.mean(1, keepdims=True) - 1).max())
    assert (np.abs(product / product.mean(1, keepdims=True) - 1) < 0.1).all()
    with pytest.warns(DataWarning, match="take solver.tilts: haadf"):
        hidden = reconstruct(data, Settings()).volume
    spoilt, mended, best = (ssim(each, data.truth).mean() for each in (
        hidden, solution.volume, reconstruct(open_, Settings()).volume))
    print(how, f"hidden {spoilt:.4f}, made up for {mended:.4f}, never hidden {best:.4f}")
    assert spoilt < mended - 0.002 and mended > best - 0.01


def test_factors_of_tilts_need_something_to_go_by(small):
    assert (responses.tilt_factors(small, "as_measured") == 1).all()
    assert np.abs(responses.tilt_factors(small, "haadf") - 1).max() < 0.05
    dark = small.chem.projections.copy()
    dark[1, 4] = 0
    with pytest.raises(DataError, match="Au has no counts above its background"):
        reconstruct(with_maps(small, projections=dark), Settings(tilts="equal"))
    with pytest.raises(DataError, match="take tilts: equal"):
        reconstruct(with_images(small, angles=small.haadf.angles + 1.3), Settings(tilts="haadf"))


def test_the_measured_particle_is_not_the_sum_of_its_minerals():
    """IDP: the lines of all elements make up the images; without platinum they do not, and platinum is named."""
    root = Path(__file__).parents[2] / "shared" / "data" / "idp_haadf_edx"
    if not root.exists():
        pytest.skip("the measured series is not here")
    from sweeps.settings import load

    given = load(ROOT / "configs" / "idp.yaml", [f"data.root={root}"]).data
    read = [measured.read_series(**source.model_dump(exclude={"candidates", "beam"}), root=root)
            for source in (given.haadf, given.chem)]
    haadf, chem = regions.prepare(*read, pixel_size=given.pixel_size, crop=given.crop.model_dump(),
                                   binning=given.binning, tilt_axis=given.tilt_axis)
    whole = MultiModal(chem, haadf, tuple(map(physics.atomic_number, chem.elements)), (24, 56, 48))

    def part(names):
        index = [chem.elements.index(name) for name in names]
        return replace(chem, projections=chem.projections[index], background=chem.background[index], elements=names)

    minerals = part(("O", "Mg", "Si", "S", "Fe"))
    bare = replace(whole, chem=minerals, numbers=(8, 12, 14, 16, 26))
    full, lacking = (responses.fit(data, prefilter=0.8, candidates=more)
                     for data, more in ((whole, None), (bare, part(("C", "Pt")))))
    print(f"R^2 {full.r_squared:.3f} and {full.r_squared_smooth:.3f}, without Pt and C {lacking.r_squared:.3f} and "
          f"{lacking.r_squared_smooth:.3f}; gains {lacking.gains}")
    assert full.r_squared_smooth > 0.9 and lacking.r_squared_smooth < 0.65 and lacking.missing == "Pt"
    with pytest.warns(DataWarning, match="most likely Pt"):
        assert reconstruct(bare, Settings(iterations=5), candidates=part(("C", "Pt"))).ok


# ---- Refusals


def test_what_cannot_be_is_refused(small):
    alone = replace(small, haadf=None)
    for wrong, data, settings in (
            ("needs HAADF", alone, Settings()), ("needs HAADF", alone, Settings(method="haadf")),
            ("from 0 to 1", small, Settings(alpha=1.2)), ("below 2", small, Settings(relaxation=2.5)),
            ("one positive number", small, Settings(responses=(1.0,))), ("JAX sees", small, Settings(devices=99))):
        with pytest.raises(DataError, match=wrong):
            reconstruct(data, settings)
    assert reconstruct(alone, Settings(method="eds")).ok
    turned = with_images(small, angles=small.haadf.angles + 1.3)
    with pytest.raises(DataError, match="solver.responses"):
        reconstruct(turned, Settings())


def test_given_ratios_are_taken(small):
    found = reconstruct(small, Settings()).metrics
    given = reconstruct(small, Settings(responses=[found["response_Ag"], found["response_Au"]]))
    assert given.metrics["response_Ag"] == found["response_Ag"]
    assert distance(given.volume, reconstruct(small, Settings()).volume) < 1e-6
    with pytest.warns(DataWarning, match="leave out solver.responses"):
        reconstruct(small, Settings(responses=(1.0, 100.0)))
