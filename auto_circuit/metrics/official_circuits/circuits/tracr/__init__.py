"""The circuits of transformers that were compiled from programs by Tracr."""
