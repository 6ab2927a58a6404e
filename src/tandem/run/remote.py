"""An engine behind a server's HTTP, as the loop knows it: asked, stepped and told of weights like one that is here.

What a server does not take is a failed request. One that cannot be asked any more, or answers what nobody asked for, is
an EngineError, by which a router knows that it died (rollout/router.py).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from tandem.columns import Columns
from tandem.engine.admit import count_pages
from tandem.engine.batch import Stats
from tandem.engine.config import EngineConfig
from tandem.engine.engine import Decode, Engine
from tandem.engine.layout import KvLayout
from tandem.errors import ConfigError, EngineError
from tandem.models.config import ModelConfig
from tandem.models.spec import ModelSpec
from tandem.run.apart import Elsewhere
from tandem.run.remote_calls import Call, CallError, Server
from tandem.run.remote_config import RemoteConfig
from tandem.run.remote_dialects import SPEECHES, Answer, OddAnswer, columns_of, stop_reason
from tandem.types import Completion, Request, StopReason

SLICE_S = 0.025  # that a step waits for an answer, between looks at what is asked meanwhile
LOOK_S = 30.0  # for a server to say what it serves
UNTAKEN = (400, 413, 422)  # statuses of a request that is not taken: it fails alone
LATE = 2.0  # times engine.answer_s, after which an answer is waited for no more: a router asks another after one


@dataclass(slots=True, eq=False)
class _Asked:
    """A request that has not ended."""

    request: Request
    submitted_s: float
    most: int  # tokens that it may draw
    call: Call | None = None
    started_s: float = 0.0


class ServerEngine(Engine):
    """Checks requests here, and has a server run them.

    Where its server names the weights behind each answer, `known` has those that this run gave it.
    """

    def __init__(
        self,
        server: Server,
        remote: RemoteConfig,
        spec: ModelSpec,
        model: ModelConfig,
        config: EngineConfig,
        decode: Decode,
    ) -> None:
        self.server, self.remote = server, remote
        self.speech = SPEECHES[remote.dialect]
        context = min(spec.max_position, self._context() or spec.max_position)
        layout = KvLayout.for_engine(spec, config, model.dtype)
        num_pages = max(  # those of the plan stand for the server's, of which nothing is known, where a router compares
            count_pages(layout, config),
            layout.most_pages(context, 1, config.page_tokens),
        )
        super().__init__(Elsewhere(layout, spec.vocab_size), config, num_pages, max_context=context, decode=decode)
        self.known: dict[str, int] = {}  # label of weights -> version step
        self.look: Callable[[], str] | None = None  # what the server calls the weights that it serves
        self.lost: EngineError | None = None  # why nothing more is asked of it
        self._answered = threading.Event()  # since the last look
        self._waiting = deque[_Asked]()
        self._running: dict[str, _Asked] = {}
        self._stats = Stats()

    def _context(self) -> int | None:
        """Positions that the server has; None where it says nothing of them. EngineError where it cannot be asked."""
        told = self.ask("/v1/models", within_s=LOOK_S)
        try:
            found = told["data"][0].get("max_model_len")
        except (TypeError, LookupError, AttributeError) as error:
            raise EngineError(
                f"{self.server.url}/v1/models names no model ({error!r}): it is no server of one."
            ) from None
        return found if type(found) is int and found > 0 else None

    def ask(self, path: str, body: dict[str, Any] | bytes | None = None, within_s: float = 0.0) -> Any:
        """A call that is no generation. EngineError."""
        return self.server.ask(path, body, within_s=within_s or self.remote.deadline_s)

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running or self._undelivered)

    @property
    def stats(self) -> Stats:
        return replace(self._stats)

    def check(self, request: Request) -> None:
        """As Engine's, and ConfigError for what its server gives no log-probs of, or would draw otherwise."""
        super().check(request)
        dialect, drawn, speech = self.remote.dialect, request.sampling, self.speech
        if not speech.exact and (drawn.top_k or drawn.top_p < 1 or drawn.min_p):
            raise ConfigError(
                f"request {request.id!r} has top_k, top_p or min_p, and a server of {dialect} does not say which "
                "tokens they kept, so the learner could not score it. Leave them out."
            )
        if request.constraint is not None and request.constraint.kind not in speech.holds:
            held = ", ".join(speech.holds) or "none"
            raise ConfigError(
                f"request {request.id!r} has a constraint of kind {request.constraint.kind}. By a server of {dialect}: "
                f"{held}."
            )
        if request.carried and (drawn.stop_strings or request.constraint is not None):
            raise ConfigError(
                f"request {request.id!r} goes on with what was drawn before, and has stop strings or a constraint, "
                "which a server would look for in the rest alone."
            )

    def submit(self, request: Request) -> None:
        """As Engine's."""
        self.check(request)
        assert request.id not in self._running, request.id
        most = self.scheduler.limit(request) - len(request.tokens)
        self._waiting.append(_Asked(request, self.clock(), most))

    def finish_program(self, program_id: str, tenant: str = "") -> None:
        """Servers find out by themselves."""

    def drawn(self, request_id: str, first: int) -> Columns:
        """Nothing: tokens of a server come at their request's end."""
        return Columns({})

    def step(self) -> list[Completion]:
        """Completions as they come, or none after SLICE_S. EngineError where the server is lost."""
        if self.lost is not None and (self._waiting or self._running):
            raise self.lost
        done, self._undelivered = self._undelivered, []
        while self._waiting and len(self._running) < self.scheduler.config.max_sequences:
            self._start(self._waiting.popleft())
        if self._running and not done:
            self._answered.wait(SLICE_S)
        self._answered.clear()
        try:
            for asked in [one for one in self._running.values() if one.call is not None]:
                completion = self._ended(asked)
                if completion is not None:
                    del self._running[asked.request.id]
                    done.append(completion)
        except EngineError as error:
            self._undelivered = done + self._undelivered
            self.lost = error
            raise
        return done

    def _start(self, asked: _Asked) -> None:
        path, body = self.speech.ask(asked.request, asked.most)
        within_s = LATE * self.scheduler.config.answer_s
        asked.started_s = self.clock()
        asked.call = self.server.begin(path, body, within_s, again=True)
        asked.call.future.add_done_callback(lambda _: self._answered.set())
        self._running[asked.request.id] = asked
        self._stats.most_running = max(self._stats.most_running, len(self._running))

    def _ended(self, asked: _Asked) -> Completion | None:
        """None while it is on its way."""
        call = asked.call
        assert call is not None
        if not call.future.done():
            if time.monotonic() < call.until_s:
                return None
            call.cancel()
            raise self._late(asked)
        try:
            answer = call.future.result(0)
        except CallError as error:
            if error.status in UNTAKEN:
                return self._failed(asked, str(error))
            raise
        completion = self.completed(asked.request, answer, asked.most)
        self._count(asked.request, completion)
        return replace(completion, submitted_s=asked.submitted_s, started_s=asked.started_s)

    def completed(self, request: Request, answer: Any, most: int) -> Completion:
        """What an answer says. EngineError where it is none to this request, or was drawn by other weights."""
        try:
            read = self.speech.read(request, answer)
            reason = stop_reason(request, read, most)
            columns = columns_of(read, self._versions(read), self.vocab_size)
        except (OddAnswer, LookupError, TypeError, ValueError) as error:
            raise EngineError(f"{self.server.url} gave an answer that cannot be learned from: {error}.") from error
        now = self.clock()
        given = min(read.cached_tokens, len(request.tokens))
        return Completion(request.id, columns, reason, now, now, now, cached_tokens=given, first_s=now)

    def _versions(self, answer: Answer) -> list[int]:
        """Of each token."""
        if not self.known or not answer.labels:
            return [self.version.step] * len(answer.tokens)
        strange = [label for label, _ in answer.labels if label not in self.known]
        if strange:
            raise OddAnswer(
                f"weights {strange[0]!r} drew it, which this run did not give the server: somebody else changed them, "
                "or it was started again"
            )
        return [self.known[label] for label, tokens in answer.labels for _ in range(tokens)]

    def _count(self, request: Request, completion: Completion) -> None:
        tokens, cached = len(completion.columns), completion.cached_tokens
        counts = self._stats
        counts.finished += 1
        counts.sampled_tokens += tokens
        counts.cached_tokens += cached
        counts.prefilled_tokens += len(request.tokens) - cached
        counts.run_tokens += len(request.tokens) - cached + max(0, tokens - 1)

    def _failed(self, asked: _Asked, why: str) -> Completion:
        self._stats.finished += 1
        self._stats.failed += 1
        now = self.clock()
        nothing = Columns.of(tokens=(), logprobs=(), versions=())
        times = (asked.submitted_s, asked.started_s, now)
        return Completion(asked.request.id, nothing, StopReason.FAILED, *times, failure=why, first_s=now)

    def _late(self, asked: _Asked) -> EngineError:
        within_s = LATE * self.scheduler.config.answer_s
        return EngineError(
            f"{self.server.url} has not answered request {asked.request.id!r} within {within_s:g} s ({LATE:g} times "
            "engine.answer_s), so it is asked no more."
        )

    def abort(self, request_id: str) -> Completion | None:
        """As Engine's. What its server has drawn is lost with the connection."""
        asked = self._running.get(request_id)
        if asked is not None and asked.call is not None:
            if asked.call.future.done() and self.lost is None:
                return None  # it comes with the next step
            asked.call.cancel()
            del self._running[request_id]
        else:
            asked = next((one for one in self._waiting if one.request.id == request_id), None)
            if asked is None:
                return None
            self._waiting.remove(asked)
        self._stats.aborted += 1
        now, nothing = self.clock(), Columns.of(tokens=(), logprobs=(), versions=())
        return Completion(request_id, nothing, StopReason.ABORTED, asked.submitted_s, asked.started_s or now, now)

    def give_up(self) -> None:
        """As Engine's."""
        self.dead = True
        self.lost = self.lost or EngineError(f"{self.server.url} was given up.")
        for asked in self._running.values():
            if asked.call is not None:
                asked.call.cancel()

    def release_memory(self) -> None:
        """As Engine's, of nothing; and EngineError where the server has other weights than this run gave it last."""
        super().release_memory()
        if self.look is not None and self.lost is None:
            self.compare(self.look())

    def compare(self, label: str) -> None:
        """With what the server calls its weights."""
        if self.known.get(label) != self.version.step:
            raise EngineError(
                f"{self.server.url} serves weights {label!r}, not those of version {self.version.step} that this run "
                "gave it: somebody else changed them, or it was started again. What it drew since is not learned from."
            )

    def draw(self, request: Request) -> Completion:
        """One request to its end, in no count. EngineError."""
        path, body = self.speech.ask(request, request.sampling.max_new_tokens)
        within_s = min(self.remote.deadline_s, LATE * self.scheduler.config.answer_s)
        answer = self.server.begin(path, body, within_s, again=True).result()
        return self.completed(request, answer, request.sampling.max_new_tokens)
