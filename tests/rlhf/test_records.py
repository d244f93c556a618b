"""Records in JSON Lines files, their split by prompt, and tokenizers of any text."""

import copy
import json
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import purejaxppo as ppo
from purejaxppo.checks import RunWarning
from purejaxppo.rlhf import records
from purejaxppo.rlhf.problems import PROBLEMS
from purejaxppo.rlhf.records import (
    Demonstration,
    Preference,
    Prompt,
    read_demonstrations,
    read_preferences,
    read_prompts,
    split,
    write_records,
)
from purejaxppo.rlhf.tokenizer import STOP_TOKENS, Bytes, FromFile, Vocabulary, vocabulary_of

NO_TOKENIZERS = "the optional package tokenizers is not installed; pip install tokenizers"
PROMPT = b'{"prompt": "p"}'
DEMONSTRATION = b'{"prompt": "p", "completion": "c"}'
PREFERENCE = b'{"prompt": "p", "chosen": "c", "rejected": "r"}'
READERS: list[tuple[Callable[..., list[Any]], bytes, Any, str]] = [
    (read_prompts, PROMPT, Prompt("p"), "prompt"),
    (read_demonstrations, DEMONSTRATION, Demonstration("p", "c"), "demonstration"),
    (read_preferences, PREFERENCE, Preference("p", "c", "r"), "pair"),
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "data.jsonl"


def preference(**changes: Any) -> bytes:
    fields = {"prompt": "p", "chosen": "c", "rejected": "r"} | changes
    return json.dumps({name: x for name, x in fields.items() if x is not ...}).encode()


# Reading

BAD_LINES = [
    (b'{"prompt": "\xff"}', r"is not UTF-8 text \(byte 13 of the line\)"),
    (b'{"prompt": "p"', "is not JSON: Expecting ',' delimiter at column 15"),
    (b"prompt", "is not JSON: Expecting value at column 1"),
    (PREFERENCE + b" {}", "is not JSON: Extra data"),
    (PREFERENCE[:-1] + b', "x": NaN}', "JSON has no NaN"),
    (b"[" * 100_000, "is not JSON that can be read: maximum recursion"),
    (b"1" * 5000, "is not JSON that can be read: Exceeds the limit"),
    (b'["p", "c"]', "is a list: must be a JSON object"),
    (b'"p"', "is a string: must be a JSON object"),
    (b"3", "is a number: must be a JSON object"),
    (b"true", "is true or false: must be a JSON object"),
    (b"null", "is null: must be a JSON object"),
    (preference(prompt="\ud83d"), "half of a surrogate pair"),
    (preference(x=["\ud83d"]), "half of a surrogate pair"),
    (preference(prompt=..., promt="p"), "has no prompt; rename 'promt'"),
    (preference(prompt=..., question="p"), "has no prompt; add the key"),
    (preference(rejected=..., Rejected="r"), "has no rejected; rename 'Rejected'"),
    (preference(chosen=...), "has no chosen; add the key"),
    (preference(prompt=3), "prompt is a number: must be a string"),
    (preference(prompt=[{"role": "user"}]), "prompt is a list: .*; apply the chat template"),
    (preference(chosen=None), "chosen is null: must be a string"),
    (preference(rejected=True), "rejected is true or false: must be a string"),
    (preference(rejected={}), "rejected is an object: must be a string"),
    (preference(prompt=""), "prompt is empty"),
    (preference(chosen=""), "chosen is empty"),
    (preference(rejected=""), "rejected is empty"),
    (preference(chosen="r"), "chosen and rejected are equal"),
    (preference(margin="1"), "margin is a string: must be a finite"),
    (preference(margin=True), "margin is true or false: must be a finite"),
    (preference(margin=None), "margin is null: must be a finite"),
    (PREFERENCE[:-1] + b', "margin": -1e999}', "margin = -inf: must be a finite"),
    (preference(margin=10**400), "margin is a number: must be a finite"),
]
IDS = [reason.split(";")[0].replace("\\", "") for _, reason in BAD_LINES]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES, ids=IDS)
def test_a_bad_line_is_named_or_skipped(line: bytes, reason: str, file: Path):
    file.write_bytes(b"\n".join([PREFERENCE, b"", line, PREFERENCE, line, b" \t", PREFERENCE]))
    with pytest.raises(ppo.ConfigError, match=rf"data\.jsonl line 3: .*{reason}") as raised:
        read_preferences(file)
    assert str(raised.value).startswith(f"{file} line 3: ")
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 300
    expected = rf"{file}: skipped 2 of 5 lines; first, line 3: .*{reason}"
    with pytest.warns(RunWarning, match=expected) as warned:
        assert read_preferences(file, bad_lines="skip") == 3 * [Preference("p", "c", "r")]
    assert len(warned) == 1
    assert warned[0].filename == __file__


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (PROMPT, "has no completion; add the key"),
        (b'{"prompt": "p", "completions": "c"}', "has no completion; rename 'completions'"),
        (b'{"completion": "c"}', "has no prompt; add the key"),
        (b'{"prompt": "p", "completion": ""}', "completion is empty"),
        (b'{"prompt": "p", "completion": 1.5}', "completion is a number"),
        (b'{"prompt": "", "completion": "c"}', "prompt is empty"),
    ],
)
def test_bad_demonstrations(line: bytes, reason: str, file: Path):
    file.write_bytes(DEMONSTRATION + b"\n" + line)
    with pytest.raises(ppo.ConfigError, match=rf"data\.jsonl line 2: {reason}"):
        read_demonstrations(file)


