"""What the Triton kernels share: walking a sequence in tiles of rows, and splitting it into segments."""
