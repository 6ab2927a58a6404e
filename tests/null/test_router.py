"""A router that loses a request, answers one twice, parts groups, piles work on one engine, or waits for a dead one."""

from __future__ import annotations

import threading
import time
from collections import Counter
from concurrent.futures import Future
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.columns import Columns
from tandem.engine.affinity import OVERLOAD
from tandem.engine.driver import Driver
from tandem.errors import CapacityError, ConfigError, EngineError, WorkerError
from tandem.rollout import router as module
from tandem.rollout.router import Replica, Router
from tandem.types import Completion, Request, Sampling, StopReason, WeightVersion
from tests.null.paged_memory import STOP, alone, make

WAIT_S = 30.0
ANSWER_S = 40.0  # ticks


class Shaky:
    """An engine that dies, stalls or is slow as it is told."""

    def __init__(self, number: int) -> None:
        self.engine = make(200, max_sequences=4)[0]
        self.name = f"engine {number}"
        self.dies = False
        self.stalls = False
        self.pace = 1  # calls a step
        self.calls = 0
        self.requests: list[Request] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def submit(self, request: Request) -> None:
        self.requests.append(request)
        self.engine.submit(request)

    def step(self) -> list[Completion]:
        self.calls += 1
        if self.dies:
            raise RuntimeError("it burnt")
        if self.stalls or self.calls % self.pace:
            return []
        return self.engine.step()

    def replica(self, capacity_tokens: int = 400) -> Replica:
        return Replica(self.name, Driver(self), lambda: self.engine.version, capacity_tokens, 4)


class Watched(Router):
    """Checks each choice against what it knows of engines itself."""

    def _load(self, replica: Replica, more: int) -> float:
        most = [
            len(one.asked.request.tokens) + one.asked.request.sampling.max_new_tokens for one in replica.open.values()
        ]
        return (sum(most) + more) / replica.capacity_tokens

    def _choose(self, asked: Any) -> Replica | None:
        request, home = asked.request, self._affinity.home(asked.request.group)
        alive = [one for one in self.replicas if not one.dead]
        newest = max((one.serves().step for one in alive), default=0)
        may = [one for one in alive if one not in asked.tried and one.serves().step == newest]
        may = [one for one in may if not one.late] or may
        chosen = super()._choose(asked)
        assert (chosen is None) == (not may)
        if chosen is not None:
            assert chosen in may
            more = len(request.tokens) + request.sampling.max_new_tokens
            least = min(self._load(one, more) for one in may)
            load = self._load(chosen, more)
            assert load <= max(OVERLOAD * least, 1.0)
            if home in may and chosen is not home:
                assert self._load(home, more) > max(OVERLOAD * least, 1.0)
        return chosen


def asked_of(name: str, tokens: list[int], new: int, seed: int, group: str) -> Request:
    return Request(name, name, tuple(tokens), Sampling(max_new_tokens=new, stop_token_ids=(STOP,)), seed, group=group)


groups = st.tuples(
    st.just("group"), st.lists(st.integers(0, 1), min_size=1, max_size=12), st.integers(1, 4), st.integers(1, 12)
)
events = st.one_of(
    groups,
    groups,
    st.tuples(st.just("wait"), st.integers(1, 60)),
    st.tuples(st.sampled_from(["die", "stall", "wake", "slow", "miss"]), st.integers(0, 5)),
    st.tuples(st.just("join")),
    st.tuples(st.just("abort"), st.integers(0, 20)),
)


