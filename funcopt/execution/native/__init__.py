"""Kernels for the CPU: a program printed as C, built, cached, and called."""
