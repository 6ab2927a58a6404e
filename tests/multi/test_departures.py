"""Departures that do not compose, or are measured on the wrong line of the error budget.

The table in docs/parity.md is written by `pytest tests/multi/test_departures.py --write-docs`.
"""

from __future__ import annotations

import itertools
import json
import math
import textwrap
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from tandem.config import override
from tandem.engine.config import EngineConfig
from tandem.errors import AlarmError, ConfigError
from tandem.kernels.build.toolchain import compiler
from tandem.models.config import ModelConfig
from tandem.program.config import TaskConfig
from tandem.program.pool import RunningEpisode
from tandem.rollout.config import RolloutConfig
from tandem.run import local
from tandem.run.config import EvaluationConfig, RunConfig, check_training
from tandem.train.config import LearnerConfig
from tests.display import Silent
from tests.samples import ended
from tests.tables import check_table

STEPS = 3
DEPARTURES: dict[str, dict[str, str]] = {
    "int4 weights": {"engine.weights": "int4", "engine.weight_group": "16"},
    "engine float32": {"engine.dtype": "float32"},
    "fp8 KV": {"engine.kv_dtype": "float8_e4m3"},
    "int8 KV": {"engine.kv_dtype": "int8"},
    "KV window": {"engine.kv_window": "4", "engine.kv_sinks": "1"},
    "noise": {"engine.noise": "0.1"},
    "library": {"model.kernels": "library"},
    "lag": {"sync.lag": "1"},
    "top-p": {"rollout.top_p": "0.8"},
    "min-p": {"rollout.min_p": "0.2"},
}
MISMATCH = {"int4 weights", "engine float32", "fp8 KV", "int8 KV", "KV window", "noise"}  # the library may have none
REFUSED: dict[str, dict[str, str]] = {
    "greedy rollouts": {"rollout.temperature": "0"},
    "a correction weight in the bypass form": {"algo.correction.weight": "token_tis"},
    "an alarm that corrects, with nothing to correct by": {
        "alarms.action": "correct",
        "algo.correction.form": "decoupled",
    },
    "a KV window on a model with a sliding window": {"engine.kv_window": "8"},
}
EITHER = {"fp8 KV", "int8 KV"}  # values of one setting
PAIRS = [names for names in itertools.combinations(DEPARTURES, 2) if set(names) != EITHER]
PAIRS += [tuple(name for name in DEPARTURES if name != other) for other in sorted(EITHER)]
pytestmark = pytest.mark.skipif(compiler() is None, reason="without a compiler every run departs")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., None]) -> RunConfig:
    folder = tmp_path_factory.mktemp("departures")
    write_model(folder / "model", scale=10)
    sums = [{"question": f"{a}+{b}=", "answer": str(a + b)} for a in range(6) for b in range(6)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums))
    return RunConfig(
        name="tiny",
        steps=STEPS,
        model=ModelConfig(str(folder / "model")),
        task=TaskConfig("jsonl", path=str(folder / "sums.jsonl"), reward="last_number", heldout_size=8),
        rollout=RolloutConfig(prompts_per_step=3, samples_per_prompt=4, max_new_tokens=12),
        engine=EngineConfig(kv_memory_bytes=4 << 20),
        learner=LearnerConfig(lr=3e-3),
        evaluation=EvaluationConfig(prompts=0),
    )


def last_row(config: RunConfig, out: Path, resume: bool = False) -> dict[str, Any]:
    """The last row of a short run whose rewards differ within its groups."""

    def graded(self: RunningEpisode, unheard: int = 0) -> Future[float]:
        return ended(float(sum(map(ord, self.said[-1].content)) % 11))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunningEpisode, "score", graded)
        folders = {"out": None, "resume": out} if resume else {"out": out, "resume": None}
        code, folder = local.train(config, **folders, display=Silent())
    assert code == 0
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])


