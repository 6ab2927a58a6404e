"""A study that runs nothing but a simulation: exact, the same on any machine, and so written anew whenever it is asked
for. Its file is studies/NAME/simulation.py, with a function simulation() that returns a Simulation."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tandem.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Found = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Simulation:
    """run: what is found, as JSON has it. page: of that, in Markdown. draw: its picture."""

    name: str
    question: str
    run: Callable[[], Found]
    page: Callable[[Found], str]
    draw: Callable[[Found], Figure]

    def write(self, folder: Path) -> Found:
        """result.json, README.md and figure.png of what is found."""
        from tandem.study.figure import compact
        from tandem.study.result import dumps

        found = dict(self.run())
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "result.json").write_text(dumps(found), encoding="utf-8")
        (folder / "README.md").write_text(self.page(found), encoding="utf-8")
        (folder / "figure.png").write_bytes(compact(lambda: self.draw(found)))
        return found


def simulations(folder: Path) -> dict[str, Path]:
    """Name -> its file, of a folder of studies."""
    return {path.parent.name: path for path in sorted(folder.glob("*/simulation.py"))}


def read(path: Path) -> Simulation:
    """ConfigError where the file has none."""
    spec = importlib.util.spec_from_file_location(f"tandem_simulation_{path.parent.name}", path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.simulation() if hasattr(module, "simulation") else None
    if not isinstance(made, Simulation):
        raise ConfigError(f"{path} has no simulation: write a function simulation() that returns a Simulation.")
    return made
