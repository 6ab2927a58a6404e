"""Answers that a task has written, as trajectories: what is learned from texts without sampling any."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tandem.corpus.turns import Trained, spoken
from tandem.errors import CapacityError
from tandem.types import Group, Message, Prompt, Trajectory

if TYPE_CHECKING:
    from tandem.program.render import Renderer


def written(prompts: Sequence[Prompt], solutions: Sequence[str], renderer: Renderer, most_tokens: int) -> list[Group]:
    """A group of one for each prompt: its solution as if the model had said it, end of turn included.

    The loss mask covers the solution alone. CapacityError for a text of more than `most_tokens`, the model's positions:
    nothing is cut in silence.
    """
    groups = []
    for prompt, solution in zip(prompts, solutions, strict=True):
        place, messages = f"the text of {prompt.id}", (*prompt.messages, Message("assistant", solution))
        trained = Trained(frozenset({len(prompt.messages)}))
        (columns,) = spoken(renderer, messages, prompt.tools, trained, place).segments
        if len(columns) > most_tokens:
            raise CapacityError(
                f"{place} has {len(columns)} tokens and the model {most_tokens} positions. "
                "Leave it out of the task, or train a model of more positions."
            )
        groups.append(Group(prompt, (Trajectory(f"{prompt.id}/0", prompt.id, columns),)))
    return groups
