"""What a published recipe and run.json say of the machine where they were made: nothing."""

from pathlib import Path

import pytest

from dag.evaluation.privacy import SERVER, public


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("path", "/home/me/models/sd15", "sd15"),
        ("path", "~/models/sd15", "sd15"),
        ("path", "../rewards/mine.py:score", "mine.py:score"),
        ("path", "my.package:score", "my.package:score"),
        ("path", "C:\\Users\\me\\sd15", "sd15"),
        ("path", "owner/name", "owner/name"),
        ("path", "here/mine.py:score", "mine.py:score"),
        ("url", "http://me:secret@10.0.0.3:8000/score", SERVER),
        ("reason", "no compiler: /usr/me/bin/cc failed (/var/x)", "no compiler: cc failed (x)"),
        ("texts", "/imagine a cat", "/imagine a cat"),
        ("prefix", "A photo of 3/4 cats", "A photo of 3/4 cats"),
        ("url_of", "https://example.org/a/b", "https://example.org/a/b"),
    ],
)
def test_local_paths_become_names(
    key: str, text: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here/mine.py").touch()
    monkeypatch.chdir(tmp_path)
    assert public({"a": [{key: text, "n": 1.5}]}) == {"a": [{key: expected, "n": 1.5}]}
