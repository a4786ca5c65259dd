"""Releasing a student to a hub on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.utils import disable_progress_bars

from sdft_ray.errors import StoreError
from sdft_ray.pipeline.run import Run
from sdft_ray.release.push import CARD, RECIPE, RECORD, push
from tests.support.finished_run import finished_run
from tests.support.hub_server import LARGE_BYTES, TOKEN, Hub, Repo, hub_server
from tests.support.released import bounded, check_release

disable_progress_bars()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Nobody changes it."""
    return finished_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub that alice may write to, asked by HTTP."""
    with hub_server() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


class TestHub:
    """Over HTTP, with huggingface_hub as it is; large files by the protocol of git LFS."""

    def test_a_new_repository_is_private_and_gets_one_commit(self, hub: Hub, run: Run) -> None:
        pushed = push(run, "sdft", "hf://alice/small")
        assert pushed.url == f"{hub.url}/alice/small"
        repo = hub.repos["alice/small"]
        assert (repo.private, repo.num_commits) == (True, 2)
        there = {name: data for name, data in repo.branches["main"].items() if name != ".gitattributes"}
        check_release(there, run)
        assert max(map(len, there.values())) >= LARGE_BYTES, "large files go another way"
        assert sum(map(len, hub.large.values())) < sum(map(len, there.values())), "small ones too"
        assert 'name = "alice/small"' in there[CARD].decode()

    def test_again_writes_nothing(self, hub: Hub, run: Run) -> None:
        push(run, "sdft", "hf://alice/small")
        hub.requests.clear()
        assert push(run, "sdft", "hf://alice/small").num_bytes == 0
        assert not [request for request in hub.requests if request.startswith(("POST", "PUT"))]
        again = push(bounded(run, 0.7), "sdft", "hf://alice/small")
        assert {file.name for file in again.files if file.sent} == {CARD, RECIPE, RECORD}
        assert hub.repos["alice/small"].num_commits == 3

    def test_an_interrupted_upload_goes_on(self, hub: Hub, run: Run) -> None:
        hub.faults["/commit/"] = 418
        with pytest.raises(StoreError, match="the hub returned 418: the hub is out of order"):
            push(run, "sdft", "hf://alice/small")
        assert list(hub.repos["alice/small"].branches["main"]) == [".gitattributes"]
        hub.faults.clear()
        push(run, "sdft", "hf://alice/small")
        assert RECORD in hub.repos["alice/small"].branches["main"]

    def test_what_is_there_is_kept(self, hub: Hub, run: Run) -> None:
        push(run, "sft", "hf://alice/small")
        before = dict(hub.repos["alice/small"].branches["main"])
        with pytest.raises(StoreError, match="has other content"):
            push(run, "sdft", "hf://alice/small")
        hub.repos["alice/small"].branches["main"][CARD] += b"edited"
        with pytest.raises(StoreError, match="was changed after the last push"):
            push(run, "sft", "hf://alice/small")
        assert hub.repos["alice/small"].branches["main"] == {**before, CARD: before[CARD] + b"edited"}

    def test_a_public_repository_is_never_filled_by_default(self, hub: Hub, run: Run) -> None:
        push(run, "sdft", "hf://alice/open", private=False)
        assert not hub.repos["alice/open"].private
        with pytest.raises(StoreError, match="exists and is public"):
            push(run, "sdft", "hf://alice/open")
        push(run, "sdft", "hf://alice/closed")
        with pytest.raises(StoreError, match="exists and is private"):
            push(run, "sdft", "hf://alice/closed", private=False)

    def test_a_branch(self, hub: Hub, run: Run) -> None:
        pushed = push(run, "sdft", "hf://alice/small", revision="v2")
        assert pushed.url.endswith("/alice/small/tree/v2")
        assert RECORD in hub.repos["alice/small"].branches["v2"]
        assert RECORD not in hub.repos["alice/small"].branches["main"]
        assert push(run, "sdft", "hf://alice/small", revision="v2").num_bytes == 0
        push(run, "sft", "hf://alice/other")
        with pytest.raises(StoreError, match="has no branch v2, and a new one would start with the files of main"):
            push(run, "sft", "hf://alice/other", revision="v2")

    def test_a_dry_run_makes_no_repository(self, hub: Hub, run: Run) -> None:
        push(run, "sdft", "hf://alice/small", dry_run=True)
        assert not hub.repos

    def test_no_token(self, hub: Hub, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("HF_TOKEN")
        with pytest.raises(StoreError, match="no token for the Hugging Face Hub is configured → set HF_TOKEN"):
            push(run, "sdft", "hf://alice/small")
        assert not hub.requests

    @pytest.mark.parametrize(
        ("token", "repository", "words"),
        [
            ("hf_wrongButSecret", "alice/small", "rejects the token"),
            (TOKEN, "bob/small", "no write access to bob/small"),
        ],
    )
    def test_a_token_that_may_not(
        self, token: str, repository: str, words: str, hub: Hub, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(StoreError, match=words) as caught:
            push(run, "sdft", f"hf://{repository}")
        assert caught.value.hint
        assert token not in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_a_hub_out_of_reach(self, run: Run, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
        with pytest.raises(StoreError, match=r"127\.0\.0\.1:9 failed: .* → check the network and HF_ENDPOINT"):
            push(run, "sdft", "hf://alice/small")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(StoreError, match="HF_HUB_OFFLINE disables access to the Hugging Face Hub"):
            push(run, "sdft", "hf://alice/small")

    def test_the_licence_is_read_from_the_teachers_page(self, hub: Hub, tmp_path: Path) -> None:
        hub.repos["org/Big-Model"] = Repo(private=False, metadata={"license": "gemma"})
        teacher = {"teacher": {"hub": "org/Big-Model", "commit": None}}
        run = finished_run(tmp_path / "run", sources=teacher, teacher={"model": "org/Big-Model"})
        push(run, "sdft", str(tmp_path / "small"))
        assert "\nlicense: gemma\n" in (tmp_path / "small" / CARD).read_text()
