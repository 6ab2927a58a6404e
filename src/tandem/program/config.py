"""What a run asks of the model: the task, its prompts and its reward."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Interval

from tandem.config import AboveZero, Count, Positive, section
from tandem.errors import ConfigError, TandemWarning, nearest
from tandem.sandbox.config import SandboxConfig

REWARD_NAMES = ("score", "last_number", "exact", "math_verify")
JUDGE = "model:"  # begins a reward that a trained reward model says; what follows is its run's folder

PLACE = re.compile(r"\{(\w+)\}")  # of a field in task.template

MAX_REWARD = 1e9  # squares of it, summed over a batch and over a model's weights, stay finite in fp32
Reward = Annotated[float, Interval(ge=-MAX_REWARD, le=MAX_REWARD)]
Scalar = int | float | str | bool
Format = Literal["auto", "chat", "plain"]
ToolFormat = Literal["auto", "hermes", "qwen3_coder", "llama3", "mistral", "harmony", "fenced"]
ControlTokens = Literal["text", "as_template"]


@dataclass(frozen=True, slots=True)
@section("task")
class TaskConfig:
    """A task by name, or a user's own class.

    `environment` is "reasoning_gym" (any data set of that package, by `name`), "jsonl" (a file of questions and
    answers) or a user's own "path/to/file.py:Class" or "package.module:Class".

    >>> TaskConfig(parameters=(("min_terms", 2), ("max_terms", 2))).name
    'chain_sum'
    """

    environment: str = "reasoning_gym"  # or jsonl, path/to/file.py:Class, package.module:Class
    name: str = "chain_sum"  # the reasoning-gym data set; unused elsewhere
    parameters: tuple[tuple[str, Scalar], ...] = ()  # keyword arguments of the data set or of the user's class
    path: str = ""  # jsonl: training questions, one JSON object a line
    heldout_path: str = ""  # jsonl: held-out questions; empty splits them off `path`
    question_field: str = "question"  # of a jsonl line
    answer_field: str = "answer"  # text or a number; of "reasoning #### 42" the 42 is the answer
    system: str = ""  # system message put first where a prompt has none; empty leaves the template's own
    template: str = "{question}"  # the user message, reasoning_gym and jsonl; of the first also texts of its metadata
    format: Format = "auto"  # of prompts: chat (by the model's template), plain (text alone); auto: chat where it can
    tool_format: ToolFormat = "auto"  # of calls in what the model writes; auto: as its chat template writes them
    control_tokens: ControlTokens = "text"  # spelt in a message: they stay text, or are read, as_template
    template_arguments: tuple[
        tuple[str, Scalar], ...
    ] = ()  # for the chat template: enable_thinking=false; JSON in a text
    reward: str = "score"  # the environment's own; or last_number, exact, math_verify, model:RUN of a reward model
    train_size: Count = 0  # training prompts before they repeat; 0: the whole file, or without end
    heldout_size: Count = 128  # distinct questions kept for evaluation, never trained on
    seed: int = 0  # of the prompts, apart from the run's seed: runs with other seeds see the same task
    reward_deadline_s: AboveZero = 10.0  # seconds for one call of a reward or an environment
    reward_on_error: Reward | None = None  # for an answer that breaks its grader; none: its program fails, untrained
    memory_bytes: Positive = 4 << 30  # own data of one child: a grader that takes more gets a MemoryError
    sandbox: SandboxConfig = SandboxConfig()  # where code of the model runs, if the environment runs any
    workers: Positive = 4  # child processes at most that answer for environments; another comes up where calls wait
    python: str = ""  # their interpreter, of a virtual environment with other packages (same Python); empty: tandem's

    def __post_init__(self) -> None:
        if self.environment not in ("reasoning_gym", "jsonl") and not _is_reference(self.environment):
            raise ConfigError(
                f"task.environment is {self.environment!r}. Allowed: reasoning_gym, jsonl, path/to/file.py:Class or "
                "package.module:Class."
            )
        if self.reward not in REWARD_NAMES and not self.judge:
            allowed = (*REWARD_NAMES, f"{JUDGE}RUN")
            raise ConfigError(f"task.reward is {self.reward!r}.{nearest(self.reward, allowed)}")
        if self.environment == "jsonl" and not (self.path or self.heldout_path):
            raise ConfigError("task.path is empty. Give the file: --set task.path=train.jsonl")
        if "{question}" not in self.template and not (
            self.environment == "reasoning_gym" and PLACE.search(self.template)
        ):
            raise ConfigError(f"task.template is {self.template!r}. It must hold {{question}}.")
        self.arguments()
        for name in ("system", "template", "path", "heldout_path", "question_field", "answer_field", "python"):
            if half := half_character(getattr(self, name)):
                raise ConfigError(f"task.{name} {half}")
        if self.is_user and self.template != "{question}":
            raise ConfigError("task.template is for reasoning_gym and jsonl; your environment writes its own prompts.")

    def override_base(self, changes: Mapping[str, Any]) -> TaskConfig:
        """What settings are made on (see config.override): another task starts from the defaults, for prompts, rewards
        and parameters of this one are none of its own.
        """
        environment = changes.get("environment", self.environment)
        named = environment == "reasoning_gym" and changes.get("name", self.name) != self.name
        if environment == self.environment and not named:
            return self
        fresh = TaskConfig()
        own = {field.name for field in fields(self) if getattr(self, field.name) != getattr(fresh, field.name)}
        if dropped := sorted(own - {"environment", "name", *changes}):
            settings = ", ".join(f"task.{name}" for name in dropped)
            text = f"another task than {self.label}: its {settings} are dropped. Set them where the new one needs them."
            warnings.warn(text, TandemWarning, stacklevel=2)
        return fresh

    def arguments(self) -> dict[str, Any]:
        """`template_arguments` by name; a text that is a JSON list or object stands for that.

        >>> TaskConfig(template_arguments=(("documents", '[{"text": "a"}]'), ("enable_thinking", False))).arguments()
        {'documents': [{'text': 'a'}], 'enable_thinking': False}
        """
        found: dict[str, Any] = {}
        for name, value in self.template_arguments:
            if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
                try:
                    found[name] = json.loads(value)
                except ValueError as error:
                    raise ConfigError(
                        f"task.template_arguments: {name} begins as JSON, and is none: {error}. Mend it."
                    ) from None
            else:
                found[name] = value
        return found

    @property
    def judge(self) -> str:
        """The folder of the reward model that pays; empty where none does.

        >>> TaskConfig(reward="model:runs/judge").judge
        'runs/judge'
        """
        return self.reward[len(JUDGE) :] if self.reward.startswith(JUDGE) else ""

    @property
    def label(self) -> str:
        """What prompt ids and messages call the task."""
        if self.environment == "reasoning_gym":
            return self.name
        if self.environment == "jsonl":
            return Path(self.path or self.heldout_path).stem
        return self.environment.rsplit(":", 1)[1]

    @property
    def is_user(self) -> bool:
        return self.environment not in ("reasoning_gym", "jsonl")


def _is_reference(text: str) -> bool:
    module, separator, attribute = text.rpartition(":")
    return bool(module and separator and attribute.isidentifier())


def half_character(text: str) -> str:
    """Why no tokeniser takes `text`; empty where it does."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"holds \\u{ord(text[error.start]):04x}, half of a character, at {error.start}. Write it whole."
    return ""
