"""The page at `/`, used in a real browser against the real application; answers come from a script, not a model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect, sync_playwright

from sdft_ray.report.toolbox import numbers
from sdft_ray.serving.access import Key, hash_of
from tests.browser.playground import FACTS, Playground, playground, scripted, wait_until

CHROMIUM = shutil.which("chromium")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to show the page in; apt-get install chromium"),
]

SECRET = "sk-" + "a" * 43
HENS = "The farmer has 12 hens. He sells 5 of them. 12 - 5 = 7. So 7 hens are left."
HOSTILE = (
    "Jörg 🐔 <script>document.title = 'broken'</script> <b>bold</b>\n  indented &amp; <img src=x onerror=alert(1)> 雞"
)
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page that may not fail in its script, break its content policy or ask another host."""
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    page = context.new_page()
    page.set_default_timeout(10_000)
    complaints: list[str] = []
    hosts: set[str] = set()
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda told: complaints.append(told.text) if "Content Security" in told.text else None)
    page.on("request", lambda request: hosts.add(request.url.split("/")[2].split(":")[0]))
    yield page
    context.close()
    assert complaints == []
    assert hosts <= {"127.0.0.1", ""}  # data: has no host


@pytest.fixture
def both() -> Iterator[Playground]:
    engines = {"pruned": scripted("7 7 7", 0), "student": scripted(HENS, 0.01), "teacher": scripted(HENS, 0.03)}
    with playground(engines) as found:
        yield found


def column(page: Any, model: str) -> Any:
    return page.get_by_role("article", name=model, exact=True)


def figure(page: Any, model: str, part: str) -> str:
    return column(page, model).locator(f'[data-part="{part}"]').inner_text()


def test_teacher_and_student_stand_side_by_side_with_what_compression_did(page: Any, both: Playground) -> None:
    page.goto(both.url)
    expect(page.get_by_label("Model", exact=True)).to_have_value("teacher")
    expect(page.get_by_label("Compared with")).to_have_value("student")
    told = "With 39.0 % fewer parameters, student recovers 97.1 % of teacher’s mean score."
    expect(page.get_by_role("heading", level=1)).to_have_text(told.replace(" %", "\u202f%"))
    shown = page.locator("#models").inner_text().replace("\u202f", " ")
    for text in ("8.03 B", "4.90 B", "15.0 GiB", "9.12 GiB", "61 % of teacher", "1.64 × student", "97.1 %"):
        assert text in shown
    expect(page.locator(".model").nth(0).get_by_text("speculative", exact=True)).to_be_hidden()
    expect(page.locator(".model").nth(1).get_by_text("speculative", exact=True)).to_be_visible()


def test_two_answers_stream_at_once(page: Any, both: Playground) -> None:
    for engine in both.engines.values():
        engine.delay_s *= 4
    page.goto(both.url)
    page.get_by_role("button", name="Word problem").click()
    page.get_by_text("System message").first.click()
    page.locator("#system").fill("Be brief.")
    page.get_by_label("Seed").fill("5")
    page.get_by_role("button", name="Send").click()
    for model in ("teacher", "student"):
        expect(column(page, model)).to_have_attribute("aria-busy", "true")
        expect(column(page, model).locator(".text")).to_contain_text("The farmer")
    assert "left." not in column(page, "teacher").locator(".text").inner_text(), "it was told whole"
    expect(page.locator("#status")).to_have_text("teacher and student are answering …")
    for model in ("teacher", "student"):
        expect(column(page, model).locator(".text")).to_have_text(HENS)
        expect(column(page, model)).to_have_attribute("aria-busy", "false")
        expect(column(page, model).locator('[data-part="state"]')).to_have_text("complete")
        assert figure(page, model, "tokens") == str(len(HENS.split()))
        ask = both.engines[model].asked[-1]
        assert (ask.seed, ask.temperature, ask.max_tokens, ask.stream) == (5, 0.0, 256, True)
        assert both.prompt(model) == (
            "<|begin|><|system|>Be brief.<|end|>"
            "<|user|>A farmer has 12 hens and sells 5. How many are left?<|end|><|assistant|>"
        )
    expect(page.locator("#status")).to_contain_text("times as many tokens per second as teacher")
    expect(page.get_by_role("status")).to_have_text(page.locator("#status").inner_text())
    fast, slow = (float(figure(page, model, "rate")) for model in ("student", "teacher"))
    assert 1.5 / 0.04 > fast > 1.3 * slow
    assert slow < 1.5 / 0.12
    first_ms, told = figure(page, "teacher", "first").split("\u202f")
    assert told == "ms"
    assert int(first_ms.replace(",", "")) >= 120


