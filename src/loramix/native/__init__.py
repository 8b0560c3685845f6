"""The C functions of a step: products of few rows, norms, attention of newest tokens.

They are for bfloat16 on CPUs with AVX512-BF16. They are compiled when they are asked for, for this
CPU, and are not kept in any file. They run in the threads of torch's OpenMP library, which has the
name of the system's.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loramix.errors import EngineError

FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-shared")
SOURCES = tuple(Path(__file__).with_name(name) for name in ("tiles.c", "norms.c", "attend.c"))
_POINTER, _COUNT = ctypes.c_void_p, ctypes.c_int64


@dataclass(frozen=True, slots=True)
class Native:
    """The functions. Each but `multiply` and `normalise` lets the interpreter's lock go.

    Whoever gets the lock in between holds it longer than what is short takes.
    """

    multiply: Any
    multiply_long: Any  # the same
    normalise: Any
    attend: Any


def compiled() -> Native:
    """Raises EngineError where they cannot be had."""
    if not torch.cpu._is_avx512_bf16_supported():
        raise EngineError("tiles need a CPU with AVX512-BF16, and this one has none; leave them.")
    compiler = shutil.which("cc")
    if compiler is None:
        raise EngineError(
            "tiles need a C compiler, and there is no cc; install one, or leave tiles."
        )
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "loramix.so"
        command = [compiler, *FLAGS, "-o", str(library), *map(str, SOURCES), "-lm"]
        made = subprocess.run(command, capture_output=True, text=True)
        if made.returncode:
            raise EngineError(f"{compiler} cannot compile tiles: {made.stderr.strip()[:200]}")
        short, long = ctypes.PyDLL(str(library)), ctypes.CDLL(str(library))
    for library_ in (short, long):
        _declare(library_)
    return Native(short.multiply, long.multiply, short.normalise, long.attend)


def _declare(library: ctypes.CDLL) -> None:
    """The kinds of the arguments, as the sources have them."""
    library.multiply.argtypes = [*[_POINTER] * 7, *[_COUNT] * 8, ctypes.c_int]
    library.normalise.argtypes = [
        *[_POINTER] * 3, _COUNT, _COUNT, ctypes.c_float, ctypes.c_float, *[ctypes.c_int] * 2,
    ]  # fmt: skip
    library.attend.argtypes = [*[_POINTER] * 3, *[_COUNT] * 6, ctypes.c_float, ctypes.c_int]
    for function in (library.multiply, library.normalise, library.attend):
        function.restype = None
