"""A real Slurm in a folder of its own, for tests: a node with 8 cores and 4 GPUs that are not there, and a second one.

`python -m tests.slurmd` says in a sentence what is missing, and installs it where root has apt-get.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("slurm-wlm", "munge", "slurm-wlm-basic-plugins", "libpmi2-0", "libpmix2")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "srun", "scontrol")
CONF = """\
ClusterName=tomoatlas
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmdPort={first}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={here}/munge/sock
CryptoType=crypto/munge
StateSaveLocation={here}/state
SlurmdSpoolDir={here}/spool.%n
SlurmctldPidFile={here}/slurmctld.pid
SlurmdPidFile={here}/slurmd.%n.pid
SlurmctldLogFile={here}/slurmctld.log
SlurmdLogFile={here}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,requeue_setup_env_fail
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=5
OverTimeLimit=0
JobRequeue=1
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=first Port={first} NodeHostname={host} NodeAddr=127.0.0.1 CPUs=8 Sockets=1 CoresPerSocket=8 \
ThreadsPerCore=1 RealMemory=8000 Gres=gpu:4 State=UNKNOWN
NodeName=second Port={second} NodeHostname={host} NodeAddr=127.0.0.1 CPUs=8 Sockets=1 CoresPerSocket=8 \
ThreadsPerCore=1 RealMemory=8000 Gres=gpu:4 State=UNKNOWN
PartitionName=batch Nodes=first Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
PartitionName=pair Nodes=first,second MaxTime=INFINITE State=UP OverSubscribe=NO
# Nodes shaped as those of the shipped sites, for sbatch --test-only. Nobody starts them; on this port the first node's
# daemon answers, so that Slurm does not take them for dead.
NodeName=generic[1-2] NodeAddr=127.0.0.2 CPUs=32 State=UNKNOWN
NodeName=perlmutter[1-2] NodeAddr=127.0.0.2 CPUs=128 Sockets=1 CoresPerSocket=64 ThreadsPerCore=2 Gres=gpu:4 \
Feature=gpu State=UNKNOWN
NodeName=frontier[1-2] NodeAddr=127.0.0.2 CPUs=64 Sockets=1 CoresPerSocket=64 ThreadsPerCore=1 CoreSpecCount=8 \
Gres=gpu:8 Feature=nvme State=UNKNOWN
NodeName=volta[1-2] NodeAddr=127.0.0.2 CPUs=40 Sockets=2 CoresPerSocket=20 ThreadsPerCore=1 Gres=gpu:4 State=UNKNOWN
PartitionName=generic Nodes=generic[1-2] State=UP
PartitionName=perlmutter Nodes=perlmutter[1-2] State=UP
PartitionName=frontier Nodes=frontier[1-2] State=UP
PartitionName=v100 Nodes=volta[1-2] State=UP
"""


def missing() -> str:
    """Why there can be no Slurm here, in a sentence; "" where there can."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    absent = [name for name in PROGRAMS if not shutil.which(name, path=path)]
    if os.geteuid() != 0:
        return "a Slurm of one's own needs root: as root, make test-slurm installs and starts one"
    if absent:
        return f"{', '.join(absent)} are not installed: apt-get install {' '.join(PACKAGES)}"
    return ""


def install() -> None:
    """With apt-get, where the programs are missing and root may."""
    if missing() and os.geteuid() == 0 and shutil.which("apt-get"):
        env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for words in (["update", "-qq"], ["install", "-qq", "-y", "--no-install-recommends", *PACKAGES]):
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run(["apt-get", *words], env=env, check=False, stdout=subprocess.DEVNULL, timeout=300)


def broken() -> str:
    """Why the daemons do not start here or run no job, in a sentence; "" where they do (containers may forbid it)."""
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        Path(folder).chmod(0o755)
        try:
            with slurm(Path(folder) / "private") as env:
                return "" if told(env, "srun", "--mpi=none", "echo", "here") == "here" else "srun runs nothing here"
        except (OSError, subprocess.SubprocessError, TimeoutError) as error:
            return f"Slurm's daemons do not start here: {error}"


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def configure(here: Path) -> Path:
    """Write keys, devices and configuration below `here`; the path of slurm.conf."""
    host = socket.gethostname().partition(".")[0]
    for name in ("munge", "state", "spool.first", "spool.second"):
        (here / name).mkdir(parents=True)
    (here / "munge").chmod(0o711)
    key = here / "munge" / "key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    for number in range(4):
        os.mknod(here / f"gpu{number}", 0o020666, os.makedev(1, 3))
    conf = here / "slurm.conf"
    conf.write_text(CONF.format(host=host, here=here, port=free_port(), first=free_port(), second=free_port()))
    (here / "gres.conf").write_text(f"NodeName=first,second Name=gpu File={here}/gpu[0-3]\n")
    (here / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
    return conf


@contextlib.contextmanager
def slurm(here: Path) -> Iterator[dict[str, str]]:
    """The daemons run while inside; yields the environment for sbatch and its like."""
    conf = configure(here)
    env = {**os.environ, "SLURM_CONF": str(conf), "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"}
    munge = here / "munge"
    munged = ["munged", "--force", f"--key-file={munge}/key", f"--socket={munge}/sock", f"--pid-file={munge}/pid",
              f"--log-file={munge}/log", f"--seed-file={munge}/seed"]
    nodes = [["slurmd", "-f", str(conf), "-N", name] for name in ("first", "second")]
    try:
        for words in (munged, ["slurmctld", "-c", "-f", str(conf)], *nodes):
            subprocess.run(words, env=env, check=True, capture_output=True, timeout=30)
        until(lambda: set(told(env, "sinfo", "--noheader", "--format=%t").split()) == {"idle"}, 60)
        yield env
    finally:
        subprocess.run(["scancel", f"--user={os.getuid()}"], env=env, check=False, capture_output=True, timeout=30)
        with contextlib.suppress(TimeoutError):
            until(lambda: not told(env, "squeue", "--noheader"), 20)
        for pid in (*here.glob("slurmd.*.pid"), here / "slurmctld.pid", munge / "pid"):
            stop(pid)


def stop(record: Path) -> None:
    """End the daemon whose id is written there, and wait for it."""
    with contextlib.suppress(OSError, ValueError):
        pid = int(record.read_text())
        os.kill(pid, signal.SIGTERM)
        for _ in range(100):
            os.kill(pid, 0)
            time.sleep(0.05)
        os.kill(pid, signal.SIGKILL)


def told(env: dict[str, str], *words: str) -> str:
    """What a program of Slurm's prints."""
    return subprocess.run(words, env=env, capture_output=True, text=True, check=False, timeout=30).stdout.strip()


def until(met, seconds: float):
    """Wait for a condition; what it gave. TimeoutError."""
    deadline = time.monotonic() + seconds
    while not (given := met()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:.0f} s")
        time.sleep(0.1)
    return given


if __name__ == "__main__":
    install()
    reason = missing() or broken()
    print(f"SKIP: {reason}" if reason else "Slurm is installed")
    sys.exit(3 if reason else 0)
