"""Files that ship with the command, wherever it is installed, and a check that the imports are ours."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("engine", "sweeps", "launch")


def strangers() -> str:
    """A sentence if `engine`, `sweeps` and `launch` do not lie side by side, else "".

    Their names are short, and other published packages share them: in one environment they mix.
    """
    homes = {name: _home(name) for name in PACKAGES}
    if len(set(homes.values())) == 1:
        return ""
    places = ", ".join(f"{name} in {home or 'no place'}" for name, home in homes.items())
    return (
        f"tomoatlas needs its packages side by side, but Python finds {places}: another package of the same "
        "name is in the way. Install tomoatlas into an environment of its own (python3 -m venv)."
    )


def _home(name: str) -> Path | None:
    spec = find_spec(name)
    return Path(spec.origin).parent.parent if spec and spec.origin else None


def folder(name: str) -> Path:
    """The shipped folder `configs` or `slurm`: inside `launch` in a wheel, beside it in a checkout."""
    here = Path(__file__).resolve().parent
    inside = here / name
    return inside if inside.is_dir() else here.parent / name


def configs() -> dict[str, Path]:
    """The shipped sweeps by name: {"quickstart": .../quickstart.yaml, ...}."""
    return {path.stem: path for path in sorted(folder("configs").glob("*.yaml"))}
