"""Exact parsing of numbers in natural text: one at a given index, all in a text, and equality of two.

Values are `Fraction`, never float. Ambiguous text ("3 4", "3,5", "3-5", "3:45", "12/25/2020", "1.2.3") is not parsed as
a number.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

MAX_DIGITS = 400
"""More digits, or a larger exponent, are not parsed: exact arithmetic on them would be too slow."""

_SCALES: dict[str, Fraction] = {
    "%": Fraction(1, 100), "percent": Fraction(1, 100), "dozen": Fraction(12), "thousand": Fraction(1000),
    "million": Fraction(10**6), "billion": Fraction(10**9), "trillion": Fraction(10**12), "k": Fraction(1000),
    "m": Fraction(10**6), "mn": Fraction(10**6), "b": Fraction(10**9), "bn": Fraction(10**9),
}  # fmt: skip


@dataclass(frozen=True)
class Number:
    """`figure` is the number as written, `scale` the size of its unit: 1/100 for a percent sign, 1 without a unit."""

    figure: Fraction
    scale: Fraction = Fraction(1)

    @property
    def value(self) -> Fraction:
        """Figure times scale."""
        return self.figure * self.scale


def equal_numbers(a: Number, b: Number) -> bool:
    """Equal value, or the same figure where one side omits the scale ("50%" and 50, "2 dozen" and 2).

    A percentage below one is compared only by value: "0.5%" is not 0.5.
    """
    if a.value == b.value:
        return True
    if a.figure != b.figure or (a.scale != 1 and b.scale != 1):
        return False
    return max(a.scale, b.scale) > 1 or abs(a.figure) >= 1


_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_THIN_SPACES = "\u00a0\u2009\u202f"
_LATEX_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf|mbox|textit)\s*\{([^{}]*)\}")
_LATEX_FRACTION = re.compile(r"(\d?)\\[dtc]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")
_LATEX_WORDS = {
    r"\times": "×", r"\cdot": "×", r"\div": "÷", r"\%": "%", r"\$": "$", r"\left": "", r"\right": "",
    r"\(": " ", r"\)": " ", r"\[": " ", r"\]": " ", r"\approx": "≈", r"\quad": " ", r"\qquad": " ",
    r"^\circ": "°", r"^{\circ}": "°",
}  # fmt: skip


def _write_fraction(match: re.Match[str]) -> str:
    numerator, denominator = (match[2] or match[3] or "").strip(), (match[4] or match[5] or "").strip()
    # The space makes 3\frac{1}{4} a mixed number; the sign of -\frac{1}{2} must stay adjacent.
    return f"{match[1]} {numerator}/{denominator}" if match[1] else f"{numerator}/{denominator}"


def plain(text: str) -> str:
    """Text with normalised Unicode, minus signs, LaTeX and Markdown.

    NFKC alone turns 10² into 102 and 3½ into 31/2, so superscripts and fractions are replaced first.
    """
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda match: "^" + match[0].translate(_SUPERSCRIPTS), text)
    text = re.sub(r"(?<=\d)(?=[¼-¾⅐-⅞])", " ", text)
    text = re.sub(rf"(?<=\d)(?:[{_THIN_SPACES}]|\\,|_)(?=\d{{3}}(?!\d))", ",", text)
    text = unicodedata.normalize("NFKC", text).replace("\u2044", "/")
    text = re.sub("[\u2212\ufe63\u2010\u2011]", "-", text)
    text = re.sub(r"(?<![\w])\u2013(?=[\d.$])", "-", text)
    text = text.replace("{,}", ",")
    for _ in range(2):  # a fraction of texts, or a text of fractions
        text = _LATEX_FRACTION.sub(_write_fraction, _LATEX_TEXT.sub(r" \1", text))
    for latex, written in _LATEX_WORDS.items():
        text = text.replace(latex, written)
    text = re.sub(r"\\sqrt\s*\{([^{}]*)\}", r"√\1", text)
    text = re.sub(r"\\[,;:! ]|~", " ", text)
    text = re.sub(r"\^\{(-?\d+)\}", r"^\1", text)
    # Dollar signs around mathematics ("$42$") are not currency.
    text = re.sub(r"\$([^$\n]{1,80}?)\$(?!\d)", r"\1", text)
    return re.sub(r"\*\*|__|`|(?<![\w*])\*(?=\S)|(?<=\S)\*(?![\w*])", "", text)


_FIGURE = r"(?:\d{1,3}(?:,\d{3})+(?!,?\d)|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(
    rf"""
    (?P<sign1>[-+]?)(?:(?:US|AU|CA)?(?P<currency>[$€£¥₹₩])\ ?|(?:USD|EUR|GBP|Rs\.?)\ )?(?P<sign2>[-+]?)
    (?:
        (?P<whole>\d+)\ +(?P<numerator1>\d+)\ ?/\ ?(?P<denominator1>\d+)
      | (?P<numerator2>{_FIGURE})\ ?/\ ?(?P<denominator2>\d+(?:\.\d+)?)
      | (?P<figure>{_FIGURE})
        (?:[eE](?P<exponent1>[-+]?\d+)|\ ?[×x*]\ ?10\^(?P<exponent2>-?\d+)|\^(?P<power>-?\d+))?
    )
    (?:\ ?(?P<scale>%|per\ ?cent\b|thousand\b|million\b|billion\b|trillion\b|dozen\b)
      |(?P<suffix>[kKMB]|mn?|bn?)(?!\w))?
    """,
    re.VERBOSE,
)
_GLUED_BEFORE = re.compile(r"(?:[\w^\\√]|\d[.,:/]|[a-zA-Z\d]-)\Z")
_GLUED_AFTER = re.compile(
    r"[,.:\-^_]\d|/\s?\d|[\^_π√∞]|\((?:[\d+-]|[a-z]\b)|\\[a-zA-Z]|[xyzn](?![a-zA-Z])|[a-zA-Z]?\d|[eE][-+]?\d"
)
_CLUSTER = re.compile(r"[\w.,:/^$€£%+-]*")


def number_at(text: str, start: int) -> tuple[Number, int] | None:
    """The unambiguous number that starts at index `start` of `plain` text, and the index after it; else None."""
    match = _NUMBER.match(text, start)
    if match is None or _GLUED_BEFORE.search(text[max(0, start - 2) : start]):
        return None
    figure, scale, end = _figure(match), _scale(match), match.end()
    if figure is None:
        return None
    if scale is None:
        scale, end = Fraction(1), match.start("suffix")
    if _GLUED_AFTER.match(text, end):
        return None
    negative = "-" in (match["sign1"], match["sign2"])
    return Number(-figure if negative else figure, scale), end


def _figure(match: re.Match[str]) -> Fraction | None:
    if match.end() - match.start() > MAX_DIGITS:
        return None
    parts = {name: value.replace(",", "") for name, value in match.groupdict().items() if value}
    if "whole" in parts:
        numerator, denominator = Fraction(parts["numerator1"]), Fraction(parts["denominator1"])
        # "12 3/4" is a mixed number, "3 7/2" is two numbers.
        return Fraction(parts["whole"]) + numerator / denominator if numerator < denominator else None
    if "numerator2" in parts:
        denominator = Fraction(parts["denominator2"])
        return Fraction(parts["numerator2"]) / denominator if denominator else None
    if match["figure"].startswith("0") and "," in match["figure"]:
        return None  # 0,125 has a decimal comma
    figure = Fraction(parts["figure"])
    power = int(parts.get("power", 1))
    exponent = int(parts.get("exponent1") or parts.get("exponent2") or 0)
    if abs(power) * len(parts["figure"]) > MAX_DIGITS or abs(exponent) > MAX_DIGITS or (figure == 0 and power <= 0):
        return None
    return figure**power * Fraction(10) ** exponent


def _scale(match: re.Match[str]) -> Fraction | None:
    """Size of the unit; None if the adjacent letters are something else: 5m is five metres, $5m five million."""
    if match["scale"]:
        return _SCALES[match["scale"].replace(" ", "")]
    if not match["suffix"]:
        return Fraction(1)
    return _SCALES[match["suffix"].lower()] if match["currency"] or match["suffix"] == "k" else None


def numbers_in(text: str) -> list[tuple[Number, int, int]]:
    """Every unambiguous number in `plain` text with start and end index, left to right."""
    numbers: list[tuple[Number, int, int]] = []
    position = 0
    while match := _NUMBER.search(text, position):
        parsed = number_at(text, match.start())
        if parsed is None:
            # Skip the whole run of adjacent characters, so that 3:45 does not yield 45.
            cluster = _CLUSTER.match(text, match.start())
            position = max(match.start() + 1, cluster.end() if cluster else 0)
        else:
            numbers.append((parsed[0], match.start(), parsed[1]))
            position = parsed[1]
    return numbers
