"""Folders as they are met: shards, an index, old copies, a head tied, alone, copied or other, and files beside them.

The reference is Transformers: the logits of what it loads from the same folder. It reads the last shard that holds a
tensor, whatever the index says (5.23), so it is given the folder without the old copies.
"""

from __future__ import annotations

import json
import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tandem.errors import ModelError, TandemWarning
from tandem.models.checkpoint import open_checkpoint, save_checkpoint
from tandem.models.decoder import Decoder
from tandem.models.view import PackView

SHAPE = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61,
         "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
EMBED, HEAD, UP = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight"
TOKENS = (torch.arange(40) * 7) % 61
Tensors = dict[str, torch.Tensor]


def random_tensors(kind: str = "llama", seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **SHAPE))
    noise = {name: torch.randn(one.shape, generator=generator) for name, one in model.state_dict().items()}
    return {name: 1 + 0.2 * one if "norm" in name else one * 0.3 for name, one in noise.items()}


def write_config(folder: Path, kind: str = "llama", **changes: Any) -> None:
    config = {**transformers.AutoConfig.for_model(kind, **SHAPE).to_dict(), **changes}
    config["architectures"] = [type(transformers.AutoConfig.for_model(kind)).__name__.replace("Config", "ForCausalLM")]
    kept = {name: value for name, value in config.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(kept))


def write(folder: Path, files: dict[str, Tensors], places: dict[str, str] | None = None) -> None:
    folder.mkdir(exist_ok=True)
    for name, tensors in files.items():
        save_file({key: one.contiguous() for key, one in tensors.items()}, folder / name, metadata={"format": "pt"})
    if places is not None:
        index = {"metadata": {"total_size": 0}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def peer(folder: Path) -> tuple[Any, dict[str, Any]]:
    found = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    return found[0], found[1]


def peer_logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS[None]).logits[0]


def logits(folder: Path) -> torch.Tensor:
    opened = open_checkpoint(str(folder))
    decoder = Decoder(opened.spec, "float32").load(opened.tensors())
    with torch.no_grad():
        return decoder.logits(decoder.forward(TOKENS, PackView([0, 40])))


def saved_again(folder: Path, out: Path) -> Any:
    opened = open_checkpoint(str(folder))
    save_checkpoint(out, opened.spec, dict(opened.tensors()), None, "float32")
    return peer(out)[0]


@given(
    kind=st.sampled_from(["llama", "qwen2"]),
    tied=st.sampled_from([True, True, False, "absent"]),
    head=st.sampled_from(["other", "copy", "alone", "absent"]),
    shards=st.integers(0, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn]),
    copies=st.lists(st.tuples(st.sampled_from([EMBED, HEAD, UP, "model.norm.weight"]), st.integers(0, 2)), max_size=3),
    seed=st.integers(0, 99),
)
@settings(max_examples=80)
def test_any_layout(
    tmp_path_factory: pytest.TempPathFactory,
    kind: str,
    tied: bool | str,
    head: str,
    shards: int,
    dtype: torch.dtype,
    copies: list[tuple[str, int]],
    seed: int,
) -> None:
    """An old copy, another head or a missing one gives other logits than Transformers', now or once saved."""
    root, rng = tmp_path_factory.mktemp("layout"), random.Random(seed)
    tensors = {name: one.to(dtype) for name, one in random_tensors(kind, seed).items()}
    if head in ("copy", "alone"):
        tensors[HEAD] = tensors[EMBED].clone()
    for gone in {"alone": [EMBED], "absent": [HEAD]}.get(head, []):
        del tensors[gone]
    names, indexed = [f"model-{number}.safetensors" for number in range(shards or 1)], shards > 0
    places = {name: rng.choice(names) for name in tensors}
    files = {file: {name: tensors[name] for name in tensors if places[name] == file} for file in names}
    if not indexed:
        files = {"model.safetensors": tensors}
    files = {name: held for name, held in files.items() if held}
    for folder in (root / "clean", root / "met"):
        write(folder, files, places if indexed else None)
        write_config(folder, kind, tie_word_embeddings=tied)
    stale = {file: dict(held) for file, held in files.items()}
    named = []
    for name, number in copies if indexed else []:
        file = names[number % shards]
        if name in places and places[name] != file and file in stale:
            stale[file][name] = tensors[name].float().mul(2).to(dtype)
            named.append(f"{name} in {file}")
    write(root / "met", stale)
    wanted, report = peer(root / "clean")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if report["missing_keys"]:
            with pytest.raises(ModelError, match=r"lacks 1 .*tie_word_embeddings"):
                open_checkpoint(str(root / "met"))
            return
        again = saved_again(root / "met", root / "out")
    lines = [str(one.message) for one in caught if issubclass(one.category, TandemWarning)]
    untied = tied is True and head == "other"
    assert len(lines) == int(bool(named) or untied)
    assert all(name in lines[0] for name in named) and (not untied or "read as untied" in lines[0])
    assert torch.equal(peer_logits(again), peer_logits(wanted))
    assert again.config.tie_word_embeddings == (tied is True and not untied)
    if seed % 8 == 0:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.testing.assert_close(logits(root / "met"), peer_logits(wanted), atol=1e-4, rtol=0)
    shutil.rmtree(root)


