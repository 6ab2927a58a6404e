"""`tandem chat`: talk with a model."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Annotated

import typer

from tandem.cli.generate import DRAFT_HELP, MODEL_HELP, MOST_SEED, MOST_TEMPERATURE, SYSTEM_SAID


def chat(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    system: Annotated[str | None, typer.Option(help="A system message; by default a run's own.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens at most, for each answer.")] = 512,
    temperature: Annotated[
        float, typer.Option(min=0.0, max=MOST_TEMPERATURE, help="0 takes the most likely token.")
    ] = 0.7,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Fixes the draws.")] = 0,
    draft: Annotated[str, typer.Option(metavar="suffix|lookup|MODEL", help=DRAFT_HELP)] = "none",
) -> int:
    """Talk with a model, a line at a time; Ctrl-D ends."""
    from tandem.config import override
    from tandem.engine.config import DraftConfig, EngineConfig
    from tandem.engine.driver import Driver
    from tandem.models.config import ModelConfig
    from tandem.numerics.random import derive_seed
    from tandem.run.model import asked_as
    from tandem.run.parts import build_parts
    from tandem.run.source import say_trained_as
    from tandem.types import Message, Request, Sampling

    task = replace(asked_as(model), format="chat")
    said = task.system if system is None else system
    messages = [Message("system", said)] if said else []
    if system is None and messages:
        print(SYSTEM_SAID.format(messages[0].content), file=sys.stderr)
    rounded = {name.removeprefix("model."): at for name, at in say_trained_as(model, (), taken="chat").items()}
    engine = EngineConfig(draft=DraftConfig.of(draft))
    parts = build_parts(override(ModelConfig(model), rounded), engine, learns=False, task=task)
    driver, tokenizer = Driver(parts.engine), parts.tokenizer
    stops = tokenizer.stop_token_ids
    sampling = Sampling(temperature=temperature, max_new_tokens=max_new_tokens, stop_token_ids=stops)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return 0
        if not line:
            continue
        messages.append(Message("user", line))
        tokens = tuple(tokenizer.render_messages(messages, add_generation_prompt=True))
        turn = str(len(messages))
        future = driver.submit(Request(f"chat/{turn}", "chat", tokens, sampling, seed=derive_seed(seed, 0, turn, 0)))
        while not future.done():
            with parts.memory.foreseen():
                driver.progress(0, 0.0)
        completion = future.result(0)
        text = tokenizer.decode([token for token in completion.tokens if token not in stops])
        messages.append(Message("assistant", text))
        print(text)
        if completion.failure:
            print(f"no more could be drawn: {completion.failure}", file=sys.stderr)
