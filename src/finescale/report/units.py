"""Numbers and untrusted strings as text for people: one rule for every table, tile and axis of the report.

Sizes are decimal (1 GB = 10^9 bytes), as disks and the Hugging Face hub count them.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence

MISSING = "–"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: object) -> float | None:
    """A finite float, or None for anything else (None, NaN, infinities, booleans, text)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        result = float(value)
    except OverflowError:
        return None
    return result if math.isfinite(result) else None


def integer(value: object) -> int | None:
    """An int, or None for anything that is not a whole finite number."""
    result = number(value)
    if result is None or result != int(result):
        return None
    return value if isinstance(value, int) else int(result)


def mapping(value: object) -> Mapping[str, object]:
    """The value if it is a mapping, else an empty one: an absent section reads like an empty section."""
    return value if isinstance(value, Mapping) else {}


def sequence(value: object) -> Sequence[object]:
    """The value if it is a list or tuple, else an empty tuple."""
    return value if isinstance(value, list | tuple) else ()


def clean(value: object, limit: int = 300) -> str:
    """Untrusted text made printable: control, bidirectional-override and surrogate characters become '�'.

    Escaping for HTML or for rich markup is the caller's (jinja2 autoescape, svg.el, rich.text.Text).
    """
    if value is None:
        return MISSING
    text = str(value)
    if len(text) > limit:
        text = text[: limit - 1] + "…"
    return "".join("�" if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") else char for char in text)


def sig(value: float | None, digits: int = 3) -> str:
    """`digits` significant digits: 12.3, 0.00123, 1.23×10⁻⁵; integers below a million are written out."""
    if value is None:
        return MISSING
    if value == 0:
        return "0"
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    rounded = float(f"{value:.{digits - 1}e}")  # decide the exponent after rounding: 9.9996 is 10.0
    exponent = math.floor(math.log10(abs(rounded)))
    if -4 <= exponent < 6:
        return f"{value:,.{max(0, digits - 1 - exponent)}f}"  # digits before the point are never rounded away
    return f"{rounded / 10.0**exponent:.{digits - 1}f}×10{str(exponent).translate(_SUPERSCRIPT)}"


def tick(value: float) -> str:
    """The shortest honest label of an axis tick (powers of ten as 10⁻⁴ beyond four digits)."""
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)) + 1e-9)
    if -3 <= exponent < 5:
        return (
            f"{value:,.{max(0, 2 - exponent)}f}".rstrip("0").rstrip(".") if value != int(value) else f"{int(value):,}"
        )
    mantissa = value / 10.0**exponent
    power = f"10{str(exponent).translate(_SUPERSCRIPT)}"
    return power if abs(mantissa - 1) < 1e-9 else f"{mantissa:.3g}×{power}"


def count(value: float | None) -> str:
    """A whole number with thousands separators."""
    return MISSING if value is None else f"{round(value):,}"


def compact(value: float) -> str:
    """An axis label for counts: 800, 20 k, 1.5 M."""
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= factor:
            return f"{value / (1e3 if unit == 'k' else factor):,.4g}\u00a0{unit}"
    return f"{value:,.4g}"


def large(value: float | None) -> str:
    """A parameter count: 134.5 million, 7.24 billion."""
    if value is None:
        return MISSING
    for size, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if value >= size:
            return f"{sig(value / size, 4 if value >= 100 * size else 3)} {word}"
    return count(value)


def percent(share: float | None, digits: int = 1) -> str:
    """A share in 0..1 as percent; never rounded up to 100 % nor down to 0 %, because the last bit is what matters."""
    if share is None:
        return MISSING
    if share in (0.0, 1.0):
        return f"{share * 100:.0f}\u00a0%"
    while digits < 6 and (float(f"{share * 100:.{digits}f}") in (0.0, 100.0)):
        digits += 1
    return f"{share * 100:.{digits}f}\u00a0%"


def size(value: float | None) -> str:
    """Bytes in decimal units, with a no-break space: 512 B, 1.23 kB, 269 MB, 1.85 GB."""
    if value is None:
        return MISSING
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(value) >= factor * 0.9995:
            scaled = value / factor
            return f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f}\u00a0{unit}"
    return f"{round(value)}\u00a0B"


def seconds(value: float | None) -> str:
    """A duration: 0.123 s, 42.1 s, 12 min 5 s, 2 h 13 min."""
    if value is None:
        return MISSING
    if value < 59.95:
        return f"{sig(value, 3)} s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(value / 60)
    return f"{minutes // 60:,} h {minutes % 60} min"


def group(value: int | None) -> str:
    """A group size; -1 is one scale per output channel."""
    if value is None:
        return MISSING
    return "per channel" if value == -1 else str(value)


def plural(amount: int, word: str) -> str:
    """`1 layer`, `210 layers`."""
    return f"{amount:,} {word}{'' if amount == 1 else 's'}"
