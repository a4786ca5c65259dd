"""A study's table like the papers', as Markdown for a README: scores by task at the largest size, and recovery."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from sdft_ray.report.study.model import ALL, OFF_DOMAIN, Interval, Panel, StudyData
from sdft_ray.report.study.words import bounds, cells_compared, rows, signed
from sdft_ray.report.toolbox.markdown import code, escaped
from sdft_ray.report.toolbox.numbers import number


def study_markdown(study: StudyData) -> str:
    """One table for all panels, each under a line with its name; in per cent, with 95 % intervals.

    What is compared stands first, where a narrow page still shows it.

    Raises `ValueError` for a study without panels.
    """
    if not study.panels:
        raise ValueError("a study without panels has no table")
    tasks = tuple(dict.fromkeys(task for panel in study.panels for task in panel.tasks))
    first = study.panels[0].arms[0]
    head = ["", "recovery", f"against {escaped(first)}"]
    with_apart = any(OFF_DOMAIN in panel.groups for panel in study.panels)
    head += [*(["off-domain recovery"] if with_apart else []), "average", *map(code, tasks)]
    lines = [_line(head), _line(["---", *["---:"] * (len(head) - 1)])]
    teacher: dict[str, float] = {}
    for panel in study.panels:
        if panel.teacher != teacher:
            teacher = panel.teacher
            shares = ["100", "", *(["100"] if with_apart else [])]
            lines.append(_line(["teacher", *shares, _share(panel.teacher_average), *_scores(tasks, teacher)]))
        lines += [_line(cells) for cells in _panel(panel, tasks, with_apart=with_apart)]
    return "".join(f"{line}\n" for line in lines)


def _panel(panel: Panel, tasks: Sequence[str], *, with_apart: bool) -> Iterator[list[str]]:
    cells = cells_compared(panel)
    yield [f"**{escaped(panel.name)}, {rows(cells[0].num_rows)}**"]
    for pruned in panel.pruned:
        whose = f" ({', '.join(pruned.arms)})" if len(panel.pruned) > 1 else ""
        found = [_share(pruned.recovery[ALL]), ""]
        if with_apart:
            found.append(_share(pruned.recovery[OFF_DOMAIN]) if OFF_DOMAIN in pruned.recovery else "")
        yield [escaped(f"pruned{whose}"), *found, _share(pruned.average), *_scores(tasks, pruned.scores)]
    best = _share(max(cell.recovery[ALL].value for cell in cells))
    for cell in cells:
        figure = _interval(cell.recovery[ALL], strong=_share(cell.recovery[ALL].value) == best)
        ahead = f"{signed(cell.ahead[ALL].value)}{bounds(cell.ahead[ALL], sign=True)}" if ALL in cell.ahead else ""
        found = [figure, ahead]
        if with_apart:
            found.append(_interval(cell.recovery[OFF_DOMAIN]) if OFF_DOMAIN in cell.recovery else "")
        yield [escaped(cell.arm), *found, _share(cell.average), *_scores(tasks, cell.scores, cell.margins)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _scores(tasks: Sequence[str], scores: Mapping[str, float], margins: Mapping[str, float] | None = None) -> list[str]:
    margin = {task: f" ± {_share(value)}" for task, value in (margins or {}).items()}
    return [_share(scores[task]) + margin.get(task, "") if task in scores else "–" for task in tasks]


def _share(value: float) -> str:
    return number(100 * value, 1)


def _interval(found: Interval, *, strong: bool = False) -> str:
    value = _share(found.value)
    return (f"**{value}**" if strong else value) + bounds(found)
