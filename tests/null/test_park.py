"""Pages of paused programs in files, and back: over a runner that knows only its pages."""

from __future__ import annotations

import pickle
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.engine.config import EngineConfig, ProgramsConfig
from tandem.engine.layout import WHOLE
from tandem.engine.pages import PagePool
from tandem.engine.park import Parking
from tandem.engine.prefix import PrefixIndex
from tandem.errors import ConfigError, TandemWarning
from tandem.types import WeightVersion
from tests.null.paged_memory import Device, PagedMemory, make
from tests.null.test_programs import Clock, Life, World, lives

ROW = 4096


@dataclass
class Readable(PagedMemory):
    """Its pages as rows of bytes."""

    page_bytes = ROW

    def read_pages(self, pages: list[int]) -> tuple[np.ndarray, list[int]]:
        size = self.config.page_tokens
        rows = np.zeros((len(pages), ROW), dtype=np.uint8)
        for row, page in zip(rows, pages, strict=True):
            held = [self.slots.get(page * size + offset) for offset in range(size)]
            text = pickle.dumps(held)
            row[: len(text)] = np.frombuffer(text, dtype=np.uint8)
        return rows, self.sums(rows)

    @staticmethod
    def sums(rows: np.ndarray) -> list[int]:
        return [hash(row.tobytes()) for row in rows]

    def write_pages(self, pages: list[int], rows: np.ndarray) -> list[int]:
        size = self.config.page_tokens
        for row, page in zip(rows, pages, strict=True):
            try:
                held = pickle.loads(row.tobytes())
            except Exception:  # noqa: BLE001 - a damaged file may be anything
                held = [None] * size
            for offset, slot in enumerate(held):
                self.slots.pop(page * size + offset, None)
                if slot is not None:
                    self.slots[page * size + offset] = slot
        return self.sums(rows)


def world(made: list[Life], num_pages: int, folder: Path, seconds_each: float = 1.0, **more: Any) -> World:
    """Programs that take `seconds_each` a token to compute again, so that parking pays, or does not."""
    asked = {"mode": "enforce", "policy": "thunder", "tick_s": 0.1, "half_life_s": 0.5, "park": str(folder)} | more
    clock = Clock()
    config = ProgramsConfig(**asked)  # type: ignore[arg-type]
    engine, runner = make(num_pages, memory=Readable, programs=config, batch_tokens=32, max_sequences=8)
    engine.clock = clock
    engine.scheduler.programs.reload_s = lambda tokens: seconds_each * max(0, tokens)
    return World(engine, runner, clock, made)


def test_parked_pages_come_back_and_are_not_computed_again(tmp_path: Path) -> None:
    """A paused program that computes its context again though it lies in a file; pages of one in another's place."""
    runs = {}
    for seconds_each in (1.0, 1e-12):
        w = world(lives(6, turns=5, tool_s=0.3, start=60, said=8), 48, tmp_path, seconds_each)
        w.run()
        runs[seconds_each] = w
        parking = w.engine.scheduler.programs.parking
        for one in w.lives:
            w.engine.finish_program(one.name)
        assert parking.bytes == 0 and not list(Path(parking._folder).iterdir())
        w.engine.scheduler.pool.check_idle()
    counts = {each: w.engine.scheduler.programs.parking.counts for each, w in runs.items()}
    assert counts[1e-12]["parked"] == 0
    assert counts[1.0]["unparked"] >= 5 and counts[1.0]["damaged"] == 0
    assert runs[1.0].engine.stats.run_tokens < 0.8 * runs[1e-12].engine.stats.run_tokens


@pytest.mark.parametrize("how", ["gone", "cut", "changed"])
def test_a_damaged_file_is_computed_again(tmp_path: Path, how: str) -> None:
    """Keys and values from a file that was changed, cut off or deleted, in the place of those that were written."""
    w = world(lives(6, turns=5, tool_s=0.3, start=60, said=8), 48, tmp_path)
    parking, struck, rng = w.engine.scheduler.programs.parking, set[Path](), random.Random(0)
    while not w.over:
        w.step()
        for path in set(Path(parking._folder).iterdir()) - struck:
            struck.add(path)
            if how == "gone":
                path.unlink()
            elif how == "cut":
                path.write_bytes(path.read_bytes()[:-7])
            else:
                rows = np.fromfile(path, dtype=np.uint8)
                rows[rng.randrange(40) :: ROW] ^= 1
                rows.tofile(path)
    assert parking.counts["damaged"] > 0


@given(st.integers(0, 2**32))
@settings(max_examples=25, deadline=None)
def test_nothing_leaks_through_files(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    """Pages that are held by nobody or twice, or found under a name of other weights, after programs were parked."""
    rng = random.Random(seed)
    made = [
        Life(f"p{n}", rng.randint(1, 4), rng.choice([0.1, 1.0]), tuple(rng.choices(range(2), k=rng.randint(1, 30))), 6)
        for n in range(rng.randint(2, 9))
    ]
    most = max(len(one.start) + one.turns * (one.said + 3) for one in made)
    pages, most_bytes = most // 4 + 1 + rng.randint(0, 12), rng.choice([0, 10**5, 10**9])
    w = world(made, pages, tmp_path_factory.mktemp("park"), park_bytes=most_bytes)
    w.updates, version = rng.random() < 0.5, 0
    for _ in range(rng.randint(0, 60)):
        w.step()
        act = rng.random()
        if act < 0.06 and w.updates:
            version += 1
            w.engine.receive(WeightVersion(version, f"{version}"))
        elif act < 0.1:
            w.engine.finish_program(rng.choice(made).name)
        elif act < 0.12:
            w.engine.set_programs_mode(rng.choice(["shadow", "enforce"]))  # type: ignore[arg-type]
        w.engine.check_integrity()
        assert w.engine.scheduler.programs.parking.bytes <= 10**9
    w.run()
    for one in made:
        w.engine.finish_program(one.name)
    w.engine.scheduler.pool.check_idle()
    assert w.engine.scheduler.programs.parking.bytes == 0


def test_parking_says_what_is_wrong(tmp_path: Path) -> None:
    """A folder that cannot be written found out in the midst of a run; a disk that fills up and ends it."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="engine.programs.park is .*file.*Choose another folder"):
        world(lives(1), 20, tmp_path / "file")
    with pytest.raises(ConfigError, match='engine.programs.mode is "off"'):
        make(20, memory=Readable, programs=ProgramsConfig(park=str(tmp_path)))
    with pytest.raises(ConfigError, match="pages of this device are not parked"):
        make(20, memory=Device, programs=ProgramsConfig(mode="enforce", park=str(tmp_path)))
    runner = Readable(EngineConfig(page_tokens=4), 4)
    index = PrefixIndex(PagePool(4, 4), WHOLE)
    parking = Parking(str(tmp_path / "new"), 10**6, runner)
    page = index.take()
    assert page is not None and index.insert(b"name", 0, page, prompt=True)
    parking._folder += "/gone"
    with pytest.warns(TandemWarning, match="could not be parked"):
        parking.park("p", index, [page])
    assert "p" not in parking and parking.cost(1, 1.0).free_bytes == 0
