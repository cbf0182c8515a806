"""`python -m fastserve_jax` is `fastserve`."""

from fastserve_jax.cli import main

main()
