"""Gymnasium-style environments: anything with `reset` and `step` whose observations are text or have a text form."""

from __future__ import annotations

import inspect
import json
import re
from typing import Any

from tandem.errors import TaskError
from tandem.program.adapters.action import last_line, named, package, seed_of
from tandem.program.environment import Environment, Episode, Step
from tandem.types import Message, Prompt

PIN = "gymnasium==1.4.0"
COLOURS = ("black", "red", "green", "yellow", "blue", "magenta", "cyan", "white")
_ESCAPE = re.compile(r"\x1b\[([\d;]*)([A-Za-z])")


class GymText(Environment):
    """An environment by its id in Gymnasium's registry, or what a callable makes.

    id: of `gymnasium.make` ("module:id" imports the module first). make: "package.module:callable" in its place, given
    the options and, where it takes one, the `seed`. instructions: the first message's text, before the observation.
    actions: names of a Discrete space's actions in order, "left/down/right/up". patience: so many texts in a row that
    are no action end the run. hidden: a seed draws more than the first observation shows, so prompts of other seeds are
    other questions. Any other parameter is an option of `make`.

    The action is what the model marks as <action>...</action>, or the last line of its text.
    """

    def __init__(
        self,
        id: str = "",
        make: str = "",
        instructions: str = "",
        actions: str = "",
        patience: int = 3,
        hidden: bool = False,
        seed: int = 0,
        **options: Any,
    ) -> None:
        if bool(id) == bool(make):
            raise TaskError("task.parameters: give id=ENVIRONMENT or make=package.module:callable, one of them.")
        self.build = named(make, "make") if make else package("gymnasium", PIN).make
        self.takes_seed = bool(make) and "seed" in inspect.signature(self.build).parameters
        self.first = (id,) if id else ()
        self.options, self.seed, self.patience = options, seed, patience
        self.instructions, self.hidden = instructions, hidden
        self.names = [name.strip() for name in actions.split("/") if name.strip()]
        made, _ = self.begun(0)
        self.allowed = allowed(made, self.names)
        close(made)

    def begun(self, seed: int) -> tuple[Any, str]:
        """An environment reset by `seed`, and the text of what it shows."""
        made = self.build(*self.first, **self.options, **({"seed": seed} if self.takes_seed else {}))
        found = made.reset(seed=seed)
        observation = found[0] if isinstance(found, tuple) and len(found) == 2 else found
        return made, text_of(made, observation)

    def prompt(self, split: str, index: int) -> Prompt:
        seed = seed_of(self.seed, split, index)
        made, text = self.begun(seed)
        close(made)
        ask = f"Answer with one action on the last line. Actions: {self.allowed}."
        content = "\n\n".join(part for part in (self.instructions or ask, text) if part)
        return Prompt(f"{split}/{index}", (Message("user", content),), {"seed": seed, "first": text})

    def key(self, prompt: Prompt) -> str:
        return f"{prompt.messages[-1].content}\n{prompt.record['seed'] if self.hidden else ''}"

    def episode(self, prompt: Prompt) -> Episode:
        return _Run(prompt, self)


class _Run(Episode):
    """One run, from the state that the prompt shows."""

    def __init__(self, prompt: Prompt, task: GymText) -> None:
        super().__init__(prompt)
        self.task = task
        self.bad = 0  # texts in a row that are no action

    def setup(self) -> None:
        self.made, self.text = self.task.begun(self.prompt.record["seed"])
        if self.text != self.prompt.record["first"]:
            raise ValueError(
                "reset(seed=...) does not give what the prompt shows: the environment draws from elsewhere"
            )

    def observe(self, turns: tuple[Message, ...]) -> Step:
        before = self.text
        word = last_line(turns[-1].content)
        try:
            action = chosen(self.made, word, self.task.names)
        except ValueError as error:
            self.bad += 1
            self.counts["bad_actions"] += 1
            told = [Message("user", f"{error} Actions: {self.task.allowed}.")]
            return Step(None if self.bad >= self.task.patience else told, state=before)
        self.bad = 0
        observation, reward, *ends = self.made.step(action)
        done, cut = (bool(ends[0]), bool(ends[1]) if len(ends) == 3 else False)
        self.counts["cut_by_environment"] += cut and not done
        self.text = text_of(self.made, observation)
        return Step(None if done or cut else [Message("user", self.text)], float(reward), before)

    def teardown(self) -> None:
        if hasattr(self, "made"):
            close(self.made)


