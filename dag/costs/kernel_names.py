"""Short names of a GPU's kernels: C++ names of templates can be thousands of characters long, and differ only at their end."""

import re
from functools import cache

_LONGEST = 100
# Words that tell kernels of one kind apart only by how they are launched, or say nothing at all.
_NOISE = {
    *("operator", "lambda", "const", "unsigned", "int", "char", "std", "array", "Array", "true", "false"),
    *("TensorIteratorBase", "TensorIterator", "gpu_kernel_impl", "gpu_kernel_impl_nocast", "func_wrapper_t"),
    *("TrivialOffsetCalculator", "OffsetCalculator", "LoadWithoutCast", "StoreWithoutCast", "cudnnKernelDataType_t"),
}
_ANONYMOUS = re.compile(r"\(anonymous namespace\)::|<unnamed>::")
# An identifier that is neither a namespace nor part of a number such as 3ul.
_WORD = re.compile(r"(?<![\w$])[A-Za-z_]\w*(?!\w|::)")


@cache
def short(name: str) -> str:
    """The template's name, then the functors and types that it is made for, each once: "elementwise_kernel MulFunctor float".

    Names that are no C++ ("Memcpy DtoH (Device -> Pageable)", names of Triton's and cuDNN's kernels) stay as they are, up to a
    length of 100.
    """
    if "::" in name or "<" in name or name.startswith("void "):
        words = _WORD.findall(_signature(_ANONYMOUS.sub("", name)))
        name = " ".join(dict.fromkeys(word for word in words if word not in _NOISE)) or name
    return name[:_LONGEST]


def _signature(name: str) -> str:
    """What stands between the type that a kernel returns and its list of arguments: its name, with what is in its brackets."""
    start, depth = 0, 0
    for place, character in enumerate(name):
        depth += {"<": 1, ">": -1}.get(character, 0)
        if depth == 0 and character == "(":
            return name[start:place]
        if depth == 0 and character == " ":
            start = place + 1
    return name[start:]