@pytest.mark.parametrize(("line", "reason"), [(b'{"prompt": ""}', "empty"), (b"{}", "no prompt")])
def test_bad_prompts(line: bytes, reason: str, file: Path):
    file.write_bytes(PROMPT + b"\n" + line)
    with pytest.raises(ppo.ConfigError, match=rf"data\.jsonl line 2: .*{reason}"):
        read_prompts(file)


def test_a_text_may_be_white_space(file: Path):
    file.write_bytes(b'{"prompt": " ", "completion": "\\n"}')
    assert read_demonstrations(file) == [Demonstration(" ", "\n")]


@pytest.mark.parametrize("size", [64, 65, 128, 129, 130, 1000])
def test_a_long_line_is_bad_and_the_next_is_read(
    size: int, file: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(records, "_MAX_LINE", 64)
    long = b'{"prompt": "' + (size - 15) * b"x" + b'"}\n'
    assert len(long) == size
    file.write_bytes(PROMPT + b"\n" + long + PROMPT + b"\n")
    if size == 64:
        assert len(read_prompts(file)) == 3
        return
    with pytest.raises(ppo.ConfigError, match="line 2: has more than 64 bytes"):
        read_prompts(file)
    with pytest.warns(RunWarning, match="skipped 1 of 3 lines; first, line 2: has more than 64"):
        assert read_prompts(file, bad_lines="skip") == [Prompt("p"), Prompt("p")]
    file.write_bytes(PROMPT + b"\n" + size * b" " + long[12:])
    with pytest.raises(ppo.ConfigError, match="line 2: has more than 64 bytes"):
        read_prompts(file)


def test_the_limit_of_a_line_is_16_mib(file: Path):
    room = 16 * 2**20 - len(b'{"prompt": ""}\n')
    file.write_bytes(b'{"prompt": "' + room * b"x" + b'"}\n')
    assert len(read_prompts(file)[0].prompt) == room
    file.write_bytes(b'{"prompt": "x' + room * b"x" + b'"}\n')
    with pytest.raises(ppo.ConfigError, match="line 1: has more than 16,777,216 bytes"):
        read_prompts(file)


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize(("read", "line", "record", "noun"), READERS)
def test_ends_of_lines(
    read: Any, line: bytes, record: Any, noun: str, mark: bytes, last: bool, end: bytes, file: Path
):
    file.write_bytes(mark + line + end + end + b"  " + end + line + (end if last else b""))
    with warnings.catch_warnings(action="error"):
        assert read(file) == read(str(file), bad_lines="skip") == [record, record]
    file.write_bytes(line + end + end + line + end + b"x" + (end if last else b""))
    with pytest.raises(ppo.ConfigError, match=r"data\.jsonl line 4: is not JSON"):
        read(file)


@pytest.mark.parametrize(("read", "line", "record", "noun"), READERS)
def test_files_without_records(read: Any, line: bytes, record: Any, noun: str, file: Path):
    with pytest.raises(ppo.ConfigError, match=r"data\.jsonl: No such file .*; check the path"):
        read(file)
    with pytest.raises(ppo.ConfigError, match="Is a directory; check the path"):
        read(file.parent)
    with pytest.raises(ppo.ConfigError, match="null byte; check the path"):
        read("a\0b")
    for content in (b"", b"\n \r\n"):
        file.write_bytes(content)
        with pytest.raises(ppo.ConfigError, match=rf"data\.jsonl: has no {noun}; write one"):
            read(file)
    file.write_bytes(b"\nx\n[]\n")
    with pytest.raises(ppo.ConfigError, match=f"has no {noun}: all 2 lines are bad; first, line 2"):
        read(file, bad_lines="skip")
    for choice in ("ignore", "", None):
        with pytest.raises(ppo.ConfigError, match=f"bad_lines = {choice!r}: must be error or skip"):
            read(file, bad_lines=choice)


def test_other_keys_become_columns(file: Path):
    file.write_bytes(b'{"prompt": "p", "answer": [1, {"a": null}], "chosen": "c"}')
    assert read_prompts(file) == [Prompt("p", {"answer": [1, {"a": None}], "chosen": "c"})]
    file.write_bytes(preference(probability=0.7, margin=2, source="x"))
    (found,) = read_preferences(file)
    assert found == Preference("p", "c", "r", 2.0, {"probability": 0.7, "source": "x"})
    assert type(found.margin) is float
    file.write_bytes(DEMONSTRATION[:-1] + b', "source": "x"}')
    assert read_demonstrations(file) == [Demonstration("p", "c")]


# Writing

TEXTS = ["a", " ", '"\\', "two\nlines\r\n", "line\u2028separator\x85", "é😀", "\0\x1b", "\ufeff"]


@pytest.mark.parametrize(
    ("read", "rows"),
    [
        (read_prompts, [Prompt(x, {"é": [x, 1, None]}) for x in TEXTS] + [Prompt("b")]),
        (read_demonstrations, [Demonstration(x, x[::-1]) for x in TEXTS]),
        (
            read_preferences,
            [Preference(x, x + "1", x + "2", i / 3, {"a": {"b": x}}) for i, x in enumerate(TEXTS)]
            + [Preference("p", "c", "r", -1.0, {"probability": np.float32(0.3)})],
        ),
    ],
)
def test_written_records_are_read_back(read: Any, rows: list[Any], file: Path):
    write_records(file, iter(rows))
    assert read(file) == rows
    lines = file.read_bytes().split(b"\n")
    assert len(lines) == len(rows) + 1
    assert lines[-1] == b""
    assert "é".encode() in file.read_bytes()
    write_records(str(file), rows[:1])  # replaces the file
    assert read(file) == rows[:1]


def test_defaults_are_left_out(file: Path):
    write_records(file, [Preference("p", "c", "r"), Preference("p", "c", "r", 0.5, {"x": 1})])
    first, second = map(json.loads, file.read_text().splitlines())
    assert first == {"prompt": "p", "chosen": "c", "rejected": "r"}
    assert second == first | {"margin": 0.5, "x": 1}
    write_records(file, [Prompt("p")])
    assert file.read_text() == '{"prompt": "p"}\n'


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "is empty; give at least one"),
        (["p"], "record 1 is a str: must be a Prompt, Demonstration, Preference or Pair"),
        ([Prompt("p"), Demonstration("p", "c")], "record 2 is a Demonstration, but the first is a"),
        ([Prompt("p"), Prompt("")], "record 2: prompt is empty"),
        ([Prompt("p", {"prompt": "p"})], "record 1: would not be read back equal"),
        ([Prompt("p", {"x": (1,)})], "record 1: would not be read back equal"),
        ([Prompt("p", {1: 2})], "record 1: would not be read back equal"),  # pyright: ignore
        ([Prompt("p", {"x": float("nan")})], "record 1: cannot be written as JSON"),
        ([Prompt("p", {"x": np.zeros(2)})], "record 1: cannot be written as JSON: .*ndarray"),
        ([Prompt("\ud83d")], "record 1: cannot be written as JSON"),
        ([Preference("p", "c", "c")], "record 1: chosen and rejected are equal"),
        ([Preference("p", "c", "r", True)], "record 1: margin is true or false"),
        ([Preference("p", "c", "r", 0.0, {"margin": 1.0})], "would not be read back equal"),
        ([Preference("p", "c", "r", np.inf)], "record 1: cannot be written as JSON"),
    ],
)
def test_records_that_cannot_be_read_back_are_not_written(rows: Any, words: str, file: Path):
    file.write_text("old")
    with pytest.raises(ppo.ConfigError, match=words):
        write_records(file, rows)
    assert file.read_text() == "old"


