"""Releasing a student to folders and by command; refusals, interruptions, and what arrives."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
import torch
from huggingface_hub.utils import disable_progress_bars
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from sdft_ray.cli.app import app
from sdft_ray.errors import StoreError, UserError
from sdft_ray.pipeline.run import Run
from sdft_ray.release.folder import Folder
from sdft_ray.release.push import CARD, RECIPE, RECORD, prepare, push
from sdft_ray.store.store import Store
from tests.support.finished_run import finished_run
from tests.support.hub_server import TOKEN, hub_server
from tests.support.released import bounded, check_release, in_folder, model_files

disable_progress_bars()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Nobody changes it."""
    return finished_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def own(run: Run, tmp_path: Path) -> Run:
    """A copy that one may damage."""
    shutil.copytree(run.store.url, tmp_path / "own")
    return Run.open(Store(str(tmp_path / "own")), "quick")


def test_a_folder_gets_the_model_and_loads(run: Run, tmp_path: Path) -> None:
    pushed = push(run, "sdft", str(tmp_path / "new/folder"))
    assert pushed.url == str(tmp_path / "new/folder")
    there = in_folder(tmp_path / "new/folder")
    check_release(there, run)
    assert pushed.num_bytes == sum(map(len, there.values()))
    assert {file.name: file.num_bytes for file in pushed.files if file.sent} == {n: len(d) for n, d in there.items()}
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        logits = [
            AutoModelForCausalLM.from_pretrained(place)(ids).logits for place in (pushed.url, run.student_path("sdft"))
        ]
    assert torch.equal(*logits)


@pytest.mark.parametrize("scheme", ["memory://push-{}/small", "file://{}/small"])
def test_other_addresses_get_the_same(scheme: str, run: Run, tmp_path: Path) -> None:
    url = scheme.format(tmp_path)
    push(run, "sft", url)
    fs, root = fsspec.core.url_to_fs(url)
    there = {str(path).removeprefix(root).lstrip("/"): fs.cat_file(path) for path in fs.find(root)}
    check_release(there, run, "sft")
    assert push(run, "sft", url).num_bytes == 0


def test_a_store_elsewhere_is_read_too(run: Run, tmp_path: Path) -> None:
    remote = f"memory://store-{tmp_path.name}"
    fs, root = fsspec.core.url_to_fs(remote)
    fs.put(run.store.url, root, recursive=True)
    push(Run.open(Store(remote), "quick"), "sdft", str(tmp_path / "small"))
    check_release(in_folder(tmp_path / "small"), run)


def test_the_record_comes_last_and_the_card_before_it(run: Run, tmp_path: Path) -> None:
    names: list[str] = []
    prepare(run, "sdft", str(tmp_path / "small")).send(lambda name, _: names.append(name))
    order = list(dict.fromkeys(names))
    assert order[-2:] == [CARD, RECORD]
    assert set(order[:-3]) == model_files(run).keys()


def test_again_sends_nothing_and_touches_nothing(run: Run, tmp_path: Path) -> None:
    push(run, "sdft", str(tmp_path / "small"))
    (tmp_path / "small/.gitattributes").write_text("hidden files are nobody's business")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "small").iterdir()}
    again = push(run, "sdft", str(tmp_path / "small"))
    assert (again.num_bytes, any(file.sent for file in again.files)) == (0, False)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "small").iterdir()} == times


def test_another_judgement_replaces_the_texts_alone(run: Run, tmp_path: Path) -> None:
    push(run, "sdft", str(tmp_path / "small"))
    again = push(bounded(run, 0.7), "sdft", str(tmp_path / "small"))
    assert {file.name for file in again.files if file.sent} == {CARD, RECIPE, RECORD}
    check_release(in_folder(tmp_path / "small"), run)
    assert json.loads((tmp_path / "small" / RECORD).read_text())["release"] == {"passed": True, "reasons": []}
    assert "| release bounds of the recipe | met |" in (tmp_path / "small" / CARD).read_text()


def test_a_dry_run_writes_nothing(run: Run, tmp_path: Path) -> None:
    planned = push(run, "sdft", str(tmp_path / "small"), dry_run=True)
    assert not (tmp_path / "small").exists()
    assert planned == push(run, "sdft", str(tmp_path / "small"))


