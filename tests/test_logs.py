"""Logs that many workers share: no line is torn, and each says which trial it is about."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

from launch.process import module
from tests.contract import answers, batch, local, message
from tests.test_workers import needs_mpi, ranks

ROOT = Path(__file__).resolve().parent.parent
CHATTER = """if True:
    import os, pathlib, sys
    from launch import logs
    logs.share(pathlib.Path(sys.argv[1]), sys.argv[2])
    for trial in range(200):
        logs.about({"cell": "chem_tilts=5", "trials": [{"trial": trial}, {"trial": trial + 1000}]})
        print("some", end=" ")
        print("words" * 300)
        print("an error", file=sys.stderr)
        os.write(2, b"from C\\n")"""


def test_processes_that_share_a_log_tear_no_line_and_say_what_it_is_about(tmp_path):
    log = tmp_path / "node.log"
    crew = [subprocess.Popen([sys.executable, "-c", CHATTER, log, f"worker-{k}"], cwd=ROOT) for k in range(3)]
    assert [worker.wait(60) for worker in crew] == [0, 0, 0]
    lines = log.read_text().splitlines()
    assert len(lines) == 3 * 200 * 3
    form = r"worker-[012] chem_tilts=5-(\d+) chem_tilts=5-(\d+) \| (some (words)+|an error)|from C"
    assert all(re.fullmatch(form, line) for line in lines)
    assert sum(" chem_tilts=5-12 " in line for line in lines) == 6


def test_a_traceback_names_its_trial_on_every_line(tmp_path):
    with local("ill") as crew:
        crew.start(tmp_path)
        found = answers(crew, [message(2, tmp_path), batch([0, 6], tmp_path)])
        assert found[2].results[0]["status"].startswith("ValueError")
    lines = "".join(path.read_text(errors="replace") for path in tmp_path.glob("logs/*")).splitlines()
    (start,) = (number for number, line in enumerate(lines) if "Traceback" in line)
    assert lines[start] == "all-2 | Traceback (most recent call last):"
    assert any(line == "all-2 | ValueError: lambda_tv" for line in lines)
    assert any(line.startswith("all-0 all-6 | ") for line in lines)


def test_a_worker_whose_coordinator_left_before_it_was_ready_leaves_without_a_word(tmp_path):
    command, path = module("launch.worker", "--evaluate", "tests.evaluators:ill")
    reader, writer = os.pipe()
    os.close(reader)  # the coordinator's end; standard input stays open, so that nothing else sends it home
    pipes = {"stdin": subprocess.PIPE, "stdout": writer}
    with open(tmp_path / "log", "wb") as log, subprocess.Popen(command, env={**os.environ, **path}, stderr=log,
                                                               **pipes) as worker:
        os.close(writer)
        assert worker.wait(60) == 0
    assert (tmp_path / "log").read_text() == ""


@needs_mpi
def test_mpi_workers_of_a_node_share_one_file_in_which_each_line_names_worker_and_trial(tmp_path):
    done = ranks(3, "tests.contract", "illness_is_a_status_and_chatter_goes_to_the_log", tmp_path)
    assert done.stdout.startswith("kept\n"), done.stderr
    (log,) = (tmp_path / "logs").iterdir()
    assert log.name == socket.gethostname().partition(".")[0] + ".log"
    lines = log.read_text(errors="replace").splitlines()
    said = [line for line in lines if "is not for the coordinator" in line]
    assert len(said) == 5 and all(re.match(r"worker-[12] all-[01256] \| ", line) for line in said)
    assert any(re.fullmatch(r"worker-[12] all-2 \| Traceback \(most recent call last\):", line) for line in lines)
