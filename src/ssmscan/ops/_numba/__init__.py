"""What the Numba kernels share: their compilation, running them on threads, and tensors seen as arrays."""