class TestInterrupted:
    """What was cut off shows, leaves no half file, and goes on."""

    def test_a_write_that_fails_inside_a_file(self, run: Run, tmp_path: Path) -> None:
        place, (soft, hard) = tmp_path / "small", resource.getrlimit(resource.RLIMIT_FSIZE)
        largest = max(len(data) for data in model_files(run).values())
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1, hard))
        try:
            with pytest.raises(StoreError, match="cannot be written: File too large"):
                push(run, "sdft", str(place))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        half = in_folder(place)
        assert half
        assert RECORD not in half
        assert half.items() <= model_files(run).items()
        done = push(run, "sdft", str(place))
        assert {file.name for file in done.files if not file.sent} == half.keys()
        check_release(in_folder(place), run)

    @pytest.mark.parametrize("at", [CARD, RECORD, "config.json"])
    def test_ctrl_c_at_any_file(self, at: str, run: Run, tmp_path: Path) -> None:
        def interrupt(name: str, _: int) -> None:
            if name == at:
                raise KeyboardInterrupt

        place = tmp_path / "small"
        with pytest.raises(KeyboardInterrupt):
            prepare(run, "sdft", str(place)).send(interrupt)
        assert not {at, RECORD} & in_folder(place).keys()
        push(run, "sdft", str(place))
        check_release(in_folder(place), run)

    def test_between_the_new_card_and_its_record(self, run: Run, tmp_path: Path) -> None:
        def interrupt(name: str, _: int) -> None:
            if name == RECORD:
                raise KeyboardInterrupt

        push(run, "sdft", str(tmp_path / "small"))
        with pytest.raises(KeyboardInterrupt):
            prepare(bounded(run, 0.7), "sdft", str(tmp_path / "small")).send(interrupt)
        push(bounded(run, 0.7), "sdft", str(tmp_path / "small"))
        check_release(in_folder(tmp_path / "small"), run)

    def test_a_disk_without_room_is_told_before(
        self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 8, 1))  # type: ignore[attr-defined]
        with pytest.raises(StoreError, match="and has 1 free"):
            push(run, "sdft", str(tmp_path / "small"))
        assert not (tmp_path / "small").exists()


class TestSomethingElse:
    """A destination keeps what it holds."""

    @pytest.mark.parametrize("name", ["notes.txt", "sub/notes.txt", "model.bin"])
    def test_a_strange_file(self, name: str, run: Run, tmp_path: Path) -> None:
        (tmp_path / "small/sub").mkdir(parents=True)
        (tmp_path / "small" / name).write_text("mine")
        self._refused(run, tmp_path / "small", "has other content")

    @pytest.mark.parametrize("name", [CARD, RECIPE, RECORD, "config.json"])
    def test_a_file_of_that_name(self, name: str, run: Run, tmp_path: Path) -> None:
        (tmp_path / "small").mkdir()
        (tmp_path / "small" / name).write_text("mine")
        self._refused(run, tmp_path / "small", name)

    def test_another_student(self, run: Run, tmp_path: Path) -> None:
        push(run, "sft", str(tmp_path / "small"))
        self._refused(run, tmp_path / "small", "has other content")

    def test_the_texts_of_another_student(self, run: Run, tmp_path: Path) -> None:
        push(run, "sft", str(tmp_path / "small"))
        for name in model_files(run):
            (tmp_path / "small" / name).unlink()
        self._refused(run, tmp_path / "small", "belongs to another student")

    def test_a_card_that_was_edited(self, run: Run, tmp_path: Path) -> None:
        push(run, "sdft", str(tmp_path / "small"))
        with (tmp_path / "small" / CARD).open("a") as stream:
            stream.write("A word of my own.")
        self._refused(run, tmp_path / "small", "README.md in .* was changed after the last push")

    def test_a_file_in_place_of_a_folder(self, run: Run, tmp_path: Path) -> None:
        (tmp_path / "small").write_text("mine")
        with pytest.raises(StoreError, match="is a file"):
            push(run, "sdft", str(tmp_path / "small"))

    def _refused(self, run: Run, folder: Path, words: str) -> None:
        before = in_folder(folder)
        for dry_run in (True, False):
            with pytest.raises(StoreError, match=words) as caught:
                push(run, "sdft", str(folder), dry_run=dry_run)
            assert caught.value.hint
        assert in_folder(folder) == before


