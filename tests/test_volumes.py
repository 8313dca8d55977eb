"""Statistics of many volumes are NumPy's, in the memory of a few chunks."""

import csv
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import xarray
import zarr

from sweeps import volumes, voxels
from sweeps.journal import RunError
from tests.coordinate import coordinate, sweep

pytest.importorskip("dask.array")
AXES = {"chem_tilts": [3, 5], "replicate": [0, 1, 2]}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished run of 2 x 3 cells with two trials each, whose volumes are (2, 8, 16, 32)."""
    folder = tmp_path_factory.mktemp("volumes") / "r"
    coordinate(folder, sweep(2, save="all", axes=AXES), "with_noise")
    return folder


def read(target, group="8x16x32"):
    """The result, as xarray reads it with nothing of ours."""
    with xarray.open_zarr(target / "volumes.zarr", group=group, chunks=None) as data:
        return data.load()


def winners(folder):
    """By cell."""
    cells = folder / "atlas.zarr/cells"
    return {path.name: zarr.open_group(path, mode="r")["volume"][:] for path in cells.iterdir() if path.is_dir()}


def assert_statistics(data, place, members):
    stacked = np.stack(members).astype("f8")
    for name, expected in (("mean", stacked.mean(0)), ("std", stacked.std(0)), ("minimum", stacked.min(0)),
                           ("maximum", stacked.max(0))):
        np.testing.assert_allclose(data[name][place], expected, rtol=1e-5, atol=1e-6)
    assert int(data["count"][place]) == len(members)


def test_voxels_projections_and_totals_of_all_cells_are_numpys(made, tmp_path):
    told = []
    target, files, text = volumes.write(made, tmp_path / "out", None, lambda share, words: told.append(share))
    data, found = read(target), winners(made)
    with open(files[1], newline="") as table:
        rows = list(csv.DictReader(table))
    assert data["volume"].values.tolist() == list(dict.fromkeys(row["volume"] for row in rows)) and len(rows) == 12
    assert float(rows[3]["mean"]) == pytest.approx(float(data["volume_mean"][1, 1]), rel=1e-5)
    assert_statistics(data, 0, list(found.values()))
    for place, name in enumerate(data["volume"].values):
        volume = found[name].astype("f8")
        for number, axis in enumerate("zyx", start=1):
            np.testing.assert_allclose(data[f"sum_{axis}"][place], volume.sum(number), rtol=1e-5)
            np.testing.assert_array_equal(data[f"maximum_{axis}"][place], volume.max(number))
        np.testing.assert_allclose(data["volume_mean"][place], volume.mean((1, 2, 3)), rtol=1e-6)
        np.testing.assert_allclose(data["volume_total"][place], volume.sum((1, 2, 3)), rtol=1e-6)
        exact = np.percentile(volume.reshape(2, -1), voxels.PERCENTILES, axis=1).T
        np.testing.assert_allclose(data["volume_percentile"][place], exact, rtol=0.01, atol=0.01)
    assert data["mean"].dims == ("group", "element", "z", "y", "x") and data["z"].units == "nm"
    assert data["z"].values.tolist() == [2.5 * (k - 3.5) for k in range(8)]
    assert all(variable.attrs["long_name"] for variable in data.variables.values())
    assert told == sorted(told) and told[-1] == 1.0
    assert [path.name for path in files] == ["volumes.zarr", "table.csv", "projections.png"]
    assert all(path.exists() for path in files) and "replicate=2" in text


def test_groups_differ_in_one_axis_alone(made, tmp_path):
    data, found = read(volumes.write(made, tmp_path / "out", "replicate")[0]), winners(made)
    assert data["group"].values.tolist() == ["chem_tilts=3", "chem_tilts=5"]
    for place, group in enumerate(data["group"].values):
        assert_statistics(data, place, [volume for name, volume in found.items() if name.startswith(group)])


def test_every_trial_that_was_kept_can_be_compared(made, tmp_path):
    data = read(volumes.write(made, tmp_path / "out", "trial")[0])
    assert data.sizes["volume"] == 12 and data["count"].values.tolist() == [2] * 6
    name = str(data["group"][3].values)
    members = [zarr.open_group(path, mode="r")["volume"][:] for path in (made / "volumes").glob(f"{name}-*")]
    assert_statistics(data, 3, members)


def test_volumes_of_other_shapes_are_other_groups_and_a_result_is_replaced_when_the_new_one_is_whole(tmp_path):
    coordinate(tmp_path / "r", sweep(1, axes={"data.size": [8, 12]}, lambda_model=1.0, lambda_tv=1.0), "with_noise")
    target, files, _ = volumes.write(tmp_path / "r")
    assert target == tmp_path / "r/statistics" and volumes.groups(target) == ["4x8x16", "6x12x24"]
    assert [path.name for path in files[2:]] == ["projections-4x8x16.png", "projections-6x12x24.png"]
    found = winners(tmp_path / "r")
    for group, name in (("4x8x16", "data.size=8"), ("6x12x24", "data.size=12")):
        assert_statistics(read(target, group), 0, [found[name]])
    (target / "old").touch()
    volumes.write(tmp_path / "r")
    assert not (target / "old").exists() and not target.with_name("statistics.partial").exists()
    coordinate(tmp_path / "r", sweep(1, axes={"data.size": [8, 12]}, lambda_model=1.0, lambda_tv=1.0), "with_noise")


def test_memory_is_that_of_a_few_chunks(tmp_path):
    """32 volumes of 2 MB in chunks of 64 kB: whatever is done at a time, a tenth of them is not in memory together."""
    chance, total = np.random.default_rng(0), 0
    for place in range(32):
        group = zarr.open_group(tmp_path / str(place), mode="w", zarr_format=3)
        volume = chance.random((1, 64, 64, 128), dtype="f4")
        group.create_array("volume", data=volume, chunks=(1, 2, 64, 128))
        group.attrs.update({"elements": ["Co"], "voxel_nm": 1.0})
        total += volume.nbytes
    (stack,) = volumes._stacks([volumes.Source(str(place), "all", tmp_path / str(place)) for place in range(32)])
    targets = volumes._targets(zarr.open_group(tmp_path / "out", mode="w", zarr_format=3), stack)
    steps = [work for _, work in volumes._steps(stack, targets)]
    steps[0](), steps[-1]()  # what the libraries keep once they are in use
    tracemalloc.start()
    try:
        for work in [steps[1], *steps[32:36]]:  # they are all alike
            work()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == 32 * 2**21 and peak < total / 5


@pytest.mark.parametrize("values", [
    np.linspace(-5, 5, 40_001), np.linspace(0, 1, 30_001) ** 3, -np.linspace(1, 2, 9_001), np.zeros(100),
    np.full(50, 3e38), np.full(50, -2.5)], ids=["signs", "small", "negative", "zero", "large", "equal"])
def test_percentiles_from_leading_bits_are_within_a_hundredth(values):
    found = voxels.ranks(voxels.histogram(values.astype("f4").reshape(1, 1, -1))[0])
    np.testing.assert_allclose(found, np.percentile(values, voxels.PERCENTILES), rtol=0.01, atol=2e-3)


def test_moments_keep_their_digits_far_from_zero():
    stack = (1000 + np.random.default_rng(0).random((200, 2, 3, 4))).astype("f4")
    found = voxels.Moments(stack.shape[1:])
    for volume in stack:
        found.add(volume)
    assert found.count == 200
    np.testing.assert_allclose(found.mean, stack.astype("f8").mean(0), rtol=1e-6)
    np.testing.assert_allclose(found.deviation(), stack.astype("f8").std(0), rtol=2e-3)
    np.testing.assert_array_equal((found.low, found.high), (stack.min(0), stack.max(0)))


def test_what_cannot_be_is_refused_with_the_next_step(made, tmp_path, monkeypatch):
    with pytest.raises(RunError, match="--over size: is no axis of this sweep; its axes are chem_tilts, replic"):
        volumes.write(made, tmp_path / "out", "size")
    coordinate(tmp_path / "bare", sweep(2, save="none", axes={}))
    with pytest.raises(RunError, match="holds no volumes, as output.save is none: .* --set output.save=best"):
        volumes.write(tmp_path / "bare")
    coordinate(tmp_path / "best", sweep(2, save="best", axes={}), "with_noise")
    with pytest.raises(RunError, match="no volumes of all trials, as output.save is best: .* --set output.save=all"):
        volumes.write(tmp_path / "best", over="trial")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/thesis.tex").touch()
    with pytest.raises(RunError, match="exists and holds other things; choose another --out"):
        volumes.write(made, tmp_path / "thesis")
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="file.*: make room, or choose another --out"):
        volumes.write(made, tmp_path / "file/out")
    monkeypatch.setitem(sys.modules, "dask.array", None)
    with pytest.raises(RunError, match=r"pip install 'tomoatlas\[dask\]'"):
        volumes.write(made)


def test_the_verb_says_where_everything_is(made, tmp_path):
    command = [sys.executable, "-m", "launch.cli", "volumes", str(made), "--over", "replicate", "--out",
               str(tmp_path / "o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert "  0 % Co of 6 volumes of 8x16x32" in done.stdout and str(tmp_path / "o/projections.png") in done.stdout
    assert f"xarray.open_zarr('{tmp_path}/o/volumes.zarr', group='8x16x32')" in done.stdout
