"""Faults of other trainers that this one must not have: T4, T7, T10, and disk-full."""
