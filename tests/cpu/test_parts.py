"""What a resumed run goes on from: the state of each part, by its name, and its prompts."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tandem.algo.price import Lagrangian, PriceConfig
from tandem.errors import CheckpointError
from tandem.run.clock import WallClock
from tandem.run.ledger import Ledger
from tandem.run.stream import PromptStream
from tandem.train import checkpoint
from tandem.train.checkpoint import Part, restore_parts

TASK: Any = SimpleNamespace(batch=lambda start, count: list(range(start, start + count)))


def make_parts() -> dict[str, Part]:
    price = Lagrangian(PriceConfig("tokens", budget=4.0))
    return {"prompts": PromptStream(TASK), "ledger": Ledger(), "clock": WallClock(), "price": price}


def test_prompts_that_no_update_has_seen_come_again() -> None:
    """A resume that skips the prompts of a step that failed, or a cursor that is a function of the step."""
    stream = PromptStream(TASK)
    assert stream.take(3) == [0, 1, 2]
    stream.settle()
    assert stream.take(2) == [3, 4] and stream.take(1) == [5]  # drawn again in place of two
    resumed = PromptStream(TASK)
    resumed.restore(json.loads(json.dumps(stream.state())))
    assert resumed.take(4) == [3, 4, 5, 6] and stream.take(1) == [6]
    stream.settle()
    resumed.restore(stream.state())
    assert resumed.take(1) == [7]


@pytest.mark.parametrize(("lacks", "has"), [("price", None), (None, "replay"), ("prompts", "stream")])
def test_a_part_that_is_not_there_is_named(tmp_path: Path, lacks: str | None, has: str | None) -> None:
    """A checkpoint of another version half taken over: a part begins anew, or its state is dropped without a word."""
    parts = make_parts()
    states = {name: part.state() for name, part in parts.items()}
    states["prompts"] = {"cursor": 9}
    states.pop(lacks or "", None)
    states |= {has: {}} if has else {}
    with pytest.raises(
        CheckpointError, match=f"lacks the state of {lacks or 'nothing'} and has that of {has or 'nothing'} "
    ):
        restore_parts(parts, states, tmp_path)
    assert parts["prompts"].state() == {"cursor": 0}


def test_a_part_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """A KeyError in place of the part's name and of what to do."""
    parts = make_parts()
    states = {name: part.state() for name, part in parts.items()} | {"clock": {}}
    with pytest.raises(CheckpointError, match="the state of clock in .* cannot be read: KeyError"):
        restore_parts(parts, states, tmp_path)


def test_a_checkpoint_before_named_parts_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run saved by the version before is refused, or goes on with its first prompts and without its ledger."""
    tokens, nanoseconds = {"trained": 7}, {"main": {"rollout": 5}}
    ledger = {"ledger": {"tokens": tokens, "nanoseconds": nanoseconds}, "wall_s": 12.5, "price": 0.25}
    saved = {"step": 3, "cursor": 48, "seed": 0, "updates": 6, "weights": "9f2c", "ledger": ledger}
    (tmp_path / "state.json").write_text(json.dumps(saved))
    monkeypatch.setattr(checkpoint, "verify", lambda directory: None)
    loaded: list[int] = []
    policy: Any = SimpleNamespace(load=lambda tensors, updates: loaded.append(updates))
    decoder: Any = SimpleNamespace(adapter=None)
    state, parts = checkpoint.load(tmp_path, decoder, {"optimiser": policy}), make_parts()
    restore_parts(parts, state.parts, tmp_path)
    assert (state.step, state.weights, loaded) == (3, "9f2c", [6])
    assert parts["prompts"].state() == {"cursor": 48} and parts["price"].state() == {"price": 0.25}
    assert parts["clock"].state()["wall_s"] >= 12.5
    assert parts["ledger"].state()["tokens"]["trained"] == 7
    assert parts["ledger"].state()["nanoseconds"] == {"main": {"host": 5}}  # the engine and what is around it
    (tmp_path / "state.json").write_text(json.dumps(saved | {"ledger": None}))
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.load(tmp_path, decoder, {"optimiser": policy})
