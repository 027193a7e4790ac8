"""Weights out: one file or directory a target, written array by array, whole or not at all."""