@settings(max_examples=200, deadline=None)
@given(number=st.integers(1, 4), script=st.lists(events, max_size=25))
def test_each_request_is_answered_once_with_its_tokens(number: int, script: list[Any]) -> None:
    """A request lost with an engine, answered by two, left at one that stalls, or of tokens that nobody counts."""
    now, dropped, crashed, fleet = [0.0], list[int](), Counter[str](), [Shaky(n) for n in range(number)]
    router = Watched(
        [one.replica() for one in fleet],
        ANSWER_S,
        lambda replica, error: crashed.update({replica.name: replica.returned_tokens}),
        dropped.append,
        lambda: now[0],
    )
    asked: list[tuple[Request, Future[Completion]]] = []
    alive_at: dict[str, list[Replica]] = {}
    refused = 0

    def tick(count: int) -> None:
        for _ in range(count):
            router.progress(0, 0.0)
            now[0] += 1.0

    for place, (verb, *rest) in enumerate(script):
        shaky = fleet[rest[0] % len(fleet)] if verb in ("die", "stall", "wake", "slow", "miss") else fleet[0]
        if verb == "group":
            prompt, size, new = rest
            for sibling in range(size):
                request = asked_of(f"g{place}/{sibling}", prompt, new, sibling, f"g{place}")
                try:
                    future = router.submit(request)
                except EngineError:
                    assert not router.living
                    refused += 1
                    continue
                asked.append((request, future))
                future.add_done_callback(lambda _, name=request.id: alive_at.update({name: router.living}))
        elif verb == "wait":
            tick(rest[0])
        elif verb == "die":
            shaky.dies = True
        elif verb in ("stall", "wake"):
            shaky.stalls = verb == "stall"
        elif verb == "slow":
            shaky.pace = 5
        elif verb == "join":
            fleet.append(Shaky(len(fleet)))
            fleet[-1].engine.receive(max((one.engine.version for one in fleet), key=lambda one: one.step))
            router.join(fleet[-1].replica())
        elif verb == "miss":  # all but one take the next version
            step = max(one.engine.version.step for one in fleet) + 1
            for one in fleet:
                if one is not shaky or len(fleet) == 1:
                    one.engine.receive(WeightVersion(step, f"digest {step}"))
        elif asked:
            router.abort(asked[rest[0] % len(asked)][0].id)
    for shaky in fleet:
        shaky.stalls = False
    left = 4000
    while (not all(future.done() for _, future in asked) or any(one.open for one in router.living)) and left:
        tick(1)
        left -= 1
    answered = 0
    for request, future in asked:
        assert future.done(), f"{request.id} is waited for after {now[0]} ticks"
        if future.exception() is not None:
            assert isinstance(future.exception(), EngineError) and not alive_at[request.id]
            continue
        completion, (tokens, logprobs) = future.result(), alone(request)
        n = len(completion.tokens)
        assert completion.request_id == request.id
        assert completion.stop_reason is StopReason.ABORTED or n == len(tokens)
        assert (completion.tokens, completion.logprobs) == (tokens[:n], logprobs[:n])
        answered += n
    assert not any(one.open or one.tokens for one in router.replicas)
    returned = sum(one.returned_tokens for one in router.replicas)
    assert returned == answered + sum(dropped)
    for shaky, replica in zip(fleet, router.replicas, strict=True):
        if replica.dead:
            assert crashed[replica.name] == replica.returned_tokens <= shaky.engine.stats.sampled_tokens
        else:
            assert replica.returned_tokens == shaky.engine.stats.sampled_tokens
    counted = router.settle()
    assert sum(count["tokens"] for count in counted.values()) == returned


def quiet(count: int, **given: Any) -> tuple[list[Shaky], Router]:
    fleet = [Shaky(number) for number in range(count)]
    return fleet, Router([one.replica() for one in fleet], **given)


def until_done(router: Router, *futures: Future[Completion]) -> None:
    for _ in range(1000):
        if all(future.done() for future in futures):
            return
        router.progress(0, 0.0)
    raise AssertionError("not done")


def test_siblings_and_later_turns_go_where_their_group_is() -> None:
    """Siblings computed on two engines, and a second turn far from the keys and values of its first."""
    fleet, router = quiet(3)
    for turn in range(3):
        for name in "abcdef":
            futures = [router.submit(asked_of(f"{name}/{turn}/{k}", [0] * (4 + turn), 4, k, name)) for k in range(4)]
            until_done(router, *futures)
    where = [{request.group for request in shaky.requests} for shaky in fleet]
    assert sum(map(len, where)) == 6 and set.union(*where) == set("abcdef")


def test_groups_that_run_at_once_are_shared_out() -> None:
    """All groups on one engine while others have nothing, for a prefix that all of them share."""
    fleet, router = quiet(3)
    for name in "abcdef":
        for sibling in range(4):
            router.submit(asked_of(f"{name}/{sibling}", [0] * 8 + [1], 4, sibling, name))
    assert [len(replica.open) for replica in router.replicas] == [8, 8, 8]


def test_the_longest_prefix_that_an_engine_was_sent_decides() -> None:
    """A new group on an engine that has to compute what another has; or on one that had it of other weights."""
    fleet, router = quiet(2)
    start = [1, 0, 1, 1, 0, 0, 1, 0]
    first = [asked_of("r0", [0] * 8, 9, 0, "a"), asked_of("r1", [*start, 0], 9, 0, "b")]
    until_done(router, *[router.submit(request) for request in first])
    assert [len(shaky.requests) for shaky in fleet] == [1, 1]
    until_done(router, router.submit(asked_of("later", [*start, 1, 1], 1, 0, "c")))
    assert fleet[1].requests[-1].id.startswith("later@")
    for shaky in fleet:
        shaky.engine.receive(WeightVersion(1, "others"))
    until_done(router, router.submit(asked_of("anew", [*start, 1, 1], 1, 0, "d")))
    assert fleet[0].requests[-1].id.startswith("anew@")


