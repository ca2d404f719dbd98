"""How edges are patched. Users need not read it; `docs/engine.md` derives it.

A destination reads the residual stream plus `sum_src mask[src] * (patch[src] - current[src])`.

What the words mean, in the modules in the order in which they import each other:

- *mask* (`patch_wrapper`): one number per incoming edge of a destination module. Its
  *weights* are what they are used as, after a mask function and dropout.
- *site*: a module of the model at which nodes are seen. *port* (`edge_matrices`): a site with
  the masks of the nodes there; the model's families say where they are (`model_adapter`).
- *edge matrix*: the edges from a range of sources into all that some ports read. *row*: one
  destination in it (a head, or a module without heads). *column*: one source in it.
- *difference*: `patch - current` of a source. *slot* (`forward_pass`): where it is kept, of
  those sources that a pass has to *record*. *token*: one position of one example.
- *buffer* (`buffers`): memory of a pass, which goes on to the next one over the same model.
- *work* (`matrix_work`, `pass_works`): what one forward pass does with one edge matrix.
  *delta*: the matrix's product with the differences. *base*: what the delta is added to, the
  current residual stream or that of the patched-in run. *carrier*: brings the gradient of a
  later port back to the work.
- *block*: one of the transformer's, which are called one after the other. A *layer* is the
  graph's: attention and MLP of a block are two.
"""
