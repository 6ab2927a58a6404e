"""GGUF block formats of 2 to 4 bits, from random bytes, against ggml-quants.c's loops written out."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from tandem.errors import ModelError
from tandem.models.gguf import FORMATS, read_header

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
CURVE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # of IQ4_NL


def half(raw: bytes) -> float:
    return float(struct.unpack("<e", raw)[0])


def q2_k(b: bytes) -> list[float]:
    scales, codes, d, low = b[:16], b[16:80], half(b[80:82]), half(b[82:84])
    out = []
    for index in range(256):
        part, place = divmod(index, 128)
        shift, at = divmod(place, 32)
        scale = scales[8 * part + 2 * shift + at // 16]
        out.append(d * (scale & 15) * (codes[32 * part + at] >> 2 * shift & 3) - low * (scale >> 4))
    return out


def q3_k(b: bytes) -> list[float]:
    high, codes, packed, d = b[:32], b[32:96], b[96:108], half(b[108:110])
    scales = [
        (packed[i % 8] >> 4 * (i // 8) & 15 | (packed[8 + i % 4] >> 2 * (i // 4) & 3) << 4) - 32 for i in range(16)
    ]
    out = []
    for index in range(256):
        part, place = divmod(index, 128)
        shift, at = divmod(place, 32)
        code = (codes[32 * part + at] >> 2 * shift & 3) - (0 if high[at] >> 4 * part + shift & 1 else 4)
        out.append(d * scales[8 * part + 2 * shift + at // 16] * code)
    return out


def curved(codes: bytes, scale: float) -> list[float]:
    return [scale * CURVE[code & 15] for code in codes] + [scale * CURVE[code >> 4] for code in codes]


def iq4_xs(b: bytes) -> list[float]:
    d, high, low, codes = half(b[:2]), struct.unpack("<H", b[2:4])[0], b[4:8], b[8:]
    out: list[float] = []
    for block in range(8):
        scale = (low[block // 2] >> 4 * (block % 2) & 15) | (high >> 2 * block & 3) << 4
        out += curved(codes[16 * block : 16 * block + 16], d * (scale - 32))
    return out


def signed(code: int) -> float:
    return E2M1[code & 7] * (-1 if code & 8 else 1)


def mxfp4(b: bytes) -> list[float]:
    return [2.0 ** (b[0] - 127) * signed(code) for code in [c & 15 for c in b[1:]] + [c >> 4 for c in b[1:]]]


def nvfp4(b: bytes) -> list[float]:
    out: list[float] = []
    for part in range(4):
        code, rest = divmod(b[part] & 127, 8)
        scale = rest * 2.0**-9 if code == 0 else (1 + rest / 8) * 2.0 ** (code - 7)
        codes = b[4 + 8 * part : 12 + 8 * part]
        out += [scale * signed(c) for c in [c & 15 for c in codes] + [c >> 4 for c in codes]]
    return out


def written(path: Path, kind: Kind, raw: np.ndarray) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("x", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("kind", "by_hand", "halves"),
    [
        (Kind.Q2_K, q2_k, (80, 82)),
        (Kind.Q3_K, q3_k, (108,)),
        (Kind.IQ4_NL, lambda b: curved(b[2:], half(b[:2])), (0,)),
        (Kind.IQ4_XS, iq4_xs, (0,)),
        (Kind.MXFP4, mxfp4, ()),
        (Kind.NVFP4, nvfp4, ()),
    ],
    ids=lambda one: getattr(one, "name", ""),
)
def test_blocks_against_their_bits(
    kind: Kind, by_hand: Callable[[bytes], list[float]], halves: tuple[int, ...], tmp_path: Path
) -> None:
    """Blocks whose size is wrong, or scales, high bits and nibbles in another order than llama.cpp's."""
    _, weights, size = FORMATS[int(kind)]
    assert gguf.GGML_QUANT_SIZES[kind] == (weights, size)
    drawn = np.random.default_rng(0)
    raw = drawn.integers(0, 256, (8, size), dtype=np.uint8)
    for at in halves:  # finite
        raw[:, at : at + 2] = drawn.normal(0, 0.01, (8, 1)).astype(np.float16).view(np.uint8)
    if kind == Kind.MXFP4:
        raw[:, 0] = (1, 2, 100, 120, 127, 130, 150, 200)
    if kind == Kind.NVFP4:
        raw[:, :4] = drawn.integers(0, 0x7F, (8, 4))  # 0x7F is NaN in e4m3
    path = written(tmp_path / "m.gguf", kind, raw.reshape(4, -1))
    found = read_header(path).read("x")
    wanted = np.array([value for block in raw for value in by_hand(block.tobytes())]).reshape(4, -1)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-5, atol=1e-6)


def test_all_that_gguf_can_read() -> None:
    """A block format that the package opens and a table here that refuses it, or of other sizes."""
    known = {int(kind) for kind in gguf.quants._type_traits}
    assert known | {0, 1} == set(FORMATS)
    assert all(gguf.GGML_QUANT_SIZES[Kind(number)] == one[1:] for number, one in FORMATS.items())


@pytest.mark.parametrize(
    ("kind", "at", "scale"),
    [
        (Kind.MXFP4, 0, (255,)),  # which gguf takes for 2^127
        (Kind.NVFP4, 1, (0x7F,)),  # for 0
        (Kind.Q4_0, 0, (0, 0x7C)),
        (Kind.Q4_1, 2, (0, 0xFC)),
        (Kind.Q8_0, 0, (1, 0x7E)),
        (Kind.Q4_K, 0, (1, 0x7E)),
        (Kind.IQ4_NL, 0, (0, 0xFC)),
    ],
    ids=lambda one: getattr(one, "name", ""),
)
def test_a_scale_that_is_no_number(kind: Kind, at: int, scale: tuple[int, ...], tmp_path: Path) -> None:
    """Weights that are NaN or infinite, or huge, because a block's scale is damaged; of codes that are kept too."""
    raw = np.zeros((2, 2, FORMATS[int(kind)][2]), np.uint8)
    sound = read_header(written(tmp_path / "s.gguf", kind, raw.reshape(2, -1)))
    assert bool((sound.read("x") == 0).all()) and (sound.codes("x") is None) != sound.entries["x"].has_codes
    raw[1, 0, at : at + len(scale)] = scale
    raw[1, 0, -1] = 1  # of small codes
    file = read_header(written(tmp_path / "m.gguf", kind, raw.reshape(2, -1)))
    for read in [file.read, *([file.codes] if file.entries["x"].has_codes else [])]:
        with pytest.raises(
            ModelError, match="tensor x has a block whose scale is NaN or infinite. The file is damaged"
        ):
            read("x")


@pytest.mark.parametrize("whole", [[0.0], [-1.0], [math.nan], [math.inf], [1.0, 1.0], [0.5]], ids=str)
def test_a_scale_of_the_tensor(whole: list[float], tmp_path: Path) -> None:
    """A matrix of NVFP4 times 0, a NaN or another's scale; a trace where there are two."""
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    raw = np.full((1, 36), 0x38, np.uint8)  # scales of 1, codes of 3 and 8: 1.5 and -0
    writer.add_tensor("x.weight", raw, raw_dtype=Kind.NVFP4)
    writer.add_tensor("x.scale", np.array(whole, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = read_header(tmp_path / "m.gguf")
    if whole == [0.5]:
        assert set(file.read("x.weight").flatten().tolist()) == {0.75, 0.0}
        return
    with pytest.raises(ModelError, match=r"x.scale is \[.*\], and no scale of a tensor. The file is damaged"):
        file.read("x.weight")