class TestRefused:
    """Before anything is sent."""

    def test_an_unknown_student_or_run(self, run: Run, tmp_path: Path) -> None:
        for name in ("sfdt", "teacher", "pruned"):
            with pytest.raises(StoreError, match=f"no student '{name}' → it has sft, sdft"):
                push(run, name, str(tmp_path / "small"))
        with pytest.raises(StoreError, match="runs here: quick"):
            Run.open(run.store, "quik")

    def test_a_run_without_its_report(self, own: Run, tmp_path: Path) -> None:
        shutil.rmtree(own.store.path(own.manifests["report"].address))
        with pytest.raises(StoreError, match="run quick is incomplete"):
            push(Run.open(own.store, "quick"), "sdft", str(tmp_path / "small"))

    def test_a_student_that_missed_its_bounds(self, run: Run, tmp_path: Path) -> None:
        strict, reason = bounded(run, 0.8), r"Mean recovery is 70\.6 % \(.*\), below the bound of 80\.0 %\."
        for dry_run in (True, False):
            with pytest.raises(UserError, match=f"bounds of its recipe: {reason} → give --anyway"):
                push(strict, "sdft", str(tmp_path / "small"), dry_run=dry_run)
        assert not (tmp_path / "small").exists()
        push(strict, "sdft", str(tmp_path / "small"), anyway=True)
        card = (tmp_path / "small" / CARD).read_text()
        assert "did not meet the release bounds" in card
        assert "below the bound of 80.0 %" in card
        record = json.loads((tmp_path / "small" / RECORD).read_text())
        assert record["release"]["passed"] is False
        assert re.match(reason, record["release"]["reasons"][0])

    def test_by_the_command(self, own: Run, tmp_path: Path) -> None:
        own.store.write_run("strict", {**bounded(own, 0.8).record, "name": "strict"})
        command = ["push", "strict", "sdft", str(tmp_path / "small"), "--store", own.store.url]
        refused = CliRunner().invoke(app, command)
        assert isinstance(refused.exception, UserError)
        assert "below the bound of 80.0 %" in refused.exception.message
        assert CliRunner().invoke(app, [*command, "--anyway"]).exit_code == 0
        assert "did not meet the release bounds" in (tmp_path / "small" / CARD).read_text()

    @pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model-00001-of-00002.safetensors"])
    def test_a_damaged_file(self, name: str, own: Run, tmp_path: Path) -> None:
        path = own.student_path("sdft") / name
        path = path if path.exists() else next(own.student_path("sdft").glob("*.safetensors"))
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        with pytest.raises(StoreError, match=f"is damaged: {path.name}"):
            push(own, "sdft", str(tmp_path / "small"))
        assert not (tmp_path / "small").exists()

    @pytest.mark.parametrize("name", ["../../secret.safetensors", "/secret.safetensors", "link.safetensors"])
    def test_a_manifest_that_points_outside(self, name: str, own: Run, tmp_path: Path) -> None:
        directory, secret = own.student_path("sdft"), tmp_path / "secret.safetensors"
        secret.write_text("hush")
        name = str(secret) if name.startswith("/") else name
        (directory / "link.safetensors").symlink_to(secret)
        shutil.copy(secret, directory / "../../secret.safetensors")
        made = own.manifests["train:sdft"]
        entry = replace(made.files["config.json"], sha256=hashlib.sha256(b"hush").hexdigest(), num_bytes=4)
        made.files[name] = entry
        with pytest.raises(StoreError, match="is damaged"):
            push(own, "sdft", str(tmp_path / "small"))

    def test_what_is_for_the_hub_alone(self, run: Run, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="--public applies only to the Hugging Face Hub"):
            push(run, "sdft", str(tmp_path / "small"), private=False)
        with pytest.raises(UserError, match="revision applies only to the Hugging Face Hub"):
            push(run, "sdft", str(tmp_path / "small"), revision="v2")

    @pytest.mark.parametrize(
        ("url", "words"), [("nope://bucket/x", "Protocol not known"), ("hf://alice", "is not a model repository")]
    )
    def test_an_address_that_is_none(self, url: str, words: str, run: Run) -> None:
        with pytest.raises(StoreError, match=words):
            push(run, "sdft", url)

    def test_credentials_in_an_address_are_not_shown(self) -> None:
        with pytest.raises(StoreError) as caught:
            Folder("nope://key:hush@bucket/x?token=hush")
        assert "hush" not in str(caught.value)


def test_a_file_that_changes_while_it_is_sent_does_not_arrive(own: Run, tmp_path: Path) -> None:
    ready = prepare(own, "sdft", str(tmp_path / "small"))
    path = own.student_path("sdft") / "config.json"
    path.write_bytes(path.read_bytes().replace(b"{", b" ", 1))
    with pytest.raises(StoreError, match=r"config\.json changed while it was sent"):
        ready.send()
    assert "config.json" not in in_folder(tmp_path / "small")


class TestCommand:
    """`sdft push`."""

    def test_it_prints_what_goes_where(self, run: Run, tmp_path: Path) -> None:
        asked = ["push", "quick", "sdft", str(tmp_path / "small"), "--store", run.store.url]
        planned = CliRunner().invoke(app, [*asked, "--dry-run"], env={"COLUMNS": "200"})
        assert "would be sent to" in planned.output
        assert not (tmp_path / "small").exists()
        done = CliRunner().invoke(app, asked, env={"COLUMNS": "200"})
        assert done.exit_code == 0
        assert done.output.splitlines()[-1] == str(tmp_path / "small")
        for name, data in in_folder(tmp_path / "small").items():
            assert any(line.split()[:2] == [name, f"{len(data):,}"] for line in done.output.splitlines())
        again = CliRunner().invoke(app, [*asked, "--json"])
        told = json.loads(again.output)
        assert (told["num_bytes"], told["url"], told["dry_run"]) == (0, str(tmp_path / "small"), False)

    @pytest.mark.slow
    def test_it_heeds_the_environment(self, run: Run, tmp_path: Path) -> None:
        with hub_server() as hub:
            env = {
                **os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1",
                "HF_HOME": str(tmp_path / "home"), "SDFT_STORE": run.store.url,
            }  # fmt: skip
            command = [sys.executable, "-m", "sdft_ray.cli", "push", "quick", "sdft"]
            done = _ask([*command, "hf://alice/small"], env)
            assert (done.returncode, done.stderr) == (0, "")
            assert done.stdout.splitlines()[-1] == f"{hub.url}/alice/small"
            there = {n: data for n, data in hub.repos["alice/small"].branches["main"].items() if n != ".gitattributes"}
            check_release(there, run)


def _ask(command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_neither_ray_nor_torch_is_loaded() -> None:
    asked = "import sys, sdft_ray.release.push; assert not {'ray', 'torch', 'vllm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", asked], check=True)
