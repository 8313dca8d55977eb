"""Where benchmarks put their results: one section each of docs/BENCHMARKS.md, with the machine named."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from launch import devices

# As a worker of a sweep would be set up; JAX and OpenMP read it when they are first used.
os.environ.update(devices.environment(0, 1, os.environ))

PAGE = Path(__file__).parents[1] / "docs" / "BENCHMARKS.md"
HEAD = "# Benchmarks\n\nWritten by `make bench`; ratios hold within one run.\n"


def machine() -> str:
    """Processor, cores, Python and JAX, in a line."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    found = re.search(r"model name\s*: (.*)", text)
    cpu = found[1] if found else platform.processor()
    widest = "AVX-512" if "avx512f" in text else "AVX2" if "avx2" in text else platform.machine()
    return (f"{cpu} ({widest}), {os.cpu_count()} cores, Python {platform.python_version()}, "
            f"JAX {version('jax')}, scikit-optimize {version('scikit-optimize')}")


def apart(code: str, threads: int, devices_of: int = 1) -> str:
    """What a program prints in a process of its own, with so many threads and JAX devices."""
    given = {k: v for k, v in os.environ.items() if k not in ("NPROC", "OMP_NUM_THREADS", "XLA_FLAGS")}
    env = devices.environment(0, 1, given, threads=threads, share=devices_of)
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout


def publish(title: str, body: str) -> None:
    """Print a section, and put it into the page in the place of its last version."""
    section = f"## {title}\n\n{machine()}\n\n{body.strip()}\n"
    print(section, flush=True)
    text = PAGE.read_text() if PAGE.exists() else HEAD
    pattern = re.compile(rf"## {re.escape(title)}\n.*?(?=\n## |\Z)", re.S)
    text = pattern.sub(lambda _: section, text) if pattern.search(text) else f"{text.rstrip()}\n\n{section}"
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(text)
