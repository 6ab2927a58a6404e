"""Regressions in tandem.config: overriding, dumping, loading and comparing frozen configs."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, is_dataclass, replace
from enum import Enum
from typing import Any, Literal, get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem import config
from tandem.errors import ConfigError
from tandem.models.config import ModelConfig
from tandem.run.config import RunConfig


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True, slots=True)
class Optim:
    lr: float = 2e-5
    betas: tuple[float, float] = (0.9, 0.95)
    warmup: int = 0
    kind: Literal["adamw", "sgd"] = "adamw"
    clip: float | None = 1.0

    def __post_init__(self) -> None:
        if self.clip is not None and self.clip <= self.lr:
            raise ConfigError("optim.clip must exceed optim.lr")


@dataclass(frozen=True, slots=True)
class Job:
    name: str = "job"
    note: str | None = None
    verbose: bool = False
    steps: int = 30
    stops: tuple[str, ...] = ()
    parameters: tuple[tuple[str, int | float | str | bool], ...] = ()
    sizes: tuple[tuple[int, ...], ...] = ()
    colour: Colour = Colour.RED
    optim: Optim = field(default_factory=Optim)
    teacher: Optim | None = None


finite = st.floats(allow_nan=False)
integers = st.integers(-(2**63), 2**63 - 1)
optims = st.builds(
    Optim,
    lr=st.floats(max_value=0.5, allow_nan=False),
    betas=st.tuples(finite, finite),
    warmup=integers,
    kind=st.sampled_from(["adamw", "sgd"]),
    clip=st.none() | st.floats(min_value=1.0, allow_nan=False),
)
scalars = st.integers() | finite | st.text() | st.booleans()
jobs = st.builds(
    Job,
    name=st.text(),
    note=st.none() | st.text(),
    verbose=st.booleans(),
    steps=integers,
    stops=st.lists(st.text()).map(tuple),
    parameters=st.lists(st.tuples(st.text(min_size=1), scalars)).map(tuple),
    sizes=st.lists(st.lists(st.integers()).map(tuple)).map(tuple),
    colour=st.sampled_from(Colour),
    optim=optims,
    teacher=st.none() | optims,
)


def typed(value: Any) -> Any:
    """Equality that tells 1 from True and from 1.0, and -0.0 from 0.0."""
    if isinstance(value, tuple):
        return tuple(typed(part) for part in value)
    return type(value), repr(value)


def leaves(job: Job) -> dict[str, Any]:
    return {name: typed(value) for name, value in config.flatten(job).items()}


@given(jobs)
def test_dump_round_trip(job: Job) -> None:
    """A field that changes value or type on its way through config.json, so that a resumed run is another run."""
    text = json.dumps(config.dump(job), allow_nan=False)
    assert leaves(config.load(Job, json.loads(text))) == leaves(job)


@given(jobs, jobs)
def test_override_round_trip(job: Job, other: Job) -> None:
    """A value shown by diff or an error that cannot be typed back in with --set."""
    other = replace(other, teacher=job.teacher, note=other.note if other.note != "none" else None)
    assignments = {name: config.render(value) for name, value in config.flatten(other).items()}
    if job.note is None and other.note is not None:
        assignments["note"] = other.note
    assignments = {k: v for k, v in assignments.items() if not (k == "note" and v.lower() == "none" and other.note)}
    wanted = other if "note" in assignments else replace(other, note=job.note)
    assert leaves(config.override(job, assignments)) == leaves(wanted)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("steps", "1_000", 1000),
        ("optim.lr", "3e-5", 3e-5),
        ("optim.lr", "0", 0.0),
        ("optim.clip", "none", None),
        ("optim.clip", "2", 2.0),
        ("verbose", "yes", True),
        ("verbose", "False", False),
        ("name", "a,b=c", "a,b=c"),
        ("note", "none", None),
        ("stops", "", ()),
        ("stops", "a,b", ("a", "b")),
        ("stops", '"a,b", c', ("a,b", "c")),
        ("stops", '"\\n"', ("\n",)),
        ("optim.betas", "0.9,0.99", (0.9, 0.99)),
        ("optim.betas", "(0.9, 0.99)", (0.9, 0.99)),
        (
            "parameters",
            "min_terms=2,ratio=0.5,op=+,on=true",
            (("min_terms", 2), ("ratio", 0.5), ("op", "+"), ("on", True)),
        ),
        ("parameters", 'op="2"', (("op", "2"),)),
        ("sizes", "(1,2),()", ((1, 2), ())),
        ("optim.kind", "sgd", "sgd"),
        ("colour", "blue", Colour.BLUE),
    ],
)
def test_override_values(name: str, text: str, value: Any) -> None:
    """A value of --set parsed to another type, or not at all."""
    changed = config.override(Job(), {name: text})
    assert typed(config.flatten(changed)[name]) == typed(value)
    assert config.flatten(changed) == {**config.flatten(Job()), name: value}


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("steps", "ten", "int"),
        ("steps", "1.5", "int"),
        ("steps", str(10**23), "an integer of 64 bits"),
        ("optim.warmup", str(-(2**63) - 1), "an integer of 64 bits"),
        ("optim.lr", "fast", "float"),
        ("optim.lr", "nan", "float"),
        ("verbose", "maybe", "bool"),
        ("optim.kind", "adam", "'adamw', 'sgd'"),
        ("colour", "green", "'red', 'blue'"),
        ("optim.betas", "0.9", "(float, float)"),
        ("parameters", "min_terms", "name=value"),
    ],
)
def test_override_wrong_type(name: str, text: str, wanted: str) -> None:
    """A value of the wrong type accepted in silence, or refused without its name, value or what is allowed."""
    with pytest.raises(ConfigError) as caught:
        config.override(Job(), {name: text})
    for part in (name, text, wanted):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("name", "offered"),
    [
        ("optim.lrr", "optim.lr"),
        ("lr", "optim.lr"),
        ("stepz", "steps"),
        ("optm.lr", "optim.lr"),
        ("optim", "optim.betas"),
        ("teacher.lr", "teacher is none"),
        ("steps.more", "steps is 30"),
    ],
)
def test_override_unknown_name(name: str, offered: str) -> None:
    """An unknown dotted name ignored, or refused without the nearest ones."""
    with pytest.raises(ConfigError, match=offered.replace(".", r"\.")):
        config.override(Job(), {name: "1"})


def test_load_refuses_what_no_array_holds() -> None:
    """An integer of 80 bits in a config.json, and an OverflowError from the array that it reaches."""
    with pytest.raises(ConfigError, match="steps is 1000.*64 bits"):
        config.load(Job, config.dump(Job()) | {"steps": 10**23})
    assert config.override(Job(), {"parameters": f"n={10**23}"}).parameters == (("n", 10**23),)


def test_override_is_joint() -> None:
    """Assignments applied one by one, so that a valid pair fails on the invalid state between them."""
    start = Job(optim=Optim(lr=0.5, clip=1.0))
    changed = config.override(start, {"optim.lr": "4", "optim.clip": "8"})
    assert (changed.optim.lr, changed.optim.clip) == (4.0, 8.0)
    with pytest.raises(ConfigError, match="clip"):
        config.override(start, {"optim.lr": "4"})
    assert config.override(start, {}) is start


def test_load_refuses() -> None:
    """A config.json of another version read with defaults filled in, so that the resumed run is another run."""
    good = config.dump(Job())
    with pytest.raises(ConfigError, match=r"optim\.lrr.*Did you mean lr"):
        config.load(Job, {**good, "optim": {**good["optim"], "lrr": 1.0}})
    with pytest.raises(ConfigError, match=r"lacks optim\.lr, optim\.warmup"):
        config.load(Job, {**good, "optim": {k: v for k, v in good["optim"].items() if k not in ("lr", "warmup")}})
    for name, value in [
        ("steps", 1.0),
        ("steps", True),
        ("steps", "3"),
        ("verbose", 1),
        ("name", None),
        ("colour", "x"),
    ]:
        with pytest.raises(ConfigError, match=name):
            config.load(Job, {**good, name: value})
    with pytest.raises(ConfigError, match="optim is 3"):
        config.load(Job, {**good, "optim": 3})
    assert config.load(Job, {**good, "optim": {**good["optim"], "lr": 0}}).optim.lr == 0.0


@dataclass(frozen=True, slots=True)
class Level:
    level: Literal[1, 2] = 1


def test_literal_numbers() -> None:
    """True or 1.0 in a config.json taken for the 1 that a Literal allows."""
    assert config.load(Level, {"level": 2}).level == 2
    assert config.override(Level(), {"level": "2"}).level == 2
    for wrong in (True, 1.0, "1", 3):
        with pytest.raises(ConfigError, match="one of 1, 2"):
            config.load(Level, {"level": wrong})


def test_diff_tells_none_from_its_name() -> None:
    """A text that says none and the absent value compared as equal."""
    assert len(config.diff(Job(note=None), Job(note="none"))) == 1


def test_diff() -> None:
    """A difference between a run and its resume that is not shown."""
    before = Job()
    after = replace(
        before, optim=replace(before.optim, lr=3e-5), parameters=(("op", "+"),), teacher=Optim(clip=math.inf)
    )
    assert config.diff(before, before) == []
    lines = config.diff(before, after)
    assert lines[:3] == ['parameters: () -> op="+"', "optim.lr: 2e-05 -> 3e-05", "teacher: none -> absent"]
    assert "teacher.clip: absent -> inf" in lines and len(lines) == 8


@given(jobs, jobs)
def test_diff_is_complete(before: Job, after: Job) -> None:
    """Two configs that differ and show no difference."""
    changed = {
        name for name in {**leaves(before), **leaves(after)} if leaves(before).get(name) != leaves(after).get(name)
    }
    assert {line.partition(": ")[0] for line in config.diff(before, after)} == changed


RUN = RunConfig("a", 1, ModelConfig("m"))


def ranged(part: Any = RUN, prefix: str = "") -> list[tuple[str, Any, Any, float, bool, int]]:
    """(name, its config, type, bound, whether the bound itself is allowed, direction outward), of every bound."""
    found = []
    for name, hint in get_type_hints(type(part), include_extras=True).items():
        value = getattr(part, name)
        if is_dataclass(value):
            found += ranged(value, f"{prefix}{name}.")
        for member in (hint, *get_args(hint)):
            for mark in getattr(member, "__metadata__", ()):
                for kind, closed, outward in (("ge", True, -1), ("gt", False, -1), ("le", True, 1), ("lt", False, 1)):
                    if (bound := getattr(mark, kind, None)) is not None:
                        found.append((prefix + name, part, member.__origin__, bound, closed, outward))
    return found


BOUNDS = ranged()


@given(st.sampled_from(BOUNDS), st.integers(0, 3))
def test_a_range_holds_at_its_ends(bound: tuple[str, Any, Any, float, bool, int], away: int) -> None:
    """A range read with the wrong end open, not read at all, or refused without the setting's name and value."""
    name, part, kind, end, closed, outward = bound

    def step(value: float, direction: int) -> float:
        return value + direction if kind is int else math.nextafter(value, direction * math.inf)

    def said(value: float) -> str:
        try:
            replace(part, **{name.rpartition(".")[2]: value})
        except ConfigError as error:
            return str(error)
        return ""

    outside = step(kind(end), outward) if closed else kind(end)
    inside = kind(end) if closed else step(kind(end), -outward)
    for _ in range(away):
        outside, inside = step(outside, outward), step(inside, -outward)
    assert said(outside).startswith(f"{name} is {outside}. Allowed: ")
    assert f"{name} is {inside}. Allowed: " not in said(inside)


def test_most_numbers_declare_a_range() -> None:
    """A setting whose range is no longer declared, so that nothing checks it."""
    numbers = {name for name, hint, _ in config.names(RUN) if {int, float} & {hint, *get_args(hint)}}
    assert numbers - {name for name, *_ in BOUNDS} == {
        "task.seed",
        "drafter.layers",
        "distil.bad_weight",
        "distil.good_reward",
        "engine.page_tokens",
        "rollout.temperature",
        "evaluation.temperature",
    }
