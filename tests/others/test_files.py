"""Models that are written here, as compressed-tensors and Transformers read them; and the vectors of CI made anew."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tandem.models.checkpoint import open_checkpoint
from tandem.models.quantised.write import kind_of, write
from tandem.surgery.quantise import Method, quantised

HERE = Path(__file__).parent
VENV = HERE.parents[1] / ".venv-others" / "files"
VECTORS = HERE.parent / "goldens" / "quantised.safetensors"
KINDS = (
    "compressed-tensors:int4_g32",
    "compressed-tensors:int4_g32_asym",
    "compressed-tensors:int3_g32",
    "compressed-tensors:int8_g32",
    "compressed-tensors:int8_row",
    "compressed-tensors:fp8_row",
    "compressed-tensors:fp8_tensor",
    "compressed-tensors:fp8_128x128",
    "compressed-tensors:nvfp4",
    "compressed-tensors:mxfp4",
    "awq:int4_g32_asym",
    "modelopt",
    "fp8",
    "mxfp4",
)


def run(script: str, *args: str) -> None:
    if not (VENV / "installed").exists():
        pytest.skip(f"{VENV} is not installed: make test-others OTHERS=files")
    command = [str(VENV / "bin" / "python"), str(HERE / script), *args]
    own = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=own | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A folder of models, and what they are to the packages."""
    folder = tmp_path_factory.mktemp("models")
    source = open_checkpoint("new:width=64,layers=1,heads=4,kv_heads=2,ff_width=192,max_position=64")
    drawn = {name: tensor.bfloat16() for name, tensor in source.tensors()}
    for text in KINDS:
        kind = kind_of(text)
        codes = quantised(source.spec, drawn, Method(), kind.form).blocks
        tensors = {name: one for name, one in drawn.items() if name not in codes}
        write(folder / text.replace(":", "_"), source.spec, tensors, kind, codes, source.load_tokenizer())
    run("files_read.py", str(folder), str(folder / "theirs.safetensors"))
    return folder, load_file(folder / "theirs.safetensors")


@pytest.mark.filterwarnings("ignore::tandem.errors.TandemWarning")
@pytest.mark.parametrize("text", KINDS)
def test_theirs_read_ours(text: str, theirs: tuple[Path, dict[str, torch.Tensor]]) -> None:
    """A model that is read as it was meant here alone: another package gives its matrices other values."""
    folder, read = theirs
    name = text.replace(":", "_")
    found = {one.removeprefix(f"{name}/"): tensor for one, tensor in read.items() if one.startswith(f"{name}/")}
    own = {one: tensor for one, tensor in open_checkpoint(str(folder / name)).tensors() if one in found}
    assert len(own) == len(found) == 7
    kind = torch.float16 if text.startswith("awq") else torch.bfloat16  # what their readers round to
    for one, tensor in own.items():
        if text == "modelopt":  # compressed-tensors divides by the reciprocal of the scale: the last bit of some
            torch.testing.assert_close(tensor, found[one], rtol=2.0**-8, atol=0)
            continue
        assert torch.equal(tensor.to(kind).float(), found[one]), (one, (tensor - found[one]).abs().max())


def test_the_vectors_of_ci_are_todays(tmp_path: Path) -> None:
    """Vectors that the pinned package no longer makes."""
    run("quantised_vectors.py", str(tmp_path / "v.safetensors"))
    made, kept = load_file(tmp_path / "v.safetensors"), load_file(VECTORS)
    assert made and all(torch.equal(tensor.float(), kept[name].float()) for name, tensor in made.items())
    with safe_open(tmp_path / "v.safetensors", "pt") as new, safe_open(VECTORS, "pt") as old:
        cases = json.loads(old.metadata()["cases"])
        assert all(cases[name] == one for name, one in json.loads(new.metadata()["cases"]).items())
