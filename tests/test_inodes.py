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


BIMODAL = """\
name: small
system: hebt
data: {phantom: agau, size: 16, planes: 4}
grid: {data.dose: [3.0e7, 3.0e8]}
solver: {iterations: 5, record: [2, 5], tilts: haadf, alpha: {low: 0.2, high: 0.9}}
search: {trials: 4, initial: 3}
output: {fractions: {by: atoms}}
"""
MAPS = """\
name: small
system: fused2d
data: {phantom: coscoo, size: 16}
grid: {data.snr.chem: [1, 4]}
solver: {iterations: 5, lambda_tv: {low: 1e-3, high: 1e1, scale: log}}
search: {trials: 4, initial: 3}
"""


@pytest.mark.slow
@pytest.mark.parametrize(("yaml", "changes"), [
    (SWEEP, ("output.save=all",)), (SWEEP, ("output.save=none",)),
    (SWEEP, ("output.save=best", "search.objective=heldout", "search.folds=2")),
    (BIMODAL, ("output.save=all",)), (MAPS, ("output.save=best",))],
    ids=["all", "none", "best", "bimodal", "maps"])
def test_a_run_leaves_no_more_files_than_check_has_said(yaml, changes, tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(yaml)
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
