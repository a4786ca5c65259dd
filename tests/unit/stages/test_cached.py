"""Arms on cached signals without Ray: which tokens are trained on, what is said of each, and rows without signals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sdft_ray.data.chat import ChatFormat, load_tokenizer
from sdft_ray.data.example import GENERATED_SCHEMA, SELECTED_SCHEMA
from sdft_ray.data.packing import PackedRows
from sdft_ray.data.signals import encode_hidden, encode_top, top_logprobs
from sdft_ray.errors import DataError
from sdft_ray.generation.kept import chosen
from sdft_ray.models.source import ModelSource
from sdft_ray.models.surgery import drop_blocks
from sdft_ray.stages.cached import cached_teacher
from sdft_ray.stages.job import StageContext
from sdft_ray.stages.training_rows import training_rows
from sdft_ray.store import files
from sdft_ray.store.store import MANIFEST
from sdft_ray.training.cached import CachedTeacher
from tests.support.jobs import make_job
from tests.support.recipes import make_recipe
from tests.support.tiny import BOS_ID, EOS_ID, make_model
from tests.support.worlds import RESOURCES

VOCAB, HIDDEN, K, ROW_TOKENS = 300, 32, 3, 64
PRUNE, GENERATE, SELECT, TRAIN = (f"{stage}/{'5' * 16}" for stage in ("prune", "generate", "select", "train"))
QUESTION = "How many apples?"
LONG = "Tom has 12 apples and gives 5 to Ann. How many apples are left?"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    teacher = make_model(root / "teacher", vocab_size=VOCAB, hidden=HIDDEN)
    (root / "store" / PRUNE).mkdir(parents=True)
    drop_blocks(teacher, root / "store" / PRUNE, [0, 1, 3])
    (root / "store" / PRUNE / MANIFEST).write_text("{}", encoding="utf-8")
    return root


@pytest.fixture
def tokenizer(root: Path) -> Any:
    return load_tokenizer(root / "teacher")


def letters(tokenizer: Any, text: str) -> list[int]:
    return [token for letter in text for token in tokenizer(letter, add_special_tokens=False)["input_ids"]]


class CachedAnswers:
    """Rows as generation and selection leave them; signals are random and remembered."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._rng = np.random.default_rng(0)
        self.records: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self.said: dict[tuple[str, int], tuple[np.ndarray, np.ndarray]] = {}

    def add(self, *samples: tuple[list[int], str], kind: str = "none", reference: str = "it is so") -> None:
        """One row and what was sampled for it: ids and finish reasons."""
        name = f"r{len(self.rows)}"
        row = {
            "example_id": name, "instruction": QUESTION, "context": "", "reference_response": reference,
            "answer_kind": kind, "check": "", "family": "",
        }  # fmt: skip
        records = [self._record(name, i, *sample) for i, sample in enumerate(samples)]
        self.records += records
        self.rows.append(chosen(row, records, lambda _instruction, _response: True))

    def _record(self, name: str, sample_index: int, ids: list[int], reason: str) -> dict[str, Any]:
        ids_TK = np.stack([self._rng.choice(VOCAB, K, replace=False) for _ in ids])
        logprobs_TK = np.log(self._rng.dirichlet(np.ones(K + 1), len(ids))[:, :K])
        hidden_TD = self._rng.integers(0x3F00, 0x3FFF, (len(ids), HIDDEN)).astype(np.uint16)
        self.said[name, sample_index] = (np.sort(ids_TK, axis=1), hidden_TD)
        top_ids, logprobs = encode_top(top_logprobs(ids_TK, logprobs_TK, VOCAB))
        return {
            "example_id": name, "row_key": b"0" * 16, "sample_index": sample_index, "prompt_tokens": 1,
            "response": self._tokenizer.decode(ids, skip_special_tokens=True), "response_tokens": len(ids),
            "finish_reason": reason, "status": "ok", "error": "", "response_ids": ids,
            "top_ids": top_ids, "top_logprobs": logprobs, "hidden_states": encode_hidden(hidden_TD),
        }  # fmt: skip

    def save(self, store: Path) -> None:
        for address, name, rows, schema in (
            (GENERATE, files.GENERATED, self.records, GENERATED_SCHEMA),
            (GENERATE, files.FAILED, [], GENERATED_SCHEMA),
            (SELECT, files.DISTILLED, self.rows, SELECTED_SCHEMA),
        ):
            (store / address).mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist(rows, schema=schema), store / address / name)
            (store / address / MANIFEST).write_text("{}", encoding="utf-8")


