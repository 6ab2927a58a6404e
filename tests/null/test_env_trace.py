"""Regressions in tandem.env, tandem.trace and tandem.errors."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem import env
from tandem.errors import ConfigError, TandemError, UserError, WorldError, nearest
from tandem.trace import CountEvent, Event, SpanEvent, Totals, Trace


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("TANDEM_CACHE", "TANDEM_THREADS", "XDG_CACHE_HOME", "OMP_NUM_THREADS", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_cache_dir(clean: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The cache put elsewhere than the user said, so that a read-only home stops every run."""
    clean.setenv("HOME", str(tmp_path))
    assert env.cache_dir() == tmp_path / ".cache" / "tandem"
    clean.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert env.cache_dir() == tmp_path / "xdg" / "tandem"
    clean.setenv("TANDEM_CACHE", "~/own")
    assert env.cache_dir() == tmp_path / "own"


def test_unknown_variable(clean: pytest.MonkeyPatch) -> None:
    """A misspelt TANDEM_ variable ignored in silence."""
    clean.setenv("TANDEM_CASHE", "x")
    with pytest.raises(ConfigError, match=r"TANDEM_CASHE.*Did you mean TANDEM_CACHE"):
        env.cache_dir()


def test_variables_of_a_cluster() -> None:
    """A pod beside a service called tandem, or tandem-router, that starts no more; a misspelt name taken for one."""
    names = ["SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_HTTP", "PORT"]
    names += ["PORT_8000_TCP", *(f"PORT_8000_TCP_{each}" for each in ("PROTO", "PORT", "ADDR"))]
    env.check({f"{service}_{name}": "" for service in ("TANDEM", "TANDEM_ROUTER") for name in names})
    for name in ("TANDEM_API_KEYS", "TANDEM_SERVICE", "TANDEM_PORTS"):
        with pytest.raises(ConfigError, match=name):
            env.check({name: ""})


@pytest.mark.parametrize(
    ("group", "files", "quota"),
    [
        ("0::/a/b", {"a/b/cpu.max": "150000 100000", "a/cpu.max": "max 100000"}, 1),
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "100000 100000"}, 1),
        ("0::/", {"cpu.max": "50000 100000"}, 1),
        ("0::/elsewhere", {"cpu.max": "100000 100000"}, 1),
        ("0::/a", {"a/cpu.max": "max 100000"}, 0),
        ("0::/a", {"a/cpu.max": "100000000 100000"}, 0),
        ("3:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": "100000", "cpu/a/cpu.cfs_period_us": "100000"}, 1),
        ("3:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, 0),
        ("0::/a", {"a/cpu.max": "\n"}, 0),
    ],
)
def test_cores_of_a_container(tmp_path: Path, group: str, files: dict[str, str], quota: int) -> None:
    """A container that may use one core of 64 computes with 64 threads, and stands still for most of each period."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(group + "\n")
    for name, text in files.items():
        place = tmp_path / "sys/fs/cgroup" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    cores = len(os.sched_getaffinity(0))
    assert env.num_cores(tmp_path) == (min(quota, cores) if quota else cores)


def test_python_without_asserts() -> None:
    """Under -O a kernel gets the address of a tensor that nobody looked at."""
    code = "from tandem import env; env.cache_dir()"
    ran = subprocess.run(
        [sys.executable, "-O", "-c", code], env=env.child(PYTHONPATH=os.pathsep.join(sys.path)), capture_output=True
    )
    assert b"ConfigError: Python runs with -O" in ran.stderr


def test_num_threads(clean: pytest.MonkeyPatch) -> None:
    """A thread count read wrongly, so that two processes fight over the cores."""
    assert env.num_threads() == env.num_cores() >= 1
    clean.setenv("OMP_NUM_THREADS", "3,2")
    assert env.num_threads() == 3
    clean.setenv("OMP_NUM_THREADS", "many")
    assert env.num_threads() == env.num_cores()
    clean.setenv("TANDEM_THREADS", "7")
    assert env.num_threads() == 7
    for wrong in ("0", "-1", "two", "1.5", "100000000000", "\u00b2"):
        clean.setenv("TANDEM_THREADS", wrong)
        with pytest.raises(ConfigError, match="TANDEM_THREADS=" + wrong):
            env.num_threads()


def test_no_color_and_child(clean: pytest.MonkeyPatch) -> None:
    """Colour codes in a log that asked for none; a child process without its parent's PATH."""
    assert not env.no_color()
    clean.setenv("NO_COLOR", "1")
    assert env.no_color()
    clean.setenv("PATH", "kept")
    assert env.child(EXTRA="1")["EXTRA"] == "1" and env.child()["PATH"] == "kept"


