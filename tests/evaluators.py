"""Evaluations for tests: quick, without JAX or the engine, and ill in every way a worker can be ill."""

import contextlib
import errno
import functools
import math
import os
import signal
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from sweeps import stages

Message = dict[str, Any]


def each(evaluate: Callable[[Message], Any]) -> Callable[[Message], Any]:
    """An evaluation of one trial as one of a message: the trials one after the other."""

    @functools.wraps(evaluate)
    def evaluated(message: Message) -> Any:
        shared = {"cell": message["cell"], "folder": message["folder"], "batch": len(message["trials"])}
        return [evaluate({**trial, **shared}) for trial in message["trials"]]

    return evaluated


def _landscape(message: Message) -> dict[str, Any]:
    """A smooth valley in log10 of the weights, deeper with more tilts; a few ms, the same anywhere."""
    time.sleep(0.004)
    solver, data = message["settings"]["solver"], message["settings"]["data"]
    x, y = math.log10(solver["lambda_model"]), math.log10(solver["lambda_tv"])
    depth = 1 / (1 + data["chem_tilts"] / 5)
    objective = depth + 0.05 * (x - 0.7) ** 2 + 0.1 * (y + 1.2) ** 2
    if solver["method"] == "ml":
        objective = 2.0
    return {
        "cell": message["cell"], "trial": message["trial"], "attempt": message["attempt"], "status": "ok",
        "objective": objective, "metrics": {"nrmse": objective, "ssim": math.exp(-objective)},
        "elements": {"nrmse": {"Co": objective, "O": 2 * objective}, "scale_error": {"Co": 0.0, "O": 0.1}},
        "checkpoints": [{"iterations": n, "objective": objective + 1 / n - 1 / solver["iterations"],
                         "metrics": {}, "elements": {}}
                        for n in solver["record"]],
        "iterations": solver["iterations"], "seconds": 0.004, "batch": message["batch"], "worker": "", "volume": None,
    }


landscape = each(_landscape)


@each
def with_volume(message: Message) -> dict[str, Any]:
    """The landscape, and a volume that tells its trial."""
    result = _landscape(message)
    name = f"volumes/{message['cell']}-{message['trial']}-{message['attempt']}.zarr"
    group = zarr.open_group(Path(message["folder"]) / name, mode="w", zarr_format=3)
    group.create_array("volume", data=np.full((2, 4, 5, 6), 1 + message["trial"], "f4"), chunks=(1, 4, 5, 6),
                       dimension_names=("element", "z", "y", "x"))
    group.attrs.update({"elements": ["Co", "O"], "voxel_nm": 2.5, "status": "ok"})
    return {**result, "volume": name}