def test_a_file_that_cannot_be_written(tmp_path: Path):
    with pytest.raises(ppo.StorageError, match="cannot be written: No such file"):
        write_records(tmp_path / "none" / "x.jsonl", [Prompt("p")])
    with pytest.raises(ppo.ConfigError, match="give the path of a file"):
        write_records("a\0b", [Prompt("p")])


def test_records_and_tokenizers_do_not_import_jax():
    code = (
        "import sys; import purejaxppo.rlhf.records; from purejaxppo.rlhf.tokenizer import *;"
        "vocabulary_of('bytes'); print('jax' in sys.modules)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert found.stdout == "False\n"


# Splitting

PINNED = [10, 17, 23, 31]
ROWS = [Demonstration(f"prompt {i % 2000}", f"completion {i}") for i in range(5000)]


def prompts_of(rows: list[Any]) -> set[str]:
    return {x.prompt for x in rows}


@pytest.mark.parametrize("share", [0.02, 0.2, 0.5, 0.9])
def test_a_split_is_by_prompt_and_has_about_the_share(share: float):
    train, held_out = split(ROWS, share)
    assert not prompts_of(train) & prompts_of(held_out)
    chosen = prompts_of(held_out)
    assert train == [x for x in ROWS if x.prompt not in chosen]
    assert held_out == [x for x in ROWS if x.prompt in chosen]
    deviation = (share * (1 - share) / 2000) ** 0.5
    assert len(chosen) / 2000 == pytest.approx(share, abs=4 * deviation)


def test_a_split_depends_on_texts_and_seed_only():
    held_out = prompts_of(split(ROWS, 0.2)[1])
    order = np.random.default_rng(0).permutation(len(ROWS))
    assert prompts_of(split([ROWS[i] for i in order], 0.2)[1]) == held_out
    assert prompts_of(split([Prompt(x) for x in prompts_of(ROWS)], 0.2)[1]) == held_out
    others = [prompts_of(split(ROWS, 0.2, seed)[1]) for seed in (1, 2, 2**64 - 1)]
    for other in others:
        assert len(other & held_out) < 0.35 * len(held_out)
    assert len(held_out) > 300
    # More prompts do not move the others, nor does a smaller share take new ones.
    more = [*ROWS, *(Demonstration(f"new {i}", "c") for i in range(500))]
    assert prompts_of(split(more, 0.2)[1]) & prompts_of(ROWS) == held_out
    assert prompts_of(split(ROWS, 0.1)[1]) < held_out
    assert len(split([Prompt("\ud83d"), Prompt("a")], 0.2)[1]) == 1  # half of a surrogate pair
    # The same in every process and version.
    assert [x.prompt for x in split(ROWS, 0.2)[1][:4]] == [f"prompt {i}" for i in PINNED]


@pytest.mark.parametrize("share", [1e-9, 0.5, 1 - 1e-9])
@pytest.mark.parametrize("count", [2, 3, 30])
def test_both_sides_of_a_split_have_records(count: int, share: float):
    rows = ROWS[:count] * 2
    for seed in range(20):
        train, held_out = split(rows, share, seed)
        assert train
        assert held_out
        assert len(train) + len(held_out) == 2 * count
        assert not prompts_of(train) & prompts_of(held_out)
        assert share != 1e-9 or len(held_out) == 2
        assert share != 1 - 1e-9 or len(train) == 2
        assert split(rows[::-1], share, seed) == (train[::-1], held_out[::-1])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((ROWS, 0.0), "share = 0.0: must be a number above 0 and below 1"),
        ((ROWS, 1), "share = 1: must be a number"),
        ((ROWS, float("nan")), "share = nan: must be a number"),
        ((ROWS, True), "share = True: must be a number"),
        ((ROWS, "0.2"), "share = '0.2': must be a number"),
        ((ROWS, 0.2, -1), "seed = -1: must be a whole number"),
        ((ROWS, 0.2, 2**64), "must be a whole number"),
        ((ROWS, 0.2, 1.5), "seed = 1.5: must be a whole number"),
        ((ROWS, 0.2, True), "seed = True: must be a whole number"),
        (([], 0.2), "have 0 distinct prompts, but a split by prompt needs at least 2"),
        (([ROWS[0], ROWS[2000]], 0.2), "have 1 distinct prompts"),
    ],
)
def test_impossible_splits(given: Any, words: str):
    with pytest.raises(ppo.ConfigError, match=words):
        split(*given)


