"""Numbers as people read them."""

from __future__ import annotations

BLANK = "–"


def duration(seconds: float | None) -> str:
    """
    >>> duration(5.23), duration(83), duration(3725), duration(None)
    ('5.2 s', '1:23', '1:02:05', '–')
    """
    if seconds is None:
        return BLANK
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def gigabytes(count_bytes: float | None) -> str:
    """
    >>> gigabytes(2_147_000_000), gigabytes(734_000_000), gigabytes(None)
    ('2.15 GB', '734 MB', '–')
    """
    if count_bytes is None:
        return BLANK
    return f"{count_bytes / 1e9:.2f} GB" if count_bytes >= 1e9 else f"{count_bytes / 1e6:.0f} MB"


def percent(share: float | None, digits: int = 0) -> str:
    """
    >>> percent(0.614), percent(0.0625, 1), percent(None)
    ('61 %', '6.2 %', '–')
    """
    return BLANK if share is None else f"{100 * share:.{digits}f} %"


def count(number: float | None) -> str:
    """
    >>> count(842), count(14200), count(3_460_000), count(None)
    ('842', '14.2 k', '3.46 M', '–')
    """
    if number is None:
        return BLANK
    if number < 9_999.5:
        return f"{number:,.0f}"
    if number < 999_500:
        return f"{number / 1e3:.1f} k"
    return f"{number / 1e6:.2f} M" if number < 999.5e6 else f"{number / 1e9:.2f} G"


def decimal(number: float | None, digits: int = 3) -> str:
    """
    >>> decimal(0.41234), decimal(0.0), decimal(1.2e-7), decimal(None)
    ('0.412', '0', '1.2e-07', '–')
    """
    if number is None:
        return BLANK
    if number == 0:
        return "0"
    return f"{number:.{digits}f}" if abs(number) >= 10**-digits else f"{number:.1e}"
