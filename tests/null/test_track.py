"""Regressions in trackers: a row that is lost or changed on its way, or a tracker that a run has to wait for."""

from __future__ import annotations

import json
import math
import sqlite3
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem import env
from tandem.cli.main import main
from tandem.config import override
from tandem.errors import ConfigError
from tandem.models.config import ModelConfig
from tandem.report import track
from tandem.report.track import Tracked, flat
from tandem.run.config import RunConfig
from tandem.study.runs import Quiet

ROWS = [
    {"step": 0, "evaluation": {"accuracy": 0.25, "prompts": 8}, "weights": "ab"},
    {"step": 1, "reward": 0.5, "kl": float("nan"), "seconds": {"rollout": 2.0, "learner": 1}, "failures": ["x"]},
    {"step": 2, "reward": None, "kl": float("inf"), "seconds": {"rollout": 3.0}, "tokens": 3_000_000_000},
]
SENT = {
    "evaluation/accuracy": {0: 0.25}, "evaluation/prompts": {0: 8.0}, "reward": {1: 0.5}, "seconds/learner": {1: 1.0},
    "seconds/rollout": {1: 2.0, 2: 3.0}, "tokens": {2: 3e9},
}  # fmt: skip

FAKE = """
import json, os, signal, sys, time
class Run:
    def log(self, values, step): print(json.dumps([step, values]), flush=True)
def init(project, name, config, resume, **rest):
    print(json.dumps([project, name, config, resume]), flush=True)
    %s
    return Run()
def finish():
    %s
"""


def tracked(notes: list[str], folder: Path, sinks: tuple[str, ...] = ("trackio",), title: str = "") -> Tracked:
    return Tracked(Quiet(notes.append), sinks, folder, "sums", title, {"learner.lr": "1e-05"})


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a trackio of our own in place, which does something when a run begins and when it ends."""

    def write(beginning: str = "pass", end: str = "pass") -> Path:
        (tmp_path / "own").mkdir()
        (tmp_path / "own/trackio.py").write_text(FAKE % (beginning, end))
        monkeypatch.syspath_prepend(str(tmp_path / "own"))
        folder = tmp_path / "run"
        folder.mkdir()
        return folder

    return write


def test_every_number_of_a_row_is_sent(fake, capsys) -> None:
    """A nested figure lost, NaN sent as a number or a text, or a resumed run that goes on as another one."""
    folder, notes = fake(), []
    for part in (ROWS[:2], ROWS[2:]):
        with tracked(notes, folder) as display:
            for row in part:
                display.update(row)
    said = [json.loads(line) for line in (folder / "track-trackio.log").read_text().splitlines()]
    begun = [line for line in said if len(line) == 4]
    assert begun[0] == begun[1] and begun[0][0] == "sums" and begun[0][2] == {"learner.lr": "1e-05"}
    assert begun[0][1].startswith("run-") and begun[0][3] == "allow"
    seen: dict[str, dict[int, float]] = {}
    for step, values in (line for line in said if len(line) == 2):
        for name, value in values.items():
            seen.setdefault(name, {})[step] = value
    assert seen == SENT and notes == [] and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("beginning", "end", "why"),
    [
        ("raise ValueError('no disk left')", "pass", "ValueError: no disk left"),
        ("sys.exit(3)", "pass", '"allow"]'),
        ("os.kill(os.getpid(), signal.SIGKILL)", "pass", '"allow"]'),
        ("signal.pthread_sigmask(signal.SIG_BLOCK, {15}); time.sleep(600)", "pass", "did not finish within 1 s"),
        ("pass", "time.sleep(600)", "did not finish within 1 s"),
        ("pass", "raise OSError('gone')", "OSError: gone"),
    ],
)
def test_a_tracker_that_fails_costs_only_itself(fake, monkeypatch, capsys, beginning: str, end: str, why: str) -> None:
    """A tracker that raises, hangs or dies, at its start or at its end, that ends a run or goes unsaid."""
    monkeypatch.setattr(track, "FINISH_S", 1.0)
    folder, notes = fake(beginning, end), []
    quiet = Quiet(notes.append)
    with Tracked(quiet, ("trackio",), folder, "sums", "", {}) as display:
        (sink,) = display._sinks
        display.update(ROWS[0])
        until_s = time.monotonic() + 20
        while "raise V" in beginning and sink._popen.poll() is None and time.monotonic() < until_s:
            time.sleep(0.01)
        for row in ROWS[1:]:
            display.update(row)
    assert quiet.rows == ROWS
    error = capsys.readouterr().err
    assert "tracking by trackio is incomplete: " in error and why in error and len(notes) <= 1
    assert not notes or (notes[0].startswith("tracking by trackio ended: ") and why in notes[0])
    assert sink._popen.returncode is not None


def test_rows_never_wait_for_a_tracker(fake, monkeypatch, capsys) -> None:
    """A step that waits until a full pipe is read, or rows that fill the memory while none is."""
    monkeypatch.setattr(track, "FINISH_S", 0.1)
    monkeypatch.setattr(track, "PENDING_BYTES", 1 << 20)
    folder, notes = fake("time.sleep(600)"), []
    wide = {"step": 1, **{f"figure {number}": float(number) for number in range(10_000)}}
    with tracked(notes, folder) as display:
        for _ in range(20):
            display.update(wide)
    assert notes == ["tracking by trackio ended: it takes no more rows"] and len(display._sinks[0]._pending) == 0


def test_a_tracker_that_is_not_installed(monkeypatch, capsys) -> None:
    """A missing package found after the model has loaded, or a name that no tracker has taken for one."""
    monkeypatch.setattr(track, "find_spec", lambda name: None)
    assert main(["train", "smollm2_arithmetic_cpu", "--set", "track.to=wandb,trackio"]) == 2
    assert "track.to names wandb, trackio, not installed here. pip install wandb trackio" in capsys.readouterr().err
    config = RunConfig("a", 1, ModelConfig("m"))
    for to, said in (
        ("mlflow", "track.to=mlflow.*'tensorboard', 'trackio', 'wandb'"),
        ("wandb,wandb", "names one twice"),
    ):
        with pytest.raises(ConfigError, match=said):
            override(config, {"track.to": to})


def test_wandb_is_offline_unless_asked(monkeypatch) -> None:
    """A run that waits for the network, or one that the user asked to be online and is not."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert env.tracking()["WANDB_MODE"] == "offline"
    monkeypatch.setenv("WANDB_MODE", "online")
    assert env.tracking()["WANDB_MODE"] == "online"


