"""Answers that a task has written, as trajectories: what is learned from texts without sampling any."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tandem.algo.advantage import Selection
from tandem.algo.pack import count_prompts
from tandem.columns import Columns
from tandem.errors import CapacityError
from tandem.program.render import Renderer
from tandem.types import Group, Prompt, Sample, Trajectory


def written(prompts: Sequence[Prompt], solutions: Sequence[str], renderer: Renderer, most_tokens: int) -> list[Group]:
    """A group of one for each prompt: its solution as if the model had said it, end of turn included.

    The loss mask covers the solution alone. CapacityError for a text of more than `most_tokens`, the model's positions:
    nothing is cut in silence.
    """
    groups = []
    for prompt, solution in zip(prompts, solutions, strict=True):
        asked, said = renderer.prompt_tokens(prompt.messages, prompt.tools), renderer.answer_tokens(solution)
        if len(asked) + len(said) > most_tokens:
            raise CapacityError(
                f"the text of {prompt.id} has {len(asked) + len(said)} tokens and the model {most_tokens} positions. "
                "Leave it out of the task, or train a model of more positions."
            )
        mask = np.repeat([False, True], [len(asked), len(said)])
        columns = Columns.of(tokens=asked + said, loss_mask=mask)
        groups.append(Group(prompt, (Trajectory(f"{prompt.id}/0", prompt.id, columns),)))
    return groups


def texts(groups: Sequence[Group]) -> Selection:
    """All of written groups, to train."""
    samples = tuple(Sample(t.id, t.prompt_id, t.columns) for group in groups for t in group.trajectories)
    return Selection(samples, count_prompts(samples), {sample.id: "trained" for sample in samples})