def test_the_first_answer_counts_and_the_other_is_told() -> None:
    """An answer that comes twice, or whose second engine draws on for nobody, with tokens that nobody hears of."""
    now, dropped = [0.0], list[int]()
    fleet, router = quiet(2, answer_s=5.0, clock=lambda: now[0], dropped=dropped.append)
    answers = list[Completion]()
    request = Request("r", "r", (0, 1), Sampling(max_new_tokens=20), 5, group="g")
    future = router.submit(request)
    future.add_done_callback(lambda ended: answers.append(ended.result()))
    for _ in range(3):
        router.progress(0, 0.0)
    fleet[0].stalls, now[0] = True, 6.0
    until_done(router, future)
    assert [one.tokens for one in answers] == [alone(request)[0]]
    assert dropped == [router.replicas[0].returned_tokens] == [fleet[0].engine.stats.sampled_tokens] and dropped[0] > 0
    assert not fleet[0].engine.scheduler.live and not router.replicas[0].open
    assert router.replicas[1].returned_tokens == 20


def test_an_engine_that_joins_has_what_waits_for_late_ones() -> None:
    """A request that stays with engines that do not answer while one that would has nothing to do."""
    now = [0.0]
    fleet, router = quiet(1, answer_s=5.0, clock=lambda: now[0])
    fleet[0].stalls = True
    request = asked_of("r", [0, 1], 5, 5, "g")
    future = router.submit(request)
    router.progress(0, 0.0)
    now[0] = 6.0
    router.progress(0, 0.0)
    assert router.replicas[0].late and not future.done()
    router.join(Shaky(1).replica())
    until_done(router, future)
    assert future.result().tokens == alone(request)[0]


def test_a_group_leaves_an_engine_that_has_no_room_for_it() -> None:
    """A group that waits for one engine's memory while another has nothing to do."""
    fleet, router = quiet(2)
    for sibling in range(30):
        router.submit(asked_of(f"g/{sibling}", [0] * 10, 10, sibling, "g"))
    # 400 tokens are 20 requests; then the other has them until it has half as much.
    assert [len(replica.open) for replica in router.replicas] == [20, 10]


def test_what_an_engine_refuses_is_refused_at_once() -> None:
    """A request that fits no engine taken for the death of one, or left to wait."""
    fleet, router = quiet(2)
    with pytest.raises(CapacityError):
        router.submit(asked_of("r", [0] * 5, 10_000, 0, "g"))
    with pytest.raises(ConfigError):
        router.submit(asked_of("r", [], 1, 0, "g"))
    future = router.submit(asked_of("r", [0], 1, 0, "g"))
    with pytest.raises(ConfigError, match="in use"):
        router.submit(asked_of("r", [0], 1, 0, "g"))
    until_done(router, future)
    assert len(router.living) == 2 and not any(replica.open or replica.tokens for replica in router.replicas)


def test_a_stream_goes_on_where_another_engine_does() -> None:
    """Tokens that are given twice, or left out, as the second engine draws what the first had drawn."""
    fleet, router = quiet(2)
    request, got = asked_of("r", [0, 1], 20, 5, "g"), list[Columns]()
    request = Request(request.id, "r", request.tokens, Sampling(max_new_tokens=20), 5, group="g")
    future = router.submit(request, got.append)
    for _ in range(6):
        router.progress(0, 0.0)
    assert 0 < sum(map(len, got)) < 20
    fleet[0].dies = True
    fleet[1].drawn = lambda request_id, first: Columns({})  # type: ignore[attr-defined]  # all comes at the end
    until_done(router, future)
    assert Columns.concat(got) == future.result().columns and future.result().tokens == alone(request)[0]
    assert router.settle()["engine 1"] == {"requests": 1, "again": 1, "moved": 0, "tokens": 20}


