"""Regression caught: a number that no array, thread or address holds, answered with a traceback."""

from __future__ import annotations

import contextlib

import pytest

from tandem.config import names, override
from tandem.errors import ConfigError, UserError
from tandem.models.config import ModelConfig
from tandem.program.config import TaskConfig
from tandem.run.config import RunConfig
from tandem.run.local import plan

NUMBERS = [
    (name, text)
    for name, hint, _ in names(RunConfig("sums", 1, ModelConfig("m")))
    for kind, texts in (
        (int, ("-1", "2147483648", str(2**63 - 1), str(10**23))),
        (float, ("-1", "1e-300", "1e308", "inf", "nan", "1" + 400 * "0")),
    )
    if hint in (kind, kind | None)
    for text in texts
]


@pytest.fixture(scope="module")
def config(tmp_path_factory, write_model) -> RunConfig:
    folder = tmp_path_factory.mktemp("limits")
    write_model(folder)
    return RunConfig("sums", 1, ModelConfig(str(folder)), task=TaskConfig(parameters=(("max_terms", 2),)))


def test_every_number_of_a_config_has_its_limits(config: RunConfig) -> None:
    """A setting of 10^23 or 1e308 that reaches an array, ctypes or the plan and overflows there."""
    assert len(NUMBERS) > 150
    for name, text in NUMBERS:
        try:
            with contextlib.suppress(UserError):
                plan(override(config, {name: text})).check()
        except Exception as error:
            raise AssertionError(f"{name}={text}: {error!r}") from error
    with pytest.raises(ConfigError, match="rollout.top_k is 2147483648"):
        override(config, {"rollout.top_k": str(2**31)})


def test_a_device_that_is_not_there(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a CUDA device said to have one with 0 MB free, and advice to use less memory."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(
        ConfigError, match="model.device is cuda, but torch .* sees no CUDA device here.*model.device=cpu"
    ):
        plan(override(config, {"model.device": "cuda"}))
