"""AutoCircuit: find and test circuits in transformers by edge patching."""

__version__ = "2.0.0.dev0"
