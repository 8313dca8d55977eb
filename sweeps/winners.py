"""Which trial wins a cell: the one place where search.rule acts.

`best` takes the least objective. `one_standard_error` asks which trials cannot be told from that one: the held-out
deviance of each fold less that of the best trial on the same fold is a paired difference, whose mean is within its
standard error. Of these the most regularised wins, the one with the largest lambda_tv over lambda_chem, among equals
the better: only ratios of weights matter, and total variation is what smooths. Noise in the folds then errs on the
smooth side (L. Breiman et al., Classification and Regression Trees, 1984, for trees).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sweeps.grid import Cell
from sweeps.journal import CellHistory, Row

FOLD = "heldout_fold_"
STRENGTH = {"solver.lambda_tv": 1.0, "solver.lambda_chem": -1.0}  # powers of the weights in what regularises
Entry = Mapping[str, Any]  # objective, metrics and params, of a trial or of a checkpoint of it


def winner(cell: Cell, history: CellHistory) -> Row | None:
    """The trial that wins among the cell's own full ones; None while there is none."""
    best = history.winner(bool(cell.space))
    if best is None or best.objective is None or cell.sweep.search.rule == "best":
        return best
    rows = [row for _, row in sorted(history.rows.items()) if eligible(cell, row)]
    return rows[choose(cell, [{**(row.result or {}), "params": row.ask["params"]} for row in rows])]


def eligible(cell: Cell, row: Row) -> bool:
    """Whether a trial may win: the cell's own, whole, and ended well."""
    return row.ok and row.own(bool(cell.space)) and row.fidelity == 1


def choose(cell: Cell, entries: Sequence[Entry]) -> int:
    """Which of some entries wins by the cell's rule, the first of equals."""
    best = min(range(len(entries)), key=lambda k: rank(entries[k]))
    if cell.sweep.search.rule == "best" or entries[best]["objective"] is None:
        return best
    alike = [k for k in range(len(entries)) if k == best or _alike(entries[k], entries[best])]
    return min(alike, key=lambda k: (-_strength(cell, entries[k]), rank(entries[k]), k))


def rank(entry: Entry) -> float:
    """The objective, infinite where there is none."""
    return math.inf if entry["objective"] is None else entry["objective"]


def _alike(entry: Entry, best: Entry) -> bool:
    """Whether the mean over folds of what an entry is worse than the best is within its standard error."""
    if entry["objective"] is None:
        return False
    names = [name for name in best["metrics"] if name.startswith(FOLD)]
    apart = [entry["metrics"].get(name, math.inf) - best["metrics"][name] for name in names]
    if len(apart) < 2 or not all(map(math.isfinite, apart)):
        return False
    mean = math.fsum(apart) / len(apart)
    variance = math.fsum((each - mean) ** 2 for each in apart) / (len(apart) - 1)
    return mean <= math.sqrt(variance / len(apart))


def _strength(cell: Cell, entry: Entry) -> float:
    """The logarithm of lambda_tv over lambda_chem."""
    solver = cell.sweep.solver
    return math.fsum(power * math.log(entry["params"].get(name, getattr(solver, name.rpartition(".")[2])))
                     for name, power in STRENGTH.items())