# Tokenizers


def test_bytes():
    tokenizer, size, stop_token = vocabulary_of("bytes")
    assert (tokenizer, size, stop_token) == (Bytes(), 257, 256)
    assert tokenizer.encode("aé") == [97, 0xC3, 0xA9]
    assert tokenizer.encode("😀") == [0xF0, 0x9F, 0x98, 0x80]
    for text in (*TEXTS, "", "👩‍👩‍👧 and \U0010ffff"):
        tokens = tokenizer.encode(text)
        assert all(type(x) is int and 0 <= x < 256 for x in tokens)
        assert tokenizer.decode(np.array([*tokens, 256], np.int32)) == text  # pyright: ignore
    assert tokenizer.decode([97, 0xF0, 0x9F, 98, 256]) == "a\ufffdb"
    assert [tokenizer.decode([x]) for x in (65, 255, 256)] == ["A", "\ufffd", ""]
    with pytest.raises(ppo.ConfigError, match=r"'\\ud83d' \(number 2\) is half of a surrogate"):
        tokenizer.encode("a\ud83d")


@pytest.mark.parametrize("name", ["sort", "countdown"])
def test_the_vocabulary_of_a_task(name: str):
    problem = PROBLEMS[name]()
    found = vocabulary_of(name)
    assert found == Vocabulary(problem.text, problem.vocab_size, problem.stop_token)
    assert found.tokenizer.decode([found.stop_token]) == "."
    assert found.tokenizer.encode("1=.")[-1] == found.stop_token


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("byte", "tokenizer 'byte': no such tokenizer; did you mean bytes"),
        ("sorted", "no such tokenizer; did you mean sort"),
        ("xyz", "no such tokenizer; use bytes, sort, .* or the path of a tok"),
        ("", "no such tokenizer; use bytes"),
    ],
)
def test_unknown_vocabularies(name: str, words: str):
    with pytest.raises(ppo.ConfigError, match=words):
        vocabulary_of(name)


