"""Parts of quantised matrices that are missing, damaged or against their config: each is refused by name, never read as
something else. Behind files: a store of a matrix of 64 x 128 beside a plain one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from tandem.errors import ModelError
from tandem.models.fields import Fields
from tandem.models.quantised.opened import METHODS, QuantisedTensors
from tandem.models.quantised.write import kind_of
from tandem.numerics.blocks import quantise

Parts = dict[str, Tensor]
DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
ROWS, COLUMNS = 64, 128


class Store:
    """Tensors by name, as safetensors' files have them."""

    mapped_bytes = 0

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors, self.ignored = tensors, []
        self.shapes = {name: tuple(one.shape) for name, one in tensors.items()}
        self.dtypes = {name: DTYPES[one.dtype] for name, one in tensors.items()}

    def read(self, name: str) -> Tensor:
        return self._tensors[name]


def read(text: str, change: Callable[[Parts, dict[str, Any]], object]) -> Tensor:
    """A matrix by a file format, changed, as it is read back."""
    kind = kind_of(text)
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))
    parts = kind.scheme.written(kind.form, quantise(weight, kind.form))
    config = kind.scheme.config(kind.form, [])
    change(parts, config)
    joint = "_" if text.startswith("mxfp4") else "."
    tensors = {f"a.m{joint}{part}": tensor for part, tensor in parts.items()}
    other = {f"a.n{joint}{part}": x for part, x in kind.scheme.written(kind.form, quantise(weight, kind.form)).items()}
    store = QuantisedTensors(Store(tensors | other), METHODS[config["quant_method"]](Fields("config.json", config)))
    assert store.shapes["a.m.weight"] == (ROWS, COLUMNS)
    store.codes("a.m.weight"), store.fp4("a.m.weight")
    return store.read("a.m.weight")


def to(part: str, change: Callable[[Tensor], Tensor]) -> Callable[[Parts, dict[str, Any]], object]:
    return lambda parts, config: parts.update({part: change(parts[part]).contiguous()})


def drop(part: str) -> Callable[[Parts, dict[str, Any]], object]:
    return lambda parts, config: parts.pop(part)


def says(**values: Any) -> Callable[[Parts, dict[str, Any]], object]:
    """In the config, or of compressed-tensors in that of its group's weights."""

    def change(parts: Parts, config: dict[str, Any]) -> None:
        groups = config.get("config_groups")
        (groups["group_0"]["weights"] if groups else config).update(values)

    return change


def both(*changes: Callable[[Parts, dict[str, Any]], object]) -> Callable[[Parts, dict[str, Any]], object]:
    return lambda parts, config: [change(parts, config) for change in changes]


