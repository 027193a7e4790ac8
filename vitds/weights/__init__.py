"""Weights in and out: Google's npz and DeepSpeed checkpoints to our state dict, fitted to a size and a head."""
