"""Regressions in the command line: verbs, flags, errors, recipes, doctor, the public names."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tandem
from tandem import env
from tandem.cli import doctor, main, recipes, train
from tandem.config import override
from tandem.errors import CheckpointError, ConfigError, ModelError, TandemWarning
from tandem.run.folder import RunFolder

SOURCES = Path(tandem.__file__).parent
ROOT = Path(__file__).parents[2]


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main.main(arguments)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_flags_are_frozen() -> None:
    """A flag renamed or gone, so that the users' scripts break."""
    assert main.flags() == (ROOT / "tests" / "goldens" / "flags.txt").read_text().splitlines()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "no verb is named trian. Did you mean train?"),
        (["train", "r", "--otu", "d"], "tandem train has no flag --otu. Did you mean --out"),
        (["--verson"], "tandem has no flag --verson."),
        (["train"], "RECIPE"),
        (["bench", "engin"], "'engine', 'learner', 'tree', 'step'"),
        (["generate", "m", "p", "--seed", "x"], "--seed"),
        (["generate", "m", "p", "--seed", "1" + 23 * "0"], "less than or equal to 9223372036854775807"),
        (["generate", "m", "p", "--temperature", "inf"], "--temperature"),
        (["chat", "m", "--seed", "1" + 23 * "0"], "less than or equal to 9223372036854775807"),
        (["study", "s", "--threads", "1" + 23 * "0"], "less than or equal to 1024"),
        (["eval", "smollm2_arithmetic_cpu", "--set", "seed=1" + 23 * "0"], "is not an integer of 64 bits"),
        (["train", "no_such_recipe"], "no recipe is named no_such_recipe."),
        (["train", "nowhere.py:recipe"], "the recipe file nowhere.py does not exist"),
        (["train", "r", "--out", "a", "--resume", "b"], "--out and --resume"),
    ],
)
def test_wrong_usage(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    """A wrong verb, flag, value or recipe answered with a traceback, or without what is allowed."""
    code, out, err = call(capsys, *arguments)
    assert code == 2 and message in err and "Traceback" not in err and out == ""


@pytest.mark.parametrize(
    ("error", "code", "shown"),
    [
        (ModelError("model.safetensors is truncated. Fetch it again."), 2, "tandem: model.safetensors is truncated"),
        (CheckpointError("the disk is full"), 1, "tandem: the disk is full"),
        (KeyboardInterrupt(), 130, "tandem: stopped\n"),
    ],
)
def test_exit_codes(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    shown: str,
) -> None:
    """A failed run that a script takes for a good one; a user's mistake shown as a crash of tandem."""

    def fail(*given: object) -> object:
        raise error

    monkeypatch.setattr(recipes, "find_recipe", fail)
    got, _, err = call(capsys, "train", "any")
    assert got == code and err.startswith(shown) and err.count("\n") == 1


def test_exit_code_of_a_verb(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A verb's own exit code dropped: Ctrl-C during training has to give 130 after the save."""
    monkeypatch.setattr(doctor, "CHECKS", (lambda: iter([doctor.Finding("torch", "missing", "no", "pip")]),))
    assert call(capsys, "doctor")[0] == 1
    monkeypatch.setattr(doctor, "CHECKS", ())
    assert call(capsys, "doctor")[0] == 0


def test_warnings_are_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What tandem warns of is shown with a line of its source; or a library's warning without where it is from."""

    def warn() -> Iterator[doctor.Finding]:
        warnings.warn("slow kernels run", TandemWarning, stacklevel=1)
        warnings.warn("another's", RuntimeWarning, stacklevel=1)
        yield doctor.Finding("torch", "ok", "2")

    monkeypatch.setattr(doctor, "CHECKS", (warn,))
    with pytest.warns(RuntimeWarning) as caught:
        code, _, err = call(capsys, "doctor")
    assert code == 0 and err == "tandem: slow kernels run\n"
    assert [(str(each.message), each.filename) for each in caught] == [("another's", __file__)]


def test_misspelt_environment(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A misspelt TANDEM_ variable ignored by the command line."""
    monkeypatch.setattr(doctor, "CHECKS", ())
    monkeypatch.setenv("TANDEM_THREDS", "2")
    code, _, err = call(capsys, "doctor")
    assert code == 2 and "TANDEM_THREADS" in err


RECIPE = """
import sys
from dataclasses import dataclass
sys.modules["ran_" + __name__] = sys

@dataclass(frozen=True)
class RunConfig:
    steps: int = 3

def tiny_sums_cpu() -> RunConfig:
    return RunConfig()

def _hidden() -> RunConfig:
    return RunConfig(5)

def half(steps: int) -> float:
    return steps / 2
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tiny_sums.py").write_text(RECIPE)
    (tmp_path / "broken_when_run.py").write_text(
        "def other_sums_cpu() -> 'config.RunConfig':\n    ...\nraise OSError\n"
    )
    return tmp_path


def test_recipe_names(folder: Path) -> None:
    """A recipe that cannot be found, a helper taken for one, or every recipe's imports run to find one."""
    assert sorted(recipes.recipe_names(folder)) == ["other_sums_cpu", "tiny_sums_cpu"]
    assert recipes.find_recipe("tiny_sums_cpu", folder)().steps == 3
    with pytest.raises(ConfigError, match="Did you mean tiny_sums_cpu"):
        recipes.find_recipe("tiny_sum_cpu", folder)


def test_recipe_of_the_user(folder: Path) -> None:
    """A user's own recipe file that cannot be trained, or fails without saying what is in it."""
    assert recipes.find_recipe(f"{folder}/tiny_sums.py:tiny_sums_cpu")().steps == 3
    assert recipes.find_recipe(f"{folder}/tiny_sums.py")().steps == 3
    with pytest.raises(ConfigError, match="Did you mean tiny_sums_cpu"):
        recipes.find_recipe(f"{folder}/tiny_sums.py:tiny_sum")
    (folder / "two.py").write_text(RECIPE + RECIPE.replace("tiny_sums_cpu", "second_cpu"))
    with pytest.raises(ConfigError, match="two.py:tiny_sums_cpu, .*two.py:second_cpu"):
        recipes.find_recipe(f"{folder}/two.py")
    (folder / "none.py").write_text("x = 1\n")
    with pytest.raises(ConfigError, match="has no recipe"):
        recipes.find_recipe(f"{folder}/none.py")
    (folder / "syntax.py").write_text("def (\n")
    with pytest.raises(ConfigError, match="is not Python"):
        recipes.find_recipe(f"{folder}/syntax.py")
    (folder / "asks.py").write_text("def needs(x) -> 'RunConfig': ...\n")
    with pytest.raises(ConfigError, match="asks for x"):
        recipes.find_recipe(f"{folder}/asks.py")


def test_settings(folder: Path) -> None:
    """--set lost, or a value that holds '=' cut."""
    assert recipes.parse_settings(["a.b=1", "c=x=y", "a.b=2"]) == {"a.b": "2", "c": "x=y"}
    recipe = recipes.find_recipe(f"{folder}/tiny_sums.py")
    assert override(recipe(), recipes.parse_settings(["steps=9"])).steps == 9
    for wrong in ("steps", "=3"):
        with pytest.raises(ConfigError, match="wanted dotted.name=value"):
            recipes.parse_settings([wrong])


def test_own_recipes() -> None:
    """A recipe of tandem's named otherwise than by model, task and, where it matters, hardware; or two of one name."""
    names = [name for path in sorted(recipes.FOLDER.glob("*.py")) for name in recipes.functions(path)]
    assert len(names) == len(set(names))
    assert all(len(name.split("_")) >= 2 for name in names)


def test_public_names() -> None:
    """A public name that is not where the front door says, or a front door that grew into a warehouse."""
    assert len(tandem.__all__) <= 25 and set(tandem.__all__) <= set(dir(tandem))
    for name, home in tandem._HOMES.items():
        file = SOURCES.joinpath(*home.split(".")[1:]).with_suffix(".py")
        tree = ast.parse(file.read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}, home
    assert tandem.Prompt("p", ()).id == "p"
    with pytest.raises(AttributeError, match="no attribute 'Promt'"):
        _ = tandem.Promt


def test_slim_import() -> None:
    """`import tandem` and the command line load torch, so that every `--help` takes seconds."""
    heavy = ("torch", "transformers", "numpy", "matplotlib", "rich")
    program = f"import sys, tandem, tandem.cli.main; print([name for name in {heavy} if name in sys.modules])"
    asked = [sys.executable, "-c", program]
    done = subprocess.run(asked, capture_output=True, text=True, env=env.child(PYTHONPATH=str(SOURCES.parent)))
    assert done.stdout.strip() == "[]", done


def test_train_builds_before_it_loads() -> None:
    """A misspelt recipe that is noticed only after torch has loaded."""
    text = Path(train.__file__).read_text()
    assert text.index("config = override(") < text.index("from tandem.run")


SUMS = """
from tandem.run.config import RunConfig
from tandem.models.config import ModelConfig

def sums() -> RunConfig:
    return RunConfig("sums", 5, ModelConfig("m"))

def other() -> RunConfig:
    return RunConfig("other", 5, ModelConfig("m"))
"""


def test_resume_takes_the_config_of_the_folder(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A resume that asks for every earlier --set again, takes another recipe's run, or does so in silence."""
    asked: list[Any] = []

    def run(config: Any, **given: Any) -> None:
        asked.append(config)
        with RunFolder.open(given["resume"], config):
            raise CheckpointError("it ran")

    monkeypatch.setitem(sys.modules, "tandem.run.local", SimpleNamespace(train=run))
    (tmp_path / "sums.py").write_text(SUMS)
    recipe = f"{tmp_path}/sums.py:sums"
    settings = {"learner.lr": "0.5", "rollout.max_new_tokens": "7", "task.heldout_size": "999"}
    started = override(recipes.find_recipe(recipe)(), settings)
    RunFolder.create(tmp_path / "run", started).close()
    code, _, err = call(capsys, "train", recipe, "--resume", str(tmp_path / "run"), "--set", "steps=9")
    assert code == 1 and "it ran" in err and asked.pop() == replace(started, steps=9)
    assert "\n  learner.lr: 1e-06 -> 0.5\n" in err and "rollout.max_new_tokens: 64 -> 7" in err and "steps:" not in err
    for name, values in {"learner.lr": "0.5 -> 0.25", "evaluation.prompts": "128 -> 998"}.items():
        given = f"{name}={values.split()[-1]}"
        code, _, err = call(capsys, "train", recipe, "--resume", str(tmp_path / "run"), "--set", given)
        assert code == 2 and "differs" in err and f"{name}: {values}" in err and "it ran" not in err
    code, _, err = call(capsys, "train", f"{tmp_path}/sums.py:other", "--resume", str(tmp_path / "run"))
    assert code == 2 and "holds the run sums, and the recipe is other" in err and len(asked) == 2
    code, _, err = call(capsys, "train", recipe, "--resume", str(tmp_path / "rum"))
    assert code == 2 and "does not exist" in err and "Did you mean run?" in err


def test_memory_of_a_container(tmp_path: Path) -> None:
    """Doctor reports the host's memory inside a container that may use less."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:  8000000 kB\nMemFree: 1 kB\nMemAvailable: 6000000 kB\n")
    assert env.memory_bytes(tmp_path) == (8_192_000_000, 6_144_000_000)
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("1000\n")
    assert env.memory_bytes(tmp_path) == (8_192_000_000, 6_144_000_000)
    (group / "memory.max").write_text("2000000000\n")
    assert env.memory_bytes(tmp_path) == (2_000_000_000, 1_999_999_000)
    (group / "memory.stat").write_text("anon 100\ninactive_file 400\n")
    assert env.memory_bytes(tmp_path) == (2_000_000_000, 1_999_999_400)


def test_memory_of_a_group_in_a_group(tmp_path: Path) -> None:
    """A limit set on a group further out, or by the older hierarchy, goes unnoticed."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 8000 kB\nMemAvailable: 6000 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("3:memory,hugetlb:/job/1\n0::/outer/inner\n")
    outer, older = tmp_path / "sys/fs/cgroup/outer", tmp_path / "sys/fs/cgroup/memory/job/1"
    (outer / "inner").mkdir(parents=True)
    (outer / "inner/memory.max").write_text("max\n")
    (outer / "inner/memory.current").write_text("5\n")
    (outer / "memory.max").write_text("5000\n")
    (outer / "memory.current").write_text("1000\n")
    assert env.memory_bytes(tmp_path) == (5000, 4000)
    older.mkdir(parents=True)
    (older / "memory.limit_in_bytes").write_text("3000\n")
    (older / "memory.usage_in_bytes").write_text("1000\n")
    (older / "memory.stat").write_text("inactive_file 1\ntotal_inactive_file 500\n")
    assert env.memory_bytes(tmp_path) == (3000, 2500)


def test_memory_under_a_limit_of_the_process(tmp_path: Path) -> None:
    """Under `ulimit -v` or `-d` a plan for all of the machine, which the allocator then refuses."""
    own = tmp_path / "proc/self"
    own.mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 8000 kB\nMemAvailable: 6000 kB\n")
    (own / "status").write_text("Name:\tpython\nVmSize:\t    1000 kB\nVmData:\t     200 kB\n")
    rows = "Limit                     Soft Limit           Hard Limit           Units     \n"
    for space, data, wanted in (
        ("unlimited", "unlimited", (8_192_000, 6_144_000)),
        ("3072000", "unlimited", (3_072_000, 2_048_000)),
        ("3072000", "1024000", (1_024_000, 819_200)),
        ("unlimited", "100000", (100_000, 0)),
    ):
        limits = f"Max data size             {data}            unlimited            bytes     \n"
        limits += f"Max address space         {space}            unlimited            bytes     \n"
        (own / "limits").write_text(rows + limits)
        assert env.memory_bytes(tmp_path) == wanted
        assert env.limits_addresses(tmp_path) == ({space, data} != {"unlimited"})


def test_processor(tmp_path: Path) -> None:
    """Doctor misses AMX, or finds it in a name that only contains it."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(
        "model name\t: Xeon\nflags\t\t: avx2 amx_tile avx512_bf16\n\nmodel name\t: Xeon\n"
    )
    assert doctor.processor(tmp_path) == ("Xeon", frozenset({"avx2", "amx_tile", "avx512_bf16"}))
    assert doctor.processor(tmp_path / "nowhere")[1] == frozenset()


def test_doctor_without_things(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Doctor is silent about, or fails on, what is missing: torch, a compiler, the demo's model."""
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    assert [f.status for f in doctor.check_torch()] == ["missing"]
    monkeypatch.setattr(doctor, "_version", lambda name: "2.14.1")
    assert [f.status for f in doctor.check_torch()] == ["missing"]
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path))
    compiler = list(doctor.check_compiler())
    assert compiler[0].status == "slow" and "apt-get install g++" in compiler[0].advice
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    model = list(doctor.check_demo_model())
    assert model[0].status == "absent" and "--no-deps" in model[0].advice


def test_doctor_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    """Doctor takes an extra's package for one that tandem needs, or the other way round."""
    lines = ["torch<2.14,>=2.11", "rich", "no-such-package-1 ; extra == 'tasks'", 'ray[default]>=2; extra == "tasks"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: [*lines, "unused; extra == 'unused'"])
    assert doctor.requirements() == {
        "": ["torch<2.14,>=2.11", "rich"],
        "tasks": ["no-such-package-1", "ray[default]>=2"],
        "unused": ["unused"],
    }
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in ("ray", "no-such-package-1") else "1")
    found = {finding.name: finding for finding in doctor.check_packages()}
    assert found["packages"].status == "ok" and found["packages [tasks]"].status == "absent"
    assert found["packages [tasks]"].advice == "pip install no-such-package-1 'ray[default]>=2'"
    assert set(found) == {"packages", "packages [tasks]"}


def imported() -> set[str]:
    """Top-level names that the package imports anywhere."""
    names = set()
    for path in SOURCES.rglob("*.py"):
        if "adapters" in path.parts:  # their packages are of another interpreter (task.python)
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.split(".")[0])
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                names.add(node.value)  # import_module, find_spec
    return names


def test_doctor_names_the_extras_that_something_uses() -> None:
    """Doctor sends a user to packages that no command imports, or is silent about one that a command does."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    used = imported()
    for extra, lines in extras.items():
        names = {re.split(r"[<>=!~;\[ ]", line)[0].replace("-", "_") for line in lines}
        assert (extra in doctor.EXTRAS) == (bool(names & used) and extra not in ("gpu", "dev")), extra


@pytest.mark.parametrize("check", doctor.CHECKS)
def test_doctor_advises_nothing_of_a_checkout(monkeypatch: pytest.MonkeyPatch, check: Any) -> None:
    """A command that fails outside a checkout (a file of it), or by a name that no index has."""
    monkeypatch.setattr(doctor, "_version", lambda name: "0.1" if name == doctor.DISTRIBUTION else None)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    for finding in check():
        assert "constraints.txt" not in finding.advice and doctor.DISTRIBUTION not in finding.advice, finding


def test_doctor_prints_brackets(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The name of an extra, which stands in brackets, taken for a colour and left out."""
    monkeypatch.setattr(doctor, "CHECKS", (lambda: iter([doctor.Finding("packages [ray]", "absent", "[x]", "a[b]")]),))
    _, out, _ = call(capsys, "doctor")
    assert "packages [ray]" in out and "[x]" in out and "a[b]" in out


def test_doctor_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """doctor --json prints what no program can read."""
    monkeypatch.setattr(doctor, "CHECKS", (doctor.check_python, doctor.check_machine, doctor.check_cache))
    code, out, _ = call(capsys, "doctor", "--json")
    findings = json.loads(out)["findings"]
    assert code == 0 and {"python", "cores", "memory", "processor", "cache"} <= {f["name"] for f in findings}