def half(x: Tensor) -> Tensor:
    return x[: len(x) // 2]


def filled(value: float) -> Callable[[Tensor], Tensor]:
    """Its first number another; of e4m3 and bytes the code."""

    def change(x: Tensor) -> Tensor:
        x = x.clone()
        (x.view(torch.uint8) if x.itemsize == 1 else x).view(-1)[0] = value
        return x

    return change


CT = "compressed-tensors"
INT, ASYM, FP8_ROW, FP8_BLOCK = f"{CT}:int4_g32", f"{CT}:int4_g32_asym", f"{CT}:fp8_row", f"{CT}:fp8_128x128"
SCALES = [  # of each dtype that a format keeps
    *((text, "weight_scale") for text in (INT, FP8_ROW, f"{CT}:fp8_tensor", FP8_BLOCK)),
    *((text, "scales") for text in ("awq:int4_g32", "gptq:int4_g32_asym", "gptq_v2:int4_g64")),
    ("fp8", "weight_scale_inv"),
]
NAN, INF = float("nan"), float("inf")
DAMAGED = r"a.m.weight: .*(NaN or infinite|scale of the tensor is).*The file is damaged"
ODD = r"the parts of a.m.weight do not fit one another by .*{}"
CASES: list[tuple[str, Callable[[Parts, dict[str, Any]], object], str]] = [
    # a matrix twice
    *(
        (text, lambda p, c: p.update(weight=torch.zeros(ROWS, COLUMNS)), "a.m.weight is there in F32 beside its codes")
        for text in (INT, f"{CT}:nvfp4", "awq:int4_g32", "gptq:int4_g32")
    ),
    # a scale that is not there
    *((text, drop("weight_scale"), "a.m.weight .* is of F8_E4M3 and has no scale") for text in (FP8_ROW, FP8_BLOCK)),
    ("fp8", drop("weight_scale_inv"), "a.m.weight .* is of F8_E4M3 and has no scale"),
    (
        "modelopt",
        lambda p, c: (p.clear(), p.update(weight=torch.ones(ROWS, COLUMNS).to(torch.float8_e4m3fn))),
        "a.m.weight .* is of F8_E4M3 and has no scale",
    ),
    ("fp8", lambda p, c: p.update(bias=torch.ones(ROWS).to(torch.float8_e5m2)), "a.m.bias .* is of F8_E5M2 and has no"),
    # parts that the config says otherwise of
    (ASYM, drop("weight_zero_point"), "a.m has no weight_zero_point, and the config says symmetric: false"),
    (ASYM, says(symmetric=True), "a.m: .* zero points are not 8, but the config says symmetric: true"),
    (f"{CT}:int8_row_asym", says(symmetric=True), "a.m: .* zero points are not 128, but the config says symmetric"),
    (FP8_ROW, lambda p, c: p.update(weight_zero_point=torch.ones(ROWS, 1)), "a.m is of floats and has a weight_zero"),
    (INT, says(actorder="group"), "a.m has no weight_g_idx, but the config says actorder"),
    ("awq:int4_g32_asym", drop("qzeros"), "a.m has no qzeros, and the config does not say zero_point: false"),
    ("awq:int4_g32_asym", says(zero_point=False), "a.m: .* zero points are not 8, but the config says zero_point: f"),
    ("gptq:int4_g32_asym", says(sym=True), "a.m: .* zero points are not 8, but the config says sym: true"),
    ("gptq:int4_g32", says(checkpoint_format="gptq_v2"), "a.m: 256 of 256 zero points are not 8"),
    ("gptq:int4_g32", both(drop("g_idx"), says(desc_act=True)), "a.m has no g_idx, but the config says desc_act"),
    ("fp8", lambda p, c: p.update(weight_scale=torch.ones(1)), "a.m has a weight_scale_inv and a weight_scale"),
    (f"{CT}:mxfp4", lambda p, c: p.update(weight_global_scale=torch.ones(1)), "U?int8.* beside a weight_global_scale"),
    # weights of another kind
    ("fp8", to("weight", lambda x: x.view(torch.int8)), r"a.m.weight is of torch.int8 \(64, 128\) beside a scale"),
    ("fp8", to("weight", lambda x: x.float().to(torch.float8_e5m2)), "a.m.weight is of torch.float8_e5m2"),
    ("mxfp4", to("scales", lambda x: x.view(torch.int8)), "a.m has blocks of torch.uint8 and scales of torch.int8"),
    # scales that lie otherwise
    (FP8_ROW, to("weight_scale", lambda x: x.T), r"a.m.weight_scale has shape \(1, 64\) .*; \(64, 1\) is needed"),
    (INT, to("weight_scale", lambda x: x.T), r"a.m.weight_scale has shape \(4, 64\) .*; \(64, 4\) is needed"),
    ("fp8", both(says(weight_block_size=[32, 32]), to("weight_scale_inv", lambda x: x[:1, :1])), "of shape .1, 1."),
    ("fp8", both(says(weight_block_size=[32, 32]), to("weight_scale_inv", lambda x: x.repeat(4, 2))), "of shape"),
    ("fp8", to("weight_scale_inv", lambda x: x.view(1, 1).repeat(1, 64)), r"a.m has scales of shape \(1, 64\)"),
    # scales that are no numbers
    *((text, to(part, filled(value)), DAMAGED) for text, part in SCALES for value in (NAN, INF)),
    *(
        (f"{CT}:{name}", to("weight_scale", filled(127 if name[0] == "n" else 255)), DAMAGED)
        for name in ("nvfp4", "mxfp4")
    ),
    ("modelopt", to("weight_scale", filled(255)), DAMAGED),
    ("mxfp4", to("scales", filled(255)), DAMAGED),
    *((f"{CT}:nvfp4", to("weight_global_scale", filled(value)), DAMAGED) for value in (0, NAN, INF, -1, 1e-44)),
    *(("modelopt", to("weight_scale_2", filled(value)), DAMAGED) for value in (0, NAN, INF, 3e38)),
    # half of what is needed, and other dtypes
    *((f"{CT}:{name}", to("weight_scale", half), ODD.format(r"weight_scale \(32, ")) for name in ("nvfp4", "mxfp4")),
    ("modelopt", to("weight_scale", half), ODD.format(r"weight_scale \(32, 8\) of F8_E4M3")),
    ("mxfp4", to("scales", half), ODD.format(r"scales \(32, 4\) of U8")),
    *((f"{text}:int4_g64", to("qzeros", half), ODD.format(r"qzeros \(1, 8\)")) for text in ("awq", "gptq", "gptq_v2")),
    *((f"{text}:int4_g32", to("qzeros", lambda x: x.repeat(1, 2)), ODD.format("qzeros")) for text in ("awq", "gptq")),
    (ASYM, to("weight_zero_point", half), ODD.format(r"weight_zero_point \(4, 4\)")),
    (ASYM, to("weight_zero_point", lambda x: x[:, :1]), ODD.format(r"weight_zero_point \(8, 1\)")),
    (f"{CT}:int8_row_asym", to("weight_zero_point", lambda x: x.T), ODD.format(r"weight_zero_point \(1, 64\)")),
    *((text, to(part, lambda x: x.to(torch.int32)), ODD.format(part)) for text, part in SCALES),
    (INT, to("weight_shape", lambda x: x.float()), ODD.format(r"weight_shape \(2,\) of F32")),
    (INT, to("weight_shape", lambda x: x[:1]), ODD.format(r"weight_shape \(1,\)")),
    (INT, lambda p, c: p.update(weight_g_idx=torch.full((COLUMNS,), 9)), ODD.format(r"weight_g_idx \(128,\)")),
    (f"{CT}:nvfp4", to("weight_global_scale", lambda x: x.repeat(2)), ODD.format(r"weight_global_scale \(2,\)")),
]


@pytest.mark.parametrize(("text", "change", "said"), CASES)
def test_damage_is_named(text: str, change: Callable[[Parts, dict[str, Any]], object], said: str) -> None:
    """Weights that are silently others, or a traceback, where a part is missing, damaged or against the config."""
    assert read(text, lambda parts, config: None).isfinite().all()
    with pytest.raises(ModelError, match=said):
        read(text, change)


def test_what_says_nothing_is_no_damage() -> None:
    """Zero points that are the middle of the range, where the config says that there are none, refused."""
    for text, part, value in (
        (INT, "weight_zero_point", torch.full((ROWS // 8, COLUMNS // 32), -0x77777778, dtype=torch.int32)),
        (f"{CT}:int8_row", "weight_zero_point", torch.zeros(ROWS, 1, dtype=torch.int8)),
        (FP8_ROW, "weight_zero_point", torch.zeros(ROWS, 1)),
        (INT, "weight_g_idx", torch.full((COLUMNS,), -1, dtype=torch.int32)),
    ):
        wanted = read(text, lambda parts, config: None)
        assert torch.equal(read(text, lambda parts, config: parts.update({part: value})), wanted)  # noqa: B023
    wanted = read("awq:int4_g32", lambda parts, config: None)
    assert torch.equal(read("awq:int4_g32", both(drop("qzeros"), says(zero_point=False))), wanted)
    assert torch.equal(read("awq:int4_g32", says(zero_point=False)), wanted)
    wanted = read(FP8_ROW, lambda parts, config: None)
    assert torch.equal(read(FP8_ROW, to("weight_scale", lambda x: x.flatten())), wanted)
