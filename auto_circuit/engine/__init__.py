"""How edges are patched. Users need not read it; `docs/engine.md` derives it."""
