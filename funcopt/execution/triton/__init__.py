"""Kernels for CUDA: a program printed in Triton, and the tables that it reads."""