def test_an_answer_may_be_stopped_and_stays(page: Any, both: Playground) -> None:
    both.engines["teacher"].delay_s = both.engines["student"].delay_s = 0.2
    page.goto(both.url)
    page.get_by_role("button", name="Ordering").click()
    page.get_by_role("button", name="Send").click()
    expect(column(page, "teacher").locator(".text")).to_contain_text("The farmer")
    page.get_by_role("button", name="Stop").click()
    for model in ("teacher", "student"):
        expect(column(page, model).locator('[data-part="state"]')).to_have_text("stopped")
        text = column(page, model).locator(".text").inner_text()
        assert 0 < len(text) < len(HENS)
        assert HENS.startswith(text)
        assert figure(page, model, "tokens").startswith("≈")
    wait_until(lambda: not any(engine.running for engine in both.engines.values()))
    expect(page.locator("#status")).to_have_text("teacher and student are stopped; what had come is kept.")
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#status")).to_have_text("teacher and student are answering …")


def test_another_model_or_none_may_be_chosen(page: Any, both: Playground) -> None:
    page.goto(both.url)
    page.get_by_label("Compared with").select_option("pruned")
    told = "pruned has 39.0\u202f% fewer parameters than teacher."
    expect(page.get_by_role("heading", level=1)).to_have_text(told)
    page.get_by_label("Prompt").fill("Well?")
    page.get_by_label("Max tokens").fill("2")
    page.get_by_role("button", name="Send").click()
    expect(column(page, "pruned").locator(".text")).to_have_text("7 7")
    expect(column(page, "pruned").locator('[data-part="state"]')).to_have_text("cut at max tokens")
    page.get_by_label("Compared with").select_option("none")
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_role("article")).to_have_count(1)
    expect(page.locator("#status")).to_have_text("teacher is done.")
    assert len(both.engines["pruned"].asked) == 1


def test_a_wrong_key_is_asked_for_again_and_no_key_is_kept(page: Any) -> None:
    key = Key(id="tests", sha256=hash_of(SECRET), models=("teacher",))
    engines = {"teacher": scripted("Seven.", 0), "student": scripted("Seven.", 0)}
    with playground(engines, (key,)) as found:
        page.goto(found.url)
        field = page.get_by_label("API key")
        expect(field).to_be_focused()
        expect(page.locator("#ask")).to_be_hidden()
        for wrong, told in (
            ("sk-wrong", "This key is not valid"),
            ("nö", "letters, digits and signs only"),
            (" ", "Give a key"),
        ):
            field.fill(wrong)
            field.press("Enter")
            expect(page.locator("#key-trouble")).to_contain_text(told)
            expect(field).to_be_focused()
            expect(field).to_have_value("")
            expect(field).to_have_attribute("aria-invalid", "true")
        field.fill(f" {SECRET} ")
        page.get_by_role("button", name="Use key").click()
        expect(page.get_by_label("Prompt")).to_be_focused()
        expect(page.get_by_label("Model", exact=True)).to_have_value("teacher")
        expect(page.get_by_label("Compared with")).to_have_value("")
        page.keyboard.type("How many?")
        page.keyboard.press("Control+Enter")
        expect(column(page, "teacher").locator(".text")).to_have_text("Seven.")
        where = "localStorage.length, sessionStorage.length, document.cookie, location.href, document.body.innerHTML"
        *stored, address, html = page.evaluate(f"[{where}]")
        assert stored == [0, 0, ""]
        assert SECRET not in address
        assert SECRET not in html
        assert page.context.cookies() == []
        page.get_by_role("button", name="Forget key").click()
        expect(field).to_be_focused()
        expect(page.get_by_role("article")).to_have_count(0)
        field.fill(SECRET)
        field.press("Enter")
        expect(page.get_by_label("Prompt")).to_be_visible()
        page.reload()
        expect(field).to_be_visible()


