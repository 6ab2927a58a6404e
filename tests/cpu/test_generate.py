"""Regression caught: `tandem generate` whose errors speak of what its users did not give."""

from __future__ import annotations

import pytest

from tandem.cli.main import main


def test_a_prompt_without_room_is_named_by_its_words(write_model, tmp_path, capsys):
    """The id of a request, which the user never saw, in place of the prompt that is too long."""
    write_model(tmp_path)
    long = "Say  again:\n" + "one two three " * 30
    assert main(["generate", str(tmp_path), "hello", long]) == 2
    error = capsys.readouterr().err
    assert "'prompt 2, Say again: one two three one two three o…': its prompt of" in error and "leaves no room" in error


@pytest.mark.parametrize("count", [1, 2])
def test_answers_are_printed_under_their_prompts(write_model, tmp_path, capsys, count):
    """A prompt's answer under another prompt, or an answer alone with a prompt before it."""
    write_model(tmp_path, 10.0)
    prompts = ["What is 1+1?", "Hello"][:count]
    assert main(["generate", str(tmp_path), *prompts, "--max-new-tokens", "5"]) == 0
    printed = capsys.readouterr().out
    alone = []
    for prompt in prompts:
        assert main(["generate", str(tmp_path), prompt, "--max-new-tokens", "5"]) == 0
        alone.append(capsys.readouterr().out.rstrip("\n"))
    assert printed == (
        "".join(f"> {p}\n{a}\n\n" for p, a in zip(prompts, alone, strict=True)) if count > 1 else alone[0] + "\n"
    )
