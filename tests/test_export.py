"""What is exported is what the atlas has: the same numbers, on voxels of the same size, in every format."""

import mrcfile
import numpy as np
import pytest
import tifffile
import zarr

from engine.data import DataError
from engine.files import read_array
from launch import cli
from sweeps import export
from sweeps.journal import RunError
from tests.coordinate import coordinate, sweep

VOXEL = 2.5  # nm, as the evaluators have it


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two cells with volumes of noise; one has its standard error beside it."""
    folder = tmp_path_factory.mktemp("runs") / "r"
    coordinate(folder, sweep(2, axes={"chem_tilts": [3, 5]}, initial=2), "with_noise")
    group = zarr.open_group(folder / "atlas.zarr/cells/chem_tilts=3", mode="r+")
    group.create_array("field_standard_error", data=np.sqrt(group["volume"][:]),
                       dimension_names=("element", "z", "y", "x"))
    group.create_array("field_other", data=np.ones(3, "f4"), dimension_names=("k",))
    return folder


def volume(run, cell="chem_tilts=3", name="volume"):
    """As the atlas has it."""
    return zarr.open_group(run / "atlas.zarr/cells" / cell, mode="r")[name][:]


def test_a_file_of_each_element_of_each_cell(run, tmp_path):
    files = export.write(run, ("mrc", "tiff"), out=tmp_path)
    assert sorted(path.name for path in files) == sorted(path.name for path in tmp_path.iterdir())
    assert {path.stem for path in files} == {
        f"chem_tilts={n}-{element}" for n in (3, 5) for element in ("Co", "O")} | {
        f"chem_tilts=3-standard_error-{element}" for element in ("Co", "O")}
    for k, element in enumerate(("Co", "O")):
        with mrcfile.open(tmp_path / f"chem_tilts=3-{element}.mrc") as opened:
            np.testing.assert_array_equal(opened.data, volume(run)[k])
            assert opened.is_volume() and opened.voxel_size.tolist() == (25.0, 25.0, 25.0)  # Angstrom
        with tifffile.TiffFile(tmp_path / f"chem_tilts=3-{element}.tif") as opened:
            np.testing.assert_array_equal(opened.asarray(), volume(run)[k])
            assert opened.imagej_metadata["spacing"] == VOXEL and opened.imagej_metadata["unit"] == "nm"
            over, under = opened.pages[0].tags["XResolution"].value
            assert under / over == pytest.approx(VOXEL)
    np.testing.assert_array_equal(read_array(tmp_path / "chem_tilts=3-standard_error-O.mrc"),
                                  volume(run, name="field_standard_error")[1])


def test_hyperspys_file_has_axes_in_nm(run, tmp_path):
    hspy = pytest.importorskip("rsciio.hspy")
    file, error = export.write(run, ("hspy",), "chem_tilts=3", tmp_path)
    signal, = hspy.file_reader(str(file))
    np.testing.assert_array_equal(signal["data"], volume(run))
    assert [(axis["name"], axis["units"], axis["scale"]) for axis in signal["axes"][1:]] == [
        (axis, "nm", VOXEL) for axis in "zyx"]
    assert error.name == "chem_tilts=3-standard_error.hspy"


def test_ome_zarr_stands_alone_and_names_its_channels(run, tmp_path):
    files = export.write(run, ("ome-zarr",), out=tmp_path)
    assert len(files) == 2
    group = zarr.open_group(tmp_path / "chem_tilts=3.ome.zarr", mode="r")
    about = group.attrs["ome"]
    np.testing.assert_array_equal(group[about["multiscales"][0]["datasets"][0]["path"]][:], volume(run))
    scale = about["multiscales"][0]["datasets"][0]["coordinateTransformations"][0]["scale"]
    assert scale == [1.0, VOXEL, VOXEL, VOXEL]
    assert [channel["label"] for channel in about["omero"]["channels"]] == ["Co", "O"]


def test_what_cannot_be_exported_is_told(run, tmp_path, monkeypatch):
    for asked, words in ((({"kinds": ["vtk"]}), "vtk: is none of mrc, tiff, hspy, ome-zarr"),
                         (({"cell": "chem_tilts=4"}), "the first is chem_tilts=3")):
        with pytest.raises(RunError, match=words):
            export.write(run, out=tmp_path, **asked)
    empty = tmp_path / "empty"
    coordinate(empty, sweep(2, axes={}, initial=2, save="none"), "landscape")
    with pytest.raises(RunError, match=r"no volume, as output\.save is none"):
        export.write(empty)
    monkeypatch.setitem(__import__("sys").modules, "rsciio", None)
    with pytest.raises(DataError, match="tomoatlas\\[files\\]"):
        export.write(run, ("hspy",), out=tmp_path)


def test_the_command_prints_the_files(run, tmp_path, capsys):
    cli.export(run, "mrc", "chem_tilts=5", tmp_path)
    lines = capsys.readouterr().out.split()
    assert lines == [str(tmp_path / f"chem_tilts=5-{element}.mrc") for element in ("Co", "O")]
