"""What an engine is given: how much memory, and how much work a step may hold."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.errors import ConfigError


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Limits of one engine. Everything else about scheduling follows from these and the requests.

    >>> EngineConfig(page_tokens=8).page_tokens
    8
    """

    page_tokens: int = 16  # tokens a page of keys and values holds; also the unit of prefix sharing
    batch_tokens: int = 2048  # most tokens one forward pass runs, decodes and prefill chunks together
    max_sequences: int = 256  # most sequences running at once
    kv_memory_bytes: int = 1 << 30  # memory for pages
    lookahead_tokens: int = 64  # admission leaves room for every running sequence to grow by this much
    share_prefixes: bool = True  # off: every prompt is computed from its first token

    def __post_init__(self) -> None:
        for name, least in (
            ("page_tokens", 1),
            ("batch_tokens", 1),
            ("max_sequences", 1),
            ("kv_memory_bytes", 1),
            ("lookahead_tokens", 0),
        ):
            if getattr(self, name) < least:
                raise ConfigError(f"engine.{name} is {getattr(self, name)}; it must be at least {least}.")
        if self.batch_tokens < self.max_sequences:
            raise ConfigError(
                f"engine.batch_tokens is {self.batch_tokens}, less than engine.max_sequences {self.max_sequences}: "
                "a step could not hold one token of each running sequence, and prompts would starve. "
                "Raise engine.batch_tokens or lower engine.max_sequences."
            )