def test_an_engine_whose_worker_is_lost_is_dead() -> None:
    """A WorkerError of a driver that lives on taken for the request's own; or asked again of the same engine."""
    fleet, router = quiet(2)
    lost = WorkerError("engine", "rollout", "it died")

    def step() -> list[Completion]:
        raise lost

    fleet[0].step = step  # type: ignore[method-assign]
    requests = [asked_of(f"g/{k}", [0], 3, k, "g") for k in range(4)]
    futures = [router.submit(request) for request in requests]
    until_done(router, *futures)
    assert [future.result().tokens for future in futures] == [alone(request)[0] for request in requests]
    assert router.replicas[0].dead == str(lost) and router.living == router.replicas[1:]


def test_what_a_dead_engine_hands_over_is_asked_of_another() -> None:
    """Tokens that count as crashed when their engine is found dead, and as answered when it hands them over then."""
    fleet, router = quiet(2)
    held: list[Completion] = []

    class Lost(Shaky):
        has_work = True

        def step(self) -> list[Completion]:
            if held:
                return held
            while not held:
                held.extend(self.engine.step())
            raise WorkerError("engine", "rollout", "it died")

    fleet[0].__class__ = Lost
    requests = [asked_of(f"g/{new}", [0], new, 0, "g") for new in (1, 9)]
    futures = [router.submit(request) for request in requests]
    until_done(router, *futures)
    assert [future.result().tokens for future in futures] == [alone(request)[0] for request in requests]
    assert held and router.replicas[0].returned_tokens == 0
    assert [len(shaky.requests) for shaky in fleet] == [2, 2]


def test_what_no_engine_is_left_for_ends_with_every_reason() -> None:
    """A wait for engines that are all dead; an error that does not say why."""
    fleet, router = quiet(2)
    for shaky in fleet:
        shaky.dies = True
    future = router.submit(asked_of("r", [0], 3, 0, "g"))
    until_done(router, future)
    with pytest.raises(EngineError, match="engine 0: .*it burnt.*engine 1: .*it burnt"):
        future.result()
    with pytest.raises(EngineError, match="no engine is left"):
        router.submit(asked_of("s", [0], 3, 0, "g"))


def test_with_threads_a_step_that_does_not_return_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request, a withdrawal or a waiter that hangs with an engine whose thread is stuck in a step."""
    monkeypatch.setattr(module, "GRACE_S", 0.1)
    fleet, released = [Shaky(number) for number in range(3)], threading.Event()

    def stuck() -> list[Completion]:
        released.wait(WAIT_S)
        return fleet[0].engine.step()

    fleet[0].step = stuck  # type: ignore[method-assign]
    fleet[1].dies = True
    replicas = [Replica(one.name, Driver(one).start(), lambda one=one: one.engine.version, 400, 4) for one in fleet]
    router = Router(replicas, answer_s=0.1)
    requests = [asked_of(f"{name}/{k}", [0, 1], 6, k, name) for name in "abcdef" for k in range(3)]
    futures = [router.submit(request) for request in requests]
    seen, until_s = -1, time.monotonic() + WAIT_S
    while not all(future.done() for future in futures) and time.monotonic() < until_s:
        seen = router.progress(seen, 1.0)
    assert [future.result(0).tokens for future in futures] == [alone(request)[0] for request in requests]
    assert replicas[0].late and replicas[1].dead and replicas[0].open
    released.set()
    while replicas[0].open and time.monotonic() < until_s:
        seen = router.progress(seen, 0.05)
    assert not replicas[0].late
    router.close(WAIT_S)
    with pytest.raises(EngineError, match="closed"):
        router.submit(requests[0])


def test_a_withdrawal_from_an_engine_that_stands_still_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """An update of the weights, or a waiter that was woken, that waits for an engine's thread which is stuck."""
    monkeypatch.setattr(module, "GRACE_S", 0.1)
    shaky, released = Shaky(0), threading.Event()

    def stuck() -> list[Completion]:
        released.wait(WAIT_S)
        return shaky.engine.step()

    shaky.step = stuck  # type: ignore[method-assign]
    router = Router([Replica("engine 0", Driver(shaky).start(), lambda: shaky.engine.version, 400, 4)])
    future = router.submit(asked_of("r", [0], 6, 0, "g"))
    waits = threading.Thread(target=router.progress, args=(0, WAIT_S), daemon=True)
    waits.start()
    router.wake()
    waits.join(WAIT_S / 2)
    assert not waits.is_alive()
    router.abort("r")
    until_s = time.monotonic() + WAIT_S / 2
    while not future.done() and time.monotonic() < until_s:
        router.progress(1, 1.0)
    assert future.result(0).stop_reason is StopReason.ABORTED and not future.result(0).tokens
    released.set()
    router.close(WAIT_S)
