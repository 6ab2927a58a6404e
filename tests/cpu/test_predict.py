"""Operations, bytes and times of a model on a device: by hand, by loops, by torch's counter, against real tensors."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tandem.bench import predicted as checks
from tandem.bench import profile as profiles
from tandem.bench import rates as machine_rates
from tandem.bench import roofline
from tandem.bench.devices import DEVICES, arithmetic_on, device_of, served_as
from tandem.bench.foretold import predict
from tandem.bench.measured import NUMBERS, ROWS, Measured
from tandem.bench.operations import Operation, Work, operations, parameters_of, room, scores_of, weight_bytes
from tandem.bench.rates import cache_bytes
from tandem.cli import main
from tandem.errors import ConfigError
from tandem.kernels.eights import Eights
from tandem.kernels.fours import Fours
from tandem.models.checkpoint import open_checkpoint
from tandem.models.spec import ModelSpec
from tandem.numerics.blocks import FORMATS, quantise
from tandem.plan.roofline import decode_cost
from tandem.train.config import LearnerConfig
from tandem.types import Reach

TINY = ModelSpec("llama", vocab_size=48, width=8, ff_width=12, layers=2, heads=4, kv_heads=2, head_size=6)
LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 131072,
}  # fmt: skip


def of(spec: ModelSpec, form: str, work: Work, device: str = "b200") -> dict[str, Operation]:
    return {one.name: one for one in operations(spec, served_as(form), work, DEVICES[device])}


def test_a_product_by_hand() -> None:
    """Bytes of a matrix or of rows counted in another format than they are kept in."""
    found = of(replace(TINY, layers=1), "w8a8", Work("decode", 3, 5), "h200")
    qkv = found["qkv"]  # 3 rows of 8 inputs become (4 + 2 + 2) x 6 outputs
    assert (qkv.flop, qkv.arithmetic, qkv.calls) == (2 * 3 * 48 * 8, "int8", 1)
    assert qkv.bytes == 48 * (8 + 8) + 3 * 8 + 2 * 3 * 48  # codes with a scale and a sum a row; codes in; bf16 out
    assert found["rounding of activations"].bytes == 3 * 3 * (8 + 24 + 8 + 12)  # bf16 read, a byte written
    assert found["down"].bytes == 8 * (12 + 8) + 3 * 12 + 2 * 3 * 8
    assert found["head, sampling"].bytes == 2 * (3 + 48) * 8  # logits are never written
    assert found["attention"].flop == 4 * 3 * 6 * 4 * 6  # 3 queries, 6 keys, 4 heads of 6, scores and values
    assert found["attention"].bytes == 2 * 2 * 6 * (2 * 18 + 4 * 3)  # keys and values of 2 heads; queries in, out


def loops(spec: ModelSpec, work: Work) -> Iterator[int]:
    """Multiplications and additions of an engine's pass, each product's element by itself."""
    for layer, _ in itertools.product(range(spec.layers), range(work.batch)):
        length = 1 if work.phase == "decode" else work.context
        for position in range(length):
            behind = layer + 1 == spec.layers and position + 1 < length  # only keys and values of it are used
            yield 2 * spec.width * (spec.heads + 2 * spec.kv_heads) * spec.head_size
            if behind:
                continue
            at = position if work.phase == "prefill" else work.context
            for key in range(at + 1):
                if key >= spec.reaches[layer].first_seen(at):
                    yield 2 * 2 * spec.heads * spec.head_size
            yield 2 * spec.heads * spec.head_size * spec.width
            yield 3 * 2 * spec.width * spec.ff_width
    yield 2 * work.batch * spec.width * spec.vocab_size


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_operations_are_those_of_the_loops(phase: str) -> None:
    """A layer, a head or the mask of attention left out of the count, or a window counted as if it saw all."""
    attention = TINY.attention[0]
    for spec in (TINY, replace(TINY, attention=(attention, replace(attention, reach=Reach(window=3))))):
        work = Work(phase, 2, 7)  # type: ignore[arg-type]
        assert sum(one.flop for one in of(spec, "bf16", work).values()) == sum(loops(spec, work))
    work = Work("decode", 3, 11)
    assert sum(one.flop for one in of(TINY, "bf16", work).values()) == decode_cost(TINY, 3, 11).flop


def test_training_has_the_operations_that_torch_counts() -> None:
    """A product of the forward or the backward pass counted twice, or not at all."""
    length, spec = 9, TINY
    heads, group, size = spec.heads, spec.heads // spec.kv_heads, spec.head_size
    drawn = torch.randn(2 * length, spec.width, requires_grad=True)
    shapes = {
        "q": (heads * size, spec.width), "k": (spec.kv_heads * size, spec.width),
        "v": (spec.kv_heads * size, spec.width),
        "o": (spec.width, heads * size), "gate": (spec.ff_width, spec.width), "up": (spec.ff_width, spec.width),
        "down": (spec.width, spec.ff_width),
    }  # fmt: skip
    from torch.utils.flop_counter import FlopCounterMode  # which imports Triton, before tests/gpu has chosen how

    with FlopCounterMode(display=False) as counted:
        x = drawn
        for _ in range(spec.layers):
            w = {name: torch.randn(shape, requires_grad=True) for name, shape in shapes.items()}
            q, k, v = ((x @ w[name].T).view(2, length, -1, size).transpose(1, 2) for name in "qkv")
            k, v = (one.repeat_interleave(group, 1) for one in (k, v))
            mixed = ((q @ k.transpose(2, 3)).softmax(-1) @ v).transpose(1, 2).reshape(2 * length, -1)
            x = x + mixed @ w["o"].T
            x = x + (torch.nn.functional.silu(x @ w["gate"].T) * (x @ w["up"].T)) @ w["down"].T
        (x @ torch.randn(spec.vocab_size, spec.width, requires_grad=True).T).sum().backward()
    square = 3 * 2 * 4 * spec.layers * heads * size * length**2  # without a mask
    found = of(spec, "bf16", Work("train", 2, length + 1))
    products = sum(one.flop for name, one in found.items() if not name.startswith("attention"))
    assert counted.get_total_flops() - square == products
    assert found["attention"].flop == 2 * 4 * spec.layers * heads * size * length * (length + 1) // 2


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_of_a_matrix_are_those_of_its_tensors(name: str) -> None:
    """Scales of blocks, of rows or of the tensor left out, or a ragged last block charged as a share of one."""
    form = FORMATS[name]
    x = torch.randn(256, 200)
    blocks = quantise(x, form)
    scale = {"e8m0": 1, "e4m3": 1, "fp32": 4}[form.scale]
    taken = x.numel() * form.element.bits / 8 + scale * blocks.scales.numel()
    taken += 0 if blocks.whole is None else 4
    taken += 0 if blocks.zeros is None else blocks.zeros.numel() * form.element.bits / 8
    assert served_as(name).matrix_bytes(*x.shape) == taken


def test_bytes_of_integers_are_those_that_the_kernels_read() -> None:
    """A row's scale or sum, or a group's scale, left out."""
    eights = Eights(torch.randn(128, 64))
    kept = eights.packed.nbytes + eights.scales.nbytes + eights.sums.nbytes
    assert served_as("w8a8").matrix_bytes(128, 64) == kept
    assert served_as("w4a8").matrix_bytes(128, 64) == Fours(torch.randn(128, 64)).packed.nbytes


def test_formats_are_multiplied_where_a_device_can() -> None:
    """A rate that a device has not, taken for one that it has."""
    assert arithmetic_on(DEVICES["b200"], served_as("nvfp4+nvfp4")) == ("fp4", "")
    assert arithmetic_on(DEVICES["b200"], served_as("mxfp4+mxfp8_e4m3"))[0] == "fp8"
    assert arithmetic_on(DEVICES["mi355x"], served_as("mxfp4_even+mxfp4"))[0] == "fp4"
    assert arithmetic_on(DEVICES["mi300x"], served_as("fp8_128x128+fp8_1x128"))[0] == "fp8"
    for device, form in (("h200", "nvfp4+nvfp4"), ("mi355x", "nvfp4+nvfp4"), ("a100", "fp8_row+fp8_row")):
        arithmetic, why = arithmetic_on(DEVICES[device], served_as(form))
        assert arithmetic == "bf16" and f"{device} does not multiply {form}" in why, why
    for form in ("nvfp4", "int4_g128", "int8"):
        arithmetic, why = arithmetic_on(DEVICES["b200"], served_as(form))
        assert arithmetic == "bf16" and "of matrices alone" in why
    assert arithmetic_on(DEVICES["b200"], served_as("nvfp4+mxfp8_e4m3"))[0] == "bf16"  # scales of two kinds
    work = Work("decode", 3, 5)
    widened = of(TINY, "nvfp4+nvfp4", work, "h200")
    assert "rounding of activations" not in widened
    assert widened["down"].bytes < of(TINY, "bf16", work)["down"].bytes
    with pytest.raises(ConfigError, match="a100, h100, h200, b200, mi300x, mi355x, by their datasheets, and this"):
        device_of("h300")


def test_seventy_billion_parameters_need_no_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder that holds a shape alone refused; keys and values, or what fits, off by the count of heads."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    asked = ["--device", "b200", "--format", "bf16,nvfp4+nvfp4", "--batch", "64", "--context", "8192", "--json"]
    assert main.main(["numerics", "roofline", str(tmp_path), *asked]) == 0
    whole, small = json.loads(capsys.readouterr().out)
    count = 2 * 128256 * 8192 + 80 * (2 * 8192 * 8192 + 2 * 1024 * 8192 + 3 * 8192 * 28672 + 2 * 8192) + 8192
    assert whole["memory"]["weights"] == 2 * count and whole["memory"]["sequence"] == 8192 * 2 * 2 * 8 * 128 * 80
    assert whole["memory"]["sequences"] == int((0.9 * 180e9 - 2 * count) // whole["memory"]["sequence"]) == 7
    assert small["memory"]["sequences"] > 40 and small["seconds"] < whole["seconds"]
    assert sum(row["seconds"] for row in small["rows"]) == small["seconds"]
    assert main.main(["numerics", "roofline", str(tmp_path), "--device", "h100", "--phase", "train"]) == 0
    # 18 bytes of each of 70.6 billion parameters, and what a microbatch keeps, over 0.9 of 80 GB.
    assert "it does not fit; 18 devices hold it, divided evenly" in capsys.readouterr().out


def test_roofline_takes_the_larger_of_both() -> None:
    """Time of an operation that is neither its products' nor its bytes'."""
    device = replace(DEVICES["h200"], bytes_s=10.0, rates={"bf16": 100.0})
    assert Operation("x", "product", 1000.0, 10.0).least_s(device) == 10.0
    assert Operation("x", "product", 1000.0, 200.0).least_s(device) == 20.0
    assert Operation("x", "product", 1000.0, 200.0).bound(device) == "memory"


def measured(threads: int = 2) -> Measured:
    steps = tuple(float(10 + rows) for rows in range(1, ROWS + 1))
    return Measured(
        machine="here, x, 2 threads", taken="today", threads=threads, memory_bytes=1e9, cache_bytes=(1e3, 1e5),
        read_bytes_s=1.0, read_one_bytes_s=1.0, write_bytes_s=1.0, cached_bytes_s=(1e9, 1e9), flop_s={"bf16": 1.0},
        tile_s={"bf16": steps, "fp32": steps, "int8": steps}, tile_end_s=dict.fromkeys(("bf16", "fp32", "int8"), 3.0),
        number_s=dict.fromkeys(NUMBERS, 0.0), call_s=0.0, wait_s=0.0,
    )  # fmt: skip


def test_a_product_takes_the_tiles_of_its_busiest_thread() -> None:
    """Rows beside whole tiles free, or half a panel at half its time: the kernel works on whole ones."""
    # 7 rows are a tile of 6 (16 a step) and one of 1 (11); 130 columns are 3 panels; 9 inputs are 5 pairs. Of 6 tiles
    # each thread has 3.
    assert measured().tiles_s(7, 130, 9, "bf16") == 3 * (5 * 16 + 3 + 5 * 11 + 3 / 6) / 2
    assert measured(4).tiles_s(7, 130, 9, "bf16") == pytest.approx(3 * (5 * 16 + 3 + 5 * 11 + 0.5) * 2 / 6)
    one = Operation("qkv", "product", 1.0, 1.0, shape=(7, 130, 9))
    streams = replace(measured(), cache_bytes=(0.0, 0.0))
    seconds, bound = streams.seconds(one, TINY, served_as("bf16"), Work("decode", 7, 1))
    assert (seconds, bound) == (130 * 9 * 2, "memory")  # a byte a second
    numbers = replace(measured(), number_s=dict.fromkeys(NUMBERS, 8.0))
    gate = replace(one, name="gate, up, SwiGLU", numbers=5.0)
    assert (
        numbers.seconds(gate, TINY, served_as("bf16"), Work("decode", 7, 1))[0]
        == measured().tiles_s(7, 130, 9, "bf16") + 20
    )


def test_scores_are_computed_in_whole_blocks() -> None:
    """A mask that saves time inside a block of keys, or 32 queries that all pay for the longest prompt."""
    assert scores_of(Reach(), 0, 1) == 64 and scores_of(Reach(), 100, 101) == 128
    assert scores_of(Reach(), 0, 96) == 32 * (64 + 64 + 128)
    assert scores_of(Reach(window=8), 200, 201) == 64


def test_rates_are_kept_by_the_machines_name(tmp_path: Path) -> None:
    """Rates of another machine, or of another version of the file, taken for this one's."""
    kept = measured()
    kept.keep(tmp_path)
    assert Measured.known(kept.machine, tmp_path) == kept
    assert Measured.known("here, x, 4 threads", tmp_path) is None
    (file,) = (tmp_path / "rates").iterdir()
    file.write_text(file.read_text().replace('"form": 2', '"form": 0'))
    assert Measured.known(kept.machine, tmp_path) is None


