from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from sdft_ray.data.calibration import calibration_batches
from sdft_ray.data.chat import ChatFormat, load_tokenizer
from sdft_ray.data.example import SEED_SCHEMA
from sdft_ray.errors import DataError, ModelError
from tests.support.tiny import BOS_ID, make_tokenizer

MANY = 10_000


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return load_tokenizer(make_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def table(*texts: tuple[str, str]) -> pa.Table:
    rows = [(f"r{i}", instruction, "", reference, "none", "", "") for i, (instruction, reference) in enumerate(texts)]
    return pa.Table.from_pylist([dict(zip(SEED_SCHEMA.names, row, strict=True)) for row in rows], SEED_SCHEMA)


def real_rows(batches: list) -> list[list[int]]:
    return [
        ids[mask.bool()].tolist()
        for batch in batches
        for ids, mask in zip(batch.input_ids_BT, batch.attention_mask_BT, strict=True)
    ]


def test_conversations_and_plain_text(tokenizer: PreTrainedTokenizerBase):
    rows = table(("How many apples?", "7"), ("", "Tom has 12 apples"))
    batches = calibration_batches(rows, tokenizer, max_tokens=MANY, batch_tokens=MANY)
    conversation = list(ChatFormat(tokenizer).encode("How many apples?", "7").ids)
    text = tokenizer.encode("Tom has 12 apples")
    assert sorted(real_rows(batches)) == sorted([conversation, text])
    for ids in (conversation, text):
        assert ids.count(BOS_ID) == 1
    counted = [said[:1].tolist() for batch in batches for said in batch.response_mask_BT]
    num_said = sum(ChatFormat(tokenizer).encode("How many apples?", "7").loss_mask) + len(text)
    assert sorted(counted) == [[0], [1]]
    assert sum(int(batch.response_mask_BT.sum()) for batch in batches) == num_said


def test_rows_are_cut_on_the_right(tokenizer: PreTrainedTokenizerBase):
    rows = table(("", "Tom has 12 apples and gives 5 to Ann"))
    whole = tokenizer.encode(rows["reference_response"][0].as_py())
    assert real_rows(calibration_batches(rows, tokenizer, max_tokens=6, batch_tokens=MANY)) == [whole[:6]]


def test_batches_hold_every_row_once_within_the_budget(tokenizer: PreTrainedTokenizerBase):
    rows = table(*(("", "ab" * (i * 7 % 23 + 1)) for i in range(40)))
    batches = calibration_batches(rows, tokenizer, max_tokens=MANY, batch_tokens=100)
    expected = [tokenizer.encode(text) for text in rows["reference_response"].to_pylist()]
    assert real_rows(batches) == sorted(expected, key=len)
    assert len(batches) > 5
    assert [expected[row] for batch in batches for row in batch.row_B.tolist()] == real_rows(batches)
    for batch in batches:
        ids, mask, *_ = batch
        assert ids.dtype == mask.dtype == torch.int64
        assert ids.shape == mask.shape
        assert ids.numel() <= 100
        lengths = mask.sum(1)
        assert lengths.max() == ids.shape[1]
        assert torch.equal(mask, (torch.arange(ids.shape[1]) < lengths[:, None]).long())
        assert ids[mask == 0].sum() == 0
    # greedy: no batch could have taken the first row of the next
    for batch, after in pairwise(batches):
        assert (len(batch.input_ids_BT) + 1) * int(after.attention_mask_BT[0].sum()) > 100


def test_a_row_longer_than_the_budget_stands_alone(tokenizer: PreTrainedTokenizerBase):
    rows = table(("", "abab" * 30), ("", "a"), ("", "b"))
    batches = calibration_batches(rows, tokenizer, max_tokens=MANY, batch_tokens=8)
    assert [len(batch.input_ids_BT) for batch in batches] == [2, 1]


def test_same_rows_same_batches(tokenizer: PreTrainedTokenizerBase):
    rows = table(*(("q", "x" * (i % 3 + 1)) for i in range(12)))
    first, second = (calibration_batches(rows, tokenizer, max_tokens=50, batch_tokens=60) for _ in range(2))
    assert all(
        torch.equal(a, b) for one, other in zip(first, second, strict=True) for a, b in zip(one, other, strict=True)
    )


def test_no_rows(tokenizer: PreTrainedTokenizerBase):
    with pytest.raises(DataError, match="no rows"):
        calibration_batches(table(), tokenizer, max_tokens=8, batch_tokens=8)


def test_only_conversations_need_a_chat_template(tmp_path: Path):
    tokenizer = load_tokenizer(make_tokenizer(tmp_path))
    tokenizer.chat_template = None
    assert calibration_batches(table(("", "text")), tokenizer, max_tokens=8, batch_tokens=8)
    with pytest.raises(ModelError, match="template"):
        calibration_batches(table(("q", "a")), tokenizer, max_tokens=8, batch_tokens=8)
