"""How often the 95 % intervals of an evaluation contain the truth, in simulated worlds where the truth is known.

    python jobs/bench/coverage.py [--quick] [--worlds 10000] [--only NAME ...]

The worlds are those of `tests/support/interval_worlds.py`. For `paired_bootstrap` and `recovery_interval` there are
worlds with one task and with several, with scores in the middle and near 0 and 1, and with models that agree on nearly
all items. Where only a few items differ ("sparse"), there are so few different outcomes that no interval contains every
truth in exactly 95 % of cases. For the crossed intervals there are 1 to 5 seeds, which shift a student not at all, as
in the laboratory (by about one point), and by four times that. The bounds are 93 and 97 %; sparse worlds and worlds of
two seeds may exceed the upper one. The standard error of a coverage is 0.2 points at 10,000 worlds. The last line is
JSON; "ratio" is the smallest coverage.
"""

from __future__ import annotations

import argparse
import json

from rich.console import Console
from rich.table import Table

from tests.support.interval_worlds import BOUND_HIGH, BOUND_LOW, WORLDS, coverage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1,000 worlds each")
    parser.add_argument("--worlds", type=int, default=10_000, help="of each kind")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="kinds of world whose names begin so")
    options = parser.parse_args()
    num_worlds = 1000 if options.quick else options.worlds
    names = [name for name in WORLDS if not options.only or name.startswith(tuple(options.only))]
    console, coverages = Console(), {}
    for name in names:
        coverages[name] = coverage(name, num_worlds)
        console.print(f"{name}: {100 * coverages[name]:.1f}", highlight=False)
    table = Table("worlds", title="How often 95 % intervals hold the truth, per cent", title_justify="left")
    table.add_column("coverage", justify="right")
    table.add_column("should be", justify="right")
    for name, share in coverages.items():
        table.add_row(name, f"{100 * share:.1f}", "at least 93" if WORLDS[name].may_exceed else "93 - 97")
    console.print(table)
    within = all(
        share >= BOUND_LOW and (share <= BOUND_HIGH or WORLDS[name].may_exceed) for name, share in coverages.items()
    )
    figures = {
        "ratio": min(coverages.values()),
        "largest": max(coverages.values()),
        "worlds": num_worlds,
        "coverages": coverages,
    }
    print(json.dumps({"benchmark": "coverage", "within_bounds": within, **figures}))


if __name__ == "__main__":
    main()
