"""Kernels in Triton, a file for each kind of blueprint; imported only where one is launched."""
