"""Kernels; installed as `zoo.kernels`. Imported lazily, by the function that needs one."""
