"""A model that answers: prompts in, texts out in the order of the prompts, on tandem's own engine."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any, get_args

from tandem.config import override
from tandem.engine.config import EngineConfig
from tandem.engine.constraint import unmet
from tandem.engine.driver import Driver
from tandem.engine.engine import Engine
from tandem.errors import ConfigError, RunFolderError, nearest
from tandem.models.config import ModelConfig
from tandem.numerics.random import derive_seed
from tandem.program.config import Format, TaskConfig
from tandem.rollout.config import RolloutConfig
from tandem.run.asked import conversations, drawing
from tandem.run.parts import Parts, build_parts
from tandem.run.source import trained_as
from tandem.types import Completion, Constraint, Message, Request, Sampling, StopReason

Asked = str | Sequence[Message | Mapping[str, str]]  # one user message, or a conversation

SHOWN = 40  # characters of a prompt in an error
AHEAD = 4  # times engine.max_sequences: requests that wait or have ended behind one that runs


@dataclass(frozen=True, slots=True)
class Answer:
    """What a prompt got.

    >>> Answer(0, 0, "42", 5, Completion("r", (7,), (-0.1,), (), StopReason.LENGTH), (-0.1,)).text
    '42'
    """

    prompt: int  # place among the prompts given
    sample: int  # 0 .. samples - 1
    text: str  # without the stop token or the stop string that ended it
    prompt_tokens: int
    completion: Completion
    logprobs: tuple[float, ...]  # of its tokens, nats, of what was drawn from; where greedy and scored, the model's own
    unmet: str = ""  # why its text is not what the constraint asks: cut off, or what no mask holds


class Model:
    """A loaded model and its engine. Prompts are rendered by the chat template, or as plain text (`load`'s form).

    `opening`: messages before a conversation that has no system message.
    """

    def __init__(self, parts: Parts, opening: Sequence[Message] = ()) -> None:
        self.parts = parts
        self.opening = tuple(opening)

    def generate(
        self,
        prompts: Sequence[Asked],
        *,
        samples: int = 1,
        seed: int = 0,
        constraint: Constraint | None = None,
        **sampling: Any,
    ) -> list[Answer]:
        """`samples` answers to each prompt, in order. `sampling`: fields of RolloutConfig (temperature, top_k, top_p,
        min_p, max_new_tokens, stop_strings); by default greedy, 256 tokens at most. `constraint`: of each answer's text
        (docs/structured.md).
        """
        asked, samples, seed = drawing(sampling, samples, seed)
        return list(self.answers(conversations(prompts), asked, samples, seed, scored=True, constraint=constraint))

    def answers(
        self,
        prompts: Sequence[tuple[Message, ...]],
        asked: RolloutConfig,
        samples: int,
        seed: int,
        *,
        scored: bool = False,
        constraint: Constraint | None = None,
    ) -> Iterator[Answer]:
        """Answers in the order of the prompts, each as soon as it and those before it are done.

        CapacityError where a prompt does not fit; nothing has run then. The answers to a prompt are a function of it,
        its place, the seed and the weights: a sample is the same however many are asked for.
        """
        engine, sampling = self.parts.engine, asked.sampling(self.parts.renderer.stop_token_ids)
        greedy = scored and sampling.greedy
        if greedy:  # the same tokens: the set kept is the one that greedy takes, and has log-probs before
            sampling = replace(sampling, temperature=1.0, top_k=1)
        for request in self._requests(prompts, sampling, 1, seed, constraint):
            engine.check(request)
        coming = self._requests(prompts, sampling, samples, seed, constraint)
        with self.parts.memory.foreseen(), closing(in_order(engine, coming)) as ended:
            for number, (request, completion) in enumerate(ended):
                text = self._text(completion, sampling)
                column = completion.columns["unfiltered_logprobs" if greedy else "logprobs"]
                logprobs = tuple(column.tolist())
                tokens = len(request.tokens)
                odd = "" if constraint is None or completion.failure else unmet(constraint, text)
                yield Answer(number // samples, number % samples, text, tokens, completion, logprobs, odd)

    def _requests(
        self,
        prompts: Sequence[tuple[Message, ...]],
        sampling: Sampling,
        samples: int,
        seed: int,
        constraint: Constraint | None,
    ) -> Iterator[Request]:
        """A request a sample. Rendered when it is asked for: the tokens of many prompts take more than their texts."""
        for index, messages in enumerate(prompts):
            if messages[0].role != "system":
                messages = (*self.opening, *messages)
            tokens = self.parts.renderer.prompt_tokens(messages)
            name = request_id(index, messages[-1].content)
            for sample in range(samples):
                tail = f" (sample {sample + 1})" if samples > 1 else ""
                own = derive_seed(seed, 0, str(index), sample)
                yield Request(name + tail, name, tokens, sampling, seed=own, constraint=constraint)

    def _text(self, completion: Completion, sampling: Sampling) -> str:
        text = self.parts.renderer.text(completion.tokens)
        if completion.stop_reason is StopReason.STOP_STRING:
            text = text[: min(place for string in sampling.stop_strings if (place := text.find(string)) >= 0)]
        return text


def in_order(engine: Engine, requests: Iterator[Request]) -> Generator[tuple[Request, Completion], None, None]:
    """Each request with its completion, in order, as soon as it and those before it are done.

    Requests are taken as there is room: AHEAD times as many as run at once.
    """
    driver, order = Driver(engine), deque[tuple[Request, Future[Completion]]]()
    seen = 0
    try:
        while True:
            while len(order) < AHEAD * engine.scheduler.config.max_sequences:
                if (following := next(requests, None)) is None:
                    break
                order.append((following, driver.submit(following)))
            if not order:
                return
            while order and order[0][1].done():
                request, future = order.popleft()
                yield request, future.result(0)
            if order:
                seen = driver.progress(seen, 0.0)
    finally:
        driver.close(0.0)


def load(
    model: str | PathLike[str] | ModelConfig, engine: EngineConfig | None = None, *, form: Format = "auto"
) -> Model:
    """A model that generates: a Hugging Face folder or hub name, a .gguf file, package:NAME, or a run folder.

    `form`: "chat" (the model's template), "plain" (text alone), or "auto": chat where the model has a template. A run
    is asked as its prompts were: with their system message, and by default in their form; and it
    is rounded as it was trained, where no ModelConfig says otherwise.
    """
    if isinstance(model, ModelConfig):
        config = model
    else:
        config = ModelConfig(fspath(model) if hasattr(model, "__fspath__") else model)
        config = override(config, {name.removeprefix("model."): at for name, at in trained_as(config.source).items()})
    if form not in get_args(Format):
        raise ConfigError(f"form is {form!r}.{nearest(str(form), get_args(Format))}")
    if not isinstance(engine, EngineConfig | None):
        raise ConfigError(f"engine is {engine!r}; wanted an EngineConfig, or None for its defaults.")
    task = asked_as(config.source)
    opening = [Message("system", task.system)] if task.system else []
    if form == "plain" or (form == "auto" and task.format == "plain"):  # who writes all of the text writes its tokens
        task = TaskConfig(format="plain", control_tokens="as_template")
    elif form == "chat":
        task = replace(task, format="chat")
    return Model(build_parts(config, engine or EngineConfig(), learns=False, task=task), opening)


def asked_as(source: str) -> TaskConfig:
    """How a run's prompts were written: its system message, format, control tokens, template arguments. The defaults
    for what is no run.
    """
    folder = Path(source)
    if not ((folder / "config.json").is_file() and (folder / "checkpoints").is_dir()):
        return TaskConfig()
    try:  # these settings alone, so that a run of another version of tandem can be asked too
        task = json.loads((folder / "config.json").read_text(encoding="utf-8"))["task"]
        known = {name: task[name] for name in ("format", "control_tokens", "template_arguments") if name in task}
        return override(TaskConfig(system=str(task["system"])), known)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise RunFolderError(f"{folder / 'config.json'} names no task.system ({error}). Restore the file.") from error


def request_id(index: int, prompt: str) -> str:
    """The id by which an error names a request.

    >>> request_id(1, "What is  1 + 1?\\nAnswer as I would answer it.")
    'prompt 2, What is 1 + 1? Answer as I would answer …'
    """
    words = " ".join(prompt.split())
    return f"prompt {index + 1}, {words if len(words) <= SHOWN else f'{words[:SHOWN]}…'}"
