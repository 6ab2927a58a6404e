"""A new model: a small Llama of random weights over bytes, for training from scratch.

`new:width=256,layers=6` is a model source like any other: the same text gives the same weights, so a run from scratch
is a function of its config too. What training saves is a Hugging Face folder that Transformers loads.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from tandem.errors import ModelError, nearest
from tandem.models.parts import expected_shapes
from tandem.models.spec import ModelSpec
from tandem.models.tokenizer import Tokenizer, byte_alphabet
from tandem.numerics.random import Stream, normal, word_rows

if TYPE_CHECKING:
    import torch

    from tandem.numerics.blocks import Fp4
    from tandem.numerics.quantise import Quantised

PREFIX = "new:"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
EMBEDDING_STD = 0.02
LIMITS = {"width": 8192, "layers": 256, "heads": 256, "kv_heads": 256, "ff_width": 65536, "max_position": 1 << 20}


@dataclass(frozen=True, slots=True)
class Shape:
    """How large a new model is; the defaults have 4.8 M parameters.

    >>> Shape.read("new:layers=2").layers
    2
    """

    width: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    ff_width: int = 768
    max_position: int = 512  # tokens
    seed: int = 0  # of the weights

    @classmethod
    def read(cls, source: str) -> Shape:
        """Of a model source "new:NAME=VALUE,...". Raises ModelError for an unknown name or a value out of range."""
        names = [field.name for field in dataclasses.fields(cls)]
        given = {}
        for part in filter(None, source.removeprefix(PREFIX).split(",")):
            name, _, text = part.partition("=")
            if name not in names:
                raise ModelError(f"model.source {source}: a new model has no {name!r}.{nearest(name, names)}")
            if not (text.isascii() and text.isdecimal() and len(text) < 20):
                raise ModelError(f"model.source {source}: {name} is {text!r}; give a whole number, 0 or more.")
            given[name] = int(text)
            if not (name == "seed" and given[name] < 2**63 or 0 < given[name] <= LIMITS.get(name, 0)):
                raise ModelError(
                    f"model.source {source}: {name} is {text}; allowed: 1 to {LIMITS.get(name, 2**63 - 1)}."
                )
        shape = cls(**given)
        if shape.width % (2 * shape.heads):
            raise ModelError(
                f"model.source {source}: width {shape.width} does not divide into {shape.heads} heads of even size."
            )
        return shape

    def spec(self) -> ModelSpec:
        """The decoder's."""
        return ModelSpec(
            "llama",
            vocab_size=len(SPECIAL) + 256,
            width=self.width,
            ff_width=self.ff_width,
            layers=self.layers,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_size=self.width // self.heads,
            tied_embeddings=True,
            max_position=self.max_position,
            bos_token_id=0,
            eos_token_ids=(SPECIAL.index("<|im_end|>"),),
            pad_token_id=0,
        )


class NewTensors:
    """Random tensors by name: a store of models/checkpoint.py.

    Matrices have a standard deviation of 1 / sqrt(inputs), those that add to the residual stream of
    1 / sqrt(2 layers inputs) (GPT-2's scaling), the embedding of 0.02; norms are 1.
    """

    mapped_bytes = 0
    coded_bytes = 0

    def __init__(self, shape: Shape) -> None:
        self._seed, self._layers = shape.seed, shape.layers
        self._shapes = expected_shapes(shape.spec())

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def codes(self, name: str) -> Quantised | None:
        return None

    def fp4(self, name: str) -> Fp4 | None:
        return None

    def read(self, name: str) -> torch.Tensor:
        """fp32."""
        import torch

        size = self._shapes[name]
        if len(size) == 1:
            return torch.ones(size)
        deviation = 1 / math.sqrt(size[1])
        if name == "model.embed_tokens.weight":
            deviation = EMBEDDING_STD
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            deviation /= math.sqrt(2 * self._layers)
        number = list(self._shapes).index(name)
        count = math.prod(size)
        drawn = normal(word_rows([self._seed], [number], count + count % 2, Stream.INITIAL)[0])[:count]
        return torch.from_numpy((drawn * deviation).astype(np.float32)).view(size)


def new_tokenizer() -> Tokenizer:
    """A token a byte, and ChatML's control tokens."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    vocab = {text: index for index, text in enumerate((*SPECIAL, *byte_alphabet()))}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }
    return Tokenizer(backend, settings, CHATML, origin="a new model")
