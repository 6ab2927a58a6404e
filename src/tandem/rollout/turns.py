"""How a program goes on: from the engine to its environment and back, until it ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from tandem.columns import Columns
from tandem.errors import CapacityError, ConfigError, ModelError
from tandem.numerics.random import derive_seed
from tandem.program.environment import Fold
from tandem.rollout.history import split_cause
from tandem.rollout.program import Program, Segment
from tandem.rollout.waits import Asked, Waits
from tandem.types import Completion, Failure, Hints, Message, Prompt, Request, StopReason, Turn

if TYPE_CHECKING:
    from tandem.rollout.rollout import Rollouts

LAST = Hints(turns_left=0)
HOLD_S = 0.05  # between looks at engines that have threads, while they give back what they are drawing


class Turns:
    """What is asked for programs, of the engine and of environments, and what becomes of the answers.

    end: called with a program that ends and its reward, or why it has none. counts: whether `Program.drawn` is kept.

    Between `hold` and `go_on` the engine has nothing of them, and its weights may change. A turn that was in the midst
    goes on behind what was drawn, over keys and values that the present weights compute.
    """

    def __init__(self, by: Rollouts, end: Callable[[Program, float | Failure], None], counts: bool = False) -> None:
        self.by = by
        self.waits = Waits(by.driver, by.trace)
        self.end = end
        self.counts = counts
        self.allowed: Callable[[Program], int | None] = _any  # tokens that a program may draw before the next `go_on`
        self.overtime = self._overtime  # whether a program has run for its seconds
        self.later: list[Program] = []  # that have drawn what they may
        self._cut: set[Program] = set()  # whose request ends with what they may draw
        self._held: list[Program] | None = None  # what is to be asked of the engine when it may be
        by.driver.on_restoring(self._prepare)

    def made(self, step: int, place: int, prompt: Prompt, until_s: float) -> Iterator[Program]:
        """The programs of a prompt."""
        tokens = self.by.renderer.prompt_tokens(prompt.messages, prompt.tools)
        for sibling in range(self.by.config.samples_per_prompt):
            seed = derive_seed(self.by.run_seed, step, prompt.id, sibling)
            segments = [Segment(tokens, seed, prompt.messages)]
            episode = self.by.environments.episode(prompt, until_s)
            yield Program(f"{prompt.id}/{step}/{sibling}", place, prompt, episode, segments)

    def submit(self, program: Program) -> None:
        """Ask for its next turn, or the rest of one. CapacityError where its context has outgrown the engine."""
        if self._held is not None:
            self._held.append(program)
            return
        may = self.allowed(program)
        if may is not None and may <= 0:
            self.later.append(program)
            return
        segment, sampling, most = program.segments[-1], self.by.sampling, self.by.config.max_program_tokens
        drawn: tuple[int, ...] = ()
        if program.carried is None:
            program.requests += 1
        else:
            drawn = program.carried.tokens
        left = sampling.max_new_tokens - len(drawn)
        if most:
            left = min(left, most - program.sampled - len(drawn))
        if may is not None and may < left:
            left = may
            self._cut.add(program)
        if left != sampling.max_new_tokens:
            sampling = dataclasses.replace(sampling, max_new_tokens=left)
        # One seed for all turns: noise is keyed by absolute position, and no position of a segment is sampled twice.
        tokens = (*segment.context, *drawn)
        if segment.turns or drawn or (program.ran and program.requests == 1):
            new = 1 + (len(segment.turns[-1].observation_tokens) if segment.turns and not drawn else 0)
        else:
            new = len(tokens)
        given = (program.request_id, program.id, tokens, sampling, segment.seed)
        priority = int(self.by.config.returning_first and (program.requests > 1 or program.carried is not None))
        ran = max(0, len(tokens) - new)
        hints = LAST if program.requests >= self.by.config.max_turns else None
        request = Request(
            *given,
            tenant=self.by.config.tenant,
            priority=priority,
            group=program.group,
            carried=len(drawn),
            ran=ran,
            hints=hints,
            constraint=program.constraint,
        )
        self.waits.submit(program, request, program.count if self.counts else None)

    def _prepare(self, program_id: str) -> None:
        """A program whose request waits for a place is soon to have it: its environment may set itself up meanwhile.

        Called by whoever drives the engine.
        """
        for program in list(self.waits.requests.values()):
            if program.id == program_id:
                program.episode.prepare()

    def hold(self) -> None:
        """Have the engine give back what it is drawing, and ask nothing of it until `go_on`.

        A request that ended with an error gives back nothing: it is asked for again then, and told then.
        """
        assert self._held is None, "held twice"
        self._held = []
        for request_id in self.waits.requests:
            self.by.driver.abort(request_id)
        while self.waits.requests:
            for program, asked, future in self.waits.ended(HOLD_S):
                if asked == "engine" and future.exception(0) is not None:
                    self.unanswered(program)
                else:
                    self.take(program, asked, future.result(0))

    def go_on(self) -> None:
        """Ask for what was held back."""
        assert self._held is not None, "not held"
        held, self._held, self.later = [*self._held, *self.later], None, []
        for program in held:
            self._go_on(program, 0)

    def drop(self, program: Program) -> None:
        """Ask nothing more for it, while held."""
        assert self._held is not None, "not held"
        if program in self._held or program in self.later:
            (self._held if program in self._held else self.later).remove(program)
            self.keep(program)
        else:
            self.waits.drop(program)

    def keep(self, program: Program) -> None:
        """What it has of a turn that does not end."""
        if program.carried is not None:
            program.turns.append(Turn(program.carried))
            program.carried = None

    def again(self, program: Program, asked: str) -> None:
        """Ask once more for what it waited for, in another process."""
        if asked == "environment":
            self.waits.ask(program, "environment", program.episode.observe(bool(program.last)))
        elif asked == "reward":
            self._grade(program)
        else:
            self.submit(program)

    def unanswered(self, program: Program) -> None:
        """Its request ended with an error: the next `go_on` asks for it again."""
        program.requests -= program.carried is None
        self.later.append(program)

    def take(self, program: Program, asked: Asked, answer: Any) -> None:
        """What came back for a program."""
        if asked == "engine":
            if program.carried is not None:
                answer, program.carried = joined(program.carried, answer), None
            cut = program in self._cut
            self._cut.discard(program)
            if cut and answer.stop_reason is StopReason.LENGTH:
                program.carried = answer
                (self.later if self._held is None else self._held).append(program)
                return
            if self._held is not None and answer.stop_reason is StopReason.ABORTED:
                program.carried = answer
                self._held.append(program)
                return
            program.turns.append(Turn(answer))
            program.unheard = 0
            self._say(program, answer.tokens)
            self._limit(program, answer)
            if answer.stop_reason is StopReason.ABORTED:
                self.end(program, Failure("engine", "its request was withdrawn"))
            elif answer.stop_reason is StopReason.FAILED:
                self.end(program, Failure("engine", answer.failure))
            elif self.by.config.max_turns > 1 or program.prompt.tools:
                last = bool(program.last)  # it acts on that one too, and is heard no more
                self.waits.ask(program, "environment", program.episode.observe(last))
            else:
                self._grade(program)
        elif asked == "reward" or isinstance(answer, Failure):
            self.end(program, answer)
        else:
            program.observed.append(answer)
            program.turns[-1] = dataclasses.replace(program.turns[-1], reward=answer.reward, state=answer.state)
            if answer.messages is None:
                self._grade(program)
            elif program.last:
                program.limits[program.last] = 1
                self._grade(program)
            else:
                self._continue(program, answer.messages)

    def _limit(self, program: Program, answer: Completion) -> None:
        """Whether it has reached a limit: with this turn it ends."""
        config = self.by.config
        program.sampled, program.drawn = program.sampled + len(answer.columns), 0
        if config.max_program_tokens and program.sampled >= config.max_program_tokens:
            program.last = "token_limit"
            if answer.stop_reason is StopReason.LENGTH:  # in the middle of the turn
                program.limits[program.last] = 1
        elif program.requests >= config.max_turns:
            program.last = "turn_limit"
        elif self.overtime(program):
            program.last = "time_limit"

    def _overtime(self, program: Program) -> bool:
        most_s, first = self.by.config.max_program_s, program.segments[0].turns[0].completion
        return most_s > 0 and self.by.clock() - first.started_s >= most_s

    def _say(self, program: Program, tokens: Sequence[int]) -> None:
        """A completion, as the message that the environment reads."""
        tools, said = program.prompt.tools, program.episode.said
        parsed = self.by.config.history == "render"
        said.append(self.by.renderer.message(tokens, tools, len(said), parsed=parsed))

    def _grade(self, program: Program) -> None:
        self.by.over(program)
        with self.by.trace.span("reward"):  # those of linear cost are computed here
            future = program.episode.score(program.unheard)
        self.waits.ask(program, "reward", future)

    def _continue(self, program: Program, observed: tuple[Message, ...] | Fold) -> None:
        try:
            self._append(program, observed)
        except ModelError as error:  # the template does not take what this environment said
            self.end(program, Failure("environment", str(error)))
            return
        self._go_on(program, len(observed.messages if isinstance(observed, Fold) else observed))

    def _go_on(self, program: Program, unheard: int) -> None:
        """unheard: messages that came since its last turn."""
        program.unheard = unheard or program.unheard
        try:
            self.submit(program)
        except CapacityError:  # the prompt did fit: this conversation has outgrown the engine, and is graded as it is
            if not program.turns:
                program.segments.pop()
            program.limits["context_limit"] = 1
            self._grade(program)
        except ConfigError as error:
            if not program.observed or program.constraint is None:
                raise
            self.end(program, Failure("environment", f"its constraint: {error}"))

    def _append(self, program: Program, observed: tuple[Message, ...] | Fold) -> None:
        """Tokens of an observation, behind the last turn or as the start of a segment."""
        renderer, segment, prompt = self.by.renderer, program.segments[-1], program.prompt
        if isinstance(observed, Fold):
            start = renderer.prompt_tokens(observed.messages, prompt.tools)
            self._begin(program, start, tuple(observed.messages), "fold")
            return
        if self.by.config.history == "render":
            self._render(program, observed)
            return
        completion = segment.turns[-1].completion
        said = program.episode.said[segment.begun : len(program.episode.said) - len(observed) - 1]
        tokens = renderer.observation_tokens(completion.tokens, observed, (*segment.messages, *said), prompt.tools)
        segment.turns[-1] = dataclasses.replace(segment.turns[-1], observation_tokens=tokens)

    def _render(self, program: Program, observed: Sequence[Message]) -> None:
        """The whole conversation, behind the last turn where it goes on from there, else as the start of a segment."""
        renderer, segment = self.by.renderer, program.segments[-1]
        messages = (*segment.messages, *program.episode.said[segment.begun :])
        whole, context = renderer.conversation_tokens(messages, program.prompt.tools, observed), segment.context
        said = [message for message in program.episode.said[segment.begun :] if message.sampled]
        if cause := split_cause(renderer, context, whole, segment.starts, said):
            self._begin(program, whole, messages, cause)
        else:
            segment.turns[-1] = dataclasses.replace(segment.turns[-1], observation_tokens=whole[len(context) :])

    def _begin(self, program: Program, start: tuple[int, ...], messages: tuple[Message, ...], cause: str) -> None:
        """A segment of a program's own noise."""
        seed = derive_seed(program.segments[-1].seed, len(program.segments), program.prompt.id, 0)
        program.segments.append(Segment(start, seed, messages, len(program.episode.said), cause))


def _any(program: Program) -> None:
    return None


def joined(first: Completion, then: Completion) -> Completion:
    """A turn that two requests drew, one behind the other.

    >>> from tandem.types import Completion, StopReason
    >>> parts = [Completion("r", Columns.of(tokens=(n,)), StopReason.ABORTED, n, n, n + 1.0, n) for n in (5, 7)]
    >>> whole = joined(*parts); whole.tokens, whole.started_s, whole.finished_s, whole.cached_tokens
    ((5, 7), 5, 8.0, 12)
    """
    parts = [one.columns for one in (first, then) if len(one.columns)]
    return dataclasses.replace(
        then,
        columns=Columns.concat(parts) if parts else then.columns,
        submitted_s=first.submitted_s,
        started_s=first.started_s,
        cached_tokens=first.cached_tokens + then.cached_tokens,
        recomputed_tokens=first.recomputed_tokens + then.recomputed_tokens,
    )
