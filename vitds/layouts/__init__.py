"""Layouts of weights that others write: which array is which parameter of ours, and what model its shapes tell."""