def test_caches_are_read_from_linux(tmp_path: Path) -> None:
    """A first-level cache of data taken for the second's."""
    for index, (level, size) in enumerate((("1", "32K"), ("2", "1024K"), ("3", "32M"))):
        folder = tmp_path / f"cpu0/cache/index{index}"
        folder.mkdir(parents=True)
        (folder / "level").write_text(level)
        (folder / "size").write_text(size)
    assert cache_bytes(tmp_path) == (1 << 20, 32 << 20)


EIGHTS = LearnerConfig(gradients="int8", moments="float8", masters="bfloat16")


def test_training_in_fewer_bits_by_hand() -> None:
    """Gradients in 8 bits at bf16's rate or bytes, a state of the optimiser that is read and not written, or a matrix
    turned in each microbatch."""
    spec, work = replace(TINY, layers=1), Work("train", 3, 5)
    found = {one.name: one for one in operations(spec, served_as("bf16"), work, DEVICES["h200"], EIGHTS)}
    plain = of(spec, "bf16", work)
    rows, (n, k) = 3 * 4, (spec.width, spec.ff_width)  # of down: [8, 12]
    for name in ("input gradient: down", "weight gradient: down"):
        assert (found[name].flop, found[name].arithmetic) == (plain[name].flop, "int8") == (2 * rows * n * k, "int8")
    # Codes of W with a scale and a sum for each of its columns, and of dy; dx in bf16. Then dW in fp32, both operands.
    assert found["input gradient: down"].bytes == n * k + 8 * k + rows * n + 2 * rows * k
    assert found["weight gradient: down"].bytes == 8 * n * k + rows * (n + k)
    outputs, inputs = 48 + 8 + 24 + 8, 8 + 24 + 8 + 12  # of qkv, out, gate and up, down
    assert found["rounding of gradients"].bytes == 2 * rows * outputs * 3
    assert found["rounding of rows, turned"].bytes == rows * inputs * 3
    matrices = 48 * 8 + 8 * 24 + 24 * 8 + 8 * 12
    assert (found["turning of weights"].numbers, found["turning of weights"].calls) == (matrices, 4)
    count = parameters_of(spec)
    # A byte of each moment read and written with a scale for 1,024; the weight read and written; the gradient read.
    assert found["AdamW, moments in 8 bits, no masters"].bytes == (4 + 2 * (2 + 8 / 1024) + 4) * count
    assert plain["AdamW"].bytes == (4 + 24 + 2) * count
    held = room(spec, served_as("bf16"), work, DEVICES["h200"], EIGHTS)
    turned = sum(4 + 4 + outputs for outputs in [48] * 8 + [8] * 24 + [24] * 8 + [8] * 12)
    assert held.training == (4 + 2 + 8 / 1024) * count + turned
    assert of(spec, "bf16", Work("train", 3, 5)) == plain  # a config asked once changes none asked later


