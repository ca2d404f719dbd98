"""A Llama with any edges patched, written out in plain torch: no code of ours.

Edges are named as in the library, at spans: "A0.1->A1.2.Q @ 3", and through attention
"A0.1.V[0]->A0.2 by value @ 3": what head 0.2 reads at the tokens of span 3 of the values of
its group (that of head 0.1) at those of span 0.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch as t
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


@dataclass
class Run:
    """What sources write, [batch seq d_model]; keys and values, [batch head seq d_head]."""

    written: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    logits: Tensor = field(default_factory=lambda: t.empty(0))


@dataclass
class PlainLlama:
    """spans: the number of each token's span."""

    model: Any
    spans: Sequence[int]

    def circuit(self, clean: Tensor, corrupt: Tensor, patched: Collection[str]) -> Tensor:
        """The logits on `clean` with these edges patched from `corrupt`."""
        with t.no_grad():
            other = self.run(corrupt, None, ())
            return self.run(clean, other, set(patched)).logits

    def run(self, tokens: Tensor, other: Run | None, patched: Collection[str]) -> Run:
        inner, run = self.model.model, Run()
        run.written["Resid Start"] = inner.embed_tokens(tokens)
        places = t.arange(tokens.shape[1])[None]
        rotary = inner.rotary_emb(run.written["Resid Start"], places)

        def read(dest: str) -> Tensor:
            total = t.stack(list(run.written.values())).sum(0)
            for src, own in run.written.items():
                if other is None:
                    break
                is_patched = [f"{src}->{dest} @ {span}" in patched for span in self.spans]
                change = other.written[src] - own
                total = total + t.tensor(is_patched)[:, None] * change
            return total

        def pairs(src: str, dest: str) -> Tensor:
            """[to from]: is what is read there patched?"""
            return t.tensor(
                [
                    [f"{src}[{i}]->{dest} @ {to}" in patched for i in self.spans]
                    for to in self.spans
                ]
            )

        for i, block in enumerate(inner.layers):
            heads = self._heads(i, block, rotary, read, pairs, run, other)
            run.written |= heads
            run.written[f"MLP {i}"] = block.mlp(
                block.post_attention_layernorm(read(f"MLP {i}"))
            )
        run.logits = self.model.lm_head(inner.norm(read("Resid End")))
        return run

    def _heads(
        self, i: int, block: Any, rotary: Any, read: Any, pairs: Any, run: Run, other: Any
    ) -> dict[str, Tensor]:
        """What the heads of a block write."""
        attention, config = block.self_attn, self.model.config
        d_head, n_heads = attention.head_dim, config.num_attention_heads
        group = n_heads // config.num_key_value_heads

        def projected(letter: str, head: int) -> Tensor:
            linear = getattr(attention, f"{letter.lower()}_proj")
            x = block.input_layernorm(read(f"A{i}.{head}.{letter}"))
            return x @ linear.weight[head * d_head : (head + 1) * d_head].T

        for g in range(config.num_key_value_heads):
            key = projected("K", g)[:, None]
            run.keys[f"A{i}.{g}"] = apply_rotary_pos_emb(key, key, *rotary)[1][:, 0]
            run.values[f"A{i}.{g}"] = projected("V", g)
        found = {}
        for head in range(n_heads):
            name, source = f"A{i}.{head}", f"A{i}.{head // group}"
            query = projected("Q", head)[:, None]
            query = apply_rotary_pos_emb(query, query, *rotary)[0][:, 0] / d_head**0.5
            scores = query @ run.keys[source].mT
            values = run.values[source]
            change, is_value = t.zeros_like(values), t.zeros(())
            if other is not None:
                change = other.values[source] - values
                is_key = pairs(f"{source}.K", f"{name} by key")
                scores = t.where(is_key, query @ other.keys[source].mT, scores)
                is_value = pairs(f"{source}.V", f"{name} by value")
            later = t.ones(scores.shape[-2:], dtype=t.bool).triu(1)
            pattern = scores.masked_fill(later, -t.inf).softmax(-1)
            z = pattern @ values + (pattern * is_value) @ change
            columns = slice(head * d_head, (head + 1) * d_head)
            found[name] = z @ attention.o_proj.weight[:, columns].T
        return found
