"""Exact parsing of numbers in natural text: one at a given index, all in a text, and equality of two.

Values are `Fraction`, never float. Thousands are separated as in 1,234,567, 12,34,567, 1'234'567, 1.234.567 or
1 234 567; 0.(3), 0.333... and a bar over digits repeat for ever. Ambiguous text ("3 4", "3,5", "3-5", "3:45",
"12/25/2020", "1.2.3") is not parsed as a number.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, replace
from fractions import Fraction

from sdft_ray.generation.units import known, same_dimension, size, unit_at

MAX_DIGITS = 400
"""More digits, or a larger exponent, are not parsed: exact arithmetic on them would be too slow."""

_SCALES: dict[str, Fraction] = {
    "%": Fraction(1, 100), "percent": Fraction(1, 100), "dozen": Fraction(12), "hundred": Fraction(100),
    "thousand": Fraction(1000), "million": Fraction(10**6), "billion": Fraction(10**9), "trillion": Fraction(10**12),
    "lakh": Fraction(10**5), "crore": Fraction(10**7),
    "k": Fraction(1000), "m": Fraction(10**6), "mn": Fraction(10**6), "b": Fraction(10**9), "bn": Fraction(10**9),
}  # fmt: skip


@dataclass(frozen=True)
class Number:
    """`figure` is the number as written, `scale` the size of its unit: 1/100 for a percent sign, 1 without a unit.

    `unit` is a unit or currency of `sdft_ray.generation.units`, `name` the letter of "x = 5"; both may be "".
    `nouns` are the words right after a number without such a unit ("red", "apple").
    """

    figure: Fraction
    scale: Fraction = Fraction(1)
    unit: str = ""
    name: str = ""
    nouns: frozenset[str] = frozenset()

    @property
    def value(self) -> Fraction:
        """Figure times scale."""
        return self.figure * self.scale

    def __neg__(self) -> Number:
        """The same number of the other sign."""
        return replace(self, figure=-self.figure)


def equal_numbers(a: Number, b: Number) -> bool:
    """Equal value, or the same figure where one side omits the percent sign ("50%" and 50).

    A percentage below one is compared only by value: "0.5%" is not 0.5. Units, nouns and names count where both sides
    have one.
    """
    if a.name and b.name and a.name.casefold() != b.name.casefold():
        return False
    if (a.unit and b.nouns) or (b.unit and a.nouns) or (a.nouns and b.nouns and a.nouns.isdisjoint(b.nouns)):
        return False
    if a.unit and b.unit:
        return same_dimension(a.unit, b.unit) and a.value * size(a.unit) == b.value * size(b.unit)
    if a.value == b.value:
        return True
    return a.figure == b.figure and {a.scale, b.scale} == {Fraction(1), Fraction(1, 100)} and abs(a.figure) >= 1


# --- writing ----------------------------------------------------------------------------------------------------

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|\\[,;: ]|[\u00a0\u2009\u202f_'’])(?=\d{3}(?!\d))")
_LATEX_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf|mbox|textit)\s*\{([^{}]*)\}")
_LATEX_FRACTION = re.compile(r"(\d?)\\[dtc]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")
_LATEX_ROOT = re.compile(r"\\(?:sqrt\s*(?:\[[^\]]*\])?|binom\s*(?:\{[^{}]*\}|\d))\s*(?:\{[^{}]*\}|\w)")
_LATEX_WORDS = {
    r"\times": "×", r"\cdot": "×", r"\div": "÷", r"\%": "%", r"\$": "$", r"\left": "", r"\right": "",
    r"\(": " ", r"\)": " ", r"\[": " ", r"\]": " ", r"\approx": "≈", r"\quad": " ", r"\qquad": " ",
    r"^\circ": "°", r"^{\circ}": "°", r"\ldots": "...", r"\dots": "...", r"\cdots": "...",
}  # fmt: skip
_OPAQUE = r"\expression"
"""Stands for LaTeX that is no number, so that no digit inside is taken for one."""
_PARTS = re.compile(r"[-+]?\s*[\d.,]+|[-+]?\s*[\d.,]+\s*(?:%|[A-Za-z ]{2,})")
_BAR = re.compile(r"(\.\d*)\\(?:overline|bar|dot)\s*\{?(\d+)\}?")
_DOTS = re.compile(r"(\.\d*)\\dot\s*\{?(\d)\}?(\d*)\\dot\s*\{?(\d)\}?")
_SAID_TO_REPEAT = re.compile(r"(?<=\d)(\.)(\d)\s(?:repeating|recurring)\b")
_ONE_IN = re.compile(r"(?<![\d.,/] )(?<![\w.,/$-])1 in (\d+)(?=[\s.)]*$)", re.MULTILINE)
_COMBINING_BAR = re.compile("((?:\\d[\u0305\u0304])+)")
_ELLIPSIS = re.compile(r"(\d{0,30}\.\d{0,30}?)(\d{1,12}?)(\2+)\.\.\.")


def _write_fraction(match: re.Match[str]) -> str:
    numerator, denominator = (match[2] or match[3] or "").strip(), (match[4] or match[5] or "").strip()
    if not _PARTS.fullmatch(numerator) or not _PARTS.fullmatch(denominator):
        return match[1] + _OPAQUE
    # The space makes 3\frac{1}{4} a mixed number; the sign of -\frac{1}{2} must stay adjacent.
    return f"{match[1]} {numerator}/{denominator}" if match[1] else f"{numerator}/{denominator}"


def _write_repeating(match: re.Match[str]) -> str:
    # A single digit three times, or a longer group twice: 0.33... may be cut anywhere.
    return f"{match[1]}({match[2]})" if len(match[2]) > 1 or len(match[3]) > 1 else match[0]


def plain(text: str) -> str:
    """Text with normalised Unicode, minus signs, LaTeX and Markdown.

    NFKC alone turns 10² into 102 and 3½ into 31/2, so superscripts and fractions are replaced first.
    """
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda match: "^" + match[0].translate(_SUPERSCRIPTS), text)
    text = re.sub(r"(?<=\d)(?=[¼-¾⅐-⅞])", " ", text)
    text = _THOUSANDS.sub(",", text.replace("\\!", ""))
    text = re.sub(r"(?<=\d) ?\*\* ?(?=-?\d)", "^", text)
    text = unicodedata.normalize("NFKC", text).replace("\u2044", "/").replace("\u2215", "/")
    text = re.sub("[\u2212\ufe63\u2010\u2011]", "-", text)
    text = re.sub(r"(?<![\w])\u2013(?=[\d.$])", "-", text)
    text = text.replace("{,}", ",")
    text = _LATEX_ROOT.sub(lambda match: _OPAQUE, text) if "\\" in text else text
    for _ in range(2):  # a fraction of texts, or a text of fractions
        text = _LATEX_FRACTION.sub(_write_fraction, _LATEX_TEXT.sub(r" \1", text))
    text = _BAR.sub(r"\1(\2)", _DOTS.sub(r"\1(\2\3\4)", text))
    text = _SAID_TO_REPEAT.sub(r"\1(\2)", text)
    text = _ONE_IN.sub(r"1/\1", text)
    text = _COMBINING_BAR.sub(lambda match: "(" + re.sub(r"\D", "", match[1]) + ")", text)
    for latex, written in _LATEX_WORDS.items():
        text = text.replace(latex, written)
    text = _ELLIPSIS.sub(_write_repeating, text)
    text = re.sub(r"\\[,;:! ]|~", " ", text)
    text = re.sub(r"\^\{(-?\d+)\}", r"^\1", text)
    # Dollar signs around mathematics ("$42$") are not currency.
    text = re.sub(r"\$\$([^$\n]{1,80}?)\$\$", r"\1", text)
    text = re.sub(r"\$([^$\n]{1,80}?)\$(?!\d)", r"\1", text)
    return re.sub(r"\*\*|__|`|(?<![\w*])\*(?=\S)|(?<=\S)\*(?![\w*])", "", text)


# --- reading ----------------------------------------------------------------------------------------------------

_INTEGER_GROUPS = (
    r"\d{1,3}(?:,\d{3})+(?!,?\d)|\d{1,2}(?:,\d{2})+,\d{3}(?!,?\d)|\d{1,3}(?:\ \d{3})+(?:(?![\ ,]?\d)|,\d+)"
)
_FIGURE = (
    rf"(?:{_INTEGER_GROUPS})(?:\.\d+)?|\d{{1,3}}(?:\.\d{{3}}){{2,}}(?:,\d+)?(?![.,]?\d)"
    r"|\d{1,3}(?:\.\d{3})+,\d+(?![.,]?\d)|\d+,\d{1,2}(?=\ ?(?:€|EUR\b|euros?\b))|\d*\.\d*\(\d+\)|\d+(?:\.\d+)?|\.\d+"
)
_NUMBER = re.compile(
    rf"""
    (?P<sign1>[-+]?)(?:(?:US|AU|CA)?(?P<currency>[$€£¥₹₩])\ ?|(?P<code>USD|EUR|GBP|Rs)\.?\ )?(?P<sign2>[-+]?)
    (?:
        (?P<whole>\d+)\ +(?P<numerator1>\d+)\ ?/\ ?(?P<denominator1>\d+)
      | (?P<numerator2>{_FIGURE})\ ?/\ ?(?P<sign3>-?)(?P<denominator2>\d+(?:\.\d+)?)
      | (?P<figure>{_FIGURE})
        (?:[eE](?P<exponent1>[-+]?\d+)|\ ?[×x*]\ ?10\^(?P<exponent2>-?\d+)|\^(?P<power>-?\d+))?
    )
    (?:\ ?(?P<scale>%|per\ ?cent\b|hundred\b|thousand\b|million\b|billion\b|trillion\b|lakh\b|crore\b|dozen\b)
      |(?P<suffix>[kKMB]|mn?|bn?)(?!\w))?
    (?P<currency_after>\ ?[€£¥₹₩])?
    """,
    re.VERBOSE,
)
_GLUED_BEFORE = re.compile(
    r"(?:[\w^\\√]|\d[.,:/–—~'’′\"″]|[a-zA-Z\d]-|[a-zA-Z)\]}]/|\\(?:log|ln|sin|cos|tan|sec|csc|cot|exp|dot|bar|overline)(?:_\w|_\{\w+\})?\s?\{?)\Z"
)
_GLUED_AFTER = re.compile(
    r"%|[,.:\-–—^_~]\d|\.?\\[a-zA-Z]|\.{3}|\.\(|/\s?\d|/\s?[a-gi-zA-Z](?![a-zA-Z])|[\^_π√∞‰]|\((?:[\d+-]|[a-z]\b)"
    r"|\s?(?:π|√|pi\b|sqrt\b)|[xyzn](?![a-zA-Z])|[a-zA-Z]?\d|[eE][-+]?\d|['’\"″′]\s?\d|\+(?=\s*(?:\Z|[.,;:)\s]))"
    r"|-(?:something|ish|odd|plus)\b|\s?(?:repeating|recurring|choose|squared|cubed|factorial|doubled|tripled|halved|mod(?:ulo)?|tens|halves|thirds|fifths|tenths)\b"
)
_CLUSTER = re.compile(r"[\w.,:/^$€£%+'’′″!√π\\–—~-]*")
_DECADE = re.compile(r"s(?!\w)")
_CLOCK = re.compile(r"[ap]\.?m\b|°|o['’]clock", re.IGNORECASE)


def number_at(text: str, start: int) -> tuple[Number, int] | None:
    """The unambiguous number that starts at index `start` of `plain` text, and the index after it; else None.

    The index is that of the unit, if the number has one.
    """
    match = _NUMBER.match(text, start)
    if match is None or _GLUED_BEFORE.search(text[max(0, start - 12) : start]):
        return None
    figure, scale, end = _figure(match), _scale(match), match.end()
    if figure is None:
        return None
    if scale is None:
        scale, end = Fraction(1), match.start("suffix")
    unit = unit_at(text, end)
    if _GLUED_AFTER.match(text, end) or (text[end : end + 1].isalpha() and not unit and not _CLOCK.match(text, end)):
        return None  # a word glued to it is no unit: 5th, 19B
    if _DECADE.match(text, end) and (figure >= 1000 or text[:start].rstrip().lower().endswith("the")):
        return None
    sign = match["currency"] or match["code"] or (match["currency_after"] or "").strip()
    unit = sign.lower() if sign and known(sign) else unit
    negative = ("-" in (match["sign1"], match["sign2"])) != (match["sign3"] == "-")
    return Number(-figure if negative else figure, scale, unit), end


_THEN = re.compile(r"\s*[A-Za-z]+(?:,?\s+and|,)?\s+(?=\d)")


def compound_at(text: str, start: int) -> tuple[Number, int] | None:
    """The sum of "1 hour and 30 minutes", and the index of its last unit; None for one number.

    In the smaller unit, money in the larger one.
    """
    first = number_at(text, start)
    then = _THEN.match(text, first[1]) if first and first[0].unit else None
    second = number_at(text, then.end()) if then else None
    if first is None or second is None or not second[0].unit or not same_dimension(first[0].unit, second[0].unit):
        return None
    ratio = size(first[0].unit) / size(second[0].unit)
    if first[0].figure < 0 or not 0 <= second[0].value < ratio:
        return None
    total = first[0].value * ratio + second[0].value
    if same_dimension(first[0].unit, "$"):
        return replace(first[0], figure=total / ratio, scale=Fraction(1)), second[1]
    return replace(second[0], figure=total, scale=Fraction(1)), second[1]


def _figure(match: re.Match[str]) -> Fraction | None:
    if match.end() - match.start() > MAX_DIGITS:
        return None
    parts = {name: value for name, value in match.groupdict().items() if value}
    if "whole" in parts:
        numerator, denominator = Fraction(parts["numerator1"]), Fraction(parts["denominator1"])
        # "12 3/4" is a mixed number, "3 7/2" is two numbers.
        return Fraction(parts["whole"]) + numerator / denominator if numerator < denominator else None
    if "numerator2" in parts:
        numerator, denominator = _written(parts["numerator2"]), Fraction(parts["denominator2"])
        return numerator / denominator if denominator and numerator is not None else None
    figure = _written(parts["figure"])
    power = int(parts.get("power", 1))
    exponent = int(parts.get("exponent1") or parts.get("exponent2") or 0)
    if figure is None or abs(power) * len(parts["figure"]) > MAX_DIGITS or abs(exponent) > MAX_DIGITS:
        return None
    return None if figure == 0 and power <= 0 else figure**power * Fraction(10) ** exponent


def _written(figure: str) -> Fraction | None:
    """The value of digits with separators; a group of repeating digits in parentheses."""
    if figure.endswith(")"):
        head, _, period = figure[:-1].partition("(")
        whole, _, decimals = head.partition(".")
        repeating = Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(decimals))
        return Fraction(f"{whole or 0}.{decimals or 0}") + repeating
    if "." in figure and "," in figure:
        thousands = min(".,", key=figure.rfind)
        return Fraction(figure.replace(thousands, "").replace(",", "."))
    if figure.count(".") > 1:
        return Fraction(figure.replace(".", ""))
    if "," in figure and (" " in figure or re.search(r",\d{1,2}\Z", figure)):
        return Fraction(figure.replace(" ", "").replace(",", "."))
    if figure.startswith("0") and re.search(r"[, ]", figure):
        return None  # 0,125 has a decimal comma
    return Fraction(re.sub(r"[, ]", "", figure))


def _scale(match: re.Match[str]) -> Fraction | None:
    """Size of the unit; None if the adjacent letters are something else: 5m is five metres, $5m five million."""
    if match["scale"]:
        return _SCALES[match["scale"].replace(" ", "")]
    if not match["suffix"]:
        return Fraction(1)
    return _SCALES[match["suffix"].lower()] if match["currency"] or match["suffix"] in "kK" else None


def numbers_in(text: str) -> list[tuple[Number, int, int]]:
    """Every unambiguous number in `plain` text with start and end index, left to right."""
    numbers, _ = scan(text)
    return numbers


def scan(text: str) -> tuple[list[tuple[Number, int, int]], bool]:
    """The numbers of `numbers_in`, and whether after the last of them there is something like a number that is none."""
    numbers: list[tuple[Number, int, int]] = []
    position, unread = 0, False
    while match := _NUMBER.search(text, position):
        parsed = number_at(text, match.start())
        if parsed is None:
            # Skip the whole run of adjacent characters, so that 3:45 does not yield 45.
            cluster = _CLUSTER.match(text, match.start())
            unread = unread or re.match(r"[\w^]", text[max(0, match.start() - 1) : match.start()]) is None
            position = max(match.start() + 1, cluster.end() if cluster else 0)
        else:
            numbers.append((parsed[0], match.start(), parsed[1]))
            position, unread = parsed[1], False
    return numbers, unread or text.rfind(_OPAQUE) > (numbers[-1][2] if numbers else 0)
