"""The command as a user meets it: help, sentences and exit status for bad input, and whole runs."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from engine.estimate import Estimate
from launch import cli, plan, progress, resources, session, status
from sweeps import coordinator, grid, settings, tables
from sweeps.atlas import RunFolder
from sweeps.yamlio import SettingsError
from tests.test_settings import BAD, Broken

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("run", "check", "submit", "simulate", "init", "status", "report", "volumes")
SMALL = """\
name: small
data: {phantom: cocuo, size: 16}
grid: {haadf_tilts: [0, 9], chem_tilts: [3, 5]}
solver:
  lambda_model: {low: 1e-3, high: 1e3, scale: log}
  lambda_tv: {low: 1e-3, high: 1e1, scale: log}
search: {trials: 3, initial: 3}
"""


def told(*words, cwd=None):
    """Exit status, standard output and standard error of a command inside this process."""
    before = os.getcwd()
    os.chdir(cwd or before)
    try:
        done = CliRunner().invoke(cli.app, [str(word) for word in words], catch_exceptions=False)
    finally:
        os.chdir(before)
    return done.exit_code, done.stdout, done.stderr


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def run_small(path, *, evaluate="tests.evaluators:landscape"):
    """A run of the small sweep with a quick evaluation; its exit status."""
    sweep = settings.load(path)
    return session.run(sweep, path.parent / "out", "2", None, evaluate)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_a_command_does_and_gives_an_example(command):
    code, out, err = told(command, "--help")
    assert (code, err) == (0, "")
    assert f"Usage: tomoatlas {command}" in out.replace("root", "tomoatlas")
    assert "Example" in out and f"tomoatlas {command}" in out


def test_without_a_command_the_help_lists_all():
    _, out, err = told()
    assert all(re.search(rf"^  {command} ", out + err, re.M) for command in COMMANDS)


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
def test_check_answers_a_broken_yaml_with_file_and_line_and_status_2(bad: Broken, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_bytes(bad.text if isinstance(bad.text, bytes) else bad.text.encode())
    code, out, err = told("check", path)
    assert (code, out) == (2, "")
    assert f"{path}:{bad.line}: " in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "words",
    [
        ("run",),
        ("check", "nowhere.yaml"),
        ("run", "nowhere.yaml"),
        ("status", "nowhere"),
        ("report", "nowhere"),
        ("run", "quickstart", "--set", "seed"),
        ("run", "quickstart", "--set", "data.sise=3"),
        ("run", "quickstart", "--cell", "a=1"),
        ("check", "quickstart", "--memory", "0.001"),
    ],
    ids=" ".join,
)
def test_what_cannot_run_is_told_in_a_sentence_and_writes_nothing(words, tmp_path):
    code, _, err = told(*words, cwd=tmp_path)
    assert code == 2
    assert err.strip() and "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_hints_name_the_next_step(tmp_path):
    assert "tomoatlas init" in told("run")[2] and "quickstart" in told("run")[2]
    assert "did you mean size?" in told("run", "quickstart", "--set", "data.sise=3")[2]
    assert "did you mean" in told("run", "quickstart", "--cell", "haadf_tilts=17,chem_tilt=5", cwd=tmp_path)[2]


@pytest.mark.parametrize("measured", [False, True])
def test_what_init_writes_is_a_valid_sweep(measured, tmp_path):
    path = tmp_path / "new.yaml"
    code, out, _ = told("init", "fused3d", *(["--measured"] if measured else []), "-o", path)
    assert code == 0 and str(path) in out
    sweep = settings.load(path)
    assert sweep == settings.load(settings.dump(sweep))
    assert told("init", "fused3d", "-o", path)[0] == 2, "an existing file is not overwritten"
    if not measured:
        assert told("check", path)[0] == 0


def test_check_of_measured_data_names_the_file_that_is_missing(tmp_path):
    told("init", "--measured", "-o", tmp_path / "new.yaml")
    code, _, err = told("check", tmp_path / "new.yaml")
    assert code == 2
    assert str(tmp_path / "maps.npz") in err or str(tmp_path / "haadf.mrc") in err


@pytest.mark.parametrize("name", sorted(set(resources.configs()) - {"idp", "idp_aligned", "needle", "fused2d_measured",
                                                           "hebt_idp"}))
def test_shipped_sweeps_pass_check_which_counts_cells_and_trials(name):
    code, out, err = told("check", name, "--memory", 80)
    assert (code, err) == (0, "")
    sweep = settings.load(resources.configs()[name])
    cells = grid.cells(sweep)
    assert f"cells       {len(cells):,} (" in out
    assert f"trials      {sum(map(grid.trials, cells)):,} (" in out
    assert "GPU-hours" in out and "voxels" in out


def test_check_opens_measured_files_and_tells_their_shapes():
    data = ROOT.parent / "shared" / "data" / "idp_haadf_edx"
    if not data.exists():
        pytest.skip("the measured series is not here")
    code, out, _ = told("check", "idp", "--set", f"data.root={data}")
    assert code == 0
    assert "16 projections from -40 to 35 degrees, 256 x 256 pixels" in out
    code, _, said = told("check", "idp", "--set", f"data.root={data}", "--set", "data.chem.units=net_counts")
    assert code == 0 and said.startswith("warning: --set data.chem.units=net_counts") and "least squares" in said


def test_check_opens_a_measured_spectrum_image():
    data = ROOT.parent / "shared" / "data" / "stem_eds_haadf_map"
    if not data.exists() or not importlib.util.find_spec("rsciio"):
        pytest.skip("the measured file, or its reader, is not here")
    code, out, _ = told("check", "fused2d_measured", "--set", f"data.root={data}")
    assert code == 0 and "data.chem   5 elements, 1 projections" in out
    assert "1 x 64 x 64 voxels" in out and "of 0.771 nm" in out


def test_plan_counts_solves_of_folds_and_bytes_of_volumes():
    sweep = settings.load(SMALL_PLAIN | {"search": {"trials": 3, "initial": 3}})
    planned = plan.plan(sweep)
    # Two conventional cells with one fixed trial each, and four searches of three trials.
    assert planned.trials == 2 * 1 + 4 * 3
    assert planned.kept == 4 * 4 * 4 * 16**3
    assert planned.stages == 4 * 4 * 16**3 + sum(4 * 16 * 16 * (h + 4 * c) for h in (0, 9) for c in (3, 5))
    held = settings.load(SMALL_PLAIN | {"search": {"trials": 3, "initial": 3, "objective": "heldout", "folds": 3}})
    assert sum(cost.solves for cost in plan.plan(held).costs) == 4 * planned.trials


SMALL_PLAIN = {
    "name": "small",
    "data": {"phantom": "cocuo", "size": 16},
    "grid": {"haadf_tilts": [0, 9], "chem_tilts": [3, 5]},
    "solver": {
        "lambda_model": {"low": 1e-3, "high": 1e3, "scale": "log"},
        "lambda_tv": {"low": 1e-3, "high": 1e1, "scale": "log"},
    },
}


def test_refusal_shows_the_arithmetic(monkeypatch, tmp_path):
    def solve(**_):
        return Estimate({"volumes": 3 * plan.GIB, "duals": 2 * plan.GIB}, 1.0, 100.0)

    monkeypatch.setattr("engine.estimate.solve", solve)
    planned = plan.plan(settings.load(SMALL_PLAIN))
    (sentence,) = plan.refusals(planned, 4 * plan.GIB, "on the GPU", tmp_path)
    assert "needs 5 GiB (volumes 3 GiB + duals 2 GiB), and 4 GiB are free on the GPU" in sentence
    assert "lower data.size" in sentence
    assert not list(plan.refusals(planned, 6 * plan.GIB, "on the GPU", tmp_path))
    monkeypatch.setattr(plan, "disk_free", lambda folder: 1000)
    (sentence,) = plan.refusals(planned, 0, "", tmp_path / "run")
    assert str(tmp_path / "run") in sentence and "1000 B are free" in sentence


def test_run_ends_with_a_table_the_report_and_status_0_and_again_at_once(small, capfd):
    assert run_small(small) == 0
    out = capfd.readouterr().out
    assert re.search(r"^14/14 ", out, re.M)
    assert "HAADF tilts \\ chemical tilts" in out and "Poisson ML, best iteration" in out
    assert "report" in out and "atlas" in out
    assert (small.parent / "out" / "report" / "index.html").exists()
    assert (small.parent / "out" / "summary.json").exists()
    assert run_small(small) == 0
    again = capfd.readouterr().out
    assert "continuing: 14 of 14 trials are finished" in again
    assert again.split("\n\n", 1)[1] == out.split("\n\n", 1)[1]


def test_status_tells_the_same_in_words_and_in_json(small):
    run_small(small)
    folder = small.parent / "out"
    code, out, _ = told("status", folder, "--json")
    seen = json.loads(out)
    assert code == 0
    assert (seen["state"], seen["done"], seen["trials"], seen["failed"]) == ("done", 14, 14, 0)
    best = json.loads((folder / "summary.json").read_text())["cells"]
    assert {name: cell["best"] for name, cell in seen["cells"].items()} == {
        name: cell["objective"] for name, cell in best.items()
    }
    code, out, _ = told("status", folder, "--watch")
    assert code == 0 and out.startswith("small: done, 14 of 14 trials, 0 failed")


def test_status_knows_a_killed_run_from_a_stopped_and_a_running_one(small):
    run_small(small)
    folder = RunFolder(small.parent / "out")
    lines = folder.journal.read_text().splitlines(keepends=True)
    folder.journal.write_text("".join(lines[:9]) + '{"event": "resu')
    assert status.look(folder.path)["state"] == "interrupted"
    with folder.open(folder.settings()) as journal:
        assert status.look(folder.path)["state"] == "running"
        journal.append({"event": "stop", "reason": "test"})
    assert status.look(folder.path)["state"] == "stopped"
    assert "run again to continue" in status.text(status.look(folder.path))


def test_status_tells_how_busy_workers_are_when_it_will_end_and_what_went_wrong(small, monkeypatch):
    run_small(small)
    folder = RunFolder(small.parent / "out")
    start, *_ = [json.loads(line) for line in folder.journal.read_text().splitlines()]
    asked = {"event": "ask", "attempt": 0, "kind": "search", "fidelity": 1.0, "params": {}, "seen": 1}
    ended = {"event": "result", "attempt": 0, "objective": None, "metrics": {}, "elements": {}, "seconds": 10.0,
             "batch": 1, "checkpoints": [], "iterations": 1, "worker": "worker-0", "volume": None}
    cells = list(status.look(folder.path)["cells"])
    events = [{**start, "event": "start", "workers": ["worker-0", "worker-1"], "time": 1000.0},
              {**asked, "cell": cells[0], "trial": 0, "time": 1010.0},
              {**asked, "cell": cells[1], "trial": 0, "time": 1010.0},
              {**ended, "cell": cells[0], "trial": 0, "time": 1020.0, "status": "the cost rose"},
              {"event": "lost", "cell": cells[1], "trial": 0, "attempt": 0, "worker": "worker-1", "reason": "it died",
               "time": 1030.0}]
    folder.journal.write_text("".join(json.dumps(event) + "\n" for event in events))
    seen = status.look(folder.path)
    assert (seen["state"], seen["workers"], seen["use"], seen["left"]) == ("interrupted", 2, 0.25, None)
    monkeypatch.setattr(status.time, "time", lambda: 1050.0)
    with folder.open(folder.settings()):
        seen = status.look(folder.path)
        assert (seen["use"], seen["left"]) == (0.125, 13 * 50.0)  # one trial of fourteen in 50 s
        words = status.text(seen)
    assert "2 workers used to 12%, about 11 min left" in words
    assert words.splitlines()[-3:] == ["last errors:", f"{cells[1]} trial 0, 20 s ago: it died",
                                       f"{cells[0]} trial 0, 30 s ago: the cost rose"]


def test_a_bare_name_is_found_in_runs(small, tmp_path):
    run_small(small)
    (tmp_path / "runs").mkdir()
    (tmp_path / "out").rename(tmp_path / "runs" / "small")
    assert told("status", "small", cwd=tmp_path)[1].startswith("small: done")
    assert told("report", "small", cwd=tmp_path)[0] == 0


def test_lines_and_bar_show_what_happens_and_stay_out_of_each_others_way(capsys):
    class Terminal:
        encoding = "utf-8"

        def __init__(self):
            self.text = ""

        def isatty(self):
            return True

        def write(self, text):
            self.text += text

        def flush(self):
            pass

    (cell, *_) = grid.cells(settings.load(SMALL_PLAIN))
    good = {"status": "ok", "trial": 4, "objective": 0.352, "seconds": 8.1}
    bad = {"status": "no [volume]", "trial": 5, "objective": None, "seconds": 2.0}
    terminal = Terminal()
    for stream in (None, terminal):
        with progress.observer(stream) as watch:
            watch.started(81, 11)
            watch.result(good, cell, 0.331)
            watch.result(bad, cell, 0.331)
            watch.lost(cell, 6, 0, "worker-1", "worker-1 was killed by SIGKILL")
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "continuing: 11 of 81 trials are finished",
        "12/81 haadf_tilts=0,chem_tilts=3 trial 4 nrmse 0.352 best 0.331 8.1 s",
        "13/81 haadf_tilts=0,chem_tilts=3 trial 5 failed after 2.0 s: no [volume]",
        "haadf_tilts=0,chem_tilts=3 trial 6 attempt 0 is lost: worker-1 was killed by SIGKILL",
    ]
    assert "no [volume]" in terminal.text and "13/81" in terminal.text and "SIGKILL" in terminal.text


def test_two_signals_count_up_and_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with session.signals() as stop:
        assert stop() == 0
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert (stop(), stop.number) == (2, signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_misspelt_cell_is_answered_with_the_nearest():
    cells = grid.cells(settings.load(SMALL_PLAIN))
    session.check_cell(cells, None)
    session.check_cell(cells, cells[2].id)
    with pytest.raises(SettingsError, match="did you mean haadf_tilts=9,chem_tilts=5"):
        session.check_cell(cells, "haadf_tilts=9,chem_tilts=55")


@pytest.mark.parametrize(
    ("seconds", "text"), [(8, "8 s"), (300, "5 min"), (3.2 * 3600, "3.2 h"), (2.1 * 86400, "2.1 days")]
)
def test_durations(seconds, text):
    assert tables.duration(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(12, "12 B"), (5.3 * 2**30, "5.3 GiB"), (812 * 2**20, "812 MiB")])
def test_sizes(count, text):
    assert plan.size(count) == text


def command(*words):
    """A whole run of the small sweep in a process of its own, with a slow evaluation."""
    code = (
        "import sys; from pathlib import Path; from launch import session; from sweeps import settings\n"
        "sweep, folder = settings.load(sys.argv[1]), Path(sys.argv[2])\n"
        "sys.exit(session.run(sweep, folder, '2', None, 'tests.evaluators:slow'))"
    )
    return [sys.executable, "-c", code, *map(str, words)]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_running_trials_end_and_loses_nothing(number, small, tmp_path):
    folder = tmp_path / "out"
    process = subprocess.Popen(
        command(small, folder), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if line.startswith("3/14"):
            break
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "finishing the trials that run" in err and "Traceback" not in err
    assert re.search(r"stopped: \d+ of 14 trials; run again to continue", out)
    seen = status.look(folder)
    assert seen["state"] == "stopped" and 3 <= seen["done"] < 14
    asked = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    assert sum(event["event"] == "ask" for event in asked) == seen["done"], "a running trial was thrown away"
    done = subprocess.run(command(small, folder), cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"continuing: {seen['done']} of 14 trials are finished" in done.stdout


@pytest.mark.slow
def test_under_mpi_a_refusal_is_said_once_and_ends_all_ranks(small, tmp_path):
    mpiexec = Path(sys.executable).parent / "mpiexec"
    if not mpiexec.exists():
        pytest.skip("no mpiexec beside this Python")
    run_small(small)
    start = [mpiexec, "-n", "3", sys.executable, "-m", "launch.cli", "run", small, "--out", tmp_path / "out"]
    for change, words in (("data.sise=16", "did you mean size?"), ("data.size=24", "data.size: was 16, now 24")):
        done = subprocess.run(
            [*start, "--set", change], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 2
        assert (done.stdout + done.stderr).count(words) == 1
        assert "Traceback" not in done.stderr and "BAD TERMINATION" not in done.stdout + done.stderr


@pytest.mark.slow
def test_two_signals_leave_at_once(small, tmp_path):
    folder = tmp_path / "out"
    process = subprocess.Popen(
        command(small, folder), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if line.startswith("2/14"):
            break
    process.send_signal(signal.SIGINT)
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGINT
    assert status.look(folder)["state"] == "stopped"


def test_observer_is_the_coordinators():
    assert issubclass(progress.Lines, coordinator.Observer) and issubclass(progress.Bar, coordinator.Observer)
