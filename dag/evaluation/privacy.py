"""What of a run may be shown to strangers: its data without the folders and servers of the machine on which it ran."""

import re
from pathlib import Path, PureWindowsPath
from typing import Any

# A server of one's own has no meaning elsewhere, and its address may hold a password.
SERVER = "http://your-server"
# Keys whose text may be a path relative to where the run was started.
_PATHS = ("path", "file", "tokenizer", "config", "head", "decoder_path", "diversity", "features")
# The folders of an absolute path inside a sentence.
_FOLDERS = re.compile(r"(?<![\w/:.~])~?/(?:[^\s'\"():,;]*/)?(?=\w)")


def public(data: Any, key: str = "") -> Any:
    """A copy of JSON data in which each local path is its last part, and the address of a reward server is SERVER.

    Args:
        data: as `json.loads` returns it. Prompts, under the key `texts`, stay as they are.
        key:  the key under which `data` lies.
    """
    if key == "texts":
        return data
    if isinstance(data, dict):
        return {name: public(value, name) for name, value in data.items()}
    if isinstance(data, list):
        return [public(item, key) for item in data]
    return _text(data, key) if isinstance(data, str) else data


def _text(text: str, key: str) -> str:
    if key == "url":
        return SERVER
    if re.match(r"[A-Za-z]:[\\/]", text):
        return PureWindowsPath(text).name
    path, _, _ = text.partition(":")  # of a custom reward: file.py:function
    if key in _PATHS and (text.startswith(("/", "~", "./", "../")) or ("/" in text and Path(path).exists())):
        return Path(text).name
    return _FOLDERS.sub("", text)
