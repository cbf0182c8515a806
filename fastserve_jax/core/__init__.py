"""Scheduling as data: stdlib only; no clock, no I/O, no arrays, no randomness."""
