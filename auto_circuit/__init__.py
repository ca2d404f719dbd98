"""AutoCircuit: find and test circuits in transformers by edge patching."""
