"""How formats are called in settings, by their looks alone: no torch, so a config is refused before torch is loaded."""

from __future__ import annotations

import re
from typing import Literal, get_args

from tandem.errors import ConfigError

_OWN = r"(int8|e\d+m\d+(b-?\d+)?(nan|ieee)?)/(\d+(x\d+)?|row|tensor):(e8m0(:\w+)?|e4m3|fp32|fp16|bf16)"
_FORMAT = rf"mx\w+|nvfp4(_\w+)?|fp8_\w+|int[2-8]_(g\d+|row)(_asym)?|{_OWN}"
_ALONE = ("same", "int8", "int4", "w8a8", "w4a8")
Ablated = Literal["weights", "rows", "kv", "logits"]  # what is rounded one tensor at a time
_WAYS = ("stochastic", "hadamard")  # of gradients
PAGES = ("float8_e4m3", "int8", "int4")  # of keys and values, beside the compute dtype (kernels/page_pool.py)
_SPANS = r"(kivi[248]|fp8_head)(_r(\d+))?"  # of keys and values, rounded many tokens at once (numerics/kv.py)
RESIDUAL = 128  # tokens of a span, as in KIVI
_EXACT = ("float8_e4m3", "int4")  # what attention reads back to the numbers that they stand for, and nothing else


def check_weights_name(setting: str, name: str) -> None:
    """ConfigError for what is no `model.weights` and no `engine.weights`. What is written as a format is
    (kernels/rounding.py) may still be none.

    >>> check_weights_name("model.weights", "nvfp4+mxfp8_e4m3"), check_weights_name("model.weights", "same")
    (None, None)
    """
    if name in _ALONE or re.fullmatch(rf"(same|{_FORMAT})(\+({_FORMAT}))?", name):
        return
    raise ConfigError(
        f"{setting}={name} is no format. Give {', '.join(map(repr, _ALONE))}, a name that `tandem numerics formats` "
        "lists, or two with a + between them: of the weights, and of the rows that they multiply."
    )


def ablated_of(names: str) -> tuple[Ablated, ...]:
    """Of --tensors: some of Ablated, with commas between. ConfigError for others.

    >>> ablated_of("kv,weights")
    ('weights', 'kv')
    """
    known, given = get_args(Ablated), names.split(",")
    if unknown := [name for name in given if name not in known]:
        raise ConfigError(
            f"--tensors {names}: {unknown[0]!r} is none. Give some of {', '.join(known)} with commas between, or "
            "gradients alone."
        )
    return tuple(name for name in known if name in given)


def gradient_parts(name: str) -> tuple[str, str, tuple[str, ...]]:
    """Of a `learner.gradients` that is a format: dy's, that of the matrices and rows that it meets, and how they are
    rounded. ConfigError for what is none.

    >>> gradient_parts("nvfp4+hadamard+stochastic"), gradient_parts("mxfp8_e5m2+mxfp8_e4m3")[:2]
    (('nvfp4', 'nvfp4', ('hadamard', 'stochastic')), ('mxfp8_e5m2', 'mxfp8_e4m3'))
    """
    words = name.split("+")
    ways = tuple(word for word in words if word in _WAYS)
    forms = [word for word in words if word not in _WAYS]
    known = all(word == "same" or re.fullmatch(_FORMAT, word) for word in forms) and set(forms) != {"same"}
    if not known or len(forms) not in (1, 2) or len(set(ways)) < len(ways) or name != "+".join((*forms, *ways)):
        raise ConfigError(
            f"learner.gradients={name} is no format. Give 'same', 'int8', a name that `tandem numerics formats` lists, "
            "or two with a + between them: of the gradient, and of the matrices and rows that it is multiplied by; "
            "behind them +stochastic (the gradient is rounded so) and +hadamard (what weights' gradients are made of "
            "is turned first)."
        )
    return forms[0], forms[-1], ways


def check_kv_name(setting: str, name: str) -> None:
    """ConfigError for what is no `model.kv` and no `engine.kv_dtype`; see `check_weights_name`.

    >>> check_kv_name("model.kv", "nvfp4"), check_kv_name("engine.kv_dtype", "int8")
    (None, None)
    """
    kept, span, sinks = kv_parts(name)
    if span and not (8 <= span <= 1024 and span & (span - 1) == 0 and sinks <= span):
        raise ConfigError(
            f"{setting}={name}: {span} tokens are rounded at once, {sinks} of the first stay. Give a power of two from "
            "8 to 1024 behind _r, and no more behind _sinks."
        )
    plain = kept in PAGES or re.fullmatch(_FORMAT, kept)
    if span or plain or name == "same":
        return
    raise ConfigError(
        f"{setting}={name} is no format of keys and values. Give 'same', {', '.join(map(repr, PAGES))}, 'kivi2', "
        "'kivi4', 'kivi8', 'fp8_head', or a name that `tandem numerics formats` lists; behind any but same _sinksN, so "
        "that the first N tokens stay."
    )


def kv_parts(name: str) -> tuple[str, int, int]:
    """Of a `model.kv` or an `engine.kv_dtype`: the format or rule, the tokens that are rounded at once (0: one as it is
    made), and the first tokens that are not rounded.

    >>> kv_parts("kivi2_r64_sinks4"), kv_parts("kivi4"), kv_parts("nvfp4_sinks4"), kv_parts("int8")
    (('kivi2', 64, 4), ('kivi4', 128, 0), ('nvfp4', 0, 4), ('int8', 0, 0))
    """
    kept, sinks = name, 0
    if found := re.fullmatch(r"(.+)_sinks([1-9]\d*)", name):
        kept, sinks = found[1], int(found[2])
    if of_span := re.fullmatch(_SPANS, kept):
        return of_span[1], RESIDUAL if of_span[3] is None else int(of_span[3]), sinks
    return kept, 0, sinks


def stored_kv(kv_dtype: str, kept: str) -> str:
    """What the pages of an engine hold, by `engine.kv_dtype` and `model.kv`: one of PAGES, same, or codes of a span by
    the rule's name. Other formats are rounded to, and kept in the compute dtype.

    >>> stored_kv("int8", "same"), stored_kv("same", "float8_e4m3"), stored_kv("same", "int8"), stored_kv("kivi2", "")
    ('int8', 'float8_e4m3', 'same', 'kivi2')
    """
    name, pages = (kv_dtype, PAGES) if kv_dtype != "same" else (kept, _EXACT)
    return name if name in pages or code_bits(name) else "same"


def code_bits(kept: str) -> int:
    """Of a span's codes in pages (kernels/span_pool.py); 0 where pages hold none: of other names, and with sinks.

    >>> code_bits("kivi2_r64"), code_bits("kivi2_sinks4"), code_bits("int4")
    (2, 0, 0)
    """
    rule, _, sinks = kv_parts(kept)
    return 0 if sinks or not rule.startswith("kivi") else int(rule.removeprefix("kivi"))
