"""Samples: how they are read, split and turned into tokens."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from austeer.compiler.errors import PairsError
from austeer.compiler.responses import Response, Sample, encode_responses, read_samples, split_samples
from austeer.compiler.tokens import Chat

WORDS = ["<s>", "</s>", "<unk>", *"abcdefg", "ab", "bc", "user", "bot"]
ID = {word: number for number, word in enumerate(WORDS)}
TEMPLATE = "<s>user{{ messages[0].content }}bot"


def tokenizer(*, before: str = "<s> ", after: str = "", template: str | None = None) -> Any:
    """Letters, of which `a b` and `b c` merge into one token; `before` and `after` are put around a text."""
    raw = Tokenizer(models.BPE(ID, [("a", "b"), ("b", "c")], unk_token=None))
    raw.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    raw.add_special_tokens(["<s>", "</s>", "user", "bot"])
    special = [(token, raw.token_to_id(token)) for token in ("<s>", "</s>")]
    raw.post_processor = processors.TemplateProcessing(single=f"{before}$A{after}", special_tokens=special)
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", model_max_length=4)
    fast.chat_template = template
    return fast


def one(prompt: str, response: str, most: int = 100, chat: Chat | None = None, **how: Any) -> tuple[str, str] | None:
    """(prefix, own) of the only sample as words, None if it was left out."""
    made = tokenizer(**how)
    found, _ = encode_responses(made, [Sample(prompt, response, "f:1")], most, chat)
    sides = [" ".join(made.convert_ids_to_tokens(list(side))) for one in found for side in (one.prefix, one.own)]
    return (sides[0], sides[1]) if sides else None


def written(folder: Path, *rows: Any) -> Path:
    file = folder / "samples.jsonl"
    file.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return file


def test_prompts_with_responses_and_plain_texts_are_read_with_their_places(tmp_path: Path) -> None:
    file = written(
        tmp_path,
        {"prompt": "p", "response": "r", "id": 7},
        "\n",
        {"text": "t"},
        {"response": "alone"},
        {"prompt": "q", "response": "both", "text": "not this"},
    )
    assert read_samples(file) == (
        Sample("p", "r", f"{file}:1"),
        Sample("", "t", f"{file}:3"),
        Sample("", "alone", f"{file}:4"),
        Sample("q", "both", f"{file}:5"),
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p"}, "no 'response'.*it has 'prompt'"),
        ({"prompt": "p", "positive": "a", "negative": "b"}, "no 'response'"),
        ({"prompt": 3, "response": "r"}, "'prompt' must be a string, got 3"),
        ({"prompt": "p", "response": None}, "'response' must be a string, got null"),
        ({"text": ["t"]}, "'text' must be a string"),
        ([1], "expected a JSON object"),
        ("{", "not JSON"),
    ],
)
def test_a_row_that_is_no_sample_is_refused_at_its_line(tmp_path: Path, row: Any, message: str) -> None:
    file = written(tmp_path, {"text": "t"}, row)
    with pytest.raises(PairsError, match=rf"samples\.jsonl:2: .*{message}"):
        read_samples(file)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_a_file_without_samples_is_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(PairsError, match=r"samples\.jsonl: holds no samples"):
        read_samples(written(tmp_path, content))


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PairsError, match="cannot be read"):
        read_samples(tmp_path / "none.jsonl")


def some_samples(prompts: int, each: int = 2) -> list[Sample]:
    return [Sample(f"p{i % prompts}", f"r{i}", f"f:{i + 1}") for i in range(prompts * each)]


@pytest.mark.parametrize(("prompts", "held"), [(3, 1), (14, 1), (16, 2), (100, 10)])
def test_a_tenth_of_the_prompts_is_held_out_twice(prompts: int, held: int) -> None:
    samples = some_samples(prompts)
    parts = split_samples(samples, 0)
    assert sorted(one.where for part in parts for one in part) == sorted(one.where for one in samples)
    of_part = [{one.prompt for one in part} for part in parts]
    assert [len(part) for part in of_part] == [prompts - 2 * held, held, held]
    assert sum(map(len, of_part)) == len(set().union(*of_part))  # no prompt is in two parts
    assert all(list(part) == [one for one in samples if one in part] for part in parts)  # in the order of the file


def test_the_split_is_by_seed_and_not_by_the_order_of_the_samples() -> None:
    samples = some_samples(40)
    parts = [{one.where for one in part} for part in split_samples(samples, 3)]
    assert parts == [{one.where for one in part} for part in split_samples(samples[::-1], 3)]
    assert parts != [{one.where for one in part} for part in split_samples(samples, 4)]


def test_plain_texts_are_split_one_by_one_and_the_same_text_stays_together() -> None:
    samples = [Sample("", f"t{i % 20}", f"f:{i}") for i in range(40)]
    parts = [{one.response for one in part} for part in split_samples(samples, 0)]
    assert [len(part) for part in parts] == [16, 2, 2]
    assert not parts[0] & parts[1]


def test_too_few_prompts_are_refused() -> None:
    with pytest.raises(PairsError, match="f: 2 different prompts are too few"):
        split_samples(some_samples(2, each=50), 0)


@pytest.mark.parametrize(
    ("prompt", "response", "sides"),
    [
        ("c d", " e f", ("<s> c d", "e f")),
        ("c a", "b d", ("<s> c", "ab d")),  # a token that begins in the prompt and ends in the response is its own
        ("a b", "c", ("<s> a", "bc")),
        ("a b", " c", ("<s> a b", "c")),
        ("", "e f", ("<s>", "e f")),
        ("e", "", None),
        ("e", " ", None),
        ("", "", None),
    ],
)
def test_a_response_begins_where_its_text_parts_from_the_prompt(
    prompt: str, response: str, sides: tuple[str, str] | None
) -> None:
    assert one(prompt, response) == sides


def test_the_end_that_a_tokenizer_adds_belongs_to_the_response() -> None:
    assert one("c d", " e", after=" </s>") == ("<s> c d", "e </s>")
    assert one("", "e", after=" </s>") == ("<s>", "e </s>")


def test_without_a_first_token_a_plain_text_is_all_its_own() -> None:
    assert one("", "c d e", before="") == ("", "c d e")
    assert one("", "c", before="") is None  # one token, and nothing to predict it from
    assert one("c", " d", before="") == ("c", "d")


def test_what_is_scored_has_a_token_before_it() -> None:
    assert Response((1, 2), (3, 4), "").scored == 2
    assert Response((), (3, 4), "").scored == 1
    assert Response((1, 2), (3, 4), "").text == (1, 2, 3, 4)


def test_texts_are_cut_at_the_right_and_told() -> None:
    samples = [
        Sample("c d", " e f", "f:1"),
        Sample("c d", " e", "f:2"),
        Sample("c d e f", " g", "f:3"),
        Sample("c", "", "f:4"),
    ]
    found, notes = encode_responses(tokenizer(), samples, 4)
    assert [(one.where, len(one.prefix), len(one.own)) for one in found] == [("f:1", 3, 1), ("f:2", 3, 1)]
    assert notes == (
        "2 samples were cut to their first 4 tokens",
        "2 samples were left out: nothing of their response is within the limit",
    )
    assert encode_responses(tokenizer(), samples[:2], 5)[1] == ()


def test_a_chat_template_wraps_the_prompt_alone_and_adds_no_second_first_token() -> None:
    assert one("c d", "e f", chat=Chat(), template=TEMPLATE) == ("<s> user c d bot", "e f")
    assert one("", "e f", chat=Chat(), template=TEMPLATE) == ("<s> user bot", "e f")
