"""The circuits that papers found by hand, as tables: one module for each task."""
