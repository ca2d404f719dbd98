"""Latents of autoencoders, and neurons, as nodes of a model's graph."""
