"""Edges of latents and neurons of Hugging Face's GPT-2, by plain hooks: no code of ours."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch as t
from torch import Tensor
from torch.nn.functional import layer_norm

Run = dict[str, Tensor]


def plain_latents(w: Any, x: Tensor) -> Tensor:
    """The formulas of the five kinds, written out."""
    bias = w.decoder_bias if w.centres_input else 0.0
    pre = (x - bias) @ w.encoder_weight.T + w.encoder_bias
    if w.kind == "gated":
        centred = (x - bias) @ w.encoder_weight.T
        size = t.relu(centred * w.log_magnitude.exp() + w.magnitude_bias)
        return t.where(pre > 0, size, t.zeros_like(size))
    if w.kind in ("jumprelu", "batchtopk"):
        return t.where((pre > w.threshold) & (pre > 0), pre, t.zeros_like(pre))
    if w.kind == "topk":
        cutoff = pre.sort(-1, descending=True).values[..., w.k - 1 : w.k]
        return t.where(pre >= cutoff, pre, t.zeros_like(pre)).clamp(min=0)
    return pre.clamp(min=0)


@dataclass(frozen=True)
class Place:
    """Where latents are. reads: the residual stream that they follow from.

    amounts: (residual stream) -> how much each writes. whole: (residual stream) -> what is
    written. written: the name of what is recorded there.
    """

    amounts: Callable[[Tensor], Tensor]
    directions: Tensor
    reads: str
    written: str
    whole: Callable[[Tensor], Tensor]


class PlainGPT2:
    """The model, and what single edges do in it. places: node names -> where they are."""

    def __init__(self, model: Any, places: dict[str, Place]) -> None:
        self.model, self.places = model, places
        self.blocks = model.transformer.h
        self.n_heads = model.config.n_head

    def forward(self, tokens: Tensor, *hooks: tuple[Any, str, Any]) -> Tensor:
        handles = [getattr(m, f"register_{kind}")(hook) for m, kind, hook in hooks]
        try:
            with t.no_grad():
                return self.model(tokens).logits
        finally:
            for handle in handles:
                handle.remove()

    def record(self, tokens: Tensor) -> Run:
        run: Run = {}

        def keep_input(name: str) -> Any:
            return lambda module, args: run.__setitem__(name, args[0])

        def keep_output(name: str) -> Any:
            return lambda module, args, out: run.__setitem__(
                name, out[0] if isinstance(out, tuple) else out
            )

        hooks = []
        for b, block in enumerate(self.blocks):
            hooks += [
                (block.ln_1, "forward_pre_hook", keep_input(f"resid{b}")),
                (block.attn.c_proj, "forward_pre_hook", keep_input(f"z{b}")),
                (block.attn.c_proj, "forward_hook", keep_output(f"attn{b}")),
                (block.ln_2, "forward_pre_hook", keep_input(f"mid{b}")),
                (block.mlp.c_proj, "forward_pre_hook", keep_input(f"acts{b}")),
                (block.mlp, "forward_hook", keep_output(f"mlp{b}")),
            ]
        end = (self.model.transformer.ln_f, "forward_pre_hook", keep_input("end"))
        self.forward(tokens, *hooks, end)
        return run

    def written(self, run: Run, name: str) -> Tensor:
        """What a source writes."""
        place, part = self._place(name)
        if place is not None:
            x = run[place.reads]
            amounts = place.amounts(x)
            if part is None:
                return run[place.written] - amounts @ place.directions
            return amounts[..., part : part + 1] * place.directions[part]
        if name == "Resid Start":
            return run["resid0"]
        if name.startswith("MLP"):
            return run[f"mlp{int(name[4:])}"]
        block, head = map(int, name[1:].split("."))
        width = run["z0"].shape[-1] // self.n_heads
        of_head = slice(head * width, (head + 1) * width)
        weight = self.blocks[block].attn.c_proj.weight
        return run[f"z{block}"][..., of_head] @ weight[of_head]

    def patched(self, tokens: Tensor, run: Run, dest: str, change: Tensor) -> Tensor:
        """The logits if one destination reads a residual stream that is changed."""
        place, part = self._place(dest)
        if place is not None:
            old, new = run[place.reads], run[place.reads] + change
            if part is None:
                parts = [
                    place.whole(x) - place.amounts(x) @ place.directions
                    for x in (old, new)
                ]
            else:
                parts = [
                    place.amounts(x)[..., part : part + 1] * place.directions[part]
                    for x in (old, new)
                ]
            return self.forward(tokens, self._adding(place.written, parts[1] - parts[0]))
        if dest == "Resid End":
            return self.forward(tokens, self._adding("end", change))
        if dest.startswith("MLP"):
            norm = self.blocks[int(dest[4:])].ln_2
            hook = (norm, "forward_pre_hook", lambda m, args: (args[0] + change,))
            return self.forward(tokens, hook)
        block_idx, head, part_name = dest[1:].split(".")
        block = self.blocks[int(block_idx)]
        d_model = change.shape[-1]
        width = d_model // self.n_heads
        start = "QKV".index(part_name) * d_model + int(head) * width
        columns = slice(start, start + width)

        def of_head(module: Any, args: Any, out: Tensor) -> Tensor:
            x = block.ln_1(run[f"resid{block_idx}"] + change)
            out = out.clone()
            full = x @ module.weight + module.bias
            out[..., columns] = full[..., columns]
            return out

        return self.forward(tokens, (block.attn.c_attn, "forward_hook", of_head))

    def _adding(self, where: str, change: Tensor) -> tuple[Any, str, Any]:
        if where == "end":
            norm = self.model.transformer.ln_f
            return norm, "forward_pre_hook", lambda m, args: (args[0] + change,)
        kind, block = re.fullmatch(r"([a-z]+)(\d)", where).groups()  # type: ignore
        module = self.blocks[int(block)]
        if kind == "resid":
            add = lambda m, args: (args[0] + change, *args[1:])  # noqa: E731
            return module, "forward_pre_hook", add
        # What attention adds is in the residual stream inside of the block ("mid").
        inner = module.mlp if kind == "mlp" else module.attn.c_proj
        return inner, "forward_hook", lambda m, args, out: out + change

    def _place(self, name: str) -> tuple[Place | None, int | None]:
        for word in ("Latent", "Neuron"):
            owner, found, part = name.partition(f" {word} ")
            if found:
                return self.places[owner], int(part)
        owner = name.rpartition(" ")[0]
        is_rest = name.endswith((" Error", " Rest"))
        return (self.places[owner], None) if is_rest else (None, None)

    # ---------------------------------------------------------------------- places

    def cut(self, w: Any, where: str) -> Place:
        return Place(
            lambda x: plain_latents(w, x), w.decoder_weight, where, where, lambda x: x
        )

    def transcoder(self, w: Any, block: int, bare: bool) -> Place:
        module = self.blocks[block]

        def normed(x: Tensor) -> Tensor:
            return layer_norm(x, x.shape[-1:], eps=1e-5) if bare else module.ln_2(x)

        return Place(
            lambda x: plain_latents(w, normed(x)),
            w.decoder_weight,
            f"mid{block}",
            f"mlp{block}",
            lambda x: module.mlp(module.ln_2(x)),
        )

    def neurons(self, block: int) -> Place:
        """All the neurons; those that are no nodes have parts of their own here."""
        module = self.blocks[block]
        return Place(
            lambda x: module.mlp.act(module.mlp.c_fc(module.ln_2(x))),
            module.mlp.c_proj.weight,
            f"mid{block}",
            f"mlp{block}",
            lambda x: module.mlp(module.ln_2(x)),
        )

    def encoded(self, w: Any, what: str, whole: str, weight: Tensor | None) -> Place:
        """Latents of something that is recorded; no destinations of their own."""
        directions = w.decoder_weight if weight is None else w.decoder_weight @ weight
        return Place(lambda x: plain_latents(w, x), directions, what, whole, lambda x: x)
