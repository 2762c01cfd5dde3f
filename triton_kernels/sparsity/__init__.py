"""N:M sparsity."""
