"""How figures are written on pages and in terminals. Fractions go in, per cent comes out.

Not `humanize`: its `naturalsize` has a fixed number of decimals (128.00 KiB) where three significant figures are
wanted, `intword` writes words (8.03 billion), `metric` SI letters (8.03 G parameters), and `precisedelta` sentences.
"""

from __future__ import annotations

import math

THIN = "\u202f"
"""Narrow no-break space: between a number and its unit."""
MINUS = "\u2212"


def percent(value: float, digits: int = 1) -> str:
    """0.8973 -> 89.7 %."""
    return f"{number(100 * value, digits)}{THIN}%"


def percent_error(value: float | None, stderr: float | None, digits: int = 1) -> str:
    """0.8973, 0.0031 -> 89.7 ± 0.3 %; a dash where there is no value."""
    if value is None:
        return "–"
    if stderr is None:
        return percent(value, digits)
    return f"{number(100 * value, digits)}{THIN}±{THIN}{number(100 * stderr, digits)}{THIN}%"


def points(difference: float, digits: int = 1) -> str:
    """−0.123 -> −12.3; with its sign, in points of a hundred."""
    text = number(100 * difference, digits)
    return text if text.startswith(MINUS) or text.strip("0.") == "" else f"+{text}"


def p_words(p_value: float) -> str:
    """<0.001, 0.023, 0.41."""
    if p_value < 0.001:
        return "<0.001"
    return f"{p_value:.3f}" if p_value < 0.1 else f"{p_value:.2f}"


def change(before: float, after: float) -> str:
    """2.0, 1.5 -> −25.0 %; signed; a dash where there was nothing before."""
    if not before:
        return "–"
    relative = 100 * (after / before - 1)
    sign = "+" if relative > 0.05 else ""
    return f"{sign}{number(relative, 1)}{THIN}%"


def number(value: float, digits: int) -> str:
    """Fixed digits, thousands apart, a real minus sign, and never −0."""
    text = f"{value:,.{digits}f}"
    if text.lstrip("-0.,") == "":
        text = text.lstrip("-")
    return text.replace("-", MINUS)


def count(value: float) -> str:
    """1,234; 61.8 k; 2.42 M; 8.03 B; 1.20 T: three figures."""
    for limit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit * (1 if letter == "k" else 0.9995):
            scaled = value / (1e3 if letter == "k" else limit)
            return f"{scaled:.{_digits(scaled)}f}{THIN}{letter}"
    return f"{value:,.0f}"


def num_bytes(value: float) -> str:
    """In powers of 1,024: 512 B, 6.00 KiB, 1.77 GiB."""
    if value < 1024:
        return f"{value:.0f}{THIN}B"
    power = min(4, int(math.log(value, 1024)))
    scaled = value / 1024**power
    return f"{scaled:.{_digits(scaled)}f}{THIN}{('KiB', 'MiB', 'GiB', 'TiB')[power - 1]}"


def seconds(value_s: float) -> str:
    """<0.1 s, 12.3 s, 2 min 05 s, 1 h 02 min."""
    if value_s < 0.05:
        return f"<0.1{THIN}s" if value_s > 0 else "–"
    if value_s < 59.95:
        return f"{value_s:.1f}{THIN}s"
    minutes, rest = divmod(round(value_s), 60)
    if minutes < 60:
        return f"{minutes}{THIN}min {rest:02d}{THIN}s"
    return f"{minutes // 60}{THIN}h {minutes % 60:02d}{THIN}min"


def short_time(value_s: float) -> str:
    """0.00675 -> 6.75 ms; 1.23 s; 125 s: three figures."""
    scaled, unit = (value_s, "s") if value_s >= 0.9995 else (1000 * value_s, "ms")
    return f"{scaled:,.{_digits(scaled)}f}{THIN}{unit}"


def plain(value: float) -> str:
    """Three significant figures without trailing zeros, for figures of unknown kind."""
    return f"{value:.3g}".replace("-", MINUS)


def nats(value: float) -> str:
    """A negative log-likelihood in nats per token: 0.413."""
    return number(value, 3)


def rate(value: float) -> str:
    """A learning rate: 0.02, 1e−3, 9.9e−4."""
    if value >= 0.01 or value <= 0:
        return f"{value:.2g}"
    mantissa, power = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(power)}".replace("-", MINUS)


def nice_ticks(largest: float, most: int = 6) -> list[float]:
    """From 0 in steps of 1, 2 or 5 times a power of ten, up to the first at or beyond `largest`."""
    if largest <= 0:
        return [0.0, 1.0]
    raw = largest / (most - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    steps = math.ceil(largest / step - 1e-9)
    return [float(f"{i * step:.10g}") for i in range(steps + 1)]


def _digits(scaled: float) -> int:
    size = abs(scaled)
    return 0 if size >= 99.95 else 1 if size >= 9.995 else 2