@pytest.fixture
def written(tokenizer: Any) -> CachedAnswers:
    """Every way in which a row can go, in a fixed order."""
    rows = CachedAnswers(tokenizer)
    spelt = letters(tokenizer, " 7 apples \n")
    rows.add(([*spelt, EOS_ID], "stop"))
    rows.add(([*letters(tokenizer, "#### 8"), EOS_ID], "stop"), kind="number", reference="#### 7")
    answer = letters(tokenizer, "#### 7")
    rows.add((answer, "length"), ([*answer, EOS_ID], "stop"), kind="number", reference="#### 7")
    rows.add(([*letters(tokenizer, "fig, pear"), BOS_ID], "stop"))
    rows.add(([*spelt, tokenizer.convert_tokens_to_ids("<|user|>"), *spelt, EOS_ID], "stop"))
    rows.add(([*letters(tokenizer, LONG), EOS_ID], "stop"))
    return rows


def _job(root: Path, objective: dict[str, Any]) -> StageContext:
    arm = {"data": "distilled", "learning_rate": 1e-3, "objective": objective}
    train = {"num_steps": 1, "max_seq_len": ROW_TOKENS, "arms": {"kd": arm}}
    asked = {"max_tokens": 16, "top_logprobs": K, "hidden_states": True}
    recipe = make_recipe(root, root / "teacher", train=train, generate=asked)
    return make_job(
        "train:kd", TRAIN, str(root / "store"), recipe, RESOURCES, ModelSource(directory=str(root / "teacher")),
        {"pruned": PRUNE, "data": SELECT, "generate": GENERATE}, lambda done, total, unit: None,
    )  # fmt: skip


def _packed(
    root: Path, written: CachedAnswers, objective: dict[str, Any]
) -> tuple[PackedRows, CachedTeacher, StageContext]:
    written.save(root / "store")
    job = _job(root, objective)
    (job.work() / "packed.arrow").unlink(missing_ok=True)
    rows = training_rows(job).rows
    teacher = cached_teacher(job, rows)
    assert teacher is not None
    return rows, teacher, job


def _documents(rows: PackedRows) -> dict[int, list[int]]:
    """Ids of each document by its place."""
    found: dict[int, list[int]] = {}
    for row_T, documents_T in zip(rows.input_ids_NT, rows.document_ids_NT, strict=True):
        for document in range(documents_T.max() + 1):
            if (documents_T == document).any():
                found[document] = row_T[documents_T == document].tolist()
    return dict(sorted(found.items()))


TOP, WHOLE = {"top_k_kl": 1.0}, {"forward_kl": 1.0, "teacher_logits": "cached"}


def test_documents_are_what_the_teacher_sampled(root: Path, written: CachedAnswers, tokenizer: Any) -> None:
    """Letter by letter, with its white space; the end is the template's, whatever the teacher stopped at."""
    rows, _, job = _packed(root, written, {**TOP, "cross_entropy": 0.0})
    chat = ChatFormat(tokenizer)
    sampled = {
        (record["example_id"], record["sample_index"]): [*record["response_ids"][:-1], EOS_ID]
        for record in written.records
    }
    wanted = [chat.prompt_ids(QUESTION) + sampled[place] for place in (("r0", 0), ("r2", 1), ("r3", 0))]
    assert list(_documents(rows).values()) == wanted
    assert chat.encode(QUESTION, written.rows[0]["response"]).ids != wanted[0]
    data = training_rows(job)
    assert data.counts == {
        "num_dropped": 0, "num_cut": 0,
        "signals": {
            "num_rows": 3, "without": {"reference": 1, "control_tokens": 1, "too_long": 1}, "num_left_out": 3,
        },
    }  # fmt: skip
    assert [data.name_of(place) for place in _documents(rows)] == ["r0", "r2", "r3"]


