"""Which latents, or neurons, are active on some prompts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal

import torch as t
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import Module
from transformer_lens.model_bridge import TransformerBridge

from auto_circuit.checks import check_count, check_number, checked
from auto_circuit.data import PromptDataLoader, PromptPairBatch, Side
from auto_circuit.model_utils.features.places import make_splice, placed
from auto_circuit.model_utils.features.splices import Splice
from auto_circuit.model_utils.transformer_lens_sites import hook_point
from auto_circuit.padding import padding_mask
from auto_circuit.prefix_cache import PrefixCache
from auto_circuit.utils.module_use import in_use
from auto_circuit.utils.torch_state import in_own_state

PromptsSeen = Literal["clean", "both", "differ"]
"""Which prompts' activations count, or what of them."""


@checked
def active_latents(
    model: TransformerBridge,
    autoencoders: Sequence[Any],
    dataloader: PromptDataLoader,
    top_n: int | None = None,
    threshold: float = 0.0,
    prompts: PromptsSeen = "both",
) -> list[list[int]]:
    """For each autoencoder, the latents that are active on some prompts: for `spliced`.

    autoencoders: as `spliced` takes them.
    top_n: at most so many of each, those with the highest mean activation.
    threshold: the mean activation (its size, over the tokens of all prompts, without padding)
        is above this.
    prompts: the "clean" ones count, or "both" sides; or by how much latents "differ" between
        the two, at each token: what does not differ does nothing where one side's
        activations are patched into the other.

    Raises ConfigError and ModelError as `spliced` does; not for autoencoders without any
    active latent, whose list is empty.
    """
    check_number("threshold", threshold)
    if top_n is not None:
        check_count("top_n", top_n)
    splices = [make_splice(model, placed(item), None) for item in autoencoders]
    means = _mean_amounts(model, splices, dataloader, prompts)
    return [_most(mean, top_n, threshold) for mean in means]


def _most(
    mean: Float[Tensor, "latent"], top_n: int | None, threshold: float
) -> list[int]:
    order = mean.argsort(descending=True, stable=True)[:top_n]
    return sorted(int(idx) for idx in order if mean[idx] > threshold)


@in_own_state(grad=False)
def _mean_amounts(
    model: TransformerBridge,
    splices: Sequence[Splice],
    dataloader: PromptDataLoader,
    prompts: PromptsSeen,
) -> list[Float[Tensor, "latent"]]:
    """How much each latent writes on average, or by how much that differs, as a size."""
    sums = [t.zeros(len(splice.idxs), dtype=t.float64) for splice in splices]
    sides: tuple[Side, ...] = ("clean",) if prompts == "clean" else ("clean", "corrupt")
    n_tokens, seen = 0, [t.empty(0) for _ in splices]

    def see(i: int, module: Module, args: Any, out: Tensor) -> None:
        encoded = splices[i].encoded(out)
        seen[i] = splices[i].latents.amounts(encoded).double()

    with in_use(model, splices), ExitStack() as stack:
        for i, splice in enumerate(splices):
            site = hook_point(model, splice.site.reads.hook)
            stack.callback(site.register_forward_hook(partial(see, i)).remove)
        for batch in dataloader:
            of_clean: list[Tensor] = []
            for side in sides:
                tokens, mask = whole_prompts(model, batch, side, dataloader.kv_cache)
                model(tokens, attention_mask=mask)
                n_tokens += int(mask.sum())
                if prompts == "differ" and side == "clean":
                    of_clean = list(seen)
                    continue
                for i, amounts in enumerate(seen):
                    change = amounts - of_clean[i] if of_clean else amounts
                    text = change.abs() * mask.unsqueeze(-1)
                    sums[i] += text.flatten(0, -2).sum(0).cpu()
    return [total / max(n_tokens, 1) for total in sums]


@checked
def whole_prompts(
    model: Module, batch: PromptPairBatch, side: Side, prefix: PrefixCache | None
) -> tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]]:
    """Tokens with the prefix that was cut off, and a mask that is 0 at padding."""
    tokens, kwargs = batch.model_input(side)
    mask = kwargs.get("attention_mask")
    if mask is None:
        mask = padding_mask(tokens, getattr(model, "tokenizer", None))
    if mask is None:
        mask = t.ones_like(tokens)
    if prefix is not None:
        full = prefix.tokens.expand(tokens.shape[0], -1)
        tokens = t.cat([full, tokens], dim=1)
        mask = t.cat([t.ones_like(full), mask], dim=1)
    return tokens, mask