def test_a_tokenizer_file_needs_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ppo.ConfigError, match=r"x\.json'.*; pip install tokenizers"):
        vocabulary_of(str(tmp_path / "x.json"))


def save_tokenizer(path: Path, special: list[str], *, shorten: bool = False) -> Any:
    """A byte-level BPE tokenizer with these special tokens, saved to a file."""
    library: Any = pytest.importorskip("tokenizers", reason=NO_TOKENIZERS)
    made = library.Tokenizer(library.models.BPE())
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = library.decoders.ByteLevel()
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    trainer = library.trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(20 * ["the sum of the numbers"], trainer)
    if special:
        made.post_processor = library.processors.TemplateProcessing(
            single=f"{special[0]} $A", special_tokens=[(special[0], 0)]
        )
    if shorten:
        made.enable_truncation(2)
        made.enable_padding(length=50)
    made.save(str(path))
    return made


def test_a_tokenizer_file(tmp_path: Path):
    path = tmp_path / "tokenizer.json"
    special = ["<s>", "<eos>", "</s>"]
    made = save_tokenizer(path, special, shorten=True)
    tokenizer, size, stop_token = vocabulary_of(str(path))
    assert isinstance(tokenizer, FromFile)
    assert size == made.get_vocab_size()
    assert stop_token == made.token_to_id("</s>")  # comes before <eos> in STOP_TOKENS
    for text in ("the sum of é😀", "line\nline", ""):
        tokens = tokenizer.encode(text)
        assert not {made.token_to_id(x) for x in special} & set(tokens)
        assert tokenizer.decode(np.array([*tokens, stop_token], np.int32)) == text  # pyright: ignore
    assert len(tokenizer.encode("the sum")) < len("the sum")
    assert tokenizer.encode("<eos>") == [made.token_to_id("<eos>")]
    assert tokenizer.decode([made.token_to_id("<eos>")]) == "<eos>"
    assert "".join(tokenizer.decode([x]) for x in range(size))
    for same in (FromFile(str(path)), copy.deepcopy(tokenizer)):
        assert same == tokenizer
        assert hash(same) == hash(tokenizer)
    assert pickle.loads(pickle.dumps(tokenizer)).encode("sum") == tokenizer.encode("sum")
    with pytest.raises(ppo.ConfigError, match="half of a surrogate pair"):
        tokenizer.encode("\ud83d")


