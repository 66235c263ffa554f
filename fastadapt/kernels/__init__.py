"""One folder per operation, the same file names in each: op, reference, triton_kernel, config, README."""