@each
def with_noise(message: Message) -> dict[str, Any]:
    """The landscape, and a volume of noise that follows from the trial, as large as data.size says."""
    result, size = _landscape(message), message["settings"]["data"]["size"]
    name = f"volumes/{message['cell']}-{message['trial']}-{message['attempt']}.zarr"
    chance = np.random.default_rng(zlib.crc32(name.encode()))
    volume = np.maximum(0, chance.normal(1, 1, (2, size // 2, size, 2 * size))).astype("f4")
    group = zarr.open_group(Path(message["folder"]) / name, mode="w", zarr_format=3)
    group.create_array("volume", data=volume, chunks=(1, 4, *volume.shape[2:]), dimension_names=("element", *"zyx"))
    group.attrs.update({"elements": ["Co", "O"], "voxel_nm": 2.5, "status": "ok"})
    return {**result, "volume": name}


@each
def flattering(message: Message) -> dict[str, Any]:
    """The landscape, but the fewer the iterations the better it looks."""
    result = _landscape(message)
    return {**result, "objective": result["objective"] + result["iterations"]}


@each
def deadly(message: Message) -> dict[str, Any]:
    """Trial 4 kills its worker, and with it what is solved beside it."""
    if message["trial"] == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return _landscape(message)


@each
def fated(message: Message) -> dict[str, Any]:
    """The first trial 3 of the run kills its worker, and writes down when."""
    time.sleep(0.2)
    if message["trial"] == 3:
        with contextlib.suppress(FileExistsError), Path(message["folder"], "killed").open("x") as file:
            file.write(f"{message['cell']} {time.time()}")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    return _landscape(message)


@each
def paced(message: Message) -> dict[str, Any]:
    """The landscape, slow enough to be killed in; while there is a file `hold` beside the run folder, of trials that it
    names alone."""
    time.sleep(0.03)
    hold, name = Path(message["folder"]).with_name("hold"), f"{message['cell']}-{message['trial']}"
    while hold.exists():
        with contextlib.suppress(FileNotFoundError):
            if name in hold.read_text().split():
                break
        time.sleep(0.01)
    return _landscape(message)


def _slow(message: Message) -> dict[str, Any]:
    """The landscape after half a second."""
    time.sleep(0.5)
    return _landscape(message)


slow = each(_slow)


@each
def gated(message: Message) -> dict[str, Any]:
    """The landscape, but trials from number 3 on wait until the run folder's file `go` has a number above theirs."""
    gate = Path(message["folder"], "go")
    while message["trial"] >= (int(gate.read_text() or 0) if gate.exists() else 3):
        time.sleep(0.05)
    return _landscape(message)


@each
def ill(message: Message) -> dict[str, Any]:
    """Trials 1 to 5 are ill in a way of their own; all print to where results go."""
    trial, attempt = message["trial"], message["attempt"]
    print('{"event": "result"} is not for the coordinator')
    os.write(1, b"\x00\xff neither is this\n")
    if trial == 1:
        return {**_landscape(message), "status": "the cost rose; lower lambda_tv", "objective": None}
    if trial == 2:
        raise ValueError("lambda_tv\nis too much")
    if trial == 3 and attempt < 2:
        os._exit(9)  # comes back
    if trial == 4:
        os.kill(os.getpid(), signal.SIGKILL)  # never comes back
    if trial == 5:
        return {**_landscape(message), "objective": math.nan, "metrics": {"nrmse": np.float32("inf")}}
    return _landscape(message)


def odd(message: Message) -> Any:
    """No result at all."""
    return {1, 2} if message["trials"][0]["trial"] == 1 else landscape(message)


@each
def stuck(message: Message) -> dict[str, Any]:
    """All but the first trial of a cell last a minute."""
    time.sleep(60 if message["trial"] else 0)
    return _landscape(message)


@each
def full(message: Message) -> dict[str, Any]:
    """The disk is full when trial 1 writes its volume."""
    if message["trial"] == 1:
        raise OSError(errno.ENOSPC, "No space left on device", f"{message['folder']}/volumes/all-1-0.zarr")
    return _landscape(message)


@each
def mortal(message: Message) -> dict[str, Any]:
    """Trial 3 kills its worker at the first attempt."""
    if message["trial"] == 3 and message["attempt"] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return _landscape(message)


@each
def process(message: Message) -> dict[str, Any]:
    """What process this is, how its signals are, and what it was given before JAX would be imported."""
    names = ("JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS", "NPROC", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
    ignored = [signal.getsignal(number) == signal.SIG_IGN for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    return {"status": "ok", "pid": os.getpid(), "ignored": all(ignored), "env": {name: os.environ.get(name)
                                                                                for name in names}}


@each
def frozen(message: Message) -> dict[str, Any]:
    """A worker that neither lives nor dies in trial 1."""
    if message["trial"] == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    return _landscape(message)


@each
def timed(message: Message) -> dict[str, Any]:
    """The landscape after 0.3 s, which it admits."""
    time.sleep(0.3)
    return {**_landscape(message), "seconds": 0.3}


@each
def slow_or_quick(message: Message) -> dict[str, Any]:
    """Odd trials are slow."""
    return _slow(message) if message["trial"] % 2 else _landscape(message)


@each
def echo(message: Message) -> dict[str, Any]:
    """The trial, as a result."""
    return {**message, "status": "ok", "objective": 0.0}


@each
def surroundings(message: Message) -> dict[str, Any]:
    """What the worker's environment says about devices."""
    return {"status": "ok", "objective": 0.0, "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
            "flags": os.environ["XLA_FLAGS"], "pool": os.environ["NPROC"]}


@each
def varied(message: Message) -> dict[str, Any]:
    """The landscape after half a second to two, without work for a processor; the same for a trial wherever it runs."""
    seconds = np.random.default_rng([zlib.crc32(message["cell"].encode()), message["trial"]]).uniform(0.5, 2.0)
    time.sleep(seconds)
    return {**_landscape(message), "seconds": seconds}


def shared(message: Message) -> Any:
    """Trials of eight stages, and how many of them this worker has made, the first when help has come; or helps."""
    trial, = message["trials"]
    made: list[int] = []
    come, late = Path(message["folder"]) / f"come-{trial['trial']}", time.monotonic() + 60

    def make(k: int) -> dict[str, np.ndarray]:
        if message.get("help"):
            come.touch()
        while not come.exists() and time.monotonic() < late:
            time.sleep(0.01)
        time.sleep(0.02)
        made.append(k)
        return {"made": np.array(k)}

    inputs = [{"trial": trial["trial"], "tilt": k} for k in range(8)]
    stages.together(Path(message["folder"]), "tilt", inputs, make)
    result = {"status": "ok", "seconds": 0.02 * len(made)}
    if message.get("help"):
        return [result]
    return [result | {"objective": 1.0 / (1 + trial["trial"]), "metrics": {"share": len(made)}, "elements": {},
                      "checkpoints": [], "iterations": 1, "batch": 1, "worker": "", "volume": None}]


@each
def folded(message: Message) -> dict[str, Any]:
    """The landscape as a held-out deviance, with folds whose scatter hides small differences."""
    result = _landscape(message)
    noise = np.random.default_rng(message["trial"]).normal(0, 0.2, 4)
    folds = (result["objective"] + noise - noise.mean()).tolist()
    known = {f"heldout_fold_{k}": value for k, value in enumerate(folds)}
    return {**result, "metrics": {"heldout": result["objective"], **known}}
