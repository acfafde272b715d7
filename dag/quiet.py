"""Holds libraries that speak when they are imported to their errors: a newcomer reads our lines alone."""

import logging
import os


def quieten() -> None:
    """To be called before diffusers, peft, transformers or bitsandbytes are imported."""
    # On some CPUs bitsandbytes asks for PyPI's package `kernels`, which nothing here needs. In the folder of
    # this project its complaint is a riddle: Python takes our folder kernels/ for that package.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
