"""Job scripts as text: a template of slurm/, an entry of slurm/sites.yaml and what a job asks for become one.

Nothing here touches a file or a scheduler, except that `sites` reads YAML; `launch.jobs` does the rest.
"""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from launch import resources
from sweeps.fields import Model
from sweeps.yamlio import SettingsError, read

HOLE = re.compile(r"@([A-Z_]+)@")
Continues = Literal["requeue", "chain", "no"]


class Site(Model):
    """A machine, as slurm/sites.yaml explains it field by field."""

    about: str = ""
    tested: str = "nothing"
    template: str = "sweep.sbatch"
    nodes: int = Field(1, ge=1)
    time: str = "01:00:00"
    account: str | None = None
    partition: str | None = None
    gpus_per_node: int = Field(0, ge=0)
    gpu_memory: float | None = Field(None, gt=0)
    workers_per_node: int = Field(1, ge=1)
    cpus_per_worker: int = Field(1, ge=1)
    mpi: str = Field("pmi2", pattern=r"^[\w.]+$")
    options: list[str] = []
    setup: str = ""
    local: str = Field("/tmp", pattern=r"^[\w/${}.-]+$")  # it stands inside double quotes
    stage: bool = True
    environment: str | None = None
    continues: Continues = "requeue"
    warning: int = Field(120, ge=10)


@dataclass(frozen=True)
class Job:
    """What one submission asks for.

    run: the words after `tomoatlas run`. folder: the run folder; cwd: where the command was given; both absolute.
    environment: the Python environment. seconds: the time limit. share: GPUs of one worker (solver.devices).
    most: how often the job may continue itself. account, partition: replace the site's.
    """

    name: str
    run: tuple[str, ...]
    folder: Path
    cwd: Path
    environment: Path
    nodes: int
    seconds: int
    share: int = 1
    most: int = 20
    continues: Continues = "requeue"
    account: str | None = None
    partition: str | None = None
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scheduler:
    """How a scheduler is spoken to: the command that takes a script (`piped`: as its input), heads of its options."""

    name: str
    submit: tuple[str, ...]
    piped: bool
    option: str
    account: str
    partition: str
    log: str
    cancel: str


SCHEDULERS = {
    ".sbatch": Scheduler("slurm", ("sbatch", "--parsable"), False, "#SBATCH ", "--account=", "--partition=",
                         "%j.log", "scancel"),
    ".lsf": Scheduler("lsf", ("bsub",), True, "#BSUB ", "-P ", "-q ", "%J.log", "bkill"),
    ".pbs": Scheduler("pbs", ("qsub",), False, "#PBS ", "-A ", "-q ", "", "qdel"),
}


def sites(own: Path | None = None) -> dict[str, Site]:
    """The sites that ship, then those of a user's own file; SettingsError names file and line."""
    found: dict[str, Site] = {}
    for path in [resources.folder("slurm") / "sites.yaml", *([own] if own else [])]:
        document = read(path)
        for name, fields in document.data.items():
            if not isinstance(fields, dict):
                raise SettingsError(document.problem((name,), "a site is a mapping of fields"))
            given = {key: value for key, value in fields.items() if value is not None}
            try:
                site = Site.model_validate(given)
            except ValidationError as error:
                raise SettingsError(*(
                    document.problem((name, *problem["loc"]), _words(problem["type"], str(problem["loc"][0]),
                                                                     problem["msg"]))
                    for problem in error.errors())) from None
            if Path(site.template).suffix not in SCHEDULERS:
                raise SettingsError(document.problem((name, "template"), f"ends in none of {', '.join(SCHEDULERS)}"))
            found[name] = site
    return found


def _words(kind: str, key: str, message: str) -> str:
    """A problem of a site in words."""
    if kind != "extra_forbidden":
        return message[:1].lower() + message[1:]
    near = difflib.get_close_matches(key, Site.model_fields, n=1)
    return "unknown" + (f" (did you mean {near[0]}?)" if near else f"; known are {', '.join(Site.model_fields)}")


def site_of(name: str, known: Mapping[str, Site]) -> Site:
    """The site of a name; SettingsError lists the known ones."""
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1)
    width = max(map(len, known))
    lines = [f"  {key:<{width}}  {site.about}" for key, site in known.items()]
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise SettingsError("\n".join([f"--site {name}: is not known{hint}; known are", *lines,
                                   "Describe others in a file of your own: --sites FILE.yaml"]))


