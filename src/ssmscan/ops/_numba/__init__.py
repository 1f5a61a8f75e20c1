"""What the Numba kernels share: running them on threads, and seeing tensors as flat arrays."""
