"""A folder of pictures with prompts: its captions file, mistakes in it, and which pictures an epoch draws."""

import json
from collections import Counter
from pathlib import Path

import pytest

from dag.errors import UsageError
from dag.recipe.captions import Captioned, draw, fingerprint, given_pictures, load_captions
from dag.recipe.load import parse


def folder_of(path: Path, *lines: object, name: str = "metadata.jsonl") -> Path:
    """A folder with pictures 0.png and 1.png, and a captions file of these lines; texts stand as they are."""
    (path / "deep").mkdir(parents=True, exist_ok=True)
    for file in ("0.png", "deep/1.png"):
        (path / file).write_bytes(file.encode())
    (path / name).write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_pictures_and_prompts_are_read_in_order(tmp_path: Path) -> None:
    lines = {"file_name": "deep/1.png", "text": " a cat "}, "", {"file_name": "0.png", "text": "a dog", "reward": 2}
    for name in ("captions.jsonl", "metadata.jsonl"):
        found = load_captions(folder_of(tmp_path / name, *lines, name=name))
        assert [(one.file.name, one.text) for one in found] == [("1.png", "a cat"), ("0.png", "a dog")]


MISTAKES: list[tuple[tuple[object, ...], str]] = [
    ((), "names no picture"),
    (("{",), "line 1: expected"),
    (({"file_name": "0.png"},), "line 1: expected"),
    (({"file_name": "0.png", "text": " "},), "line 1: expected"),
    (({"file_name": "0.png", "text": "a"}, {"file_name": "2.png", "text": "a"}), "line 2: '2.png' is no file"),
    (({"file_name": "../other.png", "text": "a"},), "line 1: '../other.png' is outside of the folder"),
]


@pytest.mark.parametrize(("lines", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_a_mistake_is_named_in_one_line(tmp_path: Path, lines: tuple[object, ...], message: str) -> None:
    (tmp_path / "other.png").touch()
    with pytest.raises(UsageError, match=r"^data\.folder: .*metadata\.jsonl") as caught:
        load_captions(folder_of(tmp_path / "mine", *lines))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_without_captions_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no metadata\.jsonl or captions\.jsonl"):
        load_captions(tmp_path / "absent")


def test_a_group_needs_so_many_pictures_of_a_prompt(tmp_path: Path) -> None:
    line = {"file_name": "0.png", "text": "a cat"}
    data = {
        "model": {"path": "embedded"},
        "prompts": {"texts": ["a cat"], "per_group": 2},
        "reward": {"name": "colourfulness"},
        "objective": {"name": "dpo"},
        "data": {"folder": str(folder_of(tmp_path, line))},
    }
    with pytest.raises(UsageError, match=r"has 1 of 'a cat'; prompts\.per_group=2"):
        given_pictures(parse(data, "test recipe"))
    folder_of(tmp_path, line, {**line, "file_name": "deep/1.png"})
    assert len(given_pictures(parse(data, "test recipe"))) == 2


def test_epochs_go_through_the_folder_in_groups_of_one_prompt() -> None:
    pictures = [Captioned(Path(str(number)), "a cat" if number < 7 else "a dog") for number in range(11)]
    for per_group, count in ((1, 22), (2, 20), (3, 9)):
        drawn = draw(pictures, count, 5, 2, per_group).tolist()
        assert (
            drawn == draw(pictures, count, 5, 2, per_group).tolist() != draw(pictures, count, 5, 3, per_group).tolist()
        )
        for start in range(0, count, per_group):
            group = drawn[start : start + per_group]
            assert len(set(group)) == per_group
            assert len({pictures[number].text for number in group}) == 1
        assert max(Counter(drawn).values()) <= {1: 2, 2: 2, 3: 3}[per_group]
    assert Counter(draw(pictures, 22, 5, 2).tolist()) == dict.fromkeys(range(11), 2), "each as often as the others"


def test_the_fingerprint_is_of_contents_and_prompts(tmp_path: Path) -> None:
    line = {"file_name": "0.png", "text": "a cat"}
    first = fingerprint(load_captions(folder_of(tmp_path, line)))
    assert first == fingerprint(load_captions(folder_of(tmp_path, {**line, "reward": 3})))
    assert first != fingerprint(load_captions(folder_of(tmp_path, {**line, "text": "a dog"})))
    found = load_captions(folder_of(tmp_path, line))
    (tmp_path / "0.png").write_bytes(b"other")
    assert first != fingerprint(found)
