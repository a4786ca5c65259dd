"""Progress events and the views that show them."""

from __future__ import annotations

import io
import itertools
import json
import threading
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from sdft_ray.progress import (
    KINDS,
    Event,
    JsonView,
    LiveView,
    NoView,
    PlainView,
    clock_time,
    open_view,
    parse_event,
    seconds,
)

STAGES = (
    "seed",
    "calibration",
    "measure",
    "generate",
    "train:sft",
    "evaluate:teacher",
    "evaluate:a_very_long_arm_name",
)


class Clock:
    """A clock that a test turns by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def terminal(width: int = 80, height: int = 40) -> Console:
    return Console(file=io.StringIO(), width=width, height=height, force_terminal=True, color_system=None)


def shown(view: LiveView, console: Console) -> list[str]:
    with console.capture() as capture:
        console.print(view.render())
    return capture.get().splitlines()


def line_of(lines: list[str], stage: str) -> str:
    (line,) = (line for line in lines if f" {stage} " in line)
    return line.rstrip()


def busy(width: int = 80, height: int = 40) -> tuple[LiveView, Console, Clock]:
    """A view with a stage in every state."""
    console, clock = terminal(width, height), Clock()
    view = LiveView(STAGES, console, clock=clock)
    view.handle(Event("stage_skipped", "seed"))
    view.handle(Event("stage_started", "calibration"))
    clock.now += 1.25
    view.handle(Event("stage_finished", "calibration"))
    for stage in ("generate", "train:sft", "evaluate:teacher"):
        view.handle(Event("stage_started", stage))
    for step in range(1, 11):
        clock.now += 1
        view.handle(Event("progress", "generate", done=100_000 * step, total=12_345_678, unit="requests"))
        view.handle(Event("progress", "train:sft", done=2 * step, total=80, unit="steps"))
        view.handle(Event("progress", "evaluate:teacher", done=step, unit="items"))
    view.handle(Event("stage_failed", "measure", detail="ModelError: " + "hidden states are not finite " * 5))
    return view, console, clock


# --- events --------------------------------------------------------------------------------------------------------

counts = st.none() | st.integers(0, 10**12)
events = st.builds(
    Event,
    event=st.sampled_from(KINDS),
    stage=st.text(max_size=8),
    done=counts,
    total=counts,
    unit=st.text(max_size=8),
    wall_s=st.none() | st.floats(0, 1e9),
    detail=st.text(max_size=30),
    phase=st.text(max_size=12),
)


@given(events)
def test_an_event_survives_its_line(event: Event) -> None:
    line = event.to_json()
    assert len(line.splitlines()) == 1
    assert parse_event(line) == event
    assert parse_event(f"(pid=123, ip=10.0.0.1) {line}\n") == event


def test_keys_of_the_line() -> None:
    line = Event("progress", "generate", done=3, total=10, unit="rows").to_json()
    assert json.loads(line) == {
        "event": "progress",
        "stage": "generate",
        "done": 3,
        "total": 10,
        "unit": "rows",
        "wall_s": None,
        "detail": "",
        "phase": "",
    }


@pytest.mark.parametrize(
    "line",
    [
        "",
        "INFO worker started",
        '{"stage": "seed"}',
        '{"event": "lunch", "stage": "seed"}',
        '{"event": "progress", "stage": "seed", "done": "3"}',
        '{"event": "progress", "stage": "seed", "done": true}',
        '{"event": "progress", "stage": null}',
        '{"event": "progress", "stage": "seed", "colour": "red"}',
        '{"event": "progress", "stage": "seed"',
        '{"event": "progress"} {"event": "progress"}',
        '{"event": ["progress"]}',
    ],
)
def test_other_lines_are_no_events(line: str) -> None:
    assert parse_event(line) is None


# --- views ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"), [("auto", PlainView), ("plain", PlainView), ("json", JsonView), ("none", NoView)]
)
def test_which_view_opens_off_a_terminal(name: str, kind: type) -> None:
    assert type(open_view(name, STAGES, io.StringIO())) is kind  # pyright: ignore[reportArgumentType]


def test_the_live_view_opens_where_asked_for() -> None:
    assert isinstance(open_view("live", STAGES, io.StringIO()), LiveView)


def test_a_terminal_gets_the_live_view_unless_it_is_dumb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(open_view("auto", STAGES, io.StringIO()), LiveView)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(open_view("auto", STAGES, io.StringIO()), PlainView)


def test_json_goes_to_standard_output_and_the_rest_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("json", "plain", "none"):
        with open_view(name, STAGES) as view:
            view.handle(Event("stage_finished", "seed", wall_s=1.0))
    captured = capsys.readouterr()
    assert parse_event(captured.out) == Event("stage_finished", "seed", wall_s=1.0)
    assert captured.err == "seed: done in 1.0 s\n"


def test_the_plain_view_says_one_line_per_message_and_ended_stage() -> None:
    out, clock = io.StringIO(), Clock()
    with PlainView(out, clock=clock) as view:
        view.handle(Event("message", detail="hello"))
        view.handle(Event("stage_skipped", "seed"))
        view.handle(Event("stage_started", "measure"))
        view.handle(Event("progress", "measure", done=1, total=2, unit="batches"))
        clock.now += 75
        view.handle(Event("stage_finished", "measure"))
        view.handle(Event("stage_started", "train:sft"))
        clock.now += 2
        view.handle(Event("stage_failed", "train:sft", detail="out of memory"))
        view.handle(Event("stage_finished", "plan", wall_s=0.04))
    assert out.getvalue().splitlines() == [
        "hello",
        "seed: reused",
        "measure: done in 1 min 15 s",
        "train:sft: failed after 2.0 s: out of memory",
        "plan: done in 0.0 s",
    ]


def log_of(minutes: float, each_second: Callable[[PlainView, Clock, int], None]) -> list[tuple[float, str]]:
    """The lines of a stage `train` that runs so long, with the seconds at which they came."""
    out, clock = io.StringIO(), Clock()
    view = PlainView(out, clock=clock)
    view.handle(Event("stage_started", "train"))
    lines: list[tuple[float, str]] = []
    for second in range(1, round(60 * minutes) + 1):
        clock.now += 1
        each_second(view, clock, second)
        view.tick()
        new = out.getvalue().splitlines()[len(lines) :]
        lines += [(second, line) for line in new]
    return lines


def steadily(view: PlainView, clock: Clock, second: int) -> None:
    view.handle(Event("progress", "train", done=2 * second, total=10_000, unit="steps"))


def silently(view: PlainView, clock: Clock, second: int) -> None:
    """Nothing comes, as from a worker that loads a model."""


def in_bursts(view: PlainView, clock: Clock, second: int) -> None:
    """Five chunks of 64 rows every two minutes."""
    chunk, place = divmod(second, 120)
    if chunk and place < 5:
        view.handle(Event("progress", "train", done=64 * (5 * (chunk - 1) + place + 1), total=6400, unit="rows"))


@pytest.mark.parametrize("how", [steadily, silently, in_bursts])
def test_a_log_has_a_line_of_each_running_stage_every_30_to_60_seconds(how: Callable[..., None]) -> None:
    times = [0.0, *(second for second, _ in log_of(15, how)), 900.0]
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert max(gaps) <= 60
    assert min(gaps[:-1]) >= 30


def test_a_line_of_a_log_says_how_far_how_fast_and_how_long() -> None:
    (second, line), *_ = log_of(1, steadily)
    assert line == f"train: {2 * second:,} of 10,000 steps, 2.0/s, {seconds((10_000 - 2 * second) / 2)} left"


def test_a_stage_that_says_nothing_has_its_time_in_the_log() -> None:
    assert [line for _, line in log_of(2, silently)] == ["train: 45.0 s so far", "train: 1 min 30 s so far"]


def test_bursts_give_no_absurd_time_left() -> None:
    """In the long run 2.7 rows a second; inside of a burst they come at 64."""
    lines = [line for _, line in log_of(20, in_bursts) if "left" in line]
    rates = [float(line.split("/")[0].split()[-1]) * (1 if "/s" in line else 1 / 60) for line in lines]
    assert len(rates) >= 10
    assert all(0.8 <= rate <= 6 for rate in rates), rates


def test_a_phase_is_named_with_its_time_and_takes_no_part_in_the_rate() -> None:
    def load_then_work(view: PlainView, clock: Clock, second: int) -> None:
        if second == 1:
            view.handle(Event("progress", "train", done=0, total=600, unit="steps"))
            view.handle(Event("progress", "train", done=0, total=600, unit="steps", phase="loading the model"))
        elif second > 100:
            view.handle(Event("progress", "train", done=second - 100, total=600, unit="steps"))

    lines = [line for _, line in log_of(3, load_then_work)]
    assert lines[0] == "train: 0 of 600 steps, loading the model, 44.0 s so far"
    assert lines[2] == "train: 35 of 600 steps, 1.0/s, 9 min 25 s left"


def test_several_stages_have_lines_of_their_own_and_none_after_their_end() -> None:
    def work(view: PlainView, clock: Clock, second: int) -> None:
        view.handle(Event("progress", "generate", done=second, total=999, unit="rows"))
        if second == 50:
            view.handle(Event("stage_finished", "train", wall_s=50.0))
        view.handle(Event("progress", "train", done=second, total=999, unit="steps"))  # late

    stages = [line.partition(":")[0] for _, line in log_of(3, work)]
    assert stages.count("train") == 2  # once how far it is, once that it is done
    assert stages.count("generate") == 3


def test_an_open_log_is_told_by_the_clock_alone() -> None:
    out, clock = io.StringIO(), Clock()
    with PlainView(out, clock=clock) as view:
        view.handle(Event("stage_started", "train"))
        clock.now += 46
        deadline = time.monotonic() + 30
        while not out.getvalue() and time.monotonic() < deadline:
            time.sleep(0.05)
    assert out.getvalue() == "train: 46.0 s so far\n"


def test_json_lines_of_many_threads_stay_whole() -> None:
    out = io.StringIO()
    view = JsonView(out)
    in_threads(lambda number: view.handle(Event("progress", f"stage{number}", done=1, detail="x" * 500)))
    lines = out.getvalue().splitlines()
    assert len(lines) == 8 * 50
    assert all(parse_event(line) for line in lines)


def in_threads(work: Callable[[int], None]) -> None:
    failures: list[BaseException] = []

    def run(number: int) -> None:
        try:
            for _ in range(50):
                work(number)
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


# --- the live view -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 60])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    view, console, _ = busy(width)
    lines = shown(view, console)
    assert max(cell_len(line) for line in lines) <= width
    assert sum(line.startswith(("✔", "✘", "·", "⠋")) for line in lines) == len(STAGES)


def test_what_each_state_shows() -> None:
    view, console, _ = busy()
    lines = shown(view, console)
    assert line_of(lines, "seed").split() == ["✔", "seed", "reused"]
    assert line_of(lines, "calibration").split() == ["✔", "calibration", "1.2", "s"]
    assert line_of(lines, "measure").split()[:3] == ["✘", "measure", "failed"]
    assert "1.00M/12.35M requests" in line_of(lines, "generate")
    assert lines[-1].strip().startswith("2 of 7 steps, 1 failed")
    assert lines[-1].rstrip().endswith("0:11")
    assert "".join(line.strip() for line in lines).count("not finite") == 5


def test_rate_and_time_left() -> None:
    view, console, _ = busy()
    line = line_of(shown(view, console), "train:sft")
    assert line.split()[-5:] == ["20/80", "steps", "2.0/s", "0:30", "left"]


def test_without_a_total_time_spent_is_shown() -> None:
    view, console, _ = busy()
    line = line_of(shown(view, console), "evaluate:teacher")
    assert line.split()[-4:] == ["10", "items", "1.0/s", "0:10"]


def test_time_left_waits_for_enough_figures() -> None:
    console, clock = terminal(), Clock()
    view = LiveView(["train"], console, clock=clock)
    view.handle(Event("stage_started", "train"))
    endings = []
    for step in range(1, 6):
        clock.now += 1
        view.handle(Event("progress", "train", done=step, total=9, unit="steps"))
        endings.append(line_of(shown(view, console), "train").endswith("left"))
    assert endings == [False, False, False, True, True]


def test_a_resumed_stage_counts_only_what_it_does_now() -> None:
    console, clock = terminal(), Clock()
    view = LiveView(["generate"], console, clock=clock)
    for step in range(6):
        view.handle(Event("progress", "generate", done=900 + 4 * step, total=1000, unit="rows"))
        clock.now += 2
    assert "2.0/s" in line_of(shown(view, console), "generate")


def test_the_rate_follows_the_recent_past() -> None:
    console, clock = terminal(), Clock()
    view = LiveView(["train"], console, clock=clock)
    done = 0
    for pace in (1, 5):
        for _ in range(60):
            clock.now += 1
            done += pace
            view.handle(Event("progress", "train", done=done, total=1000, unit="steps"))
    assert "5.0/s" in line_of(shown(view, console), "train")


def test_the_rate_falls_when_figures_stop_coming() -> None:
    view, console, clock = busy()
    clock.now += 100
    rate = float(line_of(shown(view, console), "train:sft").split("/s")[0].split()[-1])
    assert 0.1 <= rate <= 0.2


def test_slow_stages_show_what_they_do_in_a_minute() -> None:
    console, clock = terminal(), Clock()
    view = LiveView(["train"], console, clock=clock)
    for step in range(6):
        view.handle(Event("progress", "train", done=step, total=100, unit="steps"))
        clock.now += 40
    line = line_of(shown(view, console), "train")
    assert "1.5/min" in line
    assert line.endswith("1:03:20 left")


def test_a_worker_that_starts_again_starts_a_new_rate() -> None:
    view, console, clock = busy()
    clock.now += 1
    view.handle(Event("progress", "train:sft", done=3, total=80, unit="steps"))
    line = line_of(shown(view, console), "train:sft")
    assert "3/80 steps" in line
    assert "/s" not in line


def test_stages_that_nobody_announced_are_shown() -> None:
    view, console, _ = busy()
    view.handle(Event("stage_finished", "report", wall_s=0.3))
    assert line_of(shown(view, console), "report").split() == ["✔", "report", "0.3", "s"]


def test_a_low_terminal_folds_what_ended_and_what_waits() -> None:
    view, console, _ = busy(height=8)
    lines = shown(view, console)
    assert "2 done, 1 waiting" in "\n".join(lines)
    assert not any(" calibration " in line for line in lines)
    assert line_of(lines, "generate")


def test_a_plain_encoding_gets_plain_marks() -> None:
    console = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="ascii"), width=80, height=40, force_terminal=True)
    view = LiveView(["seed", "train"], console)
    view.handle(Event("stage_skipped", "seed"))
    view.handle(Event("progress", "train", done=1, total=2, unit="steps"))
    assert all("\n".join(shown(view, console)).isascii() for _ in range(2))


def test_leaving_marks_what_still_ran_as_stopped() -> None:
    view, console, _ = busy()
    with pytest.raises(KeyboardInterrupt), view:
        raise KeyboardInterrupt
    assert line_of(shown(view, console), "train:sft").split()[:3] == ["■", "train:sft", "stopped"]


def test_a_phase_stands_in_the_place_of_a_count() -> None:
    view, console, _ = busy()
    view.handle(Event("progress", "train:sft", done=20, total=80, unit="steps", phase="writing the student"))
    line = line_of(shown(view, console), "train:sft")
    assert "writing the student" in line
    assert "left" not in line


def test_figures_that_come_late_do_not_start_a_stage_again() -> None:
    view, console, _ = busy()
    view.handle(Event("stage_finished", "train:sft", wall_s=9.0))
    view.handle(Event("progress", "train:sft", done=20, total=80, unit="steps"))
    assert line_of(shown(view, console), "train:sft").split()[0] == "✔"


def test_messages_stand_above_the_stages() -> None:
    out = io.StringIO()
    console = Console(file=out, width=80, height=40, force_terminal=True, color_system=None)
    with LiveView(["seed"], console) as view:
        view.handle(Event("message", detail="2 workers"))
        view.handle(Event("stage_finished", "seed", wall_s=1.0))
    text = out.getvalue()
    assert 0 <= text.index("2 workers") < text.rindex("1 of 1 steps")


def test_many_threads_may_report_while_the_view_redraws() -> None:
    console = terminal()
    with LiveView(STAGES, console) as view:

        def work(number: int) -> None:
            view.handle(Event("progress", STAGES[number % len(STAGES)], done=number, total=9, unit="rows"))

        in_threads(work)
        view.handle(Event("message", detail="tick"))
    assert len(shown(view, console)) == len(STAGES) + 1


@pytest.mark.parametrize(
    ("value", "short", "words"),
    [
        (0.4, "0:00", "0.4 s"),
        (59.96, "1:00", "1 min 0 s"),
        (754, "12:34", "12 min 34 s"),
        (3723, "1:02:03", "1 h 2 min"),
    ],
)
def test_times(value: float, short: str, words: str) -> None:
    assert clock_time(value) == short
    assert seconds(value) == words


def test_very_long_times_are_days() -> None:
    assert clock_time(40 * 86_400) == "40 d"
