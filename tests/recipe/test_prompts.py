"""Prompt sets, prompt files and the prompts of an epoch."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dag.errors import UsageError
from dag.recipe import Prompts
from dag.recipe.prompt_sets import DOWNLOADED, HPDV2_STYLES, SIMPLE_ANIMALS, PromptSet, named, with_article
from dag.recipe.prompts import draw, load_prompts, read_prompt_file

# -- draw ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_prompts", "count"), [(45, 64), (16, 64), (3, 3), (5, 2), (1, 7), (7, 700)])
def test_every_prompt_is_drawn_equally_often(num_prompts: int, count: int) -> None:
    indices = draw(num_prompts, count, seed=0, epoch=0)
    assert indices.shape == (count,)
    assert indices.dtype == np.int64
    counts = np.bincount(indices, minlength=num_prompts)
    assert len(counts) == num_prompts
    assert counts.max() - counts.min() <= 1


def test_rounds_are_shuffled() -> None:
    indices = draw(45, 90, seed=0, epoch=0)
    first, second = indices[:45], indices[45:]
    assert sorted(first) == sorted(second) == list(range(45))
    assert list(first) != sorted(first)
    assert list(first) != list(second)


def test_a_draw_depends_on_seed_and_epoch_alone() -> None:
    first = draw(45, 64, seed=3, epoch=7)
    np.random.seed(99)
    draw(45, 64, seed=5, epoch=1)
    assert np.array_equal(first, draw(45, 64, seed=3, epoch=7))
    assert not np.array_equal(first, draw(45, 64, seed=3, epoch=8))
    assert not np.array_equal(first, draw(45, 64, seed=4, epoch=7))
    assert not np.array_equal(draw(45, 64, seed=3, epoch=7), draw(45, 64, seed=7, epoch=3))


def test_the_prompts_left_over_change_from_epoch_to_epoch() -> None:
    """With 64 trajectories of 45 prompts, 19 prompts are drawn twice; over many epochs all are drawn equally often."""
    total = Counter(int(index) for epoch in range(200) for index in draw(45, 64, seed=0, epoch=epoch))
    expected = 200 * 64 / 45
    assert all(abs(count - expected) < 0.1 * expected for count in total.values())
    assert len(total) == 45


def test_the_largest_seed_works() -> None:
    assert len(draw(3, 4, seed=2**63 - 1, epoch=0)) == 4


# -- sets ---------------------------------------------------------------------------------------------------------


def test_the_simple_animals() -> None:
    animals = named("simple_animals", None, None).training
    assert len(animals) == len(set(animals)) == len(SIMPLE_ANIMALS) == 45
    assert animals[:2] == ("a cat", "a dog")
    assert animals[-1] == "a kangaroo"
    assert all(re.fullmatch(r"an? [a-z]+", animal) for animal in animals)
    assert [animal for animal in animals if animal.startswith("an ")] == ["an ant"]


def test_the_classes_of_imagenet() -> None:
    classes = named("imagenet", None, None).training
    animals, dogs = (named(f"imagenet_{part}", None, None).training for part in ("animals", "dogs"))
    assert len(classes) == 1000 and classes[:1] == ("a tench",) and classes[-1] == "a toilet tissue"
    assert animals == classes[:398] and animals[-1] == "a puffer"
    assert len(dogs) == 118 and (dogs[0], dogs[-1]) == ("a Chihuahua", "a Mexican hairless")


@pytest.mark.parametrize(
    ("noun", "expected"), [("ant", "an ant"), ("owl", "an owl"), ("cat", "a cat"), ("Afghan hound", "an Afghan hound")]
)
def test_articles(noun: str, expected: str) -> None:
    assert with_article(noun) == expected


def test_each_source_of_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a fox\n")
    assert load_prompts(Prompts(set="simple_animals")) == named("simple_animals", None, None)
    assert load_prompts(Prompts(texts=("a cow", "a cow"))) == PromptSet(("a cow", "a cow"))
    assert load_prompts(Prompts(file=str(path))) == PromptSet(("a fox",))


DRAWBENCH = """Prompts,Category
A red car.,Colors
"A blue car, and a red one.",Colors
A green car.,Colors
A pink car.,Colors
Rbefraigerator.,Misspellings
One cat.,Counting
Acersecomicke.,Rare Words
Two cats.,Counting
Three cats.,Counting
"""


def test_drawbench_holds_two_of_each_category_out(tmp_path: Path) -> None:
    path = tmp_path / "drawbench.csv"
    path.write_text("\ufeff" + DRAWBENCH, encoding="utf-8")
    found = load_prompts(Prompts(set="drawbench", path=str(path)))
    assert found.training == ("A red car.", "A blue car, and a red one.", "One cat.")
    assert found.held_out == ("A green car.", "A pink car.", "Two cats.", "Three cats.")


def test_hpdv2_holds_ten_of_each_style_out(tmp_path: Path) -> None:
    for style in HPDV2_STYLES:
        (tmp_path / f"{style}.json").write_text(json.dumps([f"{style} {number}" for number in range(12)]))
    every = load_prompts(Prompts(set="hpdv2", path=str(tmp_path)))
    assert len(every.training) == 8 and len(every.held_out) == 40
    photo = load_prompts(Prompts(set="hpdv2", path=str(tmp_path), style="photo"))
    assert photo.training == ("photo 0", "photo 1") and photo.held_out[0] == "photo 2"
    alone = load_prompts(Prompts(set="hpdv2", path=str(tmp_path / "photo.json")))
    assert alone == photo


@pytest.mark.parametrize("name", DOWNLOADED)
@pytest.mark.parametrize("content", [None, "", "x,y\n1,2\n", "[1, 2]", '["only one"]', "\x00\xff", '{"a": 1}'])
def test_a_set_that_is_missing_or_something_else_says_where_to_get_it(
    tmp_path: Path, name: str, content: str | None
) -> None:
    path = tmp_path / "copy"
    if content is not None:
        path.write_text(content, encoding="latin-1")
    with pytest.raises(UsageError, match=r"^prompts\.path: .*; (give|download) .*https://") as caught:
        named(name, str(path), None)
    assert str(path) in str(caught.value)
    with pytest.raises(UsageError, match=rf"^prompts\.path: {name} is not shipped; download .*https://"):
        named(name, None, None)


# -- files --------------------------------------------------------------------------------------------------------


def refusal(path: Path) -> str:
    with pytest.raises(UsageError) as caught:
        read_prompt_file(path)
    return str(caught.value)


def test_a_text_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes('  a cat\r\n\r\nein Bär, "gemalt"\n\t\n{"prompt": "as it is"}'.encode())
    assert read_prompt_file(path) == ("a cat", 'ein Bär, "gemalt"', '{"prompt": "as it is"}')


def test_a_jsonl_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a cat", "id": 3}\n\n{"prompt": "B\\u00e4r\\nand fox"}\n', encoding="utf-8")
    assert read_prompt_file(path) == ("a cat", "Bär\nand fox")


@pytest.mark.parametrize(
    "line", ["a cat", '{"text": "a cat"}', '{"prompt": 3}', '{"prompt": " "}', '["a cat"]', '"a cat"', "3", "null", "{"]
)
def test_a_bad_line_of_a_jsonl_file_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "a dog"}}\n\n{line}\n')
    message = refusal(path)
    assert message.startswith(f'prompts.file: {path}, line 3: expected {{"prompt": "some text"}}, found ')
    assert repr(line) in message


def test_a_long_bad_line_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("x" * 10_000)
    assert len(refusal(path)) < 200 + len(str(path))


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl"])
@pytest.mark.parametrize("content", ["", "\n \n\t\n"])
def test_a_file_without_prompts(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    assert refusal(path) == f"prompts.file: {path} holds no prompt"


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    missing, binary = tmp_path / "nope.txt", tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    assert refusal(missing) == f"prompts.file: {missing} does not exist"
    assert refusal(tmp_path).startswith(f"prompts.file: cannot read {tmp_path}: ")
    assert refusal(binary).startswith(f"prompts.file: cannot read {binary}: ")


def test_a_name_that_no_file_can_have() -> None:
    assert refusal(Path("a\0b.txt")).startswith("prompts.file: cannot read a\0b.txt: ")


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path: Path) -> None:
    """Windows editors write a byte order mark."""
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n", encoding="utf-8-sig")
    assert read_prompt_file(path) == ("a cat",)


def test_only_line_breaks_separate_prompts(tmp_path: Path) -> None:
    """str.splitlines would also cut at form feeds and at U+2028, which JSON may hold unescaped."""
    text, lines = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    text.write_text("a cat\x85sleeping\na dog\n", encoding="utf-8")
    lines.write_text('{"prompt": "a cat\u2028sleeping"}\n', encoding="utf-8")
    assert read_prompt_file(text) == ("a cat\x85sleeping", "a dog")
    assert read_prompt_file(lines) == ("a cat\u2028sleeping",)
