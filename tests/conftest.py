"""What all tests share. Before torch is loaded: its threads must not spin, or tests beside other work take minutes, and
a process has one unless a test asks for more: two files run at a time, and two threads each that wait for each other on
two cores take 2.5 times the processor time. What threads do is asked where kernels are compiled (`any_path`) and by
the tests of parity and determinism."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tandem import env

env.limit_spinning()
os.environ.setdefault("OMP_NUM_THREADS", "1")

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-docs", action="store_true", help="write the tables of the docs that tests generate")
    parser.addoption("--write-goldens", action="store_true", help="write tests/goldens/runs.json as runs are now")
    parser.addoption("--grids", action="store_true", help="run grids of cases whole, not their diagonals")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "grid: off the diagonal of a grid of cases (tests/grid.py)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--grids"):
        for item in items:
            if item.get_closest_marker("grid"):
                item.add_marker(pytest.mark.skip(reason="off the diagonal of its grid: --grids runs it"))


@pytest.fixture(scope="session")
def write_model() -> Callable[..., None]:
    """A function that writes a random model over single characters, in bf16 when it is run, into a folder.

    `scale` multiplies its matrices: at 10 what it says hangs on the prompt.
    """
    return _write_model


def _write_model(folder: Path, scale: float = 1.0) -> None:
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ["<unk>", "<|im_start|>", "<|im_end|>"]
    characters = ["Ġ", "Ċ", *(chr(code) for code in range(33, 127))]
    backend = Tokenizer(models.BPE({text: i for i, text in enumerate([*special, *characters])}, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        eos_token="<|im_end|>",
        additional_special_tokens=special[1:],
        chat_template=TEMPLATE,
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(special) + len(characters),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(scale)
    model.save_pretrained(folder)