def test_a_key_that_is_revoked_meanwhile_is_asked_for(page: Any) -> None:
    secret_of = {name: f"sk-{name}" for name in ("old", "new")}
    keys = tuple(Key(id=name, sha256=hash_of(secret)) for name, secret in secret_of.items())
    with playground({"teacher": scripted("Seven.", 0)}, keys) as found:
        page.goto(found.url)
        page.get_by_label("API key").fill(secret_of["old"])
        page.keyboard.press("Enter")
        page.get_by_label("Prompt").fill("How many?")
        page.route("**/v1/chat/completions", lambda route: route.fulfill(status=401, json={"error": {"message": "no"}}))
        page.get_by_role("button", name="Send").click()
        expect(page.locator("#key-trouble")).to_contain_text("does not take this key any more")
        page.unroute_all()
        page.get_by_label("API key").fill(secret_of["new"])
        page.keyboard.press("Enter")
        expect(page.get_by_label("Prompt")).to_have_value("How many?")


def test_what_fails_in_one_column_leaves_the_other_alone(page: Any, both: Playground) -> None:
    both.engines["student"].died = "killed"
    page.goto(both.url)
    page.get_by_label("Prompt").fill("How many?")
    page.get_by_role("button", name="Send").click()
    expect(column(page, "teacher").locator(".text")).to_have_text(HENS)
    expect(column(page, "teacher").locator(".trouble")).to_be_hidden()
    trouble = column(page, "student").locator(".trouble")
    expect(trouble).to_contain_text("The engine is restarting. Try again in 10\u202fs.")
    expect(page.locator("#status")).to_have_text("student failed: the column says why. teacher is done.")
    both.engines["student"].died = None
    trouble.get_by_role("button", name="Try again").click()
    expect(column(page, "student").locator(".text")).to_have_text(HENS)
    expect(trouble).to_be_hidden()
    assert len(both.engines["teacher"].asked) == 1


def test_an_engine_that_dies_midway_is_told_beneath_what_came(page: Any, both: Playground) -> None:
    student = both.engines["student"]
    student.delay_s = 0.1
    page.goto(both.url)
    page.get_by_label("Prompt").fill("How many?")
    page.get_by_role("button", name="Send").click()
    expect(column(page, "student").locator(".text")).to_contain_text("The farmer")
    student.died = "killed"
    expect(column(page, "student").locator(".trouble")).to_contain_text("The engine is restarting. Try again.")
    expect(column(page, "student").locator(".text")).to_contain_text("The farmer")


def test_refusals_are_told_in_words(page: Any) -> None:
    key = Key(id="tests", sha256=hash_of(SECRET), requests_per_minute=1)
    engines = {"teacher": scripted("Seven.", 0), "student": scripted("Seven.", 0)}
    with playground(engines, (key,)) as found:
        page.goto(found.url)
        page.get_by_label("API key").fill(SECRET)
        page.keyboard.press("Enter")
        page.get_by_label("Prompt").fill("How many?")
        page.get_by_role("button", name="Send").click()
        expect(column(page, "teacher").locator(".text")).to_have_text("Seven.")
        told = "This key has reached its limit of requests per minute. Try again in 60\u202fs."
        expect(column(page, "student").locator(".trouble")).to_contain_text(told)
        gone = found.service.models.pop("student")
        page.get_by_role("button", name="Send").click()
        trouble = column(page, "student").locator(".trouble")
        expect(trouble).to_contain_text(
            "There is no model 'student'; available models: teacher. Load the list of models again"
        )
        trouble.get_by_role("button", name="Load the list again").click()
        expect(page.get_by_label("Compared with").locator("option")).to_have_text(["teacher", "none"])
        found.service.models["student"] = gone


