"""Kernels in C++ for CPUs, the counterpart of ``triton/``: rows are the lanes of vectors."""
