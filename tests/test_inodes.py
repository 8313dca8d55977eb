"""`check` says how many files a run will leave, and it leaves no more."""

import json
import re

import pytest

from launch import plan
from sweeps import settings
from sweeps.atlas import RunFolder
from sweeps.coordinator import run
from sweeps.grid import cells
from sweeps.report import write
from tests.contract import LocalWorkers
from tests.test_cli import told

SWEEP = """\
name: small
data: {phantom: cocuo, size: 16}
grid: {haadf_tilts: [0, 9], chem_tilts: [3, 5]}
solver:
  iterations: 10
  record: [5, 10]
  lambda_model: {low: 1e-3, high: 1e3, scale: log}
  lambda_tv: {low: 1e-3, high: 1e1, scale: log}
search: {trials: 4, initial: 3}
"""


@pytest.mark.slow
@pytest.mark.parametrize("changes", [("output.save=all",), ("output.save=none",),
                                     ("output.save=best", "search.objective=heldout", "search.folds=2")], ids=str)
def test_a_run_leaves_no_more_files_than_check_has_said(changes, tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(SWEEP)
    said = told("check", path, *(word for change in changes for word in ("--set", change)))[1]
    most = int(re.search(r"^files +([\d,]+) at most", said, re.M)[1].replace(",", ""))
    sweep, folder = settings.load(path, list(changes)), RunFolder(tmp_path / "out")
    assert most == sum(plan.plan(sweep).files.values())
    with LocalWorkers(2, "sweeps.trial:run") as crew:
        assert run(sweep, cells(sweep), crew, folder).stopped is None
    write(folder.path)
    assert json.loads(folder.summary.read_text())["failed"] == 0
    left = [path for path in folder.path.rglob("*") if path.is_file() and path.parent != folder.logs]
    assert most / 2 < len(left) <= most
    assert len(list(folder.logs.iterdir())) == 2
