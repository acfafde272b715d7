"""How the original code tidied prompts before CLIP's tokenizer."""

import html
import warnings
from collections.abc import Callable
from functools import cache

Cleaning = Callable[[str], str]


def openai_cleaning(text: str) -> str:
    """OpenAI's CLIP and HPSv2: mended Unicode (with ftfy, if it is installed), HTML entities resolved twice."""
    return html.unescape(html.unescape(_fix_text()(text))).strip()


@cache
def _fix_text() -> Cleaning:
    try:
        from ftfy import fix_text
    except ImportError:
        warnings.warn(
            "ftfy is not installed: about one prompt in a hundred (typographic quotes, full-width signs) is read "
            "otherwise than by the original CLIP; pip install ftfy",
            stacklevel=2,
        )
        return str
    return fix_text