def test_the_index_decides(tmp_path: Path) -> None:
    """An old copy in a later shard beats the file that the index names, or one of two unnamed ones is taken."""
    tensors = random_tensors()
    body = {name: one for name, one in tensors.items() if name != HEAD}
    places = dict.fromkeys(body, "a.safetensors") | {HEAD: "b.safetensors"}
    write(tmp_path, {"a.safetensors": body, "b.safetensors": {HEAD: tensors[HEAD], UP: tensors[UP] * 0}}, places)
    write_config(tmp_path, tie_word_embeddings=False)
    with pytest.warns(
        TandemWarning, match=rf"not read: {UP} in b.safetensors \(the index places it in a.safetensors\)"
    ):
        opened = open_checkpoint(str(tmp_path))
    assert torch.equal(dict(opened.tensors())[UP], tensors[UP])
    write(tmp_path, {}, {name: file for name, file in places.items() if name != UP})
    with pytest.raises(
        ModelError, match=f"b.safetensors and a.safetensors both hold {UP}, and the index names neither"
    ):
        open_checkpoint(str(tmp_path))
    write(tmp_path, {"b.safetensors": {HEAD: tensors[HEAD]}})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = open_checkpoint(str(tmp_path))  # in one file alone: read, as Transformers does
    assert torch.equal(dict(opened.tensors())[UP], tensors[UP])
    write(tmp_path, {}, places | {UP: "b.safetensors"})
    with pytest.raises(ModelError, match=f"places '{UP}' in b.safetensors, which does not hold it"):
        open_checkpoint(str(tmp_path))
    write(tmp_path, {"model.safetensors": tensors}, places)
    with pytest.raises(ModelError, match="holds two models: .*index.json does not name model.safetensors"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    "entry",
    [None, 3, ["a.safetensors"], "", "..", "../a.safetensors", "sub/a.safetensors", "x" * 9999, "a\0b", "\ud800"],
)
def test_an_index_of_anything(entry: Any, tmp_path: Path) -> None:
    """An index whose values are no names of files beside it ends in a traceback, or reads outside of the folder."""
    write(tmp_path, {"a.safetensors": random_tensors()}, {UP: "a.safetensors", HEAD: entry})
    write_config(tmp_path)
    with pytest.raises(ModelError, match=r"places 'lm_head.weight' in .*; the name of a file|names the shard \.\."):
        open_checkpoint(str(tmp_path))
    for text in ('{"weight_map": []}', '{"weight_map": {}}', "{}", "[" * 99999, "\xff"):
        (tmp_path / "model.safetensors.index.json").write_text(text, encoding="latin-1")
        with pytest.raises(ModelError, match="index.json"):
            open_checkpoint(str(tmp_path))


def test_what_lies_beside_is_named(tmp_path: Path) -> None:
    """An adapter, a second set of weights or a field that changes the pass is passed over without a word."""
    write(
        tmp_path, {"model.safetensors": random_tensors(), "consolidated.safetensors": {}, "optimiser-1.safetensors": {}}
    )
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 2]}
    write_config(tmp_path, rope_interval=3, max_window_layers=1, attn_pdrop=0.0, rope_parameters=rope)
    for name in ("pytorch_model.bin", "adapter_config.json", "x.gguf", "training_args.bin", "README.md"):
        (tmp_path / name).write_text("{}")
    with pytest.warns(TandemWarning) as caught:
        open_checkpoint(str(tmp_path))
    (line,) = (str(one.message) for one in caught)
    named = "adapter_config.json; consolidated.safetensors; pytorch_model.bin; x.gguf; rope_interval of config.json; "
    assert line == f"{tmp_path}: not read: {named}max_window_layers of config.json; mrope_section of config.json."


