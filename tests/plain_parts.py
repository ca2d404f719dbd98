"""Edges of latents, neurons, skips and errors in any plain Hugging Face model, by hooks.

What a place writes is `finish(whole(x))`, of the residual stream x that it reads. Its parts
are functions of x too, and the error is the whole without them; all this without code of ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch as t
from torch import Tensor

from tests.plain_features import plain_latents
from tests.plain_patching import PlainModel, change_each, hooks, in_out, shares, written

Streams = dict[str, Tensor]


@dataclass(frozen=True)
class Place:
    """name: of its nodes. reads: the stream's name. parts: [... part d] of x.

    adds_to: the module to whose output what is written is added. post_norm: what norms the
    sum of the parts. scale: what multiplies that; divisor: what multiplies what `adds_to`
    gives, where the parts are counted after that.
    """

    name: str
    reads: str
    words: tuple[str, ...]
    parts: Callable[[Tensor], Tensor]
    whole: Callable[[Tensor], Tensor]
    adds_to: Any
    post_norm: Any = None
    scale: float = 1.0
    divisor: float = 1.0

    def all_parts(self, x: Tensor) -> Tensor:
        """[... part d], the error last."""
        parts = self.parts(x)
        return t.cat([parts, (self.whole(x) - parts.sum(-2)).unsqueeze(-2)], -2)

    def source(self, x: Tensor, name: str) -> Tensor:
        parts = self.all_parts(x)
        if self.post_norm is not None:
            parts = shares(self.post_norm, parts, parts.sum(-2))
        return self.scale * parts[..., self.words.index(name), :]

    def change(self, x: Tensor, name: str, change: Tensor) -> Tensor:
        """By how much what is written changes if one part reads `x + change`."""
        before, after = self.all_parts(x), self.all_parts(x + change)
        i, total = self.words.index(name), before.sum(-2)
        new = total + after[..., i, :] - before[..., i, :]
        if self.post_norm is not None:
            new, total = self.post_norm.forward(new), self.post_norm.forward(total)
        return (new - total) / self.divisor


def streams(plain: PlainModel, tokens: Tensor) -> Streams:
    """The residual streams before and inside of each block, and at the end."""
    seen: Streams = {}

    def save(name: str) -> Callable[[Tensor], None]:
        return lambda x: seen.update({name: x.clone()})

    with t.no_grad(), hooks() as add:
        for b in range(plain.n_blocks):
            add(plain.block(b), before=save(f"pre{b}"))
            norm = plain.norm(b, plain.plan.mlp_norm)
            add(norm or plain.part(b, plain.plan.mlp_in), before=save(f"mid{b}"))
        plain.logits(tokens)
    return seen


def edge(plain: PlainModel, place: Place, clean: Tensor, corrupt: Tensor,
         src: str, dest: str) -> Tensor:  # fmt: skip
    """[1 seq vocab]: the logits on `clean` with the edge's source as on `corrupt`."""
    runs = [streams(plain, tokens) for tokens in (clean, corrupt)]
    if src in place.words:
        outs = [place.source(run[place.reads], src) for run in runs]
    else:
        outs = [written(plain, tokens)[src] for tokens in (clean, corrupt)]
    change = outs[1] - outs[0]
    if dest not in place.words:
        return change_each(plain, clean, change, [dest])
    new = place.change(runs[0][place.reads], dest, change)
    with t.no_grad(), hooks() as add:
        add(place.adds_to, after=lambda out: out + new)
        return plain.logits(clean)


# ---------------------------------------------------------------------------------- places


def names(place: str, word: str, n: int, has_skip: bool, rest: str) -> tuple[str, ...]:
    skip = [f"{place} Skip"] if has_skip else []
    return (*(f"{place} {word} {i}" for i in range(n)), *skip, f"{place} {rest}")


def transcoder(plain: PlainModel, block: int, w: Any, reads: str = "normed") -> Place:
    """From what the MLP reads to what it adds, after all norms and scales."""
    plan = plain.plan
    norm, mlp = plain.norm(block, plan.mlp_norm), plain.part(block, plan.mlp_in)
    post_norm = plain.norm(block, plan.mlp_post_norm)

    def encoded(x: Tensor) -> Tensor:
        if reads == "bare":
            centred = x - x.mean(-1, keepdim=True) if "Layer" in str(type(norm)) else x
            eps = getattr(norm, "eps", None) or norm.variance_epsilon
            return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return x if norm is None or reads == "stream" else norm.forward(x)

    def parts(x: Tensor) -> Tensor:
        amounts = plain_latents(w, encoded(x)).unsqueeze(-1) * w.decoder_weight
        if w.skip_weight is None:
            return amounts
        return t.cat([amounts, (encoded(x) @ w.skip_weight.T).unsqueeze(-2)], -2)

    def whole(x: Tensor) -> Tensor:
        out = mlp.forward(x if norm is None else norm.forward(x))
        return plain.scale * (out if post_norm is None else post_norm.forward(out))

    has_skip, n = w.skip_weight is not None, len(w.decoder_weight)
    words = names(f"MLP {block}", "Latent", n, has_skip, "Error")
    return Place(
        f"MLP {block}", f"mid{block}", words, parts, whole, post_norm or mlp,
        divisor=plain.scale,
    )  # fmt: skip


def neurons(plain: PlainModel, block: int, kept: list[int]) -> Place:
    """The MLP's neurons, normed and scaled with all that it adds."""
    plan = plain.plan
    norm, mlp = plain.norm(block, plan.mlp_norm), plain.part(block, plan.mlp_in)
    down = plain.part(block, plan.down)
    seen: list[Tensor] = []

    def run(x: Tensor) -> Tensor:
        with hooks() as add:
            add(down, before=lambda acts: seen.append(acts.clone()))
            return mlp.forward(x if norm is None else norm.forward(x))

    def parts(x: Tensor) -> Tensor:
        run(x)
        return seen.pop()[..., kept].unsqueeze(-1) * in_out(down)[kept]

    place = f"MLP {block}"
    words = (*(f"{place} Neuron {i}" for i in kept), f"{place} Rest")
    post_norm = plain.norm(block, plan.mlp_post_norm)
    adds_to = post_norm or mlp
    return Place(place, f"mid{block}", words, parts, run, adds_to, post_norm, plain.scale)


def cut_inside(plain: PlainModel, block: int, w: Any) -> Place:
    """The residual stream between attention and MLP."""
    plan = plain.plan
    place = f"Resid Mid {block}"
    words = names(place, "Latent", len(w.decoder_weight), False, "Error")
    output = plain.norm(block, plan.attn_post_norm) or plain.part(block, plan.output)
    return Place(
        place, f"mid{block}", words,
        lambda x: plain_latents(w, x).unsqueeze(-1) * w.decoder_weight,
        lambda x: x, output, divisor=plain.scale,
    )  # fmt: skip
