"""How a program goes on: from the engine to its environment and back, until it ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tandem.errors import CapacityError, ModelError
from tandem.numerics.random import derive_seed
from tandem.program.environment import Fold
from tandem.rollout.group import program_id
from tandem.rollout.history import split_cause
from tandem.rollout.program import Program, Segment
from tandem.rollout.waits import Asked, Waits
from tandem.types import Completion, Failure, Message, Request, StopReason, Turn

if TYPE_CHECKING:
    from tandem.rollout.rollout import Rollouts


class Turns:
    """What is asked for programs, of the engine and of environments, and what becomes of the answers.

    end: called with a program that ends and its reward, or why it has none. counts: whether `Program.drawn` is kept.
    """

    def __init__(self, by: Rollouts, end: Callable[[Program, float | Failure], None], counts: bool = False) -> None:
        self.by = by
        self.waits = Waits(by.driver, by.trace)
        self.end = end
        self.counts = counts

    def submit(self, program: Program) -> None:
        """Ask for its next turn. CapacityError where its context has outgrown the engine."""
        # One seed for all turns: noise is keyed by absolute position, and no position of a segment is sampled twice.
        segment = program.segments[-1]
        sampling, most = self.by.sampling, self.by.config.max_program_tokens
        if most and most - program.sampled < sampling.max_new_tokens:
            sampling = dataclasses.replace(sampling, max_new_tokens=most - program.sampled)
        program.requests += 1
        given = (program.request_id, program.id, segment.context, sampling, segment.seed)
        priority = int(program.requests > 1 and self.by.config.returning_first)
        request = Request(*given, priority=priority, group=program.group)
        self.waits.submit(program, request, program.count if self.counts else None)

    def take(self, program: Program, asked: Asked, answer: Any) -> None:
        """What came back for a program."""
        if asked == "engine":
            program.turns.append(Turn(answer))
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
        config, first = self.by.config, program.segments[0].turns[0].completion
        program.sampled, program.drawn = program.sampled + len(answer.columns), 0
        if config.max_program_tokens and program.sampled >= config.max_program_tokens:
            program.last = "token_limit"
            if answer.stop_reason is StopReason.LENGTH:  # in the middle of the turn
                program.limits[program.last] = 1
        elif program.requests >= config.max_turns:
            program.last = "turn_limit"
        elif config.max_program_s and self.by.clock() - first.started_s >= config.max_program_s:
            program.last = "time_limit"

    def _say(self, program: Program, tokens: Sequence[int]) -> None:
        """A completion, as the message that the environment reads."""
        tools, said = program.prompt.tools, program.episode.said
        parsed = self.by.config.history == "render"
        said.append(self.by.renderer.message(tokens, tools, len(said), parsed=parsed))

    def _grade(self, program: Program, unheard: int = 0) -> None:
        with self.by.trace.span("reward"):  # those of linear cost are computed here
            future = program.episode.score(unheard)
        self.waits.ask(program, "reward", future)

    def _continue(self, program: Program, observed: tuple[Message, ...] | Fold) -> None:
        try:
            self._append(program, observed)
        except ModelError as error:  # the template does not take what this environment said
            self.end(program, Failure("environment", str(error)))
            return
        try:
            self.submit(program)
        except CapacityError:  # the prompt did fit: this conversation has outgrown the engine, and is graded as it is
            if not program.turns:
                program.segments.pop()
            program.limits["context_limit"] = 1
            self._grade(program, len(observed.messages if isinstance(observed, Fold) else observed))

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
        said = [message for message in program.episode.said[segment.begun :] if message.role == "assistant"]
        if cause := split_cause(renderer, context, whole, segment.starts, said):
            self._begin(program, whole, messages, cause)
        else:
            segment.turns[-1] = dataclasses.replace(segment.turns[-1], observation_tokens=whole[len(context) :])

    def _begin(self, program: Program, start: tuple[int, ...], messages: tuple[Message, ...], cause: str) -> None:
        """A segment of a program's own noise."""
        seed = derive_seed(program.segments[-1].seed, len(program.segments), program.prompt.id, 0)
        program.segments.append(Segment(start, seed, messages, len(program.episode.said), cause))
