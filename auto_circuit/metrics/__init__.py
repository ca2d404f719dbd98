"""Metrics: each measures the circuits that a prune algorithm's best edges make."""
