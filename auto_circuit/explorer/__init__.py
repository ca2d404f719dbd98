"""The circuit explorer: circuits to look at, in a page or a notebook.

The way of the data: a loaded task -> `task_view` (graph, prompts, attention, what nodes write)
-> with `algorithm_view`s (scores, order, measured circuits) -> plain JSON -> the JavaScript in
`built/`, whose source is in `src/`.

After a change in `src/`, in this folder: `npm ci && npm run build`. `built/explorer.js` is
committed, so that nobody else needs Node; a test compares it with its source. How long frames
take: `python benchmarks/explorer_frames.py`.
"""
