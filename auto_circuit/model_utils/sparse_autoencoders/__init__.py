"""Sparse autoencoders: a model's MLP outputs as sums of latents."""
