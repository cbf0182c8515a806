"""Flax (nnx) modules: one configurable decoder for every family. Never imports core."""
