from sdft_ray.data.example import ANSWER_KINDS, GENERATED_SCHEMA, SEED_SCHEMA, SELECTED_SCHEMA, example_id


def test_id_is_stable():
    # a change here renames every row of every store
    assert example_id("What is 2 + 2?", "#### 4") == "baede2ac3a5c9d07"


def test_id_sees_the_border_between_the_texts():
    assert example_id("ab", "c") != example_id("a", "bc")
    assert example_id("", "abc") != example_id("abc", "")
    # a length-prefixed form cannot be imitated from inside the text
    assert example_id("1:a", "b") != example_id("1", ":ab")


def test_id_of_any_text():
    assert len(example_id("é\x00\ud800", "🙂")) == 16
    assert set(example_id("é", "ü")) <= set("0123456789abcdef")


def test_every_table_joins_by_example_id():
    assert SEED_SCHEMA.names[0] == GENERATED_SCHEMA.names[0] == SELECTED_SCHEMA.names[0] == "example_id"


def test_selected_rows_keep_every_seed_column():
    assert set(SEED_SCHEMA.names) <= set(SELECTED_SCHEMA.names)


def test_answer_kinds():
    assert {"number", "choice", "text", "list", "json", "function_call", "code", "callable", "none"} == set(
        ANSWER_KINDS
    )
