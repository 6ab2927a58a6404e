"""Runs whose rollouts go to several engines: the weights of one, whatever becomes of an engine, and a closed ledger."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tandem.config import override
from tandem.engine.engine import Engine
from tandem.kernels.build.toolchain import compiler
from tandem.run import local
from tandem.run.config import RunConfig
from tandem.types import Completion
from tests.display import Silent
from tests.multi.test_asynchronous import FULL, STEPS, repeated, tiny, trained

__all__ = ["tiny"]
pytestmark = pytest.mark.skipif(compiler() is None, reason="the reference kernels' bits depend on the batch")
TWO = {"engine.replicas": "2", "rollout.max_turns": "2"}
EVALUATED = {"evaluation.prompts": "4", "evaluation.every": "2"}
MODES: dict[str, dict[str, str]] = {"sync": {}, "full": {**FULL, "asynchrony.lag": "0"}}


def ledger(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "ledger.json").read_text())
    return found


def engines(folder: Path) -> dict[str, dict[str, int]]:
    """Their counts, over all rows."""
    sums: dict[str, dict[str, int]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        for name, counts in json.loads(line)["engines"].items():
            for key, count in counts.items():
                sums.setdefault(name, {}).setdefault(key, 0)
                sums[name][key] += count
    return sums


@pytest.mark.parametrize("mode", MODES)
def test_two_engines_learn_what_one_does(tiny: RunConfig, tmp_path: Path, mode: str) -> None:
    """A second engine that draws under other weights or noise, is left out, or that the ledger does not know."""
    config = override(tiny, {**MODES[mode], "rollout.max_turns": "2"})
    plain = trained(config, tmp_path / "one")
    assert trained(override(config, TWO), tmp_path / "two") == plain and len(set(plain)) == STEPS
    counts = engines(tmp_path / "two")
    assert list(counts) == ["engine 1", "engine 2"]
    assert all(count["tokens"] > 0 and count["again"] == 0 for count in counts.values())
    one, two = (ledger(tmp_path / name)["tokens"] for name in ("one", "two"))
    for tokens in (one, two):  # what is in flight as a run ends hangs on time
        tokens["total"] -= tokens.pop("in_flight")
    assert two == one


def fails(patch: pytest.MonkeyPatch, engine: int, step: int) -> None:
    """The engine that is made as the n-th fails in its k-th step."""
    made, steps = list[Engine](), list[Engine]()
    init, plain = Engine.__init__, Engine.step

    def known(this: Engine, *given: Any, **named: Any) -> None:
        made.append(this)
        init(this, *given, **named)

    def stepped(this: Engine) -> list[Completion]:
        steps.append(this)
        if this is made[engine] and steps.count(this) >= step:
            raise RuntimeError("its device fell off the bus")
        return plain(this)

    patch.setattr(Engine, "__init__", known)
    patch.setattr(Engine, "step", stepped)


@pytest.mark.parametrize("engine", [0, 1])
@pytest.mark.parametrize("mode", MODES)
def test_an_engine_that_dies_changes_no_weight(
    tiny: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, engine: int
) -> None:
    """What an engine had when it failed is lost, trained twice, or drawn otherwise by the one that is asked again."""
    config = override(tiny, {**MODES[mode], **EVALUATED, "rollout.max_turns": "2"})
    local.train(config, out=tmp_path / "one", resume=None, display=Silent())
    with monkeypatch.context() as patch:
        fails(patch, engine, 30)
        local.train(override(config, TWO), out=tmp_path / "two", resume=None, display=Silent())
    one, two = (_by_step(tmp_path / name) for name in ("one", "two"))
    assert two == one and len(one) == STEPS + 1
    counts = engines(tmp_path / "two")
    assert counts[f"engine {2 - engine}"]["again"] > 0 and counts[f"engine {1 + engine}"]["requests"] > 0
    closed = ledger(tmp_path / "two")
    assert closed["tokens"]["crashed"] > 0 and closed["audit"]["strange"] == closed["audit"]["lost"] == 0


def test_what_an_engine_does_not_answer_in_time_is_drawn_again(tiny: RunConfig, tmp_path: Path) -> None:
    """A request that two engines answer trained twice, its second answer without a fate, or a run that ends otherwise
    when it is repeated on one."""
    config = override(tiny, {**FULL, **TWO, "engine.answer_s": "0.01"})
    found = trained(config, tmp_path / "late")
    assert sum(count["again"] for count in engines(tmp_path / "late").values()) > 0
    closed = ledger(tmp_path / "late")
    assert closed["tokens"]["crashed"] > 0 and closed["audit"]["strange"] == closed["audit"]["beyond"] == 0
    assert [(one.recorded, one.found) for one in repeated(tmp_path / "late")] == [(one, one) for one in found]


def _by_step(folder: Path) -> dict[int, tuple[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: (row["weights"], row.get("evaluation")) for row in rows}
