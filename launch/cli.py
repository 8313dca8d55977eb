"""The command `tomoatlas`, verb by verb. Heavy imports wait until they are needed."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from launch import resources
from launch.sentences import REFUSED, leave, refuse, sentences

app = typer.Typer(
    name="tomoatlas",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="3D chemistry from electron-microscope tilt series: a YAML says what to reconstruct and which "
    "weights to search, `run` carries it out, and the results are an atlas that xarray opens.\n\n"
    "Example: tomoatlas run quickstart",
)

File = Annotated[str, typer.Argument(metavar="FILE", help="A YAML file, or the name of a shipped sweep.")]
Folder = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="A run folder, or the name of a sweep in runs/.")
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change a setting of the file; may be given more than once."
    ),
]
Out = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="The run folder; default: runs/<name>.")
]


@app.command(short_help="Run a sweep, or continue it where it was stopped.")
@sentences
def run(
    file: Annotated[
        str | None, typer.Argument(metavar="FILE", help="A YAML file, or the name of a shipped sweep.")
    ] = None,
    out: Out = None,
    workers: Annotated[
        str | None,
        typer.Option(
            "--workers",
            metavar="N|dask[:PLACE]",
            help="Local worker processes; default: one per GPU, else two. Under MPI the other ranks are the workers. "
            "dask: a dask cluster on this machine; dask:tcp://HOST:PORT or dask:SCHEDULER_FILE.json: one that runs.",
        ),
    ] = None,
    changes: Set = None,
    cell: Annotated[
        str | None, typer.Option("--cell", metavar="ID", help="Run this cell again from its first trial.")
    ] = None,
) -> None:
    """Run a sweep, or continue it where it was stopped.

    Writes runs/<name>/: the journal, atlas.zarr, summary.json, the best settings of each cell and a report. A
    larger search.trials continues a finished sweep. SIGINT (Ctrl-C) and SIGTERM let running trials finish;
    nothing is lost.

    Examples:

    tomoatlas run quickstart

    tomoatlas run sweep.yaml --set data.size=64 --workers 2

    mpiexec -n 9 tomoatlas run sweep.yaml --out /scratch/me/sweep

    tomoatlas run sweep.yaml --workers dask:/scratch/me/scheduler.json
    """
    if file is None:
        refuse(
            "tomoatlas run needs a FILE: write one with `tomoatlas init fused3d -o sweep.yaml`, or name a "
            f"shipped sweep: {', '.join(resources.configs())}"
        )
    from launch import session
    from sweeps import settings

    leave(session.run(settings.load(find(file), changes or []), out, workers, cell))


@app.command(short_help="Say what a sweep will cost; refuse what cannot fit.")
@sentences
def check(
    file: File,
    out: Out = None,
    changes: Set = None,
    memory: Annotated[
        float | None,
        typer.Option(
            "--memory",
            min=0.001,
            metavar="GIB",
            help="Memory of one worker's device where the sweep will run; default: this machine's.",
        ),
    ] = None,
) -> None:
    """Say what a sweep will cost, and refuse what cannot fit. Runs nothing, writes nothing.

    Prints cells, trials, solves, bytes per trial and on the disk, estimated hours; opens measured files.

    Examples:

    tomoatlas check quickstart

    tomoatlas check fig4_cocuo --set data.size=128 --memory 16
    """
    from launch import plan
    from sweeps import lookup, settings
    from sweeps.journal import RunError

    sweep = settings.load(find(file), changes or [])
    planned = plan.plan(sweep)
    lookup.check([cost.cell for cost in planned.costs])
    available, where = (int(memory * plan.GIB), "on the device (--memory)") if memory else plan.memory_here(1)
    folder = out or Path("runs") / sweep.name
    refused = list(plan.refusals(planned, available, where, folder))
    print(plan.text(planned, available, where, folder))
    for warning in plan.warnings(planned):
        print(warning, file=sys.stderr)
    if refused:
        raise RunError("\n".join(refused))


@app.command(short_help="Run a sweep as a job of a cluster.")
@sentences
def submit(
    file: File,
    site: Annotated[str, typer.Option("--site", metavar="NAME", help="An entry of slurm/sites.yaml.")] = "generic",
    nodes: Annotated[int | None, typer.Option("--nodes", min=1, metavar="N", help="Nodes of the job.")] = None,
    time: Annotated[
        str | None, typer.Option("--time", metavar="HH:MM:SS", help="Time limit of the job, also D-HH:MM:SS.")
    ] = None,
    account: Annotated[str | None, typer.Option("--account", metavar="A", help="The project that pays.")] = None,
    partition: Annotated[
        str | None, typer.Option("--partition", metavar="P", help="Slurm's partition; the queue of LSF and PBS.")
    ] = None,
    out: Out = None,
    changes: Set = None,
    continues: Annotated[
        str | None,
        typer.Option(
            "--continue",
            metavar="HOW",
            help="When the time limit comes before the last trial: requeue, chain (a job after this one) or no.",
        ),
    ] = None,
    most: Annotated[int, typer.Option("--most", min=0, metavar="N", help="Continue so many times at most.")] = 20,
    options: Annotated[
        list[str] | None,
        typer.Option("--option", metavar="TEXT", help="Another option of the scheduler, e.g. --option=--mem=8G."),
    ] = None,
    own: Annotated[Path | None, typer.Option("--sites", metavar="FILE", help="More sites, in the same form.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the job script; write and submit nothing.")] = False,
) -> None:
    """Run a sweep as a job of a cluster: checks it, writes the job script and hands it to the scheduler.

    The job continues itself when its time limit comes; what has ended is never lost. Submitting a stopped sweep
    again continues it.

    Examples:

    tomoatlas submit sweep.yaml --site perlmutter --account m1234 --nodes 4 --time 02:00:00

    tomoatlas submit fig4_cocuo --site v100 --set data.size=128 --out /scratch/me/fig4 --dry-run
    """
    from launch import jobs
    from sweeps import settings

    sweep = settings.load(find(file), changes or [])
    folder = (out or Path("runs") / sweep.name).resolve()
    words = (str(Path(find(file)).resolve()), "--out", str(folder), *(f"--set={change}" for change in changes or []))
    chosen, job = jobs.plan(sweep, words, folder, site, own, nodes=nodes, time=time, account=account,
                            partition=partition, continues=continues, most=most, options=tuple(options or ()))
    text = jobs.script(chosen, job)
    if dry_run:
        print(text, end="")
        return
    number = jobs.hand_over(folder, chosen, text)
    print(f"job {number}: {job.nodes * jobs.workers(chosen, job)} workers on {job.nodes} nodes of {site}"
          f"\nlook    tomoatlas status {shlex.quote(str(out or folder))}\noutput  {folder / 'jobs'}")


@app.command(short_help="Say how a sweep would go on a machine of any size.")
@sentences
def simulate(
    file: File,
    workers: Annotated[
        str, typer.Option("--workers", metavar="N,...", help="Workers, one per GPU; several numbers give a curve.")
    ] = "8",
    trial_seconds: Annotated[
        str,
        typer.Option("--trial-seconds", metavar="S[,SPREAD]", help="Median time of a full trial [s], and the standard "
                     "deviation of its logarithm."),
    ] = "60,0.3",
    advisers: Annotated[
        int | None,
        typer.Option("--advisers", min=1, metavar="N", help="Side processes that propose trials; default: one for 64 "
                     "workers, 64 at most."),
    ] = None,
    mtbf: Annotated[
        float, typer.Option("--mtbf", min=0.001, metavar="HOURS", help="Mean time between failures of the whole "
                            "machine; each takes a node.")
    ] = float("inf"),
    per_node: Annotated[int, typer.Option("--per-node", min=1, metavar="N", help="Workers of a node.")] = 6,
    notice: Annotated[
        float, typer.Option("--notice", min=0.0, metavar="S", help="Until a dead worker is noticed [s].")
    ] = 20.0,
    walltime: Annotated[
        float | None, typer.Option("--walltime", min=1.0, metavar="MIN", help="Time limit of a job; default: none.")
    ] = None,
    queue: Annotated[
        float, typer.Option("--queue", min=0.0, metavar="MIN", help="Between two jobs, in the queue.")
    ] = 0.0,
    scale: Annotated[
        bool, typer.Option("--scale", help="Fewer workers get fewer cells, 16 at least, and rarer failures.")
    ] = False,
    real: Annotated[
        int, typer.Option("--real", min=1, metavar="N", help="Processes here that compute the proposals.")
    ] = 1,
    changes: Set = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Keep the run folders here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object per number of workers.")] = False,
) -> None:
    """Say how a sweep would go on a machine of any size: how busy its workers would be, what failures cost.

    The coordinator and its optimisers are the real ones, and what they take is measured here; the trials only pass on
    a simulated clock, with invented results.

    Examples:

    tomoatlas simulate fig4_cocuo --workers 8,64 --trial-seconds 2

    tomoatlas simulate sweep.yaml --workers 27648 --mtbf 5 --walltime 120 --set search.in_flight=16
    """
    from launch import simulate as machine
    from launch.simulated import Machine
    from sweeps import settings

    median, spread = numbers(trial_seconds, "--trial-seconds", 2)
    counts = [int(number) for number in numbers(workers, "--workers")]
    model = Machine(1, median, spread, 3600 * mtbf, per_node, notice, advisers or 0)
    machine.show(settings.load(find(file), changes or []), counts, model, walltime and 60 * walltime, 60 * queue, real,
                 out, scale, as_json)


def numbers(text: str, option: str, count: int | None = None) -> list[float]:
    """Positive numbers between commas; with `count` exactly so many, the last ones 0.3 by default."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    found += [0.3] * ((count or 0) - len(found))
    if not found or min(found) <= 0 or len(found) != (count or len(found)) or (count is None and min(found) < 1):
        refuse(f"{option} {text}: must be {'S or S,SPREAD' if count else 'whole numbers above 0'}, separated by commas")
    return found


