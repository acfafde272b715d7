"""`python -m dag.score`: its table and JSON, prompts, and files that cannot be read."""

import json
from pathlib import Path

import pytest
from helpers.tiny_rewards import reward_of
from PIL import Image

from dag import score


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    """Three pictures of different sizes and modes, and a file that is no picture."""
    paths = [tmp_path / name for name in ("grey.png", "red.jpg", "clear.png", "broken.png")]
    Image.new("L", (20, 30), 128).save(paths[0])
    Image.new("RGB", (64, 40), (255, 0, 0)).save(paths[1], quality=95)
    Image.new("RGBA", (16, 16), (0, 255, 0, 10)).save(paths[2])
    paths[3].write_bytes(b"\x89PNG\r\n but then nothing")
    return [str(path) for path in paths]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str], str]:
    """Run the command; returns (exit code, lines of stdout, stderr)."""
    code = score.main(arguments)
    out, err = capsys.readouterr()
    return code, out.splitlines(), err


def test_a_table_and_json(pictures: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, lines, error = run(capsys, "--reward", "colourfulness", *pictures)
    assert code == 0
    found = json.loads(lines[-1])
    assert found["reward"] == "colourfulness"
    assert [entry["image"] for entry in found["images"]] == pictures
    scores = [entry["score"] for entry in found["images"]]
    assert scores[0] == 0.0 and scores[3] is None
    for number in (1, 2):
        expected = reward_of("colourfulness")(score.read_image(pictures[number]), [""])
        assert scores[number] == pytest.approx(float(expected))
        assert f"{scores[number]:.4f}" in lines[number]
    assert "skipped" in lines[3] and "broken.png" in lines[3]
    assert error == f"{pictures[3]}: skipped: {found['images'][3]['error']}\n"


@pytest.mark.parametrize("text", ["a cat\n", "a cat\na dog\n"])
def test_one_prompt_for_all_or_one_for_each(
    tmp_path: Path, pictures: list[str], capsys: pytest.CaptureFixture[str], text: str
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(text)
    _, lines, _ = run(capsys, "--reward", "image_text", "--prompts", str(prompts), *pictures[:2])
    found = json.loads(lines[-1])["images"]
    expected = (text.split("\n")[:-1] * 2)[:2]
    assert [entry["prompt"] for entry in found] == expected
    reward = reward_of("image_text")
    for entry in found:
        alone = reward(score.read_image(entry["image"]), [entry["prompt"]])
        assert entry["score"] == pytest.approx(float(alone), abs=1e-3)


def test_only_broken_pictures_are_a_failure(pictures: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--reward", "colourfulness", pictures[3], "missing.png")[0] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reward", "jpeg"], "unknown name 'jpeg'; known: "),
        (["--reward", "image_text", "--set", "path=./nope"], "there is no file or folder ./nope"),
        (["--reward", "colourfulness", "--prompts", "nope.txt"], "--prompts: nope.txt does not exist"),
        (["--reward", "colourfulness", "--prompts", "three.txt"], "holds 3 prompts for 4 images"),
    ],
)
def test_mistakes_end_in_one_line(
    tmp_path: Path,
    pictures: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "three.txt").write_text("a\nb\nc\n")
    code, lines, error = run(capsys, *arguments, *pictures)
    assert code == 2 and lines == []
    assert message in error and len(error.splitlines()) == 1