def test_whole_numbers_are_no_weights(tmp_path: Path) -> None:
    """Codes of a quantised model are read as if they were values."""
    write(tmp_path, {"model.safetensors": {**random_tensors(), UP: torch.ones(40, 24, dtype=torch.int8)}})
    write_config(tmp_path)
    with pytest.raises(ModelError, match=f"tensor {UP} is of I8; supported: F64.*not quantised"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize(("dtype", "shape", "size"), [("F6_E2M3", [4, 4], 12), ("F4", [2, 3], 3)])
@pytest.mark.parametrize("quantised", [False, True])
def test_dtypes_that_fail_when_they_are_fetched(
    dtype: str, shape: list[int], size: int, quantised: bool, tmp_path: Path
) -> None:
    """A trace in the midst of loading: safetensors opens tensors that torch does not read, and rows of half bytes."""
    write(tmp_path, {"model.safetensors": random_tensors()})
    write_config(tmp_path, **({"quantization_config": {"quant_method": "fp8"}} if quantised else {}))
    path = tmp_path / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, body = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    header["odd"] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + size]}
    written = json.dumps(header).encode()
    path.write_bytes(len(written).to_bytes(8, "little") + written + body + bytes(size))
    with safe_open(str(path), "pt") as opened, pytest.raises(SafetensorError):
        assert opened.get_slice("odd").get_dtype() == dtype
        opened.get_tensor("odd")
    with pytest.raises(ModelError, match=f"tensor odd is of {dtype}; supported: F64"):
        open_checkpoint(str(tmp_path))


def split_gguf(folder: Path, tensors: Tensors, parts: int, first_empty: bool = False) -> list[Path]:
    """What `llama-gguf-split` makes: metadata in the first part, tensors in all (or all but the first)."""
    names = {EMBED: "token_embd.weight", "model.norm.weight": "output_norm.weight", HEAD: "output.weight"}
    stems = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
             "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}  # fmt: skip
    for name in tensors:
        if name not in names:
            _, _, layer, rest = name.split(".", 3)
            stem, suffix = rest.rsplit(".", 1)
            names[name] = f"blk.{layer}.{stems[stem]}.{suffix}"
    order, paths = list(tensors), []
    for part in range(parts):
        paths.append(folder / f"m-{part + 1:05d}-of-{parts:05d}.gguf")
        writer = gguf.GGUFWriter(paths[-1], "qwen2")
        if part == 0:
            writer.add_context_length(64)
            for add, value in ((writer.add_embedding_length, 24), (writer.add_feed_forward_length, 40),
                               (writer.add_block_count, 2), (writer.add_head_count, 4), (writer.add_head_count_kv, 2),
                               (writer.add_layer_norm_rms_eps, 1e-6)):  # fmt: skip
                add(value)
        writer.add_uint16("split.no", part)
        writer.add_uint16("split.count", parts)
        writer.add_int32("split.tensors.count", len(tensors))
        places = [1 + index % (parts - 1) if first_empty else index % parts for index in range(len(order))]
        for name, place in zip(order, places, strict=True):
            if place == part:
                writer.add_tensor(names[name], tensors[name].numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths


@pytest.mark.parametrize("first_empty", [False, True])
def test_parts_of_a_gguf(first_empty: bool, tmp_path: Path) -> None:
    """A model in parts is called incomplete, its parts are mixed up, or one of another model is taken among them."""
    tensors = {name: one for name, one in random_tensors("llama").items() if name != HEAD}
    paths = split_gguf(tmp_path, tensors, 3, first_empty)
    for source in (*paths, tmp_path):
        opened = open_checkpoint(str(source))
        found = dict(opened.tensors())
        assert set(found) == set(tensors) and all(torch.equal(found[name], one) for name, one in tensors.items())
    whole = paths[1].read_bytes()
    shutil.copy(paths[2], paths[1])
    with pytest.raises(ModelError, match="00002-of-00003.gguf says that it is part 3 of 3, its name 2 of 3"):
        open_checkpoint(str(paths[0]))
    paths[1].unlink()
    with pytest.raises(
        ModelError, match="is part 3 of 3 of a model; 1 are not beside it: m-00002.*llama-gguf-split --merge"
    ):
        open_checkpoint(str(paths[2]))
    (tmp_path / "other.gguf").write_bytes(whole)
    with pytest.raises(ModelError, match="other.gguf is one of the 3 parts of a model. Name them NAME-00001-of-00003"):
        open_checkpoint(str(tmp_path / "other.gguf"))
    split_gguf(tmp_path, dict(list(tensors.items())[:-2]), 3, first_empty)
    paths[1].write_bytes(whole)
    with pytest.raises(ModelError, match=r"the 3 parts of .* hold .* tensors"):
        open_checkpoint(str(paths[0]))