@app.command(short_help="Write a commented YAML to start from.")
@sentences
def init(
    system: Annotated[
        str, typer.Argument(metavar="SYSTEM", help="What reconstructs: fused3d, fused2d, hebt, mset, mspt.")
    ] = "fused3d",
    measured: Annotated[
        bool, typer.Option("--measured", help="For tilt series in files, instead of a phantom.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="Write here instead of to the terminal."),
    ] = None,
) -> None:
    """Write a commented YAML to start from: every setting with its meaning, unit and default.

    Examples:

    tomoatlas init fused3d -o sweep.yaml

    tomoatlas init fused3d --measured -o specimen.yaml
    """
    from sweeps import settings

    text = settings.template(system, measured)
    if output is None:
        print(text, end="")
        return
    try:
        with open(output, "x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        refuse(f"{output}: exists; choose another name, or remove it first")
    except OSError as error:
        refuse(f"{output}: cannot be written: {error.strerror}")
    print(f"wrote {output}; next: tomoatlas check {output}")


@app.command(short_help="Say how far a sweep is, also while it runs.")
@sentences
def status(
    folder: Folder,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Look again every few seconds until the sweep has ended.")
    ] = False,
) -> None:
    """Say how far a sweep is: finished, failed and running trials, the best of each cell. Also while it runs.

    Examples:

    tomoatlas status runs/quickstart --watch

    tomoatlas status quickstart --json
    """
    from launch import status as seen

    seen.show(place(folder), as_json, watch)


@app.command(short_help="Draw the figures of a run again, print its tables.")
@sentences
def report(folder: Folder) -> None:
    """Draw the figures of a run folder again and print its tables: report/index.html and PNG files.

    Example: tomoatlas report runs/quickstart
    """
    from sweeps import report as drawn

    folder = place(folder)
    print(f"{drawn.table(folder)}\n")
    for path in drawn.write(folder):
        print(path)


@app.command(short_help="Statistics and projections of all volumes.")
@sentences
def volumes(
    folder: Folder,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where to write; default: FOLDER/statistics.")
    ] = None,
    over: Annotated[
        str | None,
        typer.Option(
            "--over",
            metavar="AXIS",
            help="Compare volumes that differ only in this axis of the grid, such as replicate; trial: all trials of "
            "a cell (output.save: all). Default: all volumes of a shape together.",
        ),
    ] = None,
) -> None:
    """Statistics and projections of all volumes of an atlas, also of more than fit into memory; needs tomoatlas[dask].

    Per element: mean, standard deviation, minimum and maximum of each voxel over the volumes; per volume: sums and
    maxima along z, y and x, mean, total and percentiles. Writes volumes.zarr (a group for each shape, for
    xarray.open_zarr), table.csv and pages of projections.

    Examples:

    tomoatlas volumes runs/quickstart

    tomoatlas volumes fig4_cocuo --over replicate --out /scratch/me/statistics
    """
    from launch import progress
    from sweeps import volumes as computed

    with progress.share(sys.stdout) as tell:
        target, files, text = computed.write(place(folder), out, over, tell)
    print(f"\n{text}\n")
    print(*files, sep="\n")
    for group in computed.groups(target):
        print(f"xarray.open_zarr({str(target / 'volumes.zarr')!r}, group={group!r})")


