"""`make bench-scale`: the coordinator on simulated machines of up to 27,648 workers, about 40 minutes.

The curve has one sweep, as large a part of it as the machine; the single cell is where asynchronous search is hardest.
`python -m tests.bench_scale FILE` takes the curve from a file that `tomoatlas simulate --json` has written.
"""

import contextlib
import io
import json
import sys
from dataclasses import replace
from pathlib import Path

from launch import resources, simulate
from launch.simulate import Outcome
from launch.simulated import Machine
from sweeps import settings
from tests.bench import publish

MACHINE = Machine(1, median=60.0, spread=0.3, mtbf=180.0, notice=60.0, advisers=0)
CURVE = [27648, 4096, 512, 64, 8]
REFINED = ["search.trials=80",
           f"grid={{haadf_tilts: {list(range(5, 77, 2))}, chem_tilts: {list(range(3, 51))}}}"]
SINGLE = [64, 8]
ONE = ["search.trials=400", "grid={haadf_tilts: [47], chem_tilts: [9]}"]


def simulated(changes: list[str], workers: list[int], machine: Machine, scale: bool) -> list[Outcome]:
    """The outcomes of fig4_cocuo with some changes."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        simulate.show(settings.load(resources.configs()["fig4_cocuo"], changes), workers, machine, None, 0.0, 2, None,
                      scale, as_json=True)
    return [Outcome(**json.loads(line)) for line in printed.getvalue().splitlines()]


def table(outcomes: list[Outcome]) -> list[str]:
    """Rows in markdown, the smallest machine first."""
    names = set.intersection(*(set(outcome.regret) for outcome in outcomes))
    rows = []
    for outcome in sorted(outcomes, key=lambda outcome: outcome.workers):
        regrets = [outcome.regret[name] for name in names]
        figures = [
            f"{outcome.workers:,}", f"{outcome.cells:,}", f"{outcome.trials:,}", f"{outcome.elapsed / 60:.0f} min",
            f"{outcome.busy:.1%}", f"{outcome.whole:.1%}", outcome.lost, outcome.repeated,
            f"{1e3 * outcome.coordinator:.2f}", f"{outcome.memory:.0f}", f"{1e3 * outcome.proposal:.0f}",
            outcome.advisers, f"{outcome.informed:.0%}", f"{sum(regrets) / len(regrets):.2%}", f"{max(regrets):.2%}"]
        rows.append(f"| {' | '.join(map(str, figures))} |")
    return ["| workers | cells | trials | took | busy | with the end | lost | repeated | coordinator, ms per trial | "
            "memory, MiB | proposal, ms | side processes | informed | regret | worst |", "|" + "---|" * 15, *rows]


def section(curve: list[Outcome], single: list[Outcome]) -> str:
    """Both tables, in markdown."""
    return "\n".join([
        "`tomoatlas simulate`: fig4_cocuo on a grid refined to 36 x 48 cells, 80 trials in each; a trial "
        f"takes {MACHINE.median:g} s (lognormal, spread {MACHINE.spread:g}). A node of {MACHINE.per_node} of the "
        f"largest machine's workers fails every {MACHINE.mtbf / 60:g} minutes, where a leadership machine has hours in "
        f"between, those of a smaller one as much more seldom as it has fewer; noticed after {MACHINE.notice:g} s. "
        "Coordinator, journal, optimisers and side processes are real; their seconds, measured here, pass on the "
        "simulated clock.", "",
        "busy: share of the workers' time in trials until the last was handed out; with the end: until the last ended. "
        "informed: trials proposed from 8 results of their cell or more. regret: how far the best of a cell lies above "
        "its least value, mean and worst of the cells that all machines had. Fewer workers have fewer cells, at least "
        "16.", "", *table(curve), "",
        "One single cell of 400 trials, 64 in flight:", "", *table(single)])


def main() -> None:
    """Write the section."""
    lines = Path(sys.argv[1]).read_text().splitlines() if len(sys.argv) > 1 else None
    curve = ([Outcome(**json.loads(line)) for line in lines] if lines
             else simulated(REFINED, CURVE, MACHINE, scale=True))
    rarer = replace(MACHINE, mtbf=MACHINE.mtbf * CURVE[0] / SINGLE[0])
    publish("Scale: a simulated machine", section(curve, simulated(ONE, SINGLE, rarer, scale=False)))


if __name__ == "__main__":
    main()
