"""Settings: what a YAML may say, and the answer to each mistake. `tomoatlas check` runs BAD too."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from engine.phantoms import ELEMENTS
from launch.resources import configs
from sweeps import settings
from sweeps.defaults import FLAT, SNR
from sweeps.settings import Range, SettingsError
from sweeps.yamlio import flow

SIMULATED = """\
name: trial
system: fused3d
data:
  phantom: cocuo
  size: 32
  snr: {Co: 1.92, Cu: 2.89, O: 2.69, Au: 1.96, haadf: 2208.67}
  tilt_range: [-70, 70]
  gamma: 1.6
grid:
  haadf_tilts: [0, 9]
  chem_tilts: [5, 9]
solver:
  gamma: 1.6
  iterations: 60
  lambda_model: {low: 1e-3, high: 1e3, scale: log}
  lambda_tv: {low: 1e-3, high: 1e1, scale: log}
  record: [20, 60]
search:
  trials: 30
  initial: 8
  objective: nrmse
  in_flight: 2
output: {save: best}
seed: 0
"""
MEASURED = """\
name: particle
data:
  pixel_size: 13.08
  haadf:
    path: series.npz
    key: haadf
    axes: [tilt, y, x]
    angles: [-40, -20, 0, 20, 40]
    units: intensity
  chem:
    path: series.npz
    key: counts
    axes: [element, tilt, y, x]
    angles: [-40, -20, 0, 20, 40]
    elements: {Fe: {number: 26, index: 8}, Mg: {number: 12, index: 2}}
    shifts: key:shifts
    shift_axes: [x, y]
    background: {key: sides, scale_key: scale}
    units: counts
  crop: {x: [64, 192], y: [0, 256]}
  volume: {nz: 16, padding: 8}
  sensitivity: fit
solver:
  lambda_tv: {low: 1e-3, high: 1e1, scale: log}
