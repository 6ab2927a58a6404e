"""A trained reward model asked for what it says of an answer: as a reward, or to rank answers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tandem.columns import Columns
from tandem.errors import CapacityError
from tandem.models.checkpoint import open_checkpoint
from tandem.models.decoder import Decoder
from tandem.program.config import TaskConfig
from tandem.program.render import Renderer, renderer_of
from tandem.run.config import RunConfig
from tandem.run.folder import saved_config
from tandem.run.source import resolve_source
from tandem.train import reward
from tandem.types import Message, Prompt, Sample

if TYPE_CHECKING:
    from tandem.algo.preference import RewardHead

ROWS = 4096  # of a microbatch


class _Loaded(NamedTuple):
    head: RewardHead
    renderer: Renderer


class Judge:
    """The reward model of a run's folder, or of one of its checkpoints. It is loaded when it is first asked."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def __call__(self, prompt: Prompt | Sequence[Message], text: str) -> float:
        """Of one answer, its end of turn included. ModelError where the folder holds no reward model."""
        return self.rewards([(prompt, text)])[0]

    def rewards(self, answers: Sequence[tuple[Prompt | Sequence[Message], str]]) -> list[float]:
        """Of several at once; each is what it is alone, to the bit."""
        head, renderer = self._loaded
        samples, places = list[Sample](), dict[tuple[int, ...], int]()
        for number, (prompt, text) in enumerate(answers):
            messages, tools = (prompt.messages, prompt.tools) if isinstance(prompt, Prompt) else (prompt, ())
            asked, said = renderer.prompt_tokens(messages, tools), renderer.answer_tokens(text)
            if len(asked) + len(said) > head.trunk.spec.max_position:
                raise CapacityError(
                    f"an answer has {len(asked) + len(said)} tokens with its prompt, and the reward model "
                    f"{self.folder} {head.trunk.spec.max_position} positions. Lower rollout.max_new_tokens."
                )
            mask = np.repeat([False, True], [len(asked), len(said)])
            prompt_id = str(places.setdefault(tuple(asked), number))  # whose rows are run once for all its answers
            samples.append(Sample(f"{number}/0/0", prompt_id, Columns.of(tokens=asked + said, loss_mask=mask)))
        return reward.rewards(head, samples, ROWS)

    def load(self) -> None:
        """Read it now. ModelError where the folder holds no reward model."""
        _ = self._loaded

    @cached_property
    def _loaded(self) -> _Loaded:
        where = Path(resolve_source(str(self.folder)))
        checkpoint = open_checkpoint(str(where))
        task, dtype = TaskConfig(), "bfloat16"
        run = next((one for one in (self.folder, where.parent.parent) if (one / "checkpoints").is_dir()), None)
        if run is not None:
            config = saved_config(run, RunConfig)
            task, dtype = config.task, config.model.dtype
        head = reward.load(where, Decoder(checkpoint.spec, dtype).load(checkpoint.tensors()))
        return _Loaded(head, renderer_of(checkpoint.load_tokenizer(), task))
