"""Faithfulness metrics: a number for each circuit size."""
