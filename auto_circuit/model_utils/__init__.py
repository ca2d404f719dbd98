"""One file per model family: which of its modules are source and destination nodes."""
