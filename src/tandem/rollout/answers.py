"""The answers of an evaluation as they are kept, so that two models are compared without asking either again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tandem.program.vote import vote
from tandem.rollout.evaluate import right
from tandem.types import Group, Prompt, Trajectory


def answer_rows(groups: Iterable[Group], text: Callable[[Sequence[int]], str]) -> list[dict[str, Any]]:
    """A row a prompt, with what it was asked and each sample: docs/evaluation.md has the keys. JSON can hold them.

    text: of sampled tokens, without the stop token.
    """
    return [answer_row(group, text) for group in groups]


def answer_row(group: Group, text: Callable[[Sequence[int]], str]) -> dict[str, Any]:
    """A prompt's row of `answer_rows`."""
    return {
        "id": group.prompt.id,
        "hash": prompt_hash(group.prompt),
        "messages": [message.row() for message in group.prompt.messages],
        "answer": group.prompt.record.get("answer"),
        "samples": [_sample(group.prompt, program, text) for program in group.programs],
    }


def prompt_hash(prompt: Prompt) -> str:
    """Of all that a model is asked and held to: messages, tools and the gold answer; 32 hexadecimal digits."""
    asked = [[message.row() for message in prompt.messages], list(prompt.tools), prompt.record.get("answer")]
    text = json.dumps(asked, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _sample(prompt: Prompt, program: Sequence[Trajectory], text: Callable[[Sequence[int]], str]) -> dict[str, Any]:
    first, last = program[0], program[-1]
    said = next((message.content for message in reversed(last.said) if message.sampled), None)
    if said is None:  # it ended before its turn was read
        said = text(last.columns["tokens"][last.columns["loss_mask"]].tolist())
    return {
        "reward": None if first.failure else first.reward,
        "right": first.failure is None and right(first),
        "vote": vote(prompt, said),
        "text": said,
        "tokens": sum(segment.num_sampled for segment in program),
        "stop": last.stop_reason.value if last.stop_reason else None,
        "failure": f"{first.failure.where}: {first.failure.reason}" if first.failure else None,
    }