search: {objective: heldout, folds: 4, trials: 8}
"""


class Broken(NamedTuple):
    """A YAML with one mistake, where the answer must point, and what it must say."""

    name: str
    text: str
    line: int
    path: str
    words: tuple[str, ...]


def _edit(name: str, line: int, new: str, path: str, *words: str, base: str = SIMULATED,
          at: int | None = None) -> Broken:
    """`base` with one line replaced; the answer points there, or at the line `at`."""
    lines = base.splitlines()
    lines[line - 1] = new
    return Broken(name, "\n".join(lines) + "\n", at or line, path, words)


def _measured(name: str, line: int, new: str, path: str, *words: str, at: int | None = None) -> Broken:
    return _edit(name, line, new, path, *words, base=MEASURED, at=at)


BAD: list[Broken] = [
    # The YAML itself
    Broken("empty file", "", 1, "", ("empty", "tomoatlas init")),
    Broken("only comments", "# nothing yet\n", 1, "", ("empty",)),
    Broken("not a mapping", "- name: trial\n- seed: 0\n", 1, "", ("key: value", "a list")),
    _edit("tab", 5, "\tsize: 32", "", "tab", "spaces"),
    _edit("tab after a key", 14, "  iterations: 60\n\tinner: 4", "", "tab", at=15),
    _edit("bracket left open", 10, "  haadf_tilts: [0, 9", "", "not valid YAML", at=11),
    _edit("no space after the colon", 19, "  trials:30", "", "not valid YAML", at=20),
    _edit("duplicate key", 16, "  lambda_model: 1.0", "solver.lambda_model", "given twice", "line 15"),
    _edit("duplicate section", 24, "solver: {gamma: 1.7}", "solver", "given twice", "line 12"),
    _edit("key that is no word", 5, "  32: size", "data", "a key must be a word", "32"),
    _edit("merge key", 24, "<<: {seed: 0}", "<<", "unknown key"),
    _edit("two documents", 24, "---\nname: b", "", "not valid YAML"),
    # Names
    _edit("misspelt section", 12, "slover:", "slover", "unknown key", "did you mean solver?"),
    _edit("misspelt setting", 16, "  lamda_tv: 0.1", "solver.lamda_tv", "unknown key",
          "did you mean lambda_tv?"),
    _edit("setting in the wrong section", 24, "lambda_tv: 0.1", "lambda_tv",
          "did you mean solver.lambda_tv?"),
    _edit("misspelt phantom key", 4, "  phantm: cocuo", "data.phantm", "did you mean phantom?"),
    _edit("misspelt end of a range", 16, "  lambda_tv: {low: 1e-3, hihg: 1e1}", "solver.lambda_tv.hihg",
          "did you mean high?"),
    _edit("no name", 1, "# name: trial", "name", "is missing"),
    _edit("no phantom", 4, "  # phantom: cocuo", "data.phantom", "is missing", at=3),
    _edit("bad name", 1, "name: ../other", "name", "folder"),
    _edit("unknown system", 2, "system: fused3", "system", "did you mean fused3d?"),
    _edit("unknown phantom", 4, "  phantom: cocou", "data.phantom", "did you mean cocuo?"),
    _edit("unknown method", 13, "  method: fussed", "solver.method", "did you mean fused?"),
    _edit("unknown acquisition", 20, "  acquisition: GP", "search.acquisition", "gp_hedge"),
    # Values
    _edit("text for a number", 5, "  size: big", "data.size", "a whole number", "big"),
    _edit("number in quotes", 16, '  lambda_tv: "1e-3"', "solver.lambda_tv", "a number", "'1e-3'"),
    _edit("fraction of a voxel", 5, "  size: 32.5", "data.size", "a whole number", "32.5"),
    _edit("truth value for a number", 14, "  iterations: true", "solver.iterations", "a whole number"),
    _edit("list for a number", 16, "  lambda_tv: [0.1, 1.0]", "solver.lambda_tv", "a number or a mapping",
          "a list", "{low: "),
    _edit("number for a list", 10, "  haadf_tilts: 9", "grid.haadf_tilts", "a list"),
    _edit("mapping left out", 18, "search: 30\nnote:", "search", "a mapping"),
    _edit("infinite", 13, "  lambda_chem: .inf", "solver.lambda_chem", "finite"),
    _edit("not a number", 13, "  tolerance: .nan", "solver.tolerance", "finite"),
    _edit("zero weight", 16, "  lambda_tv: 0", "solver.lambda_tv", "above 0"),
    _edit("negative weight", 16, "  lambda_tv: -0.1", "solver.lambda_tv", "above 0", "-0.1"),
    _edit("log from zero", 15, "  lambda_model: {low: 0, high: 1, scale: log}", "solver.lambda_model",
          "log scale"),
    _edit("range reversed", 15, "  lambda_model: {low: 10, high: 1}", "solver.lambda_model", "below high"),
    _edit("range without an end", 15, "  lambda_model: {low: 1}", "solver.lambda_model",
          "{low: , high: , scale: }"),
    _edit("choice of one", 15, "  lambda_model: {choice: [1.0]}", "solver.lambda_model.choice",
          "2 or more entries"),
    _edit("whole numbers only", 13, "  inner: {low: 1.5, high: 4}", "solver.inner.low", "a whole number"),
    _edit("gamma out of range", 13, "  gamma: {low: 1.0, high: 3.0}", "solver.gamma", "1 to 2"),
    _edit("angles in radians", 7, "  tilt_range: [-1.22, 1.22]", "data.tilt_range", "radians", "degrees"),
    _edit("tilt range reversed", 7, "  tilt_range: [70, -70]", "data.tilt_range", "[-70.0, 70.0]"),
    _edit("tilt range too wide", 7, "  tilt_range: [-100, 100]", "data.tilt_range", "+-90"),
    _edit("three tilt limits", 7, "  tilt_range: [-70, 0, 70]", "data.tilt_range", "at most 2 entries"),
    _edit("SNR of one", 6, "  snr: {Co: 1.0, Cu: 2.89, O: 2.69, Au: 1.96, haadf: 50}", "data.snr.Co",
          "above 1"),
    _edit("SNR of a stranger", 6, "  snr: {Co: 2, Cu: 2, O: 2, Au: 2, Fe: 2, haadf: 50}", "data.snr.Fe",
          "no Fe", "Au"),
    _edit("SNR missing", 6, "  snr: {Co: 2, Cu: 2, O: 2, haadf: 50}", "data.snr", "lacks Au"),
    _edit("nothing in flight", 22, "  in_flight: 0", "search.in_flight", "at least 1"),
    # The grid
    _edit("empty axis", 10, "  haadf_tilts: []", "grid.haadf_tilts", "no values"),
    _edit("value twice", 11, "  chem_tilts: [5, 9, 5]", "grid.chem_tilts[2]", "5 is given twice"),
    _edit("unknown axis", 10, "  hadf_tilts: [0, 9]", "grid.hadf_tilts", "did you mean haadf_tilts?"),
    _edit("axis without its section", 10, "  lambda_chem: [1, 2]", "grid.lambda_chem",
          "did you mean solver.lambda_chem?"),
    _edit("axis of no element", 10, "  data.snr.Fe: [2, 3]", "grid.data.snr.Fe", "did you mean data.snr"),
    _edit("bad value on an axis", 11, "  chem_tilts: [5, 0]", "grid.chem_tilts[1]", "at least 1"),
    _edit("bad SNR on an axis", 10, "  data.snr.haadf: [50, 0.5]", "grid.data.snr.haadf[1]", "above 1"),
    _edit("range on an axis", 10, "  solver.lambda_chem: [{low: 1, high: 2}]", "grid.solver.lambda_chem[0]",
          "a range"),
    _edit("axis twice", 10, "  data.chem_tilts: [5, 9]", "grid.chem_tilts", "same setting", at=11),
    _edit("searched and on the grid", 10, "  solver.lambda_tv: [0.1, 1]", "grid.solver.lambda_tv",
          "both searched"),
    # What does not fit together
    _edit("too many folds", 21, "  objective: heldout\n  folds: 6", "search.folds", "6 folds",
          "in the cell haadf_tilts 0, chem_tilts 5", at=22),
    _edit("budget below the start", 19, "  trials: 4", "search.trials", "4 trials", "initial"),
    _edit("checkpoint never reached", 17, "  record: [20, 80]", "solver.record[1]", "80", "60"),
    _edit("checkpoints in disorder", 17, "  record: [60, 20]", "solver.record", "rising order"),
    _edit("searched gamma, unsaid power", 8, "  replicate: 0", "data.gamma", "needed", at=3)._replace(
        text=SIMULATED.replace("  gamma: 1.6\ngrid", "  replicate: 0\ngrid").replace(
            "  gamma: 1.6\n", "  gamma: {low: 1.4, high: 2}\n")),
    # Measured data
    _measured("measured angles in radians", 8, "    angles: [-0.7, -0.35, 0, 0.35, 0.7]",
              "data.haadf.angles", "radians"),
    _measured("angles beyond a turn", 8, "    angles: [-40, -20, 0, 20, 400]", "data.haadf.angles", "400"),
    _measured("unknown axis of an array", 7, "    axes: [tilt, z, x]", "data.haadf.axes[1]",
              "element, tilt, y", "z"),
    _measured("axis of an array missing", 7, "    axes: [tilt, y]", "data.haadf.axes", "lacks x"),
    _measured("axis of an array twice", 7, "    axes: [tilt, y, y]", "data.haadf.axes", "twice"),
    _measured("no chemical maps", 10, "  chm:", "data.chm", "did you mean chem?"),
    _measured("simulated and measured", 3, "  phantom: cocuo", "data.chem", "unknown key", at=10),
    _measured("wrong atomic number", 15, "    elements: {Fe: 27, Mg: 12}", "data.chem.elements.Fe",
              "26, not 27"),
    _measured("impossible atomic number", 15, "    elements: {PtM: 780, Mg: 12}", "data.chem.elements.PtM",
              "118"),
    _measured("index for one only", 15, "    elements: {Fe: {number: 26, index: 8}, Mg: 12}",
              "data.chem.elements", "index"),
    _measured("shifts for too few", 16, "    shifts: [[0, 1], [0, 2]]", "data.chem.shifts", "2 entries",
              "5 angles"),
    _measured("shifts along one axis", 17, "    shift_axes: [x, -x]", "data.chem.shift_axes", "twice"),
    _measured("projection that is not there", 9, "    tilts: [0, 5]", "data.haadf.tilts", "no index 5"),
    _measured("unknown units", 9, "    units: count", "data.haadf.units", "did you mean counts?"),
    _measured("empty window", 20, "  crop: {x: [192, 64]}", "data.crop.x", "interval"),
    _measured("sensitivity of one only", 22, "  sensitivity: {Fe: 1.0}", "data.sensitivity", "Fe, Mg"),
    _measured("score without a truth", 25, "search: {objective: nrmse, trials: 8}", "search.objective",
              "heldout"),
    _measured("more folds than maps", 25, "search: {objective: heldout, folds: 6, trials: 8}",
              "search.folds", "there are 5"),
    _measured("more maps than measured", 23, "  chem_tilts: 9\nsolver:", "data.chem_tilts", "9 projections",
              "there are 5"),
]


def _problems(path: Path, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(SettingsError) as caught:
        settings.load(path, overrides)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems


def _write(folder: Path, text: str) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("bad", BAD, ids=[bad.name for bad in BAD])
def test_a_mistake_is_answered_with_its_place_and_a_sentence(bad: Broken, tmp_path: Path) -> None:
    path = _write(tmp_path, bad.text)
    problems = _problems(path)
    place = f"{path}:{bad.line}: " + (f"{bad.path}: " if bad.path else "")
    found = [problem for problem in problems if problem.startswith(place)]
    assert found, problems
    assert all("\n" not in problem and len(problem) < 300 for problem in problems)
    missing = [word for word in bad.words if not any(word in problem for problem in found)]
    assert not missing, (missing, problems)


def test_every_mistake_of_a_kind_is_told_at_once(tmp_path: Path) -> None:
    text = SIMULATED.replace("size: 32", "size: x").replace("seed: 0", "seed: -1")
    text = text.replace("lambda_tv", "lamda_tv")
    assert [problem.split(": ")[1] for problem in _problems(_write(tmp_path, text))] == [
        "data.size", "solver.lamda_tv", "seed"]


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "none.yaml"
    assert _problems(path) == (f"{path}:1: cannot be read: No such file or directory",)
    (tmp_path / "volume.yaml").write_bytes(b"name: a\n\xff\xfe\x00")
    assert f"{tmp_path}/volume.yaml:2: is not UTF-8" in _problems(tmp_path / "volume.yaml")[0]
    (tmp_path / "bell.yaml").write_bytes(b"name: a\nseed: \x07")
    assert f"{tmp_path}/bell.yaml:2: holds a character" in _problems(tmp_path / "bell.yaml")[0]
    (tmp_path / "loop.yaml").write_text("name: &a [*a]\n")
    assert "contains itself" in _problems(tmp_path / "loop.yaml")[0]


# ---- Overrides


def test_overrides_win_and_are_read_as_yaml(tmp_path: Path) -> None:
    sweep = settings.load(_write(tmp_path, SIMULATED), [
        "data.size=16", "solver.lambda_tv=1e-2", "search.order=strict", "grid.chem_tilts=[7]",
        "grid.data.snr.haadf=[10, 50]", "solver.lambda_model.high=10", "output.save=none", "data.gamma="])
    assert sweep.data.size == 16 and sweep.data.gamma is None and sweep.solver.lambda_tv == 0.01
    assert sweep.search.order == "strict" and sweep.output.save == "none"
    assert sweep.grid == {"haadf_tilts": [0, 9], "chem_tilts": [7], "data.snr.haadf": [10, 50]}
    assert sweep.solver.lambda_model == Range[float](low=1e-3, high=10, scale="log")


@pytest.mark.parametrize("override, path, words", [
    ("solver.lamda_tv=3", "solver.lamda_tv", "did you mean lambda_tv?"),
    ("gamma=1.7", "gamma", "did you mean data.gamma or solver.gamma?"),
    ("data.size=big", "data.size", "a whole number"),
    ("grid.chem_tilts=[5, x]", "grid.chem_tilts[1]", "a whole number"),
    ("data.size", "", "write key=value"),
    ("=3", "", "write key=value"),
    ("data.size=[1", "", "not valid YAML"),
    ("solver.gamma.low=1", "", "solver.gamma is 1.6"),
    ("data.chem_tilts=9", "data.chem_tilts", "the grid overrules it; write --set grid.chem_tilts=[...]"),
])
def test_a_bad_override_is_named(override: str, path: str, words: str, tmp_path: Path) -> None:
    problem, = _problems(_write(tmp_path, SIMULATED), override)
    assert problem.startswith(f"--set {override}: " + (f"{path}: " if path else "")) and words in problem


# ---- Laws


GOOD = {"simulated": SIMULATED, "measured": MEASURED} | {name: path.read_text() for name,
                                                         path in configs().items()}


@pytest.mark.parametrize("text", GOOD.values(), ids=GOOD)
def test_a_dump_loads_as_the_same_sweep(text: str, tmp_path: Path) -> None:
    sweep = settings.load(_write(tmp_path, text))
    data = settings.dump(sweep)
    assert settings.load(json.loads(json.dumps(data))) == sweep
    assert settings.dump(settings.load(data)) == data
    for comments in (False, True):
        (tmp_path / "again.yaml").write_text(settings.to_yaml(sweep, comments))
        assert settings.load(tmp_path / "again.yaml") == sweep
    assert sweep.path == tmp_path / "sweep.yaml" and "path" not in data


@pytest.mark.parametrize("name", configs())
def test_every_shipped_sweep_loads(name: str) -> None:
    sweep = settings.load(configs()[name])
    assert sweep.name.replace("-", "_") == name


@pytest.mark.parametrize("system", ["fused3d", "hebt", "mset"])
@pytest.mark.parametrize("measured", [False, True])
def test_the_template_loads_and_explains_every_setting(measured: bool, system: str, tmp_path: Path) -> None:
    text = settings.template(system, measured)
    sweep = settings.load(_write(tmp_path, text))
    assert settings.tunables(sweep)
    own = {"hebt": settings.Particle, "mset": settings.Scanned}.get(system, settings.Phantom)
    data = own if not measured else settings.Recorded if system == "mset" else settings.Measured
    for name in data.model_fields:
        assert f"\n  {name}:" in text or f"\n  # {name}:" in text
    # Settings that are not given stand there behind a comment sign; without it they load too.
    names = {name.split(".")[-1] for name, _ in settings.fields()}
    names -= {"responses"} if measured else set()  # those of the example's other elements
    names -= {"fused3d": {"candidates"}, "hebt": {"atlas"},  # not for them
              "mset": {"fractions", "particles", "atlas"}}.get(system, set())
    given = re.sub(r"(?m)^( *)# (\w+): (?!null)",
                   lambda m: f"{m[1]}{m[2]}: " if m[2] in names else m[0], text)
    # What has an example and no default:
    without = {"search.trial_timeout": None, "search.budget_hours": None, "output.fractions": None,
               "output.particles": None, "search.atlas": None}
    without |= {"solver.responses": None} if system == "hebt" else {}
    without |= {"data.misalign": None, "data.align": None} if system == "fused3d" and not measured else {}
    without |= {"data.dose": None} if system == "mset" and not measured else {}
    assert (settings.replace(settings.load(_write(tmp_path, given)), without) == sweep) is not measured


def test_every_setting_has_a_unit_and_a_description() -> None:
    names = []
    for name, field in settings.fields():
        names.append(name)
        extra = field.json_schema_extra
        assert isinstance(extra, dict) and extra.get("unit"), name
        assert field.description and len(field.description) > 10, name
    assert {"data.tilt_range", "data.chem.elements.number", "solver.lambda_tv.low",
            "search.folds"} <= set(names)


def test_numbers_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    text = SIMULATED.replace("lambda_tv: {low: 1e-3, high: 1e1, scale: log}", "lambda_tv: 1e-3")
    assert settings.load(_write(tmp_path, text)).solver.lambda_tv == 1e-3
    for value in ("010", "1_000", "1:30"):  # octal, grouped, sexagesimal: none of them is what it seems
        path = _write(tmp_path, SIMULATED.replace("size: 32", f"size: {value}"))
        assert "a whole number" in _problems(path)[0]
    for name in ("no", "2024-01-01", "1.2.3"):
        sweep = settings.load(_write(tmp_path, SIMULATED.replace("name: trial", f"name: {name}")))
        assert sweep.name == name
        assert settings.load(_write(tmp_path, settings.to_yaml(sweep))).name == name


@pytest.mark.parametrize("word", ["1e-3", "true", "null", "", "no", "a: b", "- x", "#", "2024-01-01", "12",
                                  "ü"])
def test_words_stay_words_on_the_way_through_yaml(word: str, tmp_path: Path) -> None:
    text = MEASURED.replace("key: haadf", f"key: {flow(word)}")
    assert settings.load(_write(tmp_path, text)).data.haadf.key == word


@pytest.mark.parametrize("phantom", ELEMENTS)
def test_the_noise_of_the_paper_is_the_default(phantom: str) -> None:
    assert list(SNR[phantom]) == [*ELEMENTS[phantom], "haadf"]
    system = "fused2d" if phantom in FLAT else "fused3d"
    sweep = settings.load({"name": "a", "system": system, "data": {"phantom": phantom}})
    assert sweep.data.snr == SNR[phantom] | {"chem": 1.0}


def test_an_empty_section_is_not_given(tmp_path: Path) -> None:
    text = "name: a\ndata: {phantom: conio}\ngrid:\nsearch:\n"
    assert settings.load(_write(tmp_path, text)).grid == {}


# ---- Getting, replacing, places


def test_get_and_replace(tmp_path: Path) -> None:
    sweep = settings.load(_write(tmp_path, SIMULATED))
    changed = settings.replace(
        sweep, {"solver.gamma": 1.7, "data.snr.haadf": 50, "solver.lambda_tv": 0.2, "grid": {}})
    assert settings.get(changed, "solver.gamma") == 1.7 and settings.get(changed, "data.snr.haadf") == 50
    assert settings.get(sweep, "solver.gamma") == 1.6 and changed != sweep and changed.path == sweep.path
    assert settings.tunables(changed).keys() == {"solver.lambda_model"}
    with pytest.raises(KeyError):
        settings.get(sweep, "solver.gama")
    with pytest.raises(SettingsError, match="sweep.yaml:12: solver.gama: unknown key .did you mean gamma"):
        settings.replace(sweep, {"solver.gama": 1.7})
    with pytest.raises(SettingsError, match="seed: must be at least 0"):
        settings.replace(settings.load(settings.dump(sweep)), {"seed": -1})


def test_a_setting_knows_its_place(tmp_path: Path) -> None:
    path = _write(tmp_path, MEASURED)
    assert settings.load(path).where("data.haadf.path") == f"{path}:5: data.haadf.path"
    sweep = settings.load(path, ["data.haadf.path=other.npz"])
    assert sweep.where("data.haadf.path") == "--set data.haadf.path=other.npz: data.haadf.path"
    assert settings.load(settings.dump(sweep)).where("data.haadf.path") == "settings: data.haadf.path"


def test_files_lie_beside_the_yaml_or_where_the_override_says(tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    path = _write(tmp_path / "configs", MEASURED)
    assert settings.load(path).data.root == str(tmp_path / "configs")
    assert settings.load(path, ["data.root=../data"]).data.root == str(tmp_path / "data")
    (tmp_path / "configs" / "sub.yaml").write_text(MEASURED.replace("data:", "data:\n  root: sub", 1))
    sweep = settings.load("../configs/sub.yaml")
    assert sweep.data.root == str(tmp_path / "configs" / "sub")
    assert settings.load(settings.dump(sweep)) == sweep


def test_words_that_mean_nothing_is_given(tmp_path: Path) -> None:
    text = MEASURED.replace("shifts: key:shifts", "shifts: none")
    data = settings.load(_write(tmp_path, text.replace("{key: sides, scale_key: scale}", "none"))).data
    assert data.chem.shifts is None and data.chem.background is None and data.sensitivity is None


def test_settings_load_without_jax_and_without_the_optimiser() -> None:
    code = ("import sys; from sweeps import grid, settings; settings.template();"
            "print([name for name in ('jax', 'skopt', 'sklearn', 'scipy') if name in sys.modules])")
    root = Path(__file__).resolve().parents[1]
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert shown.stdout.strip() == "[]"
