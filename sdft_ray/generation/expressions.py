"""Mathematical expressions in answers: roots, variables, intervals, sets, points, equations, inequalities.

They are read by the parser of math-verify and compared exactly. math-verify's own comparison is not used: it takes
0.333333 for 1/3, and finds a number somewhere in "not 9" or "5 ft 3 in" (docs/libraries.md has the figures).
What is compared is bounded in length and in its powers, so no input keeps a worker busy.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

MAX_CHARS = 160
_MAX_POWER = 12
_MAX_DIGITS = 15
_NUM_POINTS = 4
_PRECISION = 40


@dataclass(frozen=True)
class Expression:
    """LaTeX of an expression that is more than a number."""

    latex: str


_UNICODE = {
    "π": r"\pi ", "∞": r"\infty ", "∪": r"\cup ", "∩": r"\cap ", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ",
    "÷": r"\div ", "≤": r"\leq ", "≥": r"\geq ", "≠": r"\neq ", "±": r"\pm ", "−": "-", "–": "-", "²": "^{2}",
    "³": "^{3}", "θ": r"\theta ", "∅": r"\emptyset ", r"\varnothing": r"\emptyset", "**": "^",
    "<=": r"\leq ", ">=": r"\geq ",
}  # fmt: skip
_REWRITTEN = [
    (re.compile(r"√\s*(?:\(([^()]*)\)|(\d+|[a-zA-Z]))"), lambda m: rf"\sqrt{{{m[1] or m[2]}}}"),
    (re.compile(r"(?<![\\a-zA-Z])sqrt\s*\(([^()]*)\)"), lambda m: rf"\sqrt{{{m[1]}}}"),
    (re.compile(r"(?<![\\a-zA-Z])pi(?![a-zA-Z])"), lambda m: r"\pi "),
    (re.compile(r"\\(?:text|mathrm)\s*\{\s*(?:,?\s*(?:and|or))\s*\}"), lambda m: ","),
    (re.compile(r",?\s+(?:and|or)\s+"), lambda m: ", "),
    (re.compile(r"\A\{([^{}]*)\}\Z"), lambda m: rf"\{{{m[1]}\}}"),
    (re.compile(r"\\[dtc]frac"), lambda m: r"\frac"),
    (re.compile(r"\\(?:left|right|displaystyle)(?![a-zA-Z])|\\[,;:! ]|~"), lambda m: " "),
    (re.compile(r"\{,\}(?=\d{3})|(?<=\d),(?=\d{3}(?!\d))(?![^(\[{]*[)\]}])"), lambda m: ""),
]  # fmt: skip
_COMMAND = (
    r"\\(?:frac|sqrt|pi|theta|alpha|beta|gamma|lambda|mu|phi|omega|cdot|times|div|infty|cup|cap|pm|ln|log|sin|cos|tan|sec"
    r"|csc|cot|leq|le|geq|ge|lt|gt|emptyset|binom|in|mathbb\{[RNZQC]\})(?![a-zA-Z])|\\(?:begin|end)\{[pb]matrix\}|\\[{}\\]"
)
_NUMERAL = rf"\d{{1,{_MAX_DIGITS}}}(?:\.\d{{1,{_MAX_DIGITS}}})?(?![\d.])|\.\d{{1,{_MAX_DIGITS}}}"
_TOKENS = re.compile(rf"(?:\s+|{_NUMERAL}|{_COMMAND}|[a-zA-Z]|[-+*/^_=<>(),\[\]{{}}|!&])*")
_MORE_THAN_A_NUMBER = re.compile(
    r"\\(?!(?:cdot|times|div|frac)(?![a-z]))[a-z]|(?<![\\a-zA-Z])[a-zA-Z]|[,!<>|&]|\^\s*\{[^{}]*[/.]"
)
_NAMES = re.compile(r"(?<![a-zA-Z])([a-zA-Z])\s*=")
_ASSIGNED_NUMBER = re.compile(r"[a-zA-Z]\s*=\s*[-+]?[\d.,/ ]+")
_UNIT_TAIL = re.compile(
    r"(?<=[^\s,=])\s*(?:(?:\\text|\\mathrm|\\mbox)\s*\{[^{}]*\}|(?<=\s)(?:(?:square|cubic|sq\.?)\s)?(?:[cmk]?m|units?|inches|feet|ft)\b)"
    r"(?:\^\s*\{?[23]\}?)?\Z"
)
_FIGURES = re.compile(
    r"\d{1,4}(?:\s?:\s?\d{1,4}){1,2}(?:\s?[ap]\.?m\.?)?|\d{1,4}([/.-])\d{1,2}\1\d{1,4}", re.IGNORECASE
)
"""A time, a ratio or a date: compared as it is written."""
_MATRIX = re.compile(r"\\(?:begin|end)\{.matrix\}")
_WORDS = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}")
_BARE = re.compile(
    r"\\(?!cdot|times|div)[a-z]{2}|[√π∞∪]|\A(?:[(\[]|\\?\{)[^()\[\]]+,[^()\[\]]+[)\]}]\Z"
    r"|\A-?\d[\d./]*(?:(?:,?\s+(?:and|or)\s+|,\s+)-?\d[\d./]*)+\Z|\A(?!.*\d\s?[eE])(?=.*\d)(?=.*(?<![a-zA-Z])[a-zA-Z](?![a-zA-Z]))"
    r"|(?<![a-zA-Z])(?:sqrt|pi)(?![a-zA-Z])|(?<![a-zA-Z])[a-zA-Z]\s?[+*/^=]\s?[a-zA-Z](?![a-zA-Z])"
)
"""What makes bare text mathematics: a command, a pair in brackets, several numbers, or a variable with a number."""
_POWER = re.compile(r"\^\s*(?:\{([^{}]*)\}|(\d+|[a-zA-Z]|\\[a-z]+)|(.))")
_SUBSCRIPT = re.compile(r"(?<![a-zA-Z])\s*_")
_LOG_BASE = re.compile(r"\\log\s*_")
_DELIMITED = re.compile(
    r"\s*(?:\$\$?(?P<dollars>[^$]+)\$\$?|\\\((?P<round>.+?)\\\)|\\\[(?P<square>.+?)\\\])\s*"
    r"(?:[.,;!]?\s*\Z|,?\s+(?:because|since|as|so)\b)",
    re.DOTALL,
)


def expression_in(text: str, *, mathematics: bool = False) -> Expression | None:
    """The expression that a text consists of, in dollar signs or bare; None if it is prose or only a number.

    `mathematics` says that the text comes from within mathematics, where letters may stand side by side.
    """
    if len(text) > 4 * MAX_CHARS:
        return None
    if written := _FIGURES.fullmatch(text.strip().rstrip(".")):
        return Expression(re.sub(r"\s|\.(?=m)|(?<=m)\.", "", written[0]).lower())
    if re.search(r"\bor\b", text) and len(set(_NAMES.findall(text))) > 1:
        return None  # x = 3 or y = 4
    if match := _DELIMITED.match(text):
        text, mathematics = next(group for group in match.groups() if group), True
    latex = text.strip().rstrip(".;").strip()
    bare = latex
    for mark, written in _UNICODE.items():
        latex = latex.replace(mark, written)
    for pattern, rewrite in _REWRITTEN:
        latex = pattern.sub(rewrite, latex)
    latex = _UNIT_TAIL.sub("", " ".join(latex.split()))
    if "=" in latex and not re.search(r"[<>!]|(?<![\\a-zA-Z])[a-zA-Z]", latex):
        latex = latex.rsplit("=", 1)[1].strip()  # a calculation and its result
    if len(latex) > MAX_CHARS or not _TOKENS.fullmatch(latex) or not _MORE_THAN_A_NUMBER.search(latex):
        return None
    if any(len(word) > (3 if mathematics else 1) for word in _WORDS.findall(_MATRIX.sub("", latex))):
        return None
    if _ASSIGNED_NUMBER.fullmatch(latex):
        return None
    if not mathematics and not _BARE.search(bare):
        return None
    return Expression(latex) if _tame(latex) else None


def _tame(latex: str) -> bool:
    """Whether powers, those of powers too, and factorials are small, and no number stands in a base other than ten."""
    if _SUBSCRIPT.search(_LOG_BASE.sub("", latex)) or re.search(r"(?<!\d)!|\d{3,}!|!!|[=<>]\s*\Z|\A\s*[=<>*/^]", latex):
        return False
    if "binom" in latex and re.search(r"\d{4}", latex):
        return False
    powers = list(_POWER.finditer(latex))
    if len(powers) > 6 or re.search(r"\^\s*\{[^{}]*[\^{]", latex):
        return False
    product = 1
    for power in powers:
        exponent = power[1] or power[2] or ""
        if not exponent or power[3] or "!" in exponent or "," in exponent:
            return False
        largest = max((int(digits) for digits in re.findall(r"\d+", exponent)), default=1)
        if re.search(r"[)}\]]\s*\Z", latex[: power.start()]):
            product *= max(largest, 1)
        if largest > 100 or product > _MAX_POWER:
            return False
    return latex.count("{") <= 40 and latex.count("(") <= 20


# --- comparison -------------------------------------------------------------------------------------------------


def same_expressions(a: Expression, b: Expression) -> bool:
    """Whether two expressions are equal: as values, point by point, side by side."""
    if re.sub(r"\s", "", a.latex) == re.sub(r"\s", "", b.latex):
        return True
    left, right = _parsed(a.latex), _parsed(b.latex)
    return left is not None and right is not None and _same(left, right)


def is_value(a: Expression, value: Fraction) -> bool:
    """Whether an expression is a number of exactly this value."""
    from sympy import Rational

    parsed = _parsed(a.latex)
    return parsed is not None and _same(parsed, Rational(value.numerator, value.denominator))


@lru_cache(maxsize=4096)
def _parsed(latex: str) -> Any:
    """A sympy object, or None. Points stay pairs in their order, and decimals are exact."""
    from math_verify import LatexExtractionConfig
    from math_verify.parser import extract_target_from_pred, get_extraction_regexes
    from sympy import Float, Rational

    if _FIGURES.fullmatch(latex):
        return None
    # `math_verify.parse` is these two calls within an alarm signal, which works in a main thread only.
    found = extract_target_from_pred(f"${latex}$", get_extraction_regexes([LatexExtractionConfig()]))
    if not found or isinstance(found[0], str):
        return None
    try:
        return found[0].xreplace({one: Rational(str(one)) for one in found[0].atoms(Float)})
    except (AttributeError, TypeError, ValueError):
        return None


def _same(a: Any, b: Any) -> bool:
    from sympy import And, Equality, Expr, FiniteSet, Interval, MatrixBase, Tuple, Union
    from sympy.core.relational import Relational

    if isinstance(a, Equality) != isinstance(b, Equality):
        a, b = _right_side(a), _right_side(b)
    if isinstance(a, Interval) != isinstance(b, Interval):
        a, b = _interval(a), _interval(b)
    if _both(Interval, a, b):
        return (a.left_open, a.right_open) == (b.left_open, b.right_open) and _all_same(a.args[:2], b.args[:2])
    if _both(MatrixBase, a, b):
        return a.shape == b.shape and _all_same(a.flat(), b.flat())
    if _both(Tuple, a, b):
        return _all_same(a.args, b.args)
    for kind in (FiniteSet, Union, And):
        if _both(kind, a, b):
            return _same_members(list(a.args), list(b.args))
    if _both(Relational, a, b):
        return _same_relation(a, b)
    if _both(Expr, a, b):
        return _same_value(a, b)
    return type(a) is type(b) and not a.args and a == b


def _both(kind: type, a: Any, b: Any) -> bool:
    return isinstance(a, kind) and isinstance(b, kind)


def _right_side(a: Any) -> Any:
    """The right side of `x = ...` or `f(x) = ...`, anything else as it is."""
    from sympy import Equality
    from sympy.core.function import AppliedUndef

    return a.rhs if isinstance(a, Equality) and (a.lhs.is_Symbol or isinstance(a.lhs, AppliedUndef)) else a


def _interval(a: Any) -> Any:
    """The interval that `x > 3` or `1 < x <= 3` describes, anything else as it is."""
    from sympy import And, Interval, oo

    bounds: tuple[Any, ...] = a.args if isinstance(a, And) else (a,)
    low, high, names, left_open, right_open = -oo, oo, set(), True, True
    for bound in bounds:
        if getattr(bound, "rel_op", "") not in ("<", "<=", ">", ">="):
            return a
        small, large = (bound.lhs, bound.rhs) if bound.rel_op in ("<", "<=") else (bound.rhs, bound.lhs)
        if small.is_Symbol and large.is_number:
            names, high, right_open = names | {small}, large, "=" not in bound.rel_op
        elif large.is_Symbol and small.is_number:
            names, low, left_open = names | {large}, small, "=" not in bound.rel_op
        else:
            return a
    return Interval(low, high, left_open, right_open) if len(names) == 1 and len(bounds) <= 2 else a


def _all_same(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))


def _same_members(a: list[Any], b: list[Any]) -> bool:
    left = list(b)
    for x in a:
        match = next((i for i, y in enumerate(left) if _same(x, y)), None)
        if match is None:
            return False
        left.pop(match)
    return not left


def _same_relation(a: Any, b: Any) -> bool:
    """Equations whose sides differ by the same up to a factor; inequalities, up to a positive factor."""
    from sympy import Equality, GreaterThan, StrictGreaterThan

    if isinstance(a, Equality) and isinstance(b, Equality) and a.lhs.is_Symbol and b.lhs.is_Symbol:
        return a.lhs == b.lhs and _same(a.rhs, b.rhs)
    a, b = (one.reversed if isinstance(one, GreaterThan | StrictGreaterThan) else one for one in (a, b))
    if type(a) is not type(b):
        return False
    values = _values(a.lhs - a.rhs, b.lhs - b.rhs)
    if values is None or any(abs(y) < 10**-_TOLERANCE for _, y in values):
        return False
    ratios = [x / y for x, y in values]
    same = all(abs(ratio - ratios[0]) < 10**-_TOLERANCE * abs(ratios[0]) for ratio in ratios)
    return same and (isinstance(a, Equality) or (abs(ratios[0].imag) < 10**-_TOLERANCE and ratios[0].real > 0))


_TOLERANCE = 25


def _same_value(a: Any, b: Any) -> bool:
    """Equality at several points to 25 digits; exact if there is no variable and both are rational."""
    if a == b:
        return True
    if a.is_Rational and b.is_Rational:
        return False
    values = _values(a, b)
    return values is not None and all(abs(x - y) < 10**-_TOLERANCE * max(1, abs(x)) for x, y in values)


def _values(a: Any, b: Any) -> list[tuple[Any, Any]] | None:
    """Both expressions at the same points, some of them negative; None where either has no finite value."""
    from mpmath import isfinite, mpmathify
    from sympy import Rational
    from sympy.core.function import AppliedUndef

    if a.atoms(AppliedUndef) or b.atoms(AppliedUndef):
        return None
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    values = []
    for point in range(_NUM_POINTS if symbols else 1):
        sign = -1 if point % 2 else 1
        at = {one: sign * Rational(101 + 37 * i + 53 * point, 89 + 7 * i) for i, one in enumerate(symbols)}
        try:
            pair = tuple(mpmathify(one.xreplace(at).evalf(_PRECISION)) for one in (a, b))
        except (TypeError, ValueError, ArithmeticError, AttributeError):
            return None
        if not all(isfinite(one) for one in pair):
            return None
        values.append(pair)
    return values
