"""How many pages there are, who can ever fit, and who may start now. Functions of plain values."""

from __future__ import annotations

from tandem.errors import CapacityError, ConfigError
from tandem.types import Request


def pages_for(tokens: int, page_tokens: int) -> int:
    """Pages that hold `tokens` tokens.

    >>> pages_for(0, 16), pages_for(16, 16), pages_for(17, 16)
    (0, 1, 2)
    """
    return -(-tokens // page_tokens)


def count_pages(kv_memory_bytes: int, token_bytes: int, page_tokens: int) -> int:
    """Pages that fit in `kv_memory_bytes`; `token_bytes` = 2 (key, value) x layers x kv heads x head size x value size.

    CapacityError where not even one fits.

    >>> count_pages(1 << 30, 2 * 30 * 3 * 64 * 2, 16)  # SmolLM2-135M in bf16
    2912
    """
    num_pages = kv_memory_bytes // (token_bytes * page_tokens)
    if num_pages < 1:
        raise CapacityError(
            f"engine.kv_memory_bytes is {kv_memory_bytes}, but one page of {page_tokens} tokens takes "
            f"{token_bytes * page_tokens} bytes for this model: raise engine.kv_memory_bytes."
        )
    return num_pages


def length_limit(
    request: Request, num_pages: int, page_tokens: int, kv_memory_bytes: int, max_context: int | None
) -> int:
    """Context length, prompt included, at which the request ends by LENGTH. Refuses a request that can never run.

    The last token generated is never run, so a context of `limit` tokens takes `limit - 1` slots.
    CapacityError: the model's positions (`max_context`) or the pool cannot hold it. ConfigError: nothing to run.
    """
    prompt, asked = len(request.tokens), request.sampling.max_new_tokens
    if prompt == 0:
        raise ConfigError(f"request {request.id!r} has an empty prompt; at least one token is needed.")
    if asked < 1:
        raise ConfigError(f"request {request.id!r} has max_new_tokens {asked}; it must be at least 1.")
    limit = prompt + asked
    if max_context is not None:
        if prompt >= max_context:
            raise CapacityError(
                f"request {request.id!r}: its prompt of {prompt} tokens leaves no room in the {max_context} positions "
                "of this model: shorten the prompt."
            )
        limit = min(limit, max_context)
    if pages_for(limit - 1, page_tokens) > num_pages:
        capacity = num_pages * page_tokens
        wanted = -(-kv_memory_bytes * pages_for(limit - 1, page_tokens) // num_pages)
        raise CapacityError(
            f"request {request.id!r}: its prompt of {prompt} tokens and max_new_tokens {asked} need {limit - 1} tokens "
            f"of keys and values, but engine.kv_memory_bytes {kv_memory_bytes} holds {capacity}: raise "
            f"engine.kv_memory_bytes to about {wanted}, shorten the prompt or lower max_new_tokens."
        )
    return limit


def growth(context: int, limit: int, lookahead: int, page_tokens: int) -> int:
    """Pages beyond those of `context` tokens that a sequence takes in its next `lookahead` tokens.

    >>> growth(context=30, limit=100, lookahead=8, page_tokens=16), growth(30, 33, 8, 16)
    (1, 0)
    """
    return pages_for(min(context + lookahead, limit - 1), page_tokens) - pages_for(context, page_tokens)


def admits(need: int, ahead: int, available: int, num_running: int) -> bool:
    """Whether a sequence that takes `need` pages at once may start among `num_running` others.

    `ahead` pages are what all of them, the new one included, are predicted to take soon. Alone, a sequence always
    starts: it was refused at submit if the pool could not hold it whole.
    """
    return num_running == 0 or need + ahead <= available
