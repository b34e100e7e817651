"""Runnable experiments: one file each, with `config()`, `tiny()` and `main()`."""
