"""Jobs of a run folder on a cluster: written to its jobs/, handed to the scheduler, looked up in the queue.

jobs/<template> is the script, jobs/submitted has a line "<seconds since 1970> <scheduler> <job id>" for every job,
those by which a job continued itself too, and the jobs' own output lies beside them.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time as clock
from pathlib import Path
from typing import Any, cast, get_args

from launch import devices, resources, slurm
from launch import plan as costs
from launch.slurm import Continues, Job, Scheduler, Site
from sweeps import grid
from sweeps.atlas import RunFolder, write_aside
from sweeps.journal import RunError
from sweeps.settings import SettingsError, Sweep

PATIENCE = 60.0  # [s] for an answer of the scheduler


def plan(sweep: Sweep, run: tuple[str, ...], folder: Path, name: str, own: Path | None, *, nodes: int | None,
         time: str | None, account: str | None, partition: str | None, continues: str | None, most: int,
         options: tuple[str, ...]) -> tuple[Site, Job]:
    """The site called `name` and the job that carries out a sweep there; what is None is as the site says.

    run: the words after `tomoatlas run`. own: a file with more sites.
    Raises SettingsError, DataError or RunError for what cannot be submitted, or could not run there.
    """
    site = slurm.site_of(name, slurm.sites(own))
    if continues is not None and continues not in get_args(Continues):
        raise SettingsError(f"--continue {continues}: write one of {', '.join(get_args(Continues))}")
    share = max(cell.sweep.solver.devices for cell in grid.cells(sweep))
    job = Job(
        name=sweep.name, run=run, folder=folder, cwd=Path.cwd(), environment=Path(site.environment or sys.prefix),
        nodes=nodes or site.nodes, seconds=slurm.seconds(time or site.time), share=share, most=most,
        continues=cast(Continues, continues or site.continues), account=account, partition=partition, options=options)
    if job.seconds <= 2 * site.warning:
        raise SettingsError(f"--time {time or site.time}: the sweep is told to end {site.warning} s before it; give at "
                            "least twice that")
    RunFolder(folder).agree(sweep)
    planned = costs.plan(sweep)
    memory = int((site.gpu_memory or 0) * costs.GIB * devices.GPU_MEMORY)
    refused = list(costs.refusals(planned, memory, f"on a GPU of {name}", folder))
    if refused:
        raise RunError("\n".join(refused))
    for warning in costs.warnings(planned):
        print(warning, file=sys.stderr)
    return site, job


def workers(site: Site, job: Job) -> int:
    """Workers on each node."""
    return slurm.workers_per_node(site, job.share)


def script(site: Site, job: Job) -> str:
    """The text of the job script, from the site's template: one that ships, or a path to another."""
    shipped = resources.folder("slurm") / site.template
    try:
        template = (shipped if shipped.exists() else Path(site.template)).read_text(encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"{site.template}: cannot be read ({error.strerror}); it is the template of this "
                            "site") from error
    return slurm.script(template, site, job)


def hand_over(folder: Path, site: Site, text: str) -> str:
    """Write the script into the run folder and give it to the scheduler; the job's id.

    RunError where a job of this folder waits or runs already, and with the scheduler's own words if it refuses.
    """
    host = slurm.scheduler(site)
    busy = next((job for job in queue(folder) or [] if job["state"] not in OVER), None)
    if busy:
        raise RunError(f"{folder}: job {busy['id']} of this folder is {busy['state']} already; wait for it, or end it "
                       f"with {host.cancel} {busy['id']}")
    path = RunFolder(folder).jobs / Path(site.template).name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_aside(path, text)
        number = _submit(host, path)
        with open(path.with_name("submitted"), "a", encoding="utf-8") as record:
            record.write(f"{clock.time():.0f} {host.name} {number}\n")
    except OSError as error:
        raise RunError(f"{error.filename or path}: {error.strerror}") from error
    return number


def _submit(host: Scheduler, path: Path) -> str:
    """The id of the job that the scheduler makes of a script."""
    command = [*host.submit, *([] if host.piped else [str(path)])]
    words = " ".join([*host.submit, *(["<"] if host.piped else []), str(path)])
    try:
        with open(path, "rb") as text:
            done = subprocess.run(command, stdin=text if host.piped else subprocess.DEVNULL, capture_output=True,
                                  text=True, timeout=PATIENCE, check=False)
    except FileNotFoundError:
        raise RunError(f"{host.submit[0]} is not on this machine; the script is {path}. Submit where {host.submit[0]} "
                       "is, a login node of the cluster; --dry-run shows the script anywhere") from None
    except subprocess.TimeoutExpired:
        raise RunError(f"{words}: no answer in {PATIENCE:.0f} s; look into the queue before you try again") from None
    said = " ".join((done.stderr.strip() or done.stdout.strip()).split())
    number = re.search(r"\d+[\w.\[\]-]*", done.stdout)
    if done.returncode or not number:
        raise RunError(f"{host.submit[0]} refused the job: {said or f'exit status {done.returncode}'}\n"
                       f"The script is {path}; change what it asks for with the options of tomoatlas submit")
    return number[0]


OVER = ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
FORMAT = "%i|%T|%L|%S|%r|%D"  # id, state, time left, start, reason, nodes


def submitted(folder: Path) -> list[tuple[str, str]]:
    """(scheduler, job id) of all jobs that this folder has had, oldest first."""
    try:
        lines = (RunFolder(folder).jobs / "submitted").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return [(words[1], words[2]) for words in map(str.split, lines) if len(words) == 3]


def queue(folder: Path) -> list[dict[str, Any]] | None:
    """The folder's jobs that Slurm has in its queue; None where no squeue answers, and for other schedulers.

    id, state (PENDING, RUNNING, ...), left: [s] of walltime or None, starts: when Slurm expects a waiting job to
    start, as text, or None; reason: why it waits.
    """
    known = submitted(folder)
    mine = {number for host, number in known if host == "slurm"}
    if not mine:
        return None if known else []
    command = ["squeue", "--noheader", f"--user={os.getuid()}", f"--format={FORMAT}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return parse(answer, mine)


def parse(answer: str, mine: set[str]) -> list[dict[str, Any]]:
    """What squeue says of the jobs `mine` that are not over."""
    found = []
    for line in answer.splitlines():
        number, state, left, starts, reason, nodes = (word.strip() for word in line.split("|", 5))
        if number in mine and state not in OVER:
            found.append({
                "id": number, "state": state, "nodes": int(nodes) if nodes.isdigit() else None,
                "left": span(left) if state == "RUNNING" else None,
                "starts": starts if state == "PENDING" and starts not in ("N/A", "") else None,
                "reason": reason if state == "PENDING" and reason not in ("None", "") else None})
    return found


def span(text: str) -> int | None:
    """Slurm's D-HH:MM:SS, HH:MM:SS or MM:SS in seconds; None for a word such as UNLIMITED."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if not found:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
