"""Units whose sizes are compared: 6 cm is not 6 m, and 500 cents are 5 dollars.

Words that are no unit here (apples, "in", "m/s^2") are not compared at all.
"""

from __future__ import annotations

import re
from fractions import Fraction

_SIZES: dict[str, dict[str, str]] = {
    "length": {
        "mm": "1/1000", "cm": "1/100", "m": "1", "km": "1000", "inches": "254/10000", "inch": "254/10000",
        "ft": "3048/10000", "feet": "3048/10000", "foot": "3048/10000", "yards": "9144/10000", "yard": "9144/10000",
        "miles": "1609344/1000", "mile": "1609344/1000", "meter": "1", "metre": "1", "kilometer": "1000",
        "kilometre": "1000", "centimeter": "1/100", "centimetre": "1/100", "millimeter": "1/1000",
        "millimetre": "1/1000",
    },
    "mass": {
        "mg": "1/1000", "g": "1", "kg": "1000", "milligram": "1/1000", "gram": "1", "kilogram": "1000",
        "lb": "45359237/100000", "pound": "45359237/100000", "oz": "28349523125/1000000000",
        "ounce": "28349523125/1000000000", "tonne": "1000000",
    },
    "time": {
        "ms": "1/1000", "s": "1", "sec": "1", "second": "1", "min": "60", "minute": "60", "h": "3600", "hr": "3600",
        "hrs": "3600", "hour": "3600", "day": "86400", "week": "604800",
    },
    "calendar": {"month": "1", "year": "12", "decade": "120", "century": "1200"},
    "volume": {"ml": "1/1000", "l": "1", "liter": "1", "litre": "1", "milliliter": "1/1000", "millilitre": "1/1000"},
    "dollar": {"$": "1", "usd": "1", "dollar": "1", "cent": "1/100", "¢": "1/100"},
    "euro": {"€": "1", "eur": "1", "euro": "1"},
    "sterling": {"£": "1", "gbp": "1"},
    "yen": {"¥": "1", "yen": "1"},
    "rupee": {"₹": "1", "rupee": "1", "rs": "1"},
    "celsius": {"°c": "1"},
    "fahrenheit": {"°f": "1"},
    "speed": {
        "m/s": "1", "meters per second": "1", "metres per second": "1", "km/h": "1000/3600", "kph": "1000/3600",
        "km per hour": "1000/3600", "kilometers per hour": "1000/3600", "kilometres per hour": "1000/3600",
        "mph": "1609344/3600000", "miles per hour": "1609344/3600000",
    },
    "angle": {"°": "1"},
    "radian": {"radian": "1", "rad": "1"},
    "clock": {"am": "1", "pm": "1"},
}  # fmt: skip
_UNITS = {name: (dimension, Fraction(size)) for dimension, sizes in _SIZES.items() for name, size in sizes.items()}
for _power, _dimension in ((2, "area"), (3, "space")):
    for _name, _size in _SIZES["length"].items():
        _UNITS[f"{_name}^{_power}"] = (_dimension, Fraction(_size) ** _power)
_UNITS["in^2"], _UNITS["in^3"] = _UNITS["inch^2"], _UNITS["inch^3"]
_TOKEN = re.compile(
    r" {0,2}(?P<power>square |sq\.? |cubic )?(?P<unit>[A-Za-z°¢]+(?:(?:/| per )[A-Za-z]+)?(?:\^[23])?)(?![\w^/'’])",
    re.IGNORECASE,
)


def unit_at(text: str, start: int) -> str:
    """The known unit that stands at index `start`, "" for none."""
    match = _TOKEN.match(text, start)
    if match is None or match["unit"] == "M":  # a million
        return ""
    power = "" if not match["power"] else "^3" if match["power"].lower() == "cubic " else "^2"
    unit = match["unit"].lower()
    return next((name for name in (unit + power, unit.removesuffix("s") + power) if name in _UNITS), "")


def known(unit: str) -> bool:
    """Whether a name or sign is one of the known units."""
    return unit.lower() in _UNITS


def same_dimension(a: str, b: str) -> bool:
    """Whether two known units measure the same thing."""
    return _UNITS[a][0] == _UNITS[b][0]


def size(unit: str) -> Fraction:
    """Size of a known unit in the base unit of what it measures."""
    return _UNITS[unit][1]