def test_gradients_take_a_devices_arithmetic() -> None:
    """A rate of 4 bits on a device without it, or a prediction of what is only emulated, without a word."""
    learner = LearnerConfig(gradients="nvfp4+stochastic+hadamard")
    asked = (TINY, "nvfp4+nvfp4", "b200", "train", 1, 16)
    ways = {row["operation"]: row["arithmetic"] for row in predict(*asked, None, learner)["rows"]}  # type: ignore[arg-type]
    assert (ways["down"], ways["input gradient: down"], ways["weight gradient: qkv"]) == ("fp4", "fp4", "fp4")
    found = predict(TINY, "bf16", "h200", "train", 1, 16, None, learner)
    assert {row["arithmetic"] for row in found["rows"]} == {"", "bf16"}
    assert "h200 does not multiply nvfp4+nvfp4" in " ".join(found["notes"])
    assert not any(row["operation"].startswith("rounding") for row in found["rows"])
    here = predict(TINY, "bf16", "this", "train", 1, 16, measured(), learner)
    assert any("by emulation" in note for note in here["notes"])
    assert here["learner"]["gradients"] == learner.gradients


@pytest.mark.parametrize("form", ["bf16", "w8a8", "bf16, trained in 8 bits"])
def test_every_kernel_has_a_prediction(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel of a decode step, a prefill or a learner's step that the table leaves empty."""
    for name, value in (("DECODES", (2,)), ("PREFILL", (2, 8)), ("LEARNER", (2, 8)), ("LEAST", 0.0)):
        monkeypatch.setattr(checks, name, value)
    monkeypatch.setattr(checks, "STEPS", 2)
    monkeypatch.setattr(profiles, "STEPS", 2)
    rates = replace(measured(), number_s=dict.fromkeys(NUMBERS, 1e-9), flop_s={"bf16": 1.0, "int8": 1.0})
    form, _, trained = form.partition(",")
    learner = EIGHTS if trained else LearnerConfig()
    model = "new:layers=2,width=64,heads=2,kv_heads=1,ff_width=96"
    found = checks.check(model, form, rates, lambda _: None, learner)
    works = {row["work"] for row in found["rows"]}
    assert works == {"decode step 2", "prefill 2x8", *(["train 2x8"] if form == "bf16" else [])}
    assert [row for row in found["rows"] if row["predicted_s"] is None] == []
    assert {name for work in found["works"] for name in work["unseen"]} <= {"embedding", "gradient norm"}
    if trained:
        whole = predict(open_checkpoint(model).spec, form, "this", "train", 2, 8, rates, learner)
        told = next(work for work in found["works"] if work["work"] == "train 2x8")
        unseen = sum(row["seconds"] for row in whole["rows"] if row["operation"] in told["unseen"])
        assert told["predicted_s"] + unseen == pytest.approx(whole["seconds"])  # all that is rounded is shared out
    with pytest.raises(ConfigError, match="knows the kernels of bf16 and w8a8"):
        checks.check("new:", "mxfp4", rates, lambda _: None)


def test_memory_of_training_is_weights_gradients_masters_and_moments() -> None:
    """What a step keeps, or a moment, left out of what has to fit."""
    work, served = Work("train", 4, 64), served_as("bf16")
    held = room(TINY, served, work, DEVICES["h200"])
    assert (held.weights, held.training) == (2 * parameters_of(TINY), 16 * parameters_of(TINY)) and held.devices == 1
    assert weight_bytes(TINY, served) == held.weights
    assert replace(held, memory=held.fixed + held.sequence).devices == 2  # of which 0.9 are usable


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["roofline", "new:", "--device", "h20"], "no such device is known. Did you mean h200"),
        (
            ["roofline", "new:", "--format", "mxfp5"],
            "neither bf16 nor fp32, and 'mxfp5' rounds nothing",
        ),
        (["roofline", "new:", "--context", "999999"], "the model knows"),
        (["roofline", "new:", "--format", "bf16,"], "names a format that is empty"),
        (["roofline", "new:", "--set", "learner.moments=float8"], "learner.moments is of --phase train"),
        (["roofline", "new:", "--phase", "train", "--set", "learner.lr=0.1"], "looks at learner.gradients, learner.mo"),
        (["roofline", "new:", "--phase", "train", "--set", "learner.lrs=0.1"], "no setting is named"),
        (["roofline", "new:", "--measure"], "Give --device this"),
        (["roofline", "new:", "--check"], "Give --device this"),
        (["roofline", "new:", "--device", "this", "--context", "999999"], "the model knows"),
        (["roofline", "new:", "--device", "this", "--format", "bf16,mxfp5"], "'mxfp5' rounds nothing"),
        (["roofline", "new:", "--device", "this", "--check", "--format", "bf16,w8a8"], "kernels of one format"),
        (["roofline", "new:", "--device", "this", "--check", "--batch", "7"], "--batch would be passed over"),
        (["roofline"], "takes a model; 0 names were given"),
        (["compare", "mxfp4", "nvfp4", "--batch", "2"], "--batch is not of `numerics compare`"),
        (["sensitivity", "new:", "--format", "mxfp4"], "needs --texts FILE"),
        (["page", "mxfp4"], "needs --out DIR"),
    ],
)
def test_wrong_input_is_told(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A traceback, a flag that is taken and does nothing, or half a minute of measuring before a word is told."""
    monkeypatch.setattr(roofline, "rates", lambda again: pytest.fail("measured before it is refused"))
    assert main.main(["numerics", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_rates_are_measured_whoever_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trace where `pareto`, which learns nothing, is the first to ask for this machine's rates: gradients' are among
    them."""
    x = torch.ones(2, requires_grad=True)

    def measured() -> Measured:
        x.sum().backward()
        raise InterruptedError

    monkeypatch.setattr(machine_rates, "measure", measured)
    with torch.no_grad(), pytest.raises(InterruptedError):
        machine_rates.kept_or_measured(True, lambda text: None)


def test_small_models_have_figures(capsys: pytest.CaptureFixture[str]) -> None:
    """Rows of 0.0000 ms, and weights of 0 MB."""
    assert main.main(["numerics", "roofline", "new:width=32,heads=4,kv_heads=2,ff_width=48", "--context", "64"]) == 0
    printed = capsys.readouterr().out
    assert not re.search(r"\s0(\.0+)? (ms|MB|TFLOP)|\s0\.0+\s", printed), printed


def test_predict_notes_what_is_not_multiplied() -> None:
    """A time by a rate of bf16 under the name of another format, without a word."""
    found = predict(TINY, "nvfp4+nvfp4", "h200", "decode", 1, 16)
    assert found["multiplied_in"] == "bf16" and "h200 does not multiply nvfp4+nvfp4" in found["notes"][0]
    assert predict(TINY, "nvfp4+nvfp4", "b200", "decode", 1, 16)["notes"] == []
    trained = predict(TINY, "w8a8", "h200", "train", 1, 16)
    assert "those of gradients bf16's" in trained["notes"][0]
    ways = {row["operation"]: row["arithmetic"] for row in trained["rows"]}
    assert (ways["down"], ways["input gradient: down"]) == ("int8", "bf16")
    for learner in (LearnerConfig(), LearnerConfig(gradients="nvfp4+stochastic")):
        notes = " ".join(predict(TINY, "mxfp4+mxfp4", "h200", "train", 1, 16, None, learner)["notes"])
        assert "h200 does not multiply mxfp4+mxfp4" in notes and "products are those of" not in notes