@given(st.recursive(st.floats() | st.integers(-(2**60), 2**60) | st.booleans() | st.text() | st.none(),
                    lambda inner: st.lists(inner) | st.dictionaries(st.text("abc", min_size=1), inner)))  # fmt: skip
def test_only_finite_numbers_are_sent(value: Any) -> None:
    """What a tracker cannot draw, or a JSON reader cannot read."""
    assert all(type(number) is float and math.isfinite(number) for number in flat({"x": value}).values())
    assert flat({"done": True, "late": {"x": False}}) == {}


def test_tensorboard_reads_the_rows(tmp_path: Path) -> None:
    """Rows that TensorBoard does not read, or steps that a resumed run did again shown twice."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install 'tandem-rl[track]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    notes: list[str] = []
    for rows in (ROWS, [{"step": 2, "reward": 0.75}]):
        with tracked(notes, tmp_path, ("tensorboard",)) as display:
            for row in rows:
                display.update(row)
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    found = {tag: {event.step: event.value for event in read.Scalars(tag)} for tag in read.Tags()["scalars"]}
    assert found["reward"] == {1: 0.5, 2: 0.75} and found["seconds/rollout"] == {1: 2.0}
    assert found["evaluation/accuracy"] == {0: 0.25} and notes == []


def test_trackio_keeps_the_rows(tmp_path: Path, monkeypatch) -> None:
    """NaN kept as a text among numbers, or a resumed run as a second one."""
    pytest.importorskip("trackio", reason="trackio is not installed: pip install 'tandem-rl[track]'")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "kept"))
    notes: list[str] = []
    for rows in (ROWS[:2], ROWS[2:]):
        with tracked(notes, tmp_path) as display:
            for row in rows:
                display.update(row)
    with sqlite3.connect(tmp_path / "kept" / "sums.db") as kept:
        rows = kept.execute("select run_name, step, metrics from metrics order by step").fetchall()
    assert len({name for name, _, _ in rows}) == 1 and notes == []
    found: dict[str, dict[int, float]] = {}
    for _, step, text in rows:
        for name, value in json.loads(text).items():
            found.setdefault(name, {})[step] = value
    assert found == SENT


def records(content: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: seven bytes, then LevelDB's log of blocks of 32 KiB."""
    place, whole = 7, b""
    while place + 7 <= len(content):
        if (left := (1 << 15) - place % (1 << 15)) < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield whole
            whole = b""


def test_wandb_keeps_the_rows(tmp_path: Path, monkeypatch) -> None:
    """A run that W&B cannot sync later, or a resumed run under another id."""
    pytest.importorskip("wandb", reason="wandb is not installed: pip install 'tandem-rl[track]'")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.delenv("WANDB_MODE", raising=False)
    notes: list[str] = []
    for rows in (ROWS[:2], ROWS[2:]):
        with tracked(notes, tmp_path, ("wandb",)) as display:
            for row in rows:
                display.update(row)
    found: dict[str, dict[int, float]] = {}
    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len({file.name for file in files}) == 1 and notes == []
    for file in files:
        for content in records(file.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(content)
            values = {
                each.key or "/".join(each.nested_key): json.loads(each.value_json) for each in record.history.item
            }
            for name, value in values.items():
                if not name.startswith("_") and name != "step":
                    found.setdefault(name, {})[values["step"]] = value
    assert found == SENT
