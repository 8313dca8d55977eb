"""What is installed is what was written: the wheel, its command, its first second, and strangers in its place."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_an_environment_with_a_stranger_of_our_name_is_refused(tmp_path):
    for name, home in (("engine", ROOT), ("sweeps", tmp_path / "other"), ("launch", ROOT)):
        (tmp_path / "path").mkdir(exist_ok=True)
        if home == ROOT:
            (tmp_path / "path" / name).symlink_to(ROOT / name)
        else:
            (home / name).mkdir(parents=True)
            (home / name / "__init__.py").write_text("")
    code = "from launch.cli import main; main()"
    path = os.pathsep.join([str(tmp_path / "path"), str(tmp_path / "other")])
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "side by side" in done.stderr and "python3 -m venv" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_check_and_help_start_quickly():
    for words in (["--help"], ["check", "quickstart"]):
        best = min(_seconds([sys.executable, "-m", "launch.cli", *words]) for _ in range(3))
        assert best < 2.0, f"{words}: {best:.2f} s of processor time"


def _seconds(words):
    """Processor seconds of a command."""
    before = os.times()
    subprocess.run(words, cwd=ROOT, check=True, capture_output=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


@pytest.mark.slow
def test_a_wheel_holds_the_packages_and_their_files_and_runs_in_an_empty_environment(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".venv", "runs", ".git", "__pycache__", ".*_cache"))
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, source],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"launch/configs/quickstart.yaml", "engine/data.py", "sweeps/grid.py", "launch/cli.py"} <= set(names)
    assert {name.split("/")[0] for name in names} == {"engine", "sweeps", "launch", names[-1].split("/")[0]}
    place = tmp_path / "place"
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    subprocess.run([place / "bin" / "pip", "install", "--quiet", "--no-index", "--no-deps", wheel], check=True)
    # It has nothing of the checkout; what tomoatlas needs is lent by the environment that the tests run in.
    library = next((place / "lib").glob("python3*")) / "site-packages"
    (library / "lent.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    clean = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    done = subprocess.run(
        [place / "bin" / "tomoatlas", "check", "quickstart"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=clean,
    )
    assert done.returncode == 0, done.stderr
    assert "quickstart" in done.stdout and "9 (3 HAADF tilts x 3 chemical tilts)" in done.stdout
