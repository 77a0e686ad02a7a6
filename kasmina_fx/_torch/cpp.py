"""Private names around C++: a source is compiled as Inductor compiles its own loops."""

from __future__ import annotations

import ctypes


def compiled_library(source: str) -> ctypes.CDLL:
    """Return a C++ source as a loaded library; Inductor's cache on disk keeps it.

    Inductor picks the compiler, its flags and the vectors that the machine has, and links the
    OpenMP that its own kernels use.

    Raises:
        Exception: Of whatever kind Inductor, the compiler or the loader has: there is none, or it
            refuses.
    """
    from torch._inductor.codecache import CppCodeCache  # seconds to import: only where it compiles

    # Inductor's own loops are written in vectors, and never fuse a product and a sum.
    # Without errno a loop of square roots is one of vectors.
    flags = ("-ffp-contract=fast", "-ftree-loop-vectorize", "-fno-math-errno", "-Wno-psabi")
    # Not load(), which takes no flags in older releases.
    library = CppCodeCache.load_async(source, extra_flags=flags)()
    assert isinstance(library, ctypes.CDLL)
    return library
