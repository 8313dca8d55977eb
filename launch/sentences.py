"""What a command says to what its user can mend: sentences and an exit status, once even where MPI started it often."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import NoReturn, ParamSpec

import typer

P = ParamSpec("P")
REFUSED = 2  # exit status for what the user can mend
RANKS = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")  # how MPI launchers number their processes


def sentences(command: Callable[P, None]) -> Callable[P, None]:
    """What the user can mend becomes sentences on stderr and exit status 2; the rest keeps its trace."""

    @functools.wraps(command)
    def told(*args: P.args, **kwargs: P.kwargs) -> None:
        from engine.data import DataError
        from sweeps.journal import RunError
        from sweeps.settings import SettingsError

        try:
            command(*args, **kwargs)
        except (SettingsError, DataError, RunError) as error:
            refuse(str(error))

    return told


def refuse(text: str) -> NoReturn:
    """Say a sentence, once even where a launcher started this command many times, and end with status 2."""
    rank = next((os.environ[name] for name in RANKS if name in os.environ), "0")
    if rank == "0":
        print(text, file=sys.stderr, flush=True)
    leave(REFUSED)


def leave(code: int) -> NoReturn:
    """End with an exit status, under MPI in MPI's way."""
    mpi = sys.modules.get("launch.mpi")
    if mpi is not None:
        mpi.leave(code)
    raise typer.Exit(code)
