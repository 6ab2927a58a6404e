"""The families of models that are read and written, one file each or a few; docs/add_a_model.md."""

from __future__ import annotations

from tandem.errors import ModelError
from tandem.models.families.family import Family
from tandem.models.families.llama import LLAMA, MISTRAL
from tandem.models.families.llama4 import LLAMA4
from tandem.models.families.qwen import QWEN2, QWEN3
from tandem.models.families.smollm3 import SMOLLM3

FAMILIES: dict[str, Family] = {one.architecture: one for one in (LLAMA, MISTRAL, QWEN2, QWEN3, SMOLLM3, LLAMA4)}


def family_of(architecture: str) -> Family:
    """Raises ModelError for one that is not supported."""
    if architecture not in FAMILIES:
        raise unsupported(architecture)
    return FAMILIES[architecture]


def unsupported(name: str) -> ModelError:
    return ModelError(
        f"architecture {name!r} is not supported; supported: {', '.join(one.class_name for one in FAMILIES.values())} "
        f"({', '.join(FAMILIES)}). Choose a model of one of these families."
    )
