"""What a teacher of other tokens says of a student's texts: its log-probs of the spans that both write alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING

import numpy as np

from tandem.algo.advantage import Selection
from tandem.algo.pack import count_prompts
from tandem.algo.spans import aligned, numbered
from tandem.columns import Columns
from tandem.corpus.reader import Reader, refused
from tandem.errors import CapacityError, ConfigError
from tandem.program.render import Renderer, renderer_of
from tandem.rollout.pieces import Pieces
from tandem.run.distil import load_teacher, open_teacher
from tandem.train.score import with_logprobs
from tandem.types import Group, Prompt, Sample

if TYPE_CHECKING:
    from tandem.algo.objective import Objective
    from tandem.run.config import RunConfig
    from tandem.run.parts import Parts

Filled = Callable[[Selection, Sequence[Group]], Selection]
BROKEN = "\ufffd"  # in a decoded text: bytes that are no character, which the other side can't write


def filler_of(config: RunConfig, parts: Parts, objective: Objective) -> Filled:
    """What completes a batch whose objective compares spans of text; another is as it was."""
    if "spans" not in objective.columns:
        return lambda batch, groups: batch
    return SpanTeacher(config, parts.renderer, parts.tokenizer.now).filled


def no_answer(student: Renderer, prompt: Prompt, columns: Columns) -> str:
    """Why distil.spans cannot compare a text; empty where it is one answer to its prompt, of which the teacher is told
    the messages."""
    tokens, mask = columns["tokens"], columns["loss_mask"]
    asked = student.conversation_tokens(prompt.messages, prompt.tools) if prompt.messages else ()
    if asked and not mask[: len(asked)].any() and mask[len(asked) :].all() and tuple(tokens[: len(asked)]) == asked:
        return ""
    return (
        "distil.spans compares one answer to a prompt, and this is a document, has several turns, or trains some of "
        "an answer alone. Take it out (corpus.bad=count leaves such rows out), or choose a teacher of the student's "
        "tokens."
    )


class Answers:
    """A source's rows, of which those that distil.spans cannot compare are refused."""

    def __init__(self, reader: Reader, student: Renderer) -> None:
        self.name, self.digest, self.left_out = reader.name, reader.digest, reader.left_out
        self._reader, self._student = reader, student

    def __len__(self) -> int:
        return len(self._reader)

    def place(self, number: int) -> str:
        return self._reader.place(number)

    def group(self, number: int) -> Group:
        group = self._reader.group(number)
        for one in group.trajectories:
            if why := no_answer(self._student, group.prompt, one.columns):
                raise refused("no single answer", self.place(number), why)
        return group


class SpanTeacher:
    """A teacher that reads each prompt by its own template, and the answer's text in its own tokens."""

    def __init__(self, config: RunConfig, student: Renderer, now: datetime) -> None:
        """now: what templates that write the date see."""
        self._config = config
        self._student = student
        self._own = Pieces(student.tokenizer.decode)
        source = config.distil.teacher
        tokenizer = open_teacher(source).load_tokenizer()
        tokenizer.now = now
        self._renderer = renderer_of(tokenizer, config.task)
        self._others = Pieces(tokenizer.decode)
        self._decoder = load_teacher(source, config.model)

    def filled(self, batch: Selection, groups: Sequence[Group]) -> Selection:
        """The batch with `spans` and `span_logprobs` of its samples."""
        if not batch.samples:
            return batch
        prompts = {one.id: group.prompt for group in groups for one in group.trajectories}
        read = [self._read(sample, prompts[sample.id]) for sample in batch.samples]
        asked, budget = self._config.distil, self._config.learner.microbatch_tokens
        others = [other for other, _, _ in read]
        scored = with_logprobs(
            "reference_logprobs", self._decoder, others, count_prompts(others), budget, asked.temperature
        )
        samples = [
            _filled(sample, other, own, ends)
            for sample, other, (_, own, ends) in zip(batch.samples, scored, read, strict=True)
        ]
        return dataclasses.replace(batch, samples=tuple(samples))

    def _read(self, sample: Sample, prompt: Prompt) -> tuple[Sample, list[int], list[int]]:
        """The text as the teacher reads it, and the ends of spans, in trained tokens of the student and of its own."""
        if why := no_answer(self._student, prompt, sample.columns):
            raise ConfigError(f"{sample.id}: {why}")
        tokens = sample.columns["tokens"][sample.columns["loss_mask"]].tolist()
        ended = bool(tokens) and tokens[-1] in self._student.stop_token_ids
        said = tokens[:-1] if ended else tokens
        text = self._student.tokenizer.decode(said)
        own = self._own.lengths(said, text)
        encoded = list(self._renderer.tokenizer.encode(text, False))
        read = self._renderer.tokenizer.decode(encoded)
        whole = text.partition(BROKEN)[0]
        pairs = aligned(own, self._others.lengths(encoded, read)) if read.startswith(whole) else []
        ends = [(one, other) for one, other in pairs if sum(own[:one]) <= len(whole)]
        answer = list(self._renderer.answer_tokens(text)) if ended else encoded
        whole_text = (ends[-1] if ends else (0, 0)) == (len(said), len(encoded))
        if ended and whole_text and len(answer) > len(encoded):
            ends.append((len(tokens), len(answer)))
        before = list(self._renderer.prompt_tokens(prompt.messages, prompt.tools))
        most = self._decoder.spec.max_position
        if len(before) + len(answer) > most:
            raise CapacityError(
                f"the text of {sample.id} has {len(before) + len(answer)} tokens of the teacher, which has {most} "
                "positions. Leave it out, or choose a teacher of more positions."
            )
        columns = Columns.of(tokens=before + answer, loss_mask=np.repeat([False, True], [len(before), len(answer)]))
        other = Sample(sample.id, sample.prompt_id, columns)
        return other, [one for one, _ in ends], [end for _, end in ends]


def _filled(sample: Sample, other: Sample, own: Sequence[int], theirs: Sequence[int]) -> Sample:
    mask, counted = sample.columns["loss_mask"], other.columns["loss_mask"]
    logprobs = other.columns["reference_logprobs"][counted]
    spans, sums = np.full(len(mask), -1, np.int32), np.zeros(len(mask))
    places = np.flatnonzero(mask)
    spans[places] = numbered(own, len(places))
    for end, start, stop in zip(own, (0, *theirs), theirs, strict=False):
        sums[places[end - 1]] = logprobs[start:stop].sum()
    return dataclasses.replace(sample, columns=sample.columns.having(spans=spans, span_logprobs=sums))
