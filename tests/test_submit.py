"""Job scripts without a scheduler: rules of our own for every site, and sentences for what cannot be submitted."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from launch import jobs, resources, slurm, status
from launch.slurm import Job, Site
from sweeps.yamlio import SettingsError
from tests.test_cli import SMALL, told

SITES = slurm.sites()
SLURM = sorted(name for name, site in SITES.items() if site.template.endswith(".sbatch"))


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A folder of programs that come before all others: `programs("sbatch", "echo 12")` makes one."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def make(name, text):
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)

    for name in ("sbatch", "squeue", "bsub", "qsub"):
        make(name, "exit 9")
    return make


def dry(path, site, *words):
    """The script of a dry run."""
    code, out, err = told("submit", path, "--site", site, "--dry-run", *words, cwd=path.parent)
    assert (code, err) == (0, "")
    return out


def options(text):
    """{"--nodes": "2", ...} of the head of a script for Slurm."""
    words = [shlex.split(line)[1] for line in text.splitlines() if line.startswith("#SBATCH ")]
    return dict(word.partition("=")[::2] for word in words)


@pytest.mark.parametrize("name", sorted(SITES))
def test_every_site_makes_a_script_that_bash_reads_and_writes_nothing(name, small):
    text = dry(small, name, "--nodes", 3, "--account", "m1", "--set", "data.size=24")
    assert not slurm.HOLE.search(text)
    assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).stderr == ""
    assert "m1" in text and "--set=data.size=24" in text and "TOMOATLAS_END" in text
    assert max(map(len, (resources.folder("slurm") / SITES[name].template).read_text().splitlines())) <= 120
    assert list(small.parent.iterdir()) == [small]


@pytest.mark.parametrize("name", SLURM)
@pytest.mark.parametrize("share", [1, 2])
def test_one_rank_per_worker_and_one_more_on_the_first_node(name, share, small):
    text, site = dry(small, name, "--nodes", 3, "--set", f"solver.devices={share}"), SITES[name]
    head = options(text)
    workers = site.gpus_per_node // share if site.gpus_per_node else site.workers_per_node
    assert f"srun --ntasks={3 * workers + 1} --cpus-per-task={head['--cpus-per-task']} --distribution=cyclic" in text
    assert head["--ntasks-per-node"] == str(workers + 1) and head["--nodes"] == "3"
    assert head.get("--gpus-per-node") == (str(site.gpus_per_node) if site.gpus_per_node else None)
    assert "gpus-per-task=" not in text
    assert head["--signal"] == f"B:USR1@{site.warning}"
    cores = site.cpus_per_worker * ((site.gpus_per_node or site.workers_per_node) + 1)
    assert int(head["--cpus-per-task"]) * (workers + 1) <= cores


def test_what_a_user_asks_for_replaces_what_the_site_says(small):
    head = options(dry(small, "perlmutter", "--time", "1-02:30:00", "--partition", "debug", "--continue", "chain",
                       "--option=--mem=8G"))
    assert (head["--time"], head["--partition"], head["--mem"]) == ("26:30:00", "debug", "8G")
    assert "--requeue" not in head and "--requeue" in options(dry(small, "perlmutter"))
    assert "#BSUB -W 02:30\n" in dry(small, "summit", "--time", "02:29:10")
    assert "#PBS -l walltime=02:29:10\n" in dry(small, "polaris", "--time", "02:29:10")
    assert "continues=chain\n" in dry(small, "polaris", "--continue", "requeue"), "qrerun is for administrators"


def test_a_script_quotes_what_a_shell_would_take_apart(tmp_path):
    folder = tmp_path / "it's $HOME @NAME@; 100%"
    job = Job("a b", ("x y.yaml", "--set=data.phantom=$(id)"), folder, tmp_path, tmp_path, 1, 3600)
    text = jobs.script(Site(), job)
    asked = subprocess.run(["bash", "-c", 'eval "$(grep -E \'^(run|folder)=\')"; printf "%s|" "${run[@]}" "$folder"'],
                           input=text, text=True, capture_output=True, check=True).stdout
    assert asked == f"x y.yaml|--set=data.phantom=$(id)|{folder}|"
    head = options(text)
    assert head["--output"] == f"{folder}/jobs/%j.log".replace("100%", "100%%")
    assert head["--job-name"] == "tomoatlas-a-b"
    with pytest.raises(SettingsError, match="line breaks"):
        jobs.script(Site(), Job("a", ("x\ny",), folder, tmp_path, tmp_path, 1, 3600))


def test_a_template_with_a_word_that_nothing_fills_is_refused():
    assert slurm.render("@A@ b@c @B@", {"A": "@B@", "B": "1"}) == "@B@ b@c 1"
    with pytest.raises(SettingsError, match="asks for C; known are A"):
        slurm.render("@A@ @C@", {"A": "1"})


@pytest.mark.parametrize(("words", "said"), [
    (("--site", "perlmuter"), "did you mean perlmutter?"),
    (("--site", "hal"), "--sites FILE.yaml"),
    (("--time", "90"), "write HH:MM:SS"),
    (("--time", "00:00:00"), "write HH:MM:SS"),
    (("--time", "00:03:00"), "told to end 120 s before it"),
    (("--continue", "ever"), "requeue, chain, no"),
    (("--site", "v100", "--set", "solver.devices=8"), "a node has 4 GPUs"),
    (("--site", "v100", "--set", "data.size=512"), "are free on a GPU of v100"),
    (("--set", "data.sise=16"), "did you mean size?"),
    (("--sites", "none.yaml"), "none.yaml:1: cannot be read"),
], ids=" ".join)
def test_what_cannot_be_submitted_is_told_and_writes_nothing(words, said, small):
    code, out, err = told("submit", small, *words, cwd=small.parent)
    assert (code, out) == (2, "")
    assert said in err and "Traceback" not in err
    assert list(small.parent.iterdir()) == [small]


@pytest.mark.parametrize(("text", "said"), [
    ("mine: {gpu_per_node: 4}", "mine.yaml:1: mine.gpu_per_node: unknown (did you mean gpus_per_node?)"),
    ("mine: 4", "mine.yaml:1: mine: a site is a mapping"),
    ("mine:\n  nodes: many", "mine.yaml:2: mine.nodes: input should be a valid integer"),
    ("mine: {template: job.sh}", "mine.template: ends in none of .sbatch"),
    ("mine: {template: job.sbatch}", "job.sbatch: cannot be read"),
    ("mine: {local: '/tmp; rm'}", "mine.local: string should match"),
])
def test_a_site_of_ones_own_is_checked_as_a_sweep_is(text, said, small):
    own = small.parent / "mine.yaml"
    own.write_text(text)
    code, _, err = told("submit", small, "--sites", own, "--site", "mine", "--dry-run")
    assert code == 2 and said in err


def test_a_submitted_job_is_recorded_and_shown_and_not_submitted_twice(small, programs):
    out = small.parent / "out"
    programs("sbatch", 'echo "12;cluster"')
    code, said, _ = told("submit", small, "--out", out, cwd=small.parent)
    assert code == 0 and "job 12: 4 workers on 1 nodes of generic" in said and "tomoatlas status" in said
    assert jobs.submitted(out) == [("slurm", "12")]
    assert (out / "jobs" / "sweep.sbatch").read_text() == dry(small, "generic", "--out", out)
    programs("squeue", "echo '11|RUNNING|5:00|N/A|None|1'; echo '12|PENDING|1:00:00|2026-01-01T08:00:00|Priority|4'")
    seen = json.loads(told("status", out, "--json")[1])
    assert (seen["state"], seen["jobs"][0]["starts"], seen["jobs"][0]["left"]) == (
        "queued", "2026-01-01T08:00:00", None)
    assert "job 12: pending, Slurm expects it to start at 2026-01-01T08:00:00, it waits for Priority" in (
        told("status", out)[1])
    code, _, said = told("submit", small, "--out", out, cwd=small.parent)
    assert code == 2 and "job 12 of this folder is PENDING already" in said and "scancel 12" in said
    programs("squeue", "echo '12|RUNNING|1-02:03:04|N/A|None|4'")
    assert status.look(out)["jobs"][0]["left"] == 93784
    assert "job 12: running, 1.1 days of walltime left" in told("status", out)[1]
    programs("squeue", "true")
    assert "job 12: is not in the queue; its output lies in" in told("status", out)[1]
    programs("squeue", "exit 1")
    assert status.look(out)["jobs"] is None and "there is no squeue here" in told("status", out)[1]


@pytest.mark.parametrize(("site", "program", "says", "number"), [
    ("summit", "bsub", '[[ $(cat) == "#!/bin/bash"* ]] && echo "Job <77> is submitted to queue <batch>."', "77"),
    ("polaris", "qsub", '[ -f "$1" ] && echo 77.polaris-pbs-01', "77.polaris-pbs-01"),
])
def test_lsf_and_pbs_take_scripts_in_their_own_way(site, program, says, number, small, programs):
    programs(program, says)
    code, said, err = told("submit", small, "--out", small.parent / "out", "--site", site)
    assert (code, err) == (0, "") and f"job {number}: " in said
    assert "there is no squeue here" in told("status", small.parent / "out")[1]


def test_a_refusal_of_the_scheduler_is_passed_on(small, programs):
    programs("sbatch", 'echo "sbatch: error: invalid account" >&2; exit 1')
    code, _, said = told("submit", small, "--out", small.parent / "out")
    assert code == 2 and "sbatch refused the job: sbatch: error: invalid account" in said
    assert jobs.submitted(small.parent / "out") == []
    os.remove(small.parent / "bin" / "sbatch")
    if not Path("/usr/bin/sbatch").exists():
        code, _, said = told("submit", small, "--out", small.parent / "out")
        assert code == 2 and "sbatch is not on this machine" in said and "--dry-run" in said


def test_a_folder_with_other_results_or_other_things_is_refused_before_a_job_waits_for_hours(small):
    from tests.test_cli import run_small

    run_small(small)
    code, _, said = told("submit", small, "--out", small.parent / "out", "--set", "data.size=24", "--dry-run")
    assert code == 2 and "data.size: was 16, now 24" in said
    code, _, said = told("submit", small, "--out", small.parent, "--dry-run")
    assert code == 2 and "is no run folder and not empty" in said


@pytest.mark.parametrize(("text", "value"), [
    ("1-02:03:04", 93784), ("2:03:04", 7384), ("1:30", 90), ("UNLIMITED", None), ("INVALID", None)])
def test_times_of_squeue(text, value):
    assert jobs.span(text) == value


def test_every_field_of_a_site_is_explained_in_sites_yaml():
    text = (resources.folder("slurm") / "sites.yaml").read_text()
    comments = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    assert not [name for name in Site.model_fields if not re.search(rf"\b{name}\b", comments)]
