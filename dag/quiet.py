"""Silences libraries that log when they are imported, so that the first lines a user sees are ours. Errors stay."""

import logging
import os


def quieten() -> None:
    """Call this before diffusers, peft, transformers or bitsandbytes are imported."""
    # On some CPUs bitsandbytes looks for PyPI's package `kernels`, which nothing here needs. Started in the folder of this
    # project, Python takes our folder kernels/ for that package, and the warning that follows would mislead.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # diffusers imports xformers wherever it is installed. Built for another torch it complains in five lines, although nothing
    # needs it; a recipe that asks for it (`memory.attention`) ends with the reason.
    logging.getLogger("xformers").setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
