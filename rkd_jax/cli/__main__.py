"""``python -m rkd_jax.cli`` is ``rkd``."""

from rkd_jax.cli import main

if __name__ == "__main__":
    main()
