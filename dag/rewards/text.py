"""The cleaning of prompts that the original code of CLIP and HPSv2 does before the tokenizer."""

import html
import warnings
from collections.abc import Callable
from functools import cache

Cleaning = Callable[[str], str]


def openai_cleaning(text: str) -> str:
    """Repairs Unicode (with ftfy, if it is installed) and resolves HTML entities twice, as OpenAI's CLIP and HPSv2 do."""
    return html.unescape(html.unescape(_fix_text()(text))).strip()


@cache
def _fix_text() -> Cleaning:
    try:
        from ftfy import fix_text
    except ImportError:
        warnings.warn(
            "ftfy is not installed: about one prompt in a hundred (typographic quotes, full-width signs) is read "
            "differently from the original CLIP; pip install ftfy",
            stacklevel=2,
        )
        return str
    return fix_text
