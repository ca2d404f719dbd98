"""Prune algorithms: each gives every edge of a model a score."""