def seconds(text: str) -> int:
    """A time limit, HH:MM:SS or D-HH:MM:SS, in seconds; SettingsError for another form."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d{1,3}):([0-5]\d):([0-5]\d)", text.strip())
    if not found or not any(int(part or 0) for part in found.groups()):
        raise SettingsError(f"--time {text}: write HH:MM:SS or D-HH:MM:SS, for example 02:00:00")
    days, hours, minutes, rest = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest


def scheduler(site: Site) -> Scheduler:
    """Who takes the scripts of a site."""
    return SCHEDULERS[Path(site.template).suffix]


def workers_per_node(site: Site, share: int) -> int:
    """Workers on a node: one per `share` of its GPUs, without GPUs the site's number.

    SettingsError where a node has too few GPUs for one.
    """
    if not site.gpus_per_node:
        return site.workers_per_node
    if share > site.gpus_per_node:
        raise SettingsError(f"solver.devices is {share}, and a node has {site.gpus_per_node} GPUs: the slabs of one "
                            "volume have to lie on one node")
    return site.gpus_per_node // share


def script(template: str, site: Site, job: Job) -> str:
    """The job script; SettingsError where the template has a word that nothing fills, or a value breaks a line."""
    if "\n" in "".join([job.name, *job.run, str(job.folder), str(job.cwd), str(job.environment), *job.options]):
        raise SettingsError("a job script cannot name files or settings that contain line breaks")
    host, workers = scheduler(site), workers_per_node(site, job.share)
    cores = site.cpus_per_worker * ((site.gpus_per_node or workers) + 1)  # of a node
    values = {
        "NAME": f"tomoatlas-{re.sub(r'[^A-Za-z0-9_.-]', '-', job.name)}"[:60],
        "NODES": job.nodes,
        "WORKERS": workers,
        "PLAIN_WORKERS": job.nodes * workers,
        "TASKS_PER_NODE": workers + 1,
        "RANKS": job.nodes * workers + 1,
        "CPUS": cores // (workers + 1),
        "NODE_CPUS": cores,
        "GPUS": site.gpus_per_node,
        "SECONDS": job.seconds,
        "TIME": _clock(job.seconds, host),
        "WARNING": site.warning if host.name != "lsf" else -(-site.warning // 60),
        "LOG": shlex.quote(f"{job.folder}/jobs".replace("%", "%%" if host.log else "%") + f"/{host.log}"),
        "OPTIONS": "\n".join(_options(site, job, host)),
        "RUN": shlex.join(job.run),
        "FOLDER": shlex.quote(str(job.folder)),
        "CWD": shlex.quote(str(job.cwd)),
        "ENVIRONMENT": shlex.quote(str(job.environment)),
        "SCRIPT": shlex.quote(str(job.folder / "jobs" / site.template)),
        "LOCAL": site.local,
        "STAGE": "yes" if site.stage else "no",
        "CONTINUES": "chain" if job.continues == "requeue" and host.name != "slurm" else job.continues,
        "MOST": job.most,
        "MPI": site.mpi,
        "SETUP": site.setup.strip(),
    }
    return render(template, {name: str(value) for name, value in values.items()})


def _options(site: Site, job: Job, host: Scheduler) -> list[str]:
    """The lines of the script's head that depend on the site and the user."""
    account, partition = job.account or site.account, job.partition or site.partition
    words = [f"{host.account}{account}" if account else "", f"{host.partition}{partition}" if partition else "",
             f"--gpus-per-node={site.gpus_per_node}" if site.gpus_per_node and host.name == "slurm" else "",
             "--requeue" if job.continues == "requeue" and host.name == "slurm" else "",
             *site.options, *job.options]
    return [host.option + word for word in words if word]


def _clock(seconds: int, host: Scheduler) -> str:
    """A time limit in the scheduler's form: LSF counts no seconds."""
    hours, minutes = divmod(-(-seconds // 60) if host.name == "lsf" else seconds // 60, 60)
    return f"{hours:02}:{minutes:02}" + ("" if host.name == "lsf" else f":{seconds % 60:02}")


def render(template: str, values: Mapping[str, str]) -> str:
    """The template with every @WORD@ replaced, in one pass: a value may contain what looks like one."""
    unknown = sorted(set(HOLE.findall(template)) - set(values))
    if unknown:
        raise SettingsError(f"the template asks for {', '.join(unknown)}; known are {', '.join(values)}")
    return HOLE.sub(lambda found: values[found[1]], template)