def test_a_service_that_is_gone_is_told_with_a_way_on(page: Any, both: Playground) -> None:
    page.route("**/v1/**", lambda route: route.abort())
    page.goto(both.url)
    expect(page.locator("#notice")).to_contain_text("The service cannot be reached")
    expect(page.get_by_role("status")).to_contain_text("The service cannot be reached")
    page.unroute_all()
    page.route("**/v1/**", lambda route: route.fulfill(status=502, body="<html>bad gateway</html>"))
    page.get_by_role("button", name="Try again").click()
    expect(page.locator("#notice")).to_contain_text("The service answers with status 502.")
    expect(page.get_by_role("button", name="Try again")).to_be_focused()
    page.unroute_all()
    page.get_by_role("button", name="Try again").click()
    expect(page.locator("#notice")).to_be_hidden()
    expect(page.get_by_label("Prompt")).to_be_focused()
    page.get_by_label("Prompt").fill("How many?")
    page.route("**/v1/chat/**", lambda route: route.fulfill(body='data: {"choices":[{"delta":{"content":"Se"}}]}\n\n'))
    page.get_by_role("button", name="Send").click()
    expect(column(page, "teacher").locator(".trouble")).to_contain_text("broke before the answer was complete")
    expect(column(page, "teacher").locator(".text")).to_have_text("Se")


def test_the_keyboard_is_enough(page: Any, both: Playground) -> None:
    both.engines["teacher"].delay_s = 0.2
    page.goto(both.url)
    expect(page.get_by_label("Prompt")).to_be_visible()
    seen = []
    for _ in range(14):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid", seen[-1]
        assert page.evaluate("document.activeElement.matches(':focus-visible')")
    assert seen[:4] == ["model-0", "model-1", "prompt", "Word problem"]
    assert seen[-6:] == ["System message", "temperature", "max-tokens", "seed", "send", "stop"]
    page.get_by_label("Prompt").focus()
    page.keyboard.press("Control+Enter")
    expect(page.locator("#status")).to_have_text("Write a prompt first, or take an example.")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.get_by_label("Prompt")).to_be_focused()
    page.keyboard.press("Control+Enter")
    expect(column(page, "teacher").locator(".text")).to_contain_text("The")
    page.keyboard.press("Control+Enter")
    page.keyboard.press("Escape")
    expect(column(page, "teacher").locator('[data-part="state"]')).to_have_text("stopped")
    assert len(both.engines["teacher"].asked) == 1, "a second Ctrl+Enter does nothing while answers come"
    page.get_by_label("Max tokens").fill("100000")
    page.keyboard.press("Control+Enter")
    assert not page.evaluate("document.getElementById('max-tokens').validity.valid")
    assert len(both.engines["teacher"].asked) == 1


def test_what_a_draft_model_was_worth_is_told(page: Any, both: Playground) -> None:
    counted = {"accepted_prediction_tokens": 6, "rejected_prediction_tokens": 2}
    usage = {"prompt_tokens": 1200, "completion_tokens": 9, "completion_tokens_details": counted}
    told = f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n"
    page.goto(both.url)
    page.get_by_label("Prompt").fill("How many?")
    page.route("**/v1/chat/**", lambda route: route.fulfill(body=told))
    page.get_by_role("button", name="Send").click()
    expect(column(page, "student").locator('[data-part="beside"]')).to_have_text(
        "prompt 1,200, 75\u202f% of drafts right"
    )
    assert figure(page, "student", "tokens") == "9"
    assert figure(page, "student", "rate") == "–"


