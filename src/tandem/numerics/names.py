"""How formats are called in settings, by their looks alone: no torch, so a config is refused before torch is loaded."""

from __future__ import annotations

import re

from tandem.errors import ConfigError

_OWN = r"e\d+m\d+(b-?\d+)?(nan|ieee)?/\d+:(e8m0(:\w+)?|fp32|fp16|bf16)"
_FORMAT = rf"mx\w+|nvfp4(_\w+)?|fp8_\w+|int[2-8]_(g\d+|row)(_asym)?|{_OWN}"
_ALONE = ("same", "int8", "int4", "w8a8")


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