@pytest.mark.parametrize("stop", STOP_TOKENS)
def test_the_stop_token_of_a_tokenizer_file(stop: str, tmp_path: Path):
    path = tmp_path / "tokenizer.json"
    made = save_tokenizer(path, [*reversed(STOP_TOKENS[STOP_TOKENS.index(stop) :])])
    assert vocabulary_of(str(path)).stop_token == made.token_to_id(stop)


def test_the_size_counts_gaps_between_token_numbers(tmp_path: Path):
    library: Any = pytest.importorskip("tokenizers", reason=NO_TOKENIZERS)
    path = tmp_path / "words.json"
    made = library.Tokenizer(library.models.WordLevel({"a": 0, "</s>": 7}, unk_token="none"))
    made.save(str(path))
    tokenizer, size, stop_token = vocabulary_of(str(path))
    assert (size, stop_token) == (8, 7)
    assert tokenizer.decode([5]) == ""
    with pytest.raises(ppo.ConfigError, match="prompt 'b': cannot be encoded: "):
        tokenizer.encode("b")


def test_unusable_tokenizer_files(tmp_path: Path):
    path = tmp_path / "tokenizer.json"
    save_tokenizer(path, [])
    assert FromFile(path).stop_token is None
    with pytest.raises(ppo.ConfigError, match=r"has no stop token; add one of <\|im_end\|>, .*SEP"):
        vocabulary_of(str(path))
    with pytest.raises(ppo.ConfigError, match=r"none\.json': No such file .*; check the path"):
        vocabulary_of(str(tmp_path / "none.json"))
    for content, words in ((b"\xff", "is not UTF-8 text"), (b"{}", "is not a tokenizer of the")):
        path.write_bytes(content)
        with pytest.raises(ppo.ConfigError, match=words):
            vocabulary_of(str(path))