@pytest.mark.parametrize("objective", [TOP, WHOLE])
@pytest.mark.parametrize("cross_entropy", [0.0, 1.0])
def test_each_token_has_the_signals_of_its_own_sample(
    root: Path, written: CachedAnswers, objective: dict[str, Any], cross_entropy: float
) -> None:
    rows, teacher, _ = _packed(root, written, {**objective, "cross_entropy": cross_entropy})
    places = {0: ("r0", 0), 2: ("r2", 1), 3: ("r3", 0)}
    told = teacher.outputs(range(rows.num_rows), "cpu")
    documents_N = rows.document_ids_NT[rows.loss_mask_NT]
    known_N = np.isin(documents_N, list(places))
    assert (told.known_N is None) == (cross_entropy == 0)
    if told.known_N is not None:
        assert told.known_N.tolist() == known_N.tolist()
    for document, place in places.items():
        ids_TK, hidden_TD = written.said[place]
        here = torch.from_numpy(documents_N == document)
        if "top_k_kl" in objective:
            assert told.top is not None
            assert told.top.ids_NK[here].tolist() == ids_TK.tolist()
            assert torch.isfinite(told.top.logprobs_NK[here]).all()
        else:
            assert told.hidden_ND is not None
            bits = told.hidden_ND[here].bfloat16().view(torch.int16).numpy().view(np.uint16)
            assert bits.tolist() == hidden_TD.tolist()
    if told.top is not None:
        assert bool(torch.isneginf(told.top.logprobs_NK[torch.from_numpy(~known_N)]).all())


def test_rows_without_signals_keep_their_text_for_cross_entropy(
    root: Path, written: CachedAnswers, tokenizer: Any
) -> None:
    rows, _, job = _packed(root, written, TOP)
    chat, documents = ChatFormat(tokenizer), _documents(rows)
    assert sorted(documents) == list(range(6))
    for place in (1, 4, 5):
        row = written.rows[place]
        assert documents[place] == chat.encode(QUESTION, row["response"]).ids
    assert written.rows[1]["response"] == "#### 7"
    assert written.rows[5]["source"] == "distilled"
    assert training_rows(job).counts["signals"]["num_left_out"] == 0


def test_only_what_the_objective_reads_is_unpacked(root: Path, written: CachedAnswers) -> None:
    for objective, names in ((TOP, {"places", "tail", "top_ids", "top_logprobs"}), (WHOLE, {"places", "hidden"})):
        _, _, job = _packed(root, written, objective)
        assert {path.stem for path in (job.work() / "signals").iterdir()} == names


def test_what_a_killed_worker_left_is_replaced(root: Path, written: CachedAnswers) -> None:
    job = _job(root, TOP)
    for name in ("signals", "signals.partial"):
        (job.work() / name).mkdir(exist_ok=True)
        (job.work() / name / "top_ids.npy").write_bytes(b"half")
    rows, teacher, _ = _packed(root, written, TOP)
    assert teacher.outputs(range(rows.num_rows), "cpu").top is not None
    assert not (job.work() / "signals.partial").exists()


@pytest.mark.parametrize("cross_entropy", [0.0, 1.0])
def test_an_arm_whose_every_row_is_without_signals_is_refused(root: Path, tokenizer: Any, cross_entropy: float) -> None:
    written = CachedAnswers(tokenizer)
    written.add((letters(tokenizer, "no end"), "length"))
    with pytest.raises(
        DataError, match=r"arm kd needs cached signals, but no row has any: \{'reference': 1\}"
    ) as caught:
        _packed(root, written, {**TOP, "cross_entropy": cross_entropy})
    assert caught.value.hint


def test_other_arms_know_nothing_of_signals(root: Path) -> None:
    job = _job(root, {})
    assert cached_teacher(job, PackedRows(*[np.zeros((0, 0))] * 5)) is None