def text_of(made: Any, observation: Any) -> str:
    """Text as it is; else what an environment with render_mode="ansi" draws; else the observation as JSON."""
    if isinstance(observation, str):
        return observation
    if getattr(made, "render_mode", None) == "ansi" and isinstance(drawn := made.render(), str):
        return plain(drawn).strip("\n")
    return json.dumps(_plain_values(observation))


def plain(drawn: str) -> str:
    """Without escape codes: what is coloured is written in brackets, for a colour may be all that tells.

    >>> plain("\\x1b[41mS\\x1b[0mFF \\x1b[35m\\x1b[43mR\\x1b[0m\\x1b[0m \\x1b[43m \\x1b[0m\\x1b[2J")
    '[red S]FF [magenta yellow R] [yellow]'
    """
    parts: list[str] = []
    colours: list[str] = []
    texts = _ESCAPE.split(drawn)  # text, codes, letter, text, ...
    for position in range(0, len(texts), 3):
        text = texts[position]
        parts.append(f"[{' '.join([*colours, text.strip()]).rstrip()}]" if text and colours else text)
        if texts[position + 2 : position + 3] == ["m"]:
            for code in [int(code or 0) for code in texts[position + 1].split(";")]:
                if code == 0:
                    colours = []
                elif 30 <= code <= 37 or 40 <= code <= 47:
                    colours.append(COLOURS[code % 10])
    return "".join(parts)


def _plain_values(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain_values(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_values(one) for one in value]
    return value.tolist() if hasattr(value, "tolist") else value


def allowed(made: Any, names: list[str]) -> str:
    """The actions, in words; TaskError where `names` are not those of the space."""
    space: Any = getattr(made, "action_space", None)
    numbers = range(space.start, space.start + space.n) if type(space).__name__ == "Discrete" else range(0)
    if names and len(numbers) != len(names):
        raise TaskError(f"task.parameters: actions names {len(names)}, and the action space is {space}.")
    if names:
        return ", ".join(names)
    if numbers:
        return f"{numbers[0]} to {numbers[-1]}"
    return "any text" if space is None or type(space).__name__ == "Text" else f"JSON of {space}"


def chosen(made: Any, word: str, names: list[str]) -> Any:
    """The action that a text names; ValueError, to be told to the model, where it names none."""
    space: Any = getattr(made, "action_space", None)
    if names:
        lower = [name.lower() for name in names]
        if word.lower().strip(" .'\"[]") in lower:
            return lower.index(word.lower().strip(" .'\"[]")) + int(space.start)
        raise ValueError(f"{word[:80]!r} is no action.")
    if space is None or type(space).__name__ == "Text":
        if space is None or space.contains(word):
            return word
        raise ValueError(f"{word[:80]!r} is no action.")
    try:
        value = json.loads(word)
        value = _shaped(space, value)
        if not isinstance(value, bool) and space.contains(value):
            return value
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    raise ValueError(f"{word[:80]!r} is no action.")


def _shaped(space: Any, value: Any) -> Any:
    """A value of JSON as a space takes it: arrays where it has arrays, tuples where it has tuples."""
    if type(space).__name__ == "Tuple":
        return tuple(_shaped(one, part) for one, part in zip(space.spaces, value, strict=True))
    if type(space).__name__ == "Dict":
        return {key: _shaped(one, value[key]) for key, one in space.spaces.items()}
    if type(space).__name__ in ("Discrete", "Text"):
        return value
    import numpy as np

    return np.asarray(value, dtype=space.dtype)


def close(made: Any) -> None:
    if hasattr(made, "close"):
        made.close()
