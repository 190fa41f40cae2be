"""Triton kernels for grouped, structured-sparse convolution. Needs torch and triton only."""
