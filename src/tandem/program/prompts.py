"""Where prompts come from: reasoning-gym, a jsonl file, or a user's class; and which of them are held out."""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import inspect
import json
import math
import os
import random
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from tandem.errors import ConfigError, SandboxError, TaskError, nearest
from tandem.program.config import PLACE, TaskConfig, half_character
from tandem.program.environment import Environment
from tandem.program.episode import fault
from tandem.program.reward import clipped, extract_answer, last_number_in, math_verify, one_number, refusal
from tandem.program.tools import schemas
from tandem.program.worked import worked
from tandem.sandbox.pool import SandboxPool, check
from tandem.types import Message, Prompt

CHUNK_DRAWS = 4096  # draws of one reasoning-gym data set before its seed changes; some limit their size, to 20,000
ATTEMPTS = 256  # draws for one training prompt; where a fifth of the draws is not held out, all fail once in 1e25
MAX_FILE_BYTES, MAX_LINE_BYTES = 4 << 30, 16 << 20  # of a task file: its questions are held in memory
STRIDE = 4099  # draws from one attempt to the next: prime, so that it visits all of a list that a user wraps around

# What a task file is taken for by its first bytes.
OTHER_FORMATS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\x1f\x8b": "gzip", b"(\xb5/\xfd": "zstd", b"PK": "zip"}
OTHER_FORMATS |= {b"PAR1": "Parquet", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}

# Of reasoning-gym 0.1.25 at its default parameters; tests/null/test_gym.py measures every set, docs/rewards.md has all.
NO_ANSWER = "it keeps no answer of its own, so only its scorer knows what is right"
MALFORMED = "its scorer raises on malformed answers; here they get 0"
GYM_FAULTS = {
    "game_of_life_halting": "any text gets full marks",
    "coin_flip": f'"0" gets full marks on most prompts; {MALFORMED}',
    "complex_arithmetic": '"nan" gets full marks; here 0',
    "boxnet": f"{NO_ANSWER}; {MALFORMED}",
    "graph_color": NO_ANSWER,
    "propositional_logic": NO_ANSWER,
    "rubiks_cube": NO_ANSWER,
    "rush_hour": NO_ANSWER,
    "game_of_life": MALFORMED,
    "prime_factorization": MALFORMED,
}
_NOT_FINITE = re.compile(r"(?i)\b(?:nan|inf(?:inity)?)[ij]?\b")


class Prompts(Protocol):
    """An environment with a bounded, disjoint held-out split."""

    environment: Environment
    heldout: tuple[Prompt, ...]

    def train(self, index: int) -> Prompt: ...


def make_prompts(config: TaskConfig) -> Prompts:
    """The task of `config`, ready to be asked; TaskError where its name, file, parameters or split are wrong."""
    if config.environment == "jsonl":
        return FilePrompts(config)
    if config.environment == "reasoning_gym":
        return DrawnPrompts(config, ReasoningGym(config))
    return DrawnPrompts(config, load_user(config))


def question_key(prompt: Prompt) -> str:
    """What makes two prompts the same question: all that is said, whatever the white space."""
    return "\n".join(" ".join(message.content.split()) for message in prompt.messages)


class DrawnPrompts:
    """Prompts drawn without end from an environment. Held-out questions are distinct and are never trained on."""

    def __init__(self, config: TaskConfig, environment: Environment) -> None:
        self.config = config
        self.environment = environment
        self.key: Callable[[Prompt], str] = getattr(environment, "key", None) or question_key
        self.heldout = self._heldout()
        self._heldout_keys = {self.key(prompt) for prompt in self.heldout}
        # A space that the held-out questions exhaust, and answers of no use to the reward, show before any training.
        for prompt in (*self.heldout, self.train(0)) if self.heldout or config.reward != "score" else ():
            if reason := refusal(config.reward, prompt):
                raise TaskError(f"task {config.label}: {reason}")

    def train(self, index: int) -> Prompt:
        """Training prompt `index`, a function of (config, index); repeats after `task.train_size` prompts."""
        position = index % self.config.train_size if self.config.train_size else index
        for attempt in range(ATTEMPTS):
            prompt = self._drawn("train", position + attempt * STRIDE)
            if self.key(prompt) not in self._heldout_keys:
                return dataclasses.replace(prompt, id=f"{self.config.label}/train/{index}")
        raise TaskError(
            f"task {self.config.label}: {ATTEMPTS} draws in a row are held out, so nothing is left to train on. "
            + self._advice()
        )

    def _heldout(self) -> tuple[Prompt, ...]:
        wanted = self.config.heldout_size
        chosen: dict[str, Prompt] = {}
        # n distinct questions within 2n draws leave at least a fifth of an even space: 1 - exp(-2n/K) = n/K at 0.80.
        for draw in range(2 * wanted):
            prompt = self._drawn("heldout", draw)
            name = f"{self.config.label}/heldout/{len(chosen)}"
            chosen.setdefault(self.key(prompt), dataclasses.replace(prompt, id=name))
            if len(chosen) == wanted:
                break
        if len(chosen) < wanted:
            raise TaskError(
                f"task {self.config.label}: {2 * wanted} draws hold only {len(chosen)} distinct questions, too few to "
                f"hold {wanted} out and train on others. " + self._advice()
            )
        return tuple(chosen.values())

    def _drawn(self, split: str, index: int) -> Prompt:
        prompt = self.environment.prompt(split, index)
        if not isinstance(prompt, Prompt) or not prompt.messages:
            raise TaskError(
                f"{type(self.environment).__name__}.prompt({split!r}, {index}) returned {clipped(prompt)}; "
                "it must return a tandem.types.Prompt with at least one message"
            )
        for message in prompt.messages:
            if wrong := fault(message):
                raise TaskError(f"task {self.config.label}: prompt {index} of {split!r} {wrong}")
        if not _is_plain(dict(prompt.record)):
            name, value = next((name, value) for name, value in prompt.record.items() if not _is_plain({name: value}))
            raise TaskError(
                f"task {self.config.label}: prompt {index} of {split!r} has {clipped(value)} in its record's {name!r}; "
                "allowed: text, finite numbers, true and false, None, and lists and dicts of these. Convert it."
            )
        kind = getattr(self.environment, "episodes", None)
        if kind is not None and not prompt.tools:
            prompt = dataclasses.replace(prompt, tools=schemas(kind))
        return _with_system(prompt, self.config.system)

    def _advice(self) -> str:
        return "Lower task.heldout_size or widen task.parameters."


def _is_plain(value: Any) -> bool:
    """Whether JSON, which a run keeps its prompts in, can hold `value`."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


class ReasoningGym(Environment):
    """Any procedural data set of the package reasoning-gym, by name."""

    def __init__(self, config: TaskConfig) -> None:
        self.config = config
        self.entry = functools.lru_cache(maxsize=4096)(self._entry)
        self.chunk = functools.lru_cache(maxsize=8)(self._chunk)
        self.chunk("train", 0)

    def prompt(self, split: str, index: int) -> Prompt:
        entry = self.entry(split, index)
        fields = {**entry.get("metadata", {}), "question": entry["question"]}
        content = PLACE.sub(lambda place: self._field(fields, place[1]), self.config.template)
        record = {"question": entry["question"], "answer": str(entry["answer"]), "split": split, "draw": index}
        return Prompt(f"{self.config.label}/{split}/{index}", (Message("user", content),), record)

    def solution(self, prompt: Prompt) -> str:
        """Its steps where program/worked.py knows them, else the data set's answer."""
        return worked(self.config.name, self.entry(prompt.record["split"], prompt.record["draw"]))

    def reward(self, prompt: Prompt, text: str) -> float:
        """The data set's own score_answer of the marked answer; of the last number where none is marked and the gold
        answer is a number. 0 for NaN or infinity where a number is asked for, and for an answer on which the scorer
        raises though it takes the set's own."""
        entry = self.entry(prompt.record["split"], prompt.record["draw"])
        answer = extract_answer(text)
        if answer == text.strip() and _is_number(str(entry["answer"])):
            number = last_number_in(text)
            answer = answer if number is None else f"{number:f}"
        own, scorer = str(entry["answer"]), self.chunk(prompt.record["split"], 0)
        if _NOT_FINITE.search(answer) and re.search(r"\d", own) and not _NOT_FINITE.search(own):
            return 0.0
        try:
            return scorer.score_answer(answer, entry)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            scorer.score_answer(own, entry)  # raises in its turn where the fault is the scorer's
            return 0.0

    def _field(self, fields: Mapping[str, Any], name: str) -> str:
        texts = [key for key, value in fields.items() if isinstance(value, str)]
        if name not in texts:
            raise TaskError(f"task.template asks for {{{name}}}, which {self.config.name} lacks.{nearest(name, texts)}")
        return str(fields[name])

    def _entry(self, split: str, index: int) -> dict[str, Any]:
        return self.chunk(split, index // CHUNK_DRAWS)[index % CHUNK_DRAWS]

    def _chunk(self, split: str, number: int) -> Any:
        try:
            from reasoning_gym.factory import DATASETS, create_dataset
        except ImportError as error:
            raise TaskError(f"the task needs reasoning-gym ({error}): pip install reasoning-gym") from error
        import reasoning_gym  # noqa: F401 - fills DATASETS

        name, parameters = self.config.name, dict(self.config.parameters)
        if name not in DATASETS:
            raise TaskError(f"task.name is {name!r}, which reasoning-gym does not have.{nearest(name, DATASETS)}")
        allowed = {field.name for field in dataclasses.fields(DATASETS[name][1])} - {"seed", "size"}
        for parameter in parameters:
            if parameter not in allowed:
                raise TaskError(f"task.parameters: {name} takes no {parameter!r}.{nearest(parameter, allowed)}")
        # 31 bits: some data sets hand the seed to numpy, which takes 32.
        text = f"{self.config.seed}/{split}/{number}".encode()
        seed = int.from_bytes(hashlib.blake2b(text, digest_size=4).digest()) >> 1
        try:
            return create_dataset(name, seed=seed, size=CHUNK_DRAWS, **parameters)
        except (AssertionError, TypeError, ValueError) as error:
            raise TaskError(f"task.parameters {parameters} do not suit {name}: {error}") from error


class QuestionFile(Environment):
    """Questions and answers read from a file; scored by math-verify."""

    def solution(self, prompt: Prompt) -> str | None:
        """The file's own, all of it; None where its line has no answer."""
        return prompt.record.get("solution")

    def reward(self, prompt: Prompt, text: str) -> float:
        return math_verify(prompt, text)


class FilePrompts:
    """The lines of a jsonl file in an order shuffled anew each epoch, and a held-out part with other questions."""

    def __init__(self, config: TaskConfig) -> None:
        self.config = config
        self.environment: Environment = QuestionFile()
        rows = read_questions(config, config.path) if config.path else []
        heldout_rows = read_questions(config, config.heldout_path) if config.heldout_path else rows
        by_question: dict[str, Prompt] = {}
        for prompt in heldout_rows:
            by_question.setdefault(question_key(prompt), prompt)
        distinct = list(by_question.values())
        if config.heldout_size > len(distinct):
            name = "heldout_path" if config.heldout_path else "path"
            raise TaskError(
                f"task.heldout_size is {config.heldout_size}, but {config.heldout_path or config.path} has "
                f"{len(distinct)} distinct questions. Lower task.heldout_size or give a larger task.{name}."
            )
        order = random.Random(f"heldout {config.seed}").sample(range(len(distinct)), len(distinct))
        chosen = [distinct[position] for position in order[: config.heldout_size]]
        self.heldout = tuple(
            dataclasses.replace(prompt, id=f"{config.label}/heldout/{number}") for number, prompt in enumerate(chosen)
        )
        keys = {question_key(prompt) for prompt in self.heldout}
        left = [prompt for prompt in rows if question_key(prompt) not in keys]
        if config.train_size > len(left):
            raise TaskError(
                f"task.train_size is {config.train_size}, but {config.path or 'no task.path'} leaves {len(left)} lines "
                "to train on. Lower task.train_size or task.heldout_size."
            )
        self._rows = self._shuffled(left, "train")[: config.train_size or None]
        if config.path and not self._rows:
            raise TaskError(f"{config.path} has no line left to train on. Lower task.heldout_size.")
        self._epochs: dict[int, list[Prompt]] = {}

    @property
    def prompts(self) -> list[Prompt]:
        """All that may be asked."""
        return [*self.heldout, *self._rows]

    def train(self, index: int) -> Prompt:
        if not self._rows:
            raise TaskError("task.path is empty: nothing to train on. Give the file: --set task.path=train.jsonl")
        epoch, position = divmod(index, len(self._rows))
        if epoch not in self._epochs:
            self._epochs = {epoch: self._shuffled(self._rows, f"epoch {epoch}")}
        return dataclasses.replace(self._epochs[epoch][position], id=f"{self.config.label}/train/{index}")

    def _shuffled(self, rows: list[Prompt], purpose: str) -> list[Prompt]:
        shuffled = list(rows)
        random.Random(f"{purpose} {self.config.seed}").shuffle(shuffled)
        return shuffled


def read_questions(config: TaskConfig, path: str) -> list[Prompt]:
    """The prompts of a jsonl file, blank lines left out; TaskError names the line that cannot be used, or the two that
    answer one question differently."""
    prompts = []
    first: dict[str, Prompt] = {}
    for number, line in enumerate(lines_of(path), start=1):
        if line.strip():
            prompt = _question(config, f"{path} line {number}", line, number)
            before = first.setdefault(question_key(prompt), prompt)
            was, now = (one.record.get("answer", "") for one in (before, prompt))
            if was != now and (one_number(was) is None or one_number(was) != one_number(now)) and not config.judge:
                asked = clipped(prompt.record["question"])
                raise TaskError(
                    f"{path} lines {before.record['line']} and {number} ask the same, {asked}, and answer "
                    f"{clipped(was)} and {clipped(now)}. Keep one of them."
                )
            prompts.append(prompt)
    if not prompts:
        raise TaskError(f"task file {path} holds no line.")
    return prompts


def lines_of(path: str) -> Iterator[bytes]:
    """The lines of a regular file of bounded size; TaskError where it is anything else."""
    try:
        file = Path(path).expanduser()
        if file.exists() and not (file.is_file() or file.is_dir()):
            raise TaskError(f"task file {path} is a pipe or a device. Give a regular file: one JSON object a line.")
        with file.open("rb") as opened:
            if os.fstat(opened.fileno()).st_size > MAX_FILE_BYTES:
                raise TaskError(f"task file {path} is larger than {MAX_FILE_BYTES >> 30} GiB. Split it.")
            number = 0
            while line := opened.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise TaskError(f"{path} line {number} is longer than {MAX_LINE_BYTES >> 20} MiB. Remove it.")
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                    for first, name in OTHER_FORMATS.items():
                        if line.startswith(first):
                            raise TaskError(f"task file {path} is {name}. Unpack or save it as UTF-8 JSON lines.")
                yield line
    except (OSError, RuntimeError, ValueError) as error:  # "~nobody/a" is a RuntimeError, a NUL in a path a ValueError
        reason = error.strerror if isinstance(error, OSError) else error
        raise TaskError(f"task file {path} cannot be read: {reason}. Check the path.") from error


def _question(config: TaskConfig, place: str, line: bytes, number: int) -> Prompt:
    repeated: list[str] = []  # names that the outermost object has twice

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        repeated[:] = [name for name, count in collections.Counter(name for name, _ in pairs).items() if count > 1]
        return dict(pairs)

    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=once)
    except RecursionError as error:
        raise TaskError(f"{place}: nested too deeply to be read. Remove the line.") from error
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are both ValueErrors
        raise TaskError(f"{place}: not JSON ({error}). Mend or remove the line.") from error
    if not isinstance(row, dict):
        raise TaskError(f"{place}: {clipped(row)} is not a JSON object with {config.question_field!r}.")
    for name in (config.question_field, config.answer_field):
        if name in repeated:
            raise TaskError(f"{place}: field {name!r} is there twice. Keep one.")
    question = _field(row, "question_field", config.question_field, place)
    record: dict[str, Any] = {"question": question, "line": number}
    if not config.judge or config.answer_field in row:  # a reward model needs none
        solution = _field(row, "answer_field", config.answer_field, place)
        answer = solution
        if "####" in solution:
            answer = (solution.rsplit("####", 1)[1].strip().splitlines() or [""])[0].strip()
        if not answer:
            raise TaskError(f"{place}: nothing follows the '####' of {config.answer_field!r}.")
        record |= {"answer": answer, "solution": solution}
    content = config.template.replace("{question}", question)
    prompt = Prompt(f"{config.label}/{number}", (Message("user", content),), record)
    if reason := refusal("math_verify" if config.reward == "score" else config.reward, prompt):
        raise TaskError(f"{place}: {reason}")
    return _with_system(prompt, config.system)


def _field(row: Mapping[str, Any], setting: str, name: str, place: str) -> str:
    if name not in row:
        there = nearest(name, row) if row else " The object is empty."
        raise TaskError(f"{place}: no field {name!r} (task.{setting}).{there}")
    value = row[name]
    finite = not isinstance(value, float) or math.isfinite(value)  # JSON's NaN, Infinity and 1e999 are no numbers
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not finite or not str(value).strip():
        raise TaskError(f"{place}: field {name!r} is {clipped(value)}; text or a finite number is needed.")
    if half := half_character(str(value)):
        raise TaskError(f"{place}: field {name!r} {half}")
    return f"{Decimal(str(value)):f}" if isinstance(value, float) else str(value).strip()


def _arguments(config: TaskConfig, name: str, build: Callable[..., Any]) -> dict[str, Any]:
    """What the user's class is made with; TaskError where task.parameters have what it does not take, or lack one."""
    wanted, arguments = inspect.signature(build).parameters, dict[str, Any](config.parameters)
    named = [one for one in wanted.values() if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    allowed = [one.name for one in named if one.name != "sandbox"]
    for parameter in arguments:
        if parameter not in allowed and not any(one.kind is one.VAR_KEYWORD for one in wanted.values()):
            raise TaskError(f"task.parameters: {name} takes no {parameter!r}.{nearest(parameter, allowed)}")
    if "seed" in wanted:
        arguments.setdefault("seed", config.seed)
    for one in named:
        if one.default is one.empty and one.name not in ("sandbox", *arguments):
            advice = f"--set task.parameters={one.name}=VALUE"
            raise TaskError(f"task.parameters: {name} needs a value of {one.name!r}. Give it: {advice}")
    if "sandbox" in wanted:
        check(config.sandbox)
        arguments["sandbox"] = SandboxPool(config.sandbox)
    return arguments


def load_user(config: TaskConfig) -> Environment:
    """The user's environment; TaskError where it cannot be found or built."""
    where, attribute = config.environment.rsplit(":", 1)
    try:
        module = _file_module(Path(where).expanduser()) if where.endswith(".py") else importlib.import_module(where)
    except Exception as error:  # recorded boundary: importing runs the user's code
        raise TaskError(f"task.environment {config.environment}: {_reason(error)}") from error
    build: Callable[..., Any] | None = getattr(module, attribute, None)
    if not callable(build):
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise TaskError(f"task.environment: {where} has no {attribute!r}.{nearest(attribute, names)}")
    try:
        environment = build(**_arguments(config, attribute, build))
    except TaskError:
        raise
    except (ConfigError, SandboxError) as error:
        raise TaskError(str(error)) from error
    except Exception as error:  # recorded boundary: the constructor is the user's code
        parameters = dict(config.parameters)
        raise TaskError(f"task.environment {config.environment}({parameters}): {_reason(error)}") from error
    missing = [name for name in ("prompt", "reward") if not callable(getattr(environment, name, None))]
    if missing:
        raise TaskError(
            f"task.environment {config.environment} lacks {' and '.join(missing)}; see docs/write_an_environment.md."
        )
    return environment


def uses_math_verify(config: TaskConfig) -> bool:
    return config.reward == "math_verify" or (config.environment, config.reward) == ("jsonl", "score")


def uncertain(config: TaskConfig, prompts: Sequence[Prompt]) -> list[Prompt]:
    """A prompt for each answer whose evaluation by the task's reward might fail or never end."""
    by_answer: dict[str, Prompt] = {}
    for prompt in prompts if uses_math_verify(config) else ():
        if "answer" in prompt.record:
            by_answer.setdefault(str(prompt.record["answer"]), prompt)
    return [prompt for answer, prompt in by_answer.items() if one_number(answer) is None]


def solution(source: Prompts, prompt: Prompt) -> str:
    """A right answer written out; TaskError where the environment has none."""
    own = getattr(source.environment, "solution", None)
    text = own(prompt) if own is not None else None
    if not isinstance(text, str) or not text.strip():
        raise TaskError(
            f"{type(source.environment).__name__} has no solution of prompt {prompt.id}, which objective=next_token "
            "trains on. Define solution(self, prompt) -> str."
        )
    return text


def _file_module(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    name = f"tandem_task_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))  # what lies beside it can be imported, as when it is run
    sys.modules[name] = module  # dataclasses and pickle look classes up by module name
    spec.loader.exec_module(module)
    return module


def _with_system(prompt: Prompt, system: str) -> Prompt:
    if not system or prompt.messages[0].role == "system":
        return prompt
    return dataclasses.replace(prompt, messages=(Message("system", system), *prompt.messages))


def _is_number(text: str) -> bool:
    number = last_number_in(text)
    return number is not None and text.strip().replace(",", "").lstrip("+") == str(number)


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
