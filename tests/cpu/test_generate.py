"""Regression caught: `tandem generate` whose errors speak of what its users did not give."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tandem.cli.main import main
from tandem.engine.batch import Batch, Sampled
from tandem.engine.schedule import Scheduler
from tandem.types import Completion


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


def row(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["generate", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_an_answer_that_failed_is_told(write_model, tmp_path, capsys, monkeypatch):
    """An answer cut short by a row that is not finite looks like a whole one, or takes the others with it."""
    write_model(tmp_path, 10.0)
    capsys.readouterr()
    resolve = Scheduler.resolve

    def broken(self: Scheduler, batch: Batch, sampled: Sampled, now: float) -> list[Completion]:
        drawing = [work.request.id for work in batch.works if work.draws]
        failed = {i: "2 NaN" for i, name in enumerate(drawing) if "two" in name and self._stats.sampled_tokens > 2}
        return resolve(self, batch, replace(sampled, failed=failed), now)

    monkeypatch.setattr(Scheduler, "resolve", broken)
    assert main(["generate", str(tmp_path), "one", "two", "--max-new-tokens", "5", "--json"]) == 1
    printed = capsys.readouterr()
    one, two = map(json.loads, printed.out.splitlines())
    assert one["stop_reason"] == "length" and "failure" not in one
    assert two["stop_reason"] == "failed" and two["failure"] == "2 NaN" and len(two["tokens"]) < 5
    assert printed.err == "prompt 2, two: no more could be drawn: 2 NaN\n"


def test_greedy_answers_have_the_models_log_probs(write_model, tmp_path, capsys):
    """The most likely token reported with log-prob 0, as of a distribution that holds no other, or another token."""
    write_model(tmp_path, 10.0)
    given = (str(tmp_path), "What is 1+1?", "--max-new-tokens", "12")
    found = row(capsys, *given)
    assert main(["generate", *given]) == 0
    assert capsys.readouterr().out.rstrip("\n") == found["text"]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": given[1]}], add_generation_prompt=True)[
        "input_ids"
    ]
    assert len(prompt) == found["prompt_tokens"]
    with torch.no_grad():
        logits_TV = model(torch.tensor([prompt + found["tokens"]])).logits[0, len(prompt) - 1 : -1].float()
    wanted = logits_TV.log_softmax(-1).gather(1, torch.tensor(found["tokens"])[:, None])[:, 0]
    assert found["logprobs"] == pytest.approx(wanted.tolist(), abs=0.1) and min(found["logprobs"]) < -0.01
    warm = row(capsys, *given, "--temperature", "0.5", "--seed", str(2**63 - 1))
    assert len(warm["logprobs"]) == len(warm["tokens"]) and warm["logprobs"] != found["logprobs"]


@pytest.fixture
def run_folder(write_model, tmp_path) -> Path:
    """A run of one step whose prompts had a system message."""
    write_model(tmp_path / "model", 10.0)
    rows = [{"question": f"{n}+1=", "answer": str(n + 1)} for n in range(9)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    settings = {
        "model.source": tmp_path / "model",
        "task.environment": "jsonl",
        "task.path": tmp_path / "sums.jsonl",
        "task.system": "Be brief.",
        "task.heldout_size": 2,
        "evaluation.prompts": 0,
        "rollout.max_new_tokens": 3,
        "rollout.prompts_per_step": 1,
        "steps": 1,
    }
    assigned = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    assert main(["train", "smollm2_arithmetic_cpu", "--out", str(tmp_path / "run"), *assigned]) == 0
    return tmp_path / "run"


def test_a_run_is_asked_with_its_system_message(run_folder, capsys, monkeypatch):
    """A trained policy asked without the system message of its prompts, which answers as nothing that was trained."""
    capsys.readouterr()
    alone = row(capsys, str(run_folder / "checkpoints/step-1"), "2+1=", "--max-new-tokens", "3")
    assert main(["generate", str(run_folder), "2+1=", "--max-new-tokens", "3", "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1] == "system message of the run: Be brief."
    added = len("<|im_start|>system\nBe brief.<|im_end|>\n") - len("<|im_start|>") - len("<|im_end|>") + 2
    assert json.loads(printed.out)["prompt_tokens"] == alone["prompt_tokens"] + added
    for given, said in (((), True), (("--system", "Shout."), False), (("--system", ""), False)):
        monkeypatch.setattr("sys.stdin", io.StringIO("2+1=\n"))
        assert main(["chat", str(run_folder), "--max-new-tokens", "3", *given]) == 0
        assert ("Be brief." in capsys.readouterr().err) == said
    (run_folder / "config.json").write_text('{"task": 3}')
    assert main(["generate", str(run_folder), "2+1="]) == 2
    assert "names no task.system" in capsys.readouterr().err
