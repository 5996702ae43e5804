"""Kernels that compute only with what is stored, and the formats they read.

Independent of `jaxsparse`: use them with any JAX code.
"""