@app.command(short_help="Write volumes as MRC, TIFF, hspy or OME-Zarr.")
@sentences
def export(
    folder: Folder,
    kinds: Annotated[
        str, typer.Option("--as", metavar="KIND,...", help="Of mrc, tiff (a file of each element), hspy, ome-zarr.")
    ] = "mrc",
    cell: Annotated[
        str | None, typer.Option("--cell", metavar="ID", help="The volume of this cell alone; default: of all.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where to write; default: FOLDER/export.")
    ] = None,
) -> None:
    """Write the best volume of each cell, and what lies on its voxels, as files that other programs open.

    mrc for Chimera, IMOD and tomviz, tiff for Fiji, hspy for HyperSpy (needs tomoatlas[files]), ome-zarr for napari.
    Each file knows the size of its voxels.

    Examples:

    tomoatlas export runs/quickstart

    tomoatlas export idp --as tiff,ome-zarr --cell method=fused --out /scratch/me
    """
    from sweeps import export as written

    print(*written.write(place(folder), kinds.split(","), cell, out), sep="\n")


def find(file: str) -> str:
    """The path of a YAML: as given, or of the shipped sweep of that name."""
    shipped = resources.configs()
    return str(shipped[file]) if file in shipped and not Path(file).exists() else file


def place(folder: Path) -> Path:
    """A run folder: as given, or runs/<name> for a bare name."""
    inside = Path("runs") / folder
    return inside if not folder.exists() and inside.exists() else folder


def main() -> None:
    """The console script: refuses an environment in which another package shadows one of ours."""
    trouble = resources.strangers()
    if trouble:
        print(trouble, file=sys.stderr)
        sys.exit(REFUSED)
    app(prog_name="tomoatlas")


if __name__ == "__main__":
    main()