class Clock:
    """Whole seconds, moved by hand, so that sums are exact."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_spans_nest() -> None:
    """A child's seconds counted twice, once in the child and once in its parent."""
    events: list[Event] = []
    clock, totals = Clock(), Totals()
    trace = Trace([events.append, totals], clock)
    with trace.span("step"):
        clock.now += 1
        with trace.span("rollout"):
            clock.now += 2
            with trace.span("reward"):
                clock.now += 4
            trace.count("tokens", 5)
        with trace.span("reward"):
            clock.now += 8
        clock.now += 16
    assert totals.seconds == {"step": 17, "rollout": 2, "reward": 12}
    assert totals.counts == {"tokens": 5}
    paths = [event.path for event in events]
    assert paths == ["step/rollout/reward", "step/rollout", "step/rollout", "step/reward", "step"]
    assert events[1] == CountEvent("tokens", 5, "step/rollout")
    assert isinstance(events[-1], SpanEvent) and (events[-1].start_s, events[-1].end_s) == (0.0, 31.0)
    assert totals.take() == ({"step": 17, "rollout": 2, "reward": 12}, {"tokens": 5})
    assert totals.take() == ({}, {})


trees = st.recursive(
    st.tuples(st.sampled_from("abc"), st.integers(0, 5), st.just(())),
    lambda inner: st.tuples(st.sampled_from("abc"), st.integers(0, 5), st.lists(inner, max_size=4).map(tuple)),
    max_leaves=20,
)


@given(st.lists(trees))
def test_no_second_lost(forest: list[tuple[str, int, tuple]]) -> None:
    """Seconds of the spans that do not add up to the time that passed, whatever the nesting and the exceptions."""
    clock, totals = Clock(), Totals()
    trace = Trace([totals], clock)

    def walk(name: str, seconds: int, children: tuple) -> None:
        with trace.span(name):
            clock.now += seconds
            for child in children:
                walk(*child)
            if seconds == 5:
                raise RuntimeError

    for tree in forest:
        try:
            walk(*tree)
        except RuntimeError:
            pass
    assert sum(totals.seconds.values()) == clock.now
    assert trace._stack() == []


def test_failed_span() -> None:
    """A span that an exception left is not emitted, so the time before a crash is in no account."""
    events: list[Event] = []
    with pytest.raises(KeyError), Trace([events.append]).span("reward"):
        raise KeyError
    assert isinstance(events[0], SpanEvent) and events[0].failed and events[0].name == "reward"


def test_threads_have_their_own_stack() -> None:
    """A span of one thread taken for the child of another's."""
    events: list[Event] = []
    trace = Trace([events.append])
    inside, leave = threading.Event(), threading.Event()

    def work() -> None:
        with trace.span("publish"):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=work)
    with trace.span("step"):
        thread.start()
        assert inside.wait(10)
        with trace.span("rollout"):
            pass
        leave.set()
        thread.join()
    assert {event.path for event in events} == {"step", "step/rollout", "publish"}


def test_nearest() -> None:
    """An error that offers nothing where a name is close, or hides the allowed names where none is."""
    assert nearest("trian", ["train", "eval"]) == " Did you mean train?"
    assert nearest("zzz", ["b", "a"]) == " Allowed: a, b."


def test_audience() -> None:
    """An error that the command line prints with the wrong exit code."""
    assert issubclass(ConfigError, UserError) and issubclass(ConfigError, ValueError)
    assert issubclass(UserError, TandemError) and not issubclass(UserError, WorldError)
