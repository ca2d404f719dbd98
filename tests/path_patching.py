"""Path patching with plain TransformerLens hooks: no code of ours.

Nodes are named as in auto-circuit; what the names mean in terms of hooks is written out
here a second time, on purpose.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch as t
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

Site = tuple[str, int | None]
"""(hook name, head or None)"""


def source_site(name: str) -> Site:
    if name == "Resid Start":
        return "blocks.0.hook_in", None
    if match := re.fullmatch(r"A(\d+)\.(\d+)", name):
        return f"blocks.{match[1]}.attn.hook_result", int(match[2])
    match = re.fullmatch(r"MLP (\d+)", name)
    assert match, name
    return f"blocks.{match[1]}.mlp.hook_out", None


def dest_sites(bridge: TransformerBridge, name: str, ungroup: bool = False) -> list[Site]:
    if name == "Resid End":
        return [(f"blocks.{bridge.cfg.n_layers - 1}.hook_out", None)]
    if match := re.fullmatch(r"MLP (\d+)", name):
        return [(f"blocks.{match[1]}.hook_mlp_in", None)]
    match = re.fullmatch(r"A(\d+)\.(\d+)(?:\.([QKV]))?", name)
    assert match, name
    block, head, letter = f"blocks.{match[1]}.attn", int(match[2]), match[3]
    if letter in ("K", "V") and ungroup:
        head //= bridge.cfg.n_heads // (bridge.cfg.n_key_value_heads or 1)
    if letter:
        return [(f"{block}.hook_{letter.lower()}_input", head)]
    # One input for the three: a key-value head, and all the query heads that share it.
    group = bridge.cfg.n_heads // (bridge.cfg.n_key_value_heads or bridge.cfg.n_heads)
    queries = [(f"{block}.hook_q_input", head * group + i) for i in range(group)]
    return [*queries, (f"{block}.hook_k_input", head), (f"{block}.hook_v_input", head)]


def set_switches(bridge: TransformerBridge, is_on: bool) -> None:
    bridge.set_use_attn_result(is_on)
    bridge.set_use_split_qkv_input(is_on)
    bridge.set_use_hook_mlp_in(is_on)


def source_outputs(bridge: TransformerBridge, x: Tensor, names: Sequence[str]) -> dict:
    cache: dict[str, Tensor] = {}

    def save(activation: Tensor, hook: Any) -> None:
        cache[hook.name] = activation.clone()

    hook_names = {source_site(name)[0] for name in names}
    bridge.run_with_hooks(x, fwd_hooks=[(name, save) for name in hook_names])
    outputs = {}
    for name in names:
        hook_name, head = source_site(name)
        activation = cache[hook_name]
        outputs[name] = activation if head is None else activation[:, :, head]
    return outputs


def patch_each_edge(
    bridge: TransformerBridge,
    clean: Tensor,
    corrupt: Tensor,
    edges: Sequence[tuple[str, str, int | None]],
    ungroup: bool = False,
) -> Tensor:
    """[edge, seq, vocab]: the output on `clean` [1 seq] with one edge from `corrupt`.

    edges: (source, destination, position or None). A single patched edge changes nothing
    upstream of its destination, so its patch is what the source writes on `corrupt`
    minus what it writes on `clean`.

    ungroup: "A0.1.K" is the key that query head 1 reads: its whole group's is patched, and
    what the group's other heads make of it is set back to what they make on `clean`.
    """
    set_switches(bridge, True)
    names = sorted({src for src, _, _ in edges})
    on_clean = source_outputs(bridge, clean, names)
    on_corrupt = source_outputs(bridge, corrupt, names)
    additions: dict[str, list[tuple[int, int | None, Tensor]]] = {}
    for i, (src, dest, position) in enumerate(edges):
        change = (on_corrupt[src] - on_clean[src])[0].clone()
        if position is not None:
            keep = t.arange(change.shape[0]) == position
            change = change * keep[:, None]
        for hook_name, head in dest_sites(bridge, dest, ungroup):
            additions.setdefault(hook_name, []).append((i, head, change))

    def add(hook_name: str) -> Callable[[Tensor, Any], Tensor]:
        def hook_function(activation: Tensor, hook: Any) -> Tensor:
            activation = activation.clone()
            for i, head, change in additions[hook_name]:
                where = (i,) if head is None else (i, slice(None), head)
                activation[where] += change
            return activation

        return hook_function

    hooks: list[Any] = [(name, add(name)) for name in additions]
    if ungroup:
        hooks += heads_set_back(bridge, clean, [dest for _, dest, _ in edges])
    output = bridge.run_with_hooks(clean.expand(len(edges), -1), fwd_hooks=hooks)
    set_switches(bridge, False)
    return output


def heads_set_back(
    bridge: TransformerBridge, clean: Tensor, dests: Sequence[str]
) -> list[tuple[str, Callable[[Tensor, Any], Tensor]]]:
    """Hooks: of row i, all heads but that of a patched key or value are as on `clean`."""
    by_block: dict[str, list[tuple[int, int]]] = {}
    for i, dest in enumerate(dests):
        if match := re.fullmatch(r"A(\d+)\.(\d+)\.[KV]", dest):
            name = f"blocks.{match[1]}.attn.hook_z"
            by_block.setdefault(name, []).append((i, int(match[2])))
    on_clean: dict[str, Tensor] = {}

    def save(name: str) -> Callable[[Tensor, Any], None]:
        return lambda z, hook: on_clean.update({name: z.clone()})

    bridge.run_with_hooks(clean, fwd_hooks=[(name, save(name)) for name in by_block])

    def set_back(name: str) -> Callable[[Tensor, Any], Tensor]:
        def hook_function(z: Tensor, hook: Any) -> Tensor:
            z = z.clone()
            for i, head in by_block[name]:
                own = z[i, :, head].clone()
                z[i] = on_clean[name][0]
                z[i, :, head] = own
            return z

        return hook_function

    return [(name, set_back(name)) for name in by_block]