@pytest.mark.parametrize(
    "names", [(), *((name,) for name in DEPARTURES), *PAIRS], ids=lambda names: " + ".join(names) or "exact"
)
def test_departures_compose(config, names, tmp_path):
    """Two departures that cannot run together; one that lights another's line of the error budget, or none."""
    settings: dict[str, str] = {}
    for name in names:
        settings |= DEPARTURES[name]
    row = last_row(override(config, settings), tmp_path / "run")
    budget = row["error_budget"]
    assert all(math.isfinite(value) for value in budget.values()), budget
    assert (budget["staleness"] > 0) is ("lag" in names), budget
    if "library" not in names:
        assert (budget["mismatch"] > 0) is bool(set(names) & MISMATCH), budget
    assert (budget["sampling"] > 0) is bool({"top-p", "min-p"} & set(names)), budget
    assert budget["masking"] == 0 and row["trained_tokens"] > 0 and math.isfinite(row["grad_norm"])


LAGGING = {"sync.lag": "1", "alarms.k3": "0", "alarms.rare_share": "none"}


def weights(folder: Path) -> list[str]:
    return [json.loads(line)["weights"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_an_alarm_stops_before_the_update_and_the_run_goes_on(config, tmp_path):
    """A stop that loses the steps before it, moves the weights first, or cannot be resumed with another threshold."""
    with pytest.raises(
        AlarmError, match=r"^step 2: .*k3 \S+ > 0; most of it in sums/train/.*trajectories are kept in "
    ):
        last_row(override(config, {**LAGGING, "alarms.action": "stop"}), tmp_path / "stopped")
    assert (tmp_path / "stopped" / "trajectories" / "step-2.jsonl").is_file()
    row = last_row(override(config, LAGGING), tmp_path / "warned")
    assert "k3" in [alarm.split()[0] for alarm in row["alarms"]]
    resumed = last_row(override(config, LAGGING), tmp_path / "stopped", resume=True)
    assert resumed["step"] == STEPS and weights(tmp_path / "stopped") == weights(tmp_path / "warned")


def test_an_alarm_turns_the_correction_on(config, tmp_path):
    """A correction that is on before any alarm, stays off after one, or leaves the gradients of both passes."""
    settings = {"alarms.action": "correct", "algo.correction.form": "decoupled", "algo.correction.weight": "token_tis"}
    last_row(override(config, {**LAGGING, **settings}), tmp_path / "held")
    rows = [json.loads(line) for line in (tmp_path / "held" / "metrics.jsonl").read_text().splitlines()]
    assert [row["corrected"] for row in rows] == [0.0, *[1.0] * (STEPS - 1)]
    last_row(override(config, {**LAGGING, **settings, "alarms.action": "warn"}), tmp_path / "always")
    assert weights(tmp_path / "held") == weights(tmp_path / "always")


@pytest.fixture(scope="module")
def refusals(config, tmp_path_factory) -> Mapping[str, str]:
    """What each refused combination says."""
    said = {}
    for name, settings in REFUSED.items():
        source = Path(config.model.source)
        if "sliding" in name:
            windowed = tmp_path_factory.mktemp("windowed")
            for path in source.iterdir():
                (windowed / path.name).write_bytes(path.read_bytes())
            described = json.loads((source / "config.json").read_text())
            described |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 8}
            (windowed / "config.json").write_text(json.dumps(described))
            source = windowed
        with pytest.raises(ConfigError) as caught:
            changed = override(config, {**settings, "model.source": str(source)})
            check_training(changed)
            local.build_parts(changed.model, changed.engine, changed.sync.lag)
        said[name] = str(caught.value)
    return said


def table(refusals: Mapping[str, str]) -> str:
    names = list(DEPARTURES)
    lines = [
        "Each pair below, and all at once (with either format of KV), is run by `tests/multi/test_departures.py`: it",
        "trains, and each departure lights its own line of the error budget and no other.",
        "",
    ]
    lines += [f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for name in names:
        cells = [("·" if name == other or {name, other} == EITHER else "yes") for other in names]
        settings = ", ".join(f"`{key}={value}`" for key, value in list(DEPARTURES[name].items())[:1])
        lines.append(f"| {name} ({settings}) | {' | '.join(cells)} |")
    lines += ["", "Refused at start, before any weight is loaded:", ""]
    for name, reason in refusals.items():
        lines += textwrap.wrap(
            f"- {name}: {reason}", 118, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        )
    return "\n".join(lines)


def test_the_table_in_the_docs_is_this_one(refusals, request):
    """Docs that promise a combination which nothing tests, or hide one that is refused."""
    check_table(request, "docs/parity.md", "departures", table(refusals))
