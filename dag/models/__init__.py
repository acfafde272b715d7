"""Model families behind `dag.protocols.Policy`, one module each. Only this package imports diffusers."""

import logging
import os

# When diffusers imports them these say which optional packages are missing, which concerns nobody here.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