@pytest.mark.parametrize("width", [360, 700, 800, 1600])
def test_nothing_is_wider_than_the_window(page: Any, width: int) -> None:
    long_name = "organisation/" + "Long-Model-Name-" * 6
    engines = {"teacher": scripted("x" * 400, 0), long_name: scripted(HOSTILE * 5, 0)}
    page.set_viewport_size({"width": width, "height": 740})
    with playground(engines) as found:
        found.service.models[long_name].facts = {**FACTS["student"], "draft": "artifact/" + "0123456789abcdef" * 5}
        page.goto(found.url)
        page.get_by_role("button", name="Sort a list").click()
        page.get_by_role("button", name="Send").click()
        expect(page.locator("#status")).to_contain_text("Both are done")
        assert page.evaluate("document.documentElement.scrollWidth") == width
        room = "[...document.querySelectorAll('.figure')].map((each) => each.clientWidth - each.scrollWidth)"
        assert min(page.evaluate(room)) >= 0, "figures run into each other"
        boxes = [column(page, name).bounding_box() for name in ("teacher", long_name)]
        assert (boxes[0]["x"] == boxes[1]["x"]) == (width < 720)


def test_answers_are_text_whatever_they_hold(page: Any) -> None:
    with playground({"teacher": scripted(HOSTILE, 0)}) as found:
        page.goto(found.url)
        page.get_by_label("Prompt").fill("<script>document.title = 'broken'</script>")
        page.get_by_role("button", name="Send").click()
        expect(page.locator("#status")).to_have_text("teacher is done.")
        text = column(page, "teacher").locator(".text")
        assert text.evaluate("node => node.textContent") == HOSTILE
        assert text.evaluate("node => node.childElementCount") == 0
        assert text.inner_text() == HOSTILE, "line breaks and spaces are shown"
        assert page.title() == "sdft_ray playground"


def test_events_are_read_however_they_are_cut(page: Any, both: Playground) -> None:
    page.goto(both.url)
    sent = 'data: {"a":"ü🐔"}\n\n: comment\r\ndata:two\r\ndata: lines\r\n\r\nevent: x\rdata:  y\r\r\n\ndata: cut off'
    read = """async ([text, size]) => {
        const bytes = new TextEncoder().encode(text);
        let at = 0;
        const stream = new ReadableStream({ pull(controller) {
            if (at >= bytes.length) return controller.close();
            controller.enqueue(bytes.slice(at, at += size));
        }});
        const found = [];
        for await (const data of events(stream)) found.push(data);
        return found;
    }"""
    for size in (1, 2, 3, 5, 1000):
        assert page.evaluate(read, [sent, size]) == ['{"a":"ü🐔"}', "two\nlines", " y"]


def test_figures_read_as_in_the_report(page: Any, both: Playground) -> None:
    page.goto(both.url)
    values = [0, 7, 999, 1023, 1024, 9_999, 10_000, 61_840, 999_499, 999_600, 2_420_000, 8_030_261_248, 1.6e10, 3.2e12]
    assert page.evaluate("values => values.map(count)", values) == [numbers.count(value) for value in values]
    assert page.evaluate("values => values.map(numBytes)", values) == [numbers.num_bytes(value) for value in values]
    shares = [0.0, 0.61, 0.97134, 1.0, 1.204]
    told = page.evaluate("shares => shares.map((share) => percent(share))", shares)
    assert told == [numbers.percent(share) for share in shares]


def test_the_files_of_the_page_are_one(both: Playground) -> None:
    """No host but its own can be named in it."""
    text = (Path(__file__).parents[2] / "sdft_ray/serving/playground.html").read_text(encoding="utf-8")
    without_icon = text.replace("http://www.w3.org/2000/svg", "")
    for stray in ("http://", "https://", "innerHTML", "localStorage", "sessionStorage", "document.cookie"):
        assert stray not in without_icon
