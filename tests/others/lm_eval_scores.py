"""Scores of a model by lm-eval, through Transformers or tandem's engine, as JSON: BACKEND FOLDER LENGTH TASKS TASK...

Run by test_lm_eval.py with the Python of .venv-others/lm_eval.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager


def main(model: str, folder: str, length: int, tasks: str, names: list[str]) -> dict[str, Any]:
    arguments = {"pretrained": folder, "max_length": length}
    if model == "tandem":
        import tandem.run.lm_eval  # noqa: F401 - registers it

        arguments["model.dtype"] = "float32"
    else:
        arguments["dtype"] = "float32"
    found = lm_eval.simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=names,
        task_manager=TaskManager(include_path=tasks, include_defaults=False),
        batch_size=4,
        device="cpu",
        bootstrap_iters=0,
        verbosity="ERROR",
    )
    answers = {name: [sample["resps"] for sample in found["samples"][name]] for name in names}
    return {"results": found["results"], "answers": answers, "config": found["config"]}


if __name__ == "__main__":
    model, folder, length, tasks, *names = sys.argv[1:]
    print("\n" + json.dumps(main(model, folder, int(length), tasks, names), default=str))
