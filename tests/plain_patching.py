"""Edges patched in plain Hugging Face models, by torch's hooks: no code of ours.

A `Plan` says where a model of a family does what, by the names of its modules. Everything
else follows from what an edge is: a source's other output is added to what one destination
reads, before the norm; all others read what they read before.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, Literal
from unittest import mock

import torch as t
from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedModel

# ----------------------------------------------------------------- what a family looks like

Stripe = Callable[[int, int, "Sizes"], int]
"""(0, 1, 2 for query, key, value; head; sizes) -> which stripe of d_head rows is its own."""


@dataclass(frozen=True)
class Sizes:
    heads: int
    kv_heads: int


def own_matrix(part: int, head: int, n: Sizes) -> int:
    """Queries, keys and values have matrices of their own."""
    return head


def thirds(part: int, head: int, n: Sizes) -> int:
    """All queries, all keys, all values."""
    return (0, n.heads, n.heads + n.kv_heads)[part] + head


def head_by_head(part: int, head: int, n: Sizes) -> int:
    """A head's query, key, value; then the next head's."""
    return 3 * head + part


def group_by_group(part: int, head: int, n: Sizes) -> int:
    """A group's queries, its key, its value; then the next group's."""
    group = n.heads // n.kv_heads
    if part == 0:
        return head // group * (group + 2) + head % group
    return head * (group + 2) + group + part - 1


def in_four_parts(part: int, head: int, n: Sizes) -> int:
    """Four times: queries, values, keys of a quarter of the heads."""
    quarter = n.heads // 4
    return (3 * (head // quarter) + (0, 2, 1)[part]) * quarter + head % quarter


@dataclass(frozen=True)
class Plan:
    """Where a family's models do what: modules of the model, and of its blocks.

    blocks, end: the blocks; the norm that reads the residual stream at its end.
    attn_norm, mlp_norm: what is between the residual stream and attention, or the MLP.
    qkv: the linear maps of queries, keys and values: three, or one for all of them.
    stripe: where a head's rows are in it.
    output: the linear map of attention's output.
    mlp_in, mlp_out: what reads the MLP's norm; what gives the MLP's output.
    attn_post_norm, mlp_post_norm: norms of what is added to the residual stream.
    scale: the number in the configuration that multiplies what is added.
    activation: what RelP makes linear. gated: its product has two factors; these are the
        maps that give them, and `down` is the map that reads it.
    """

    blocks: str = "model.layers"
    end: str = "model.norm"
    attn_norm: str | None = "input_layernorm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    stripe: Stripe = own_matrix
    output: str = "self_attn.o_proj"
    mlp_norm: str | None = "post_attention_layernorm"
    mlp_in: str = "mlp"
    mlp_out: str = "mlp"
    attn_post_norm: str | None = None
    mlp_post_norm: str | None = None
    scale: str | None = None
    activation: str | None = "mlp.act_fn"
    gated: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"


@dataclass(frozen=True)
class PlainModel:
    """A Hugging Face model with its plan."""

    model: PreTrainedModel
    plan: Plan

    @property
    def n_blocks(self) -> int:
        return len(self._get(self.plan.blocks))

    @property
    def sizes(self) -> Sizes:
        config: Any = self.model.config.get_text_config()
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or getattr(
            config, "num_kv_heads", heads
        )
        is_multi_query = getattr(config, "multi_query", False)
        is_multi_query &= not getattr(config, "new_decoder_architecture", False)
        return Sizes(heads, 1 if is_multi_query else kv_heads)

    @property
    def scale(self) -> float:
        return (
            1.0
            if self.plan.scale is None
            else getattr(self.model.config, self.plan.scale)
        )

    def _get(self, name: str) -> Any:
        return self.model.get_submodule(name)

    def end(self) -> Any:
        return self._get(self.plan.end)

    def block(self, i: int) -> Any:
        return self._get(f"{self.plan.blocks}.{i}")

    def part(self, block: int, name: str) -> Any:
        return self._get(f"{self.plan.blocks}.{block}.{name}")

    def norm(self, block: int, name: str | None) -> Any:
        return None if name is None else self.part(block, name)

    def logits(self, tokens: Tensor, **kwargs: Any) -> Tensor:
        return self.model(tokens, use_cache=False, **kwargs).logits

    def qkv(self, block: int, part: int) -> Any:
        """The linear map of queries (0), keys (1) or values (2)."""
        return self.part(block, self.plan.qkv[part if len(self.plan.qkv) > 1 else 0])

    def stripes(self, block: int, part: int) -> list[slice]:
        """Each head's rows in it."""
        width = len(in_out(self.part(block, self.plan.output))) // self.sizes.heads
        n_heads = self.sizes.heads if part == 0 else self.sizes.kv_heads
        starts = [self.plan.stripe(part, head, self.sizes) for head in range(n_heads)]
        return [slice(start * width, (start + 1) * width) for start in starts]


def ungrouped(plain: PlainModel) -> PlainModel:
    """A model that computes the same, in which every query head has its own key and value."""
    n_heads, group = plain.sizes.heads, plain.sizes.heads // plain.sizes.kv_heads
    if group == 1:
        return plain
    config = deepcopy(plain.model.config)
    of_text = config.get_text_config()
    for name in ("num_key_value_heads", "num_kv_heads"):
        if hasattr(of_text, name):
            setattr(of_text, name, n_heads)
    if getattr(config, "multi_query", False):
        config.multi_query = False
    model_class: Any = type(plain.model)
    model = model_class._from_config(config, attn_implementation="eager")
    is_bigcode = config.model_type == "gpt_bigcode"
    plan = replace(plain.plan, stripe=head_by_head) if is_bigcode else plain.plan
    wide = PlainModel(model.to(next(plain.model.parameters()).dtype).eval(), plan)
    of_heads = {wide.qkv(b, part) for b in range(plain.n_blocks) for part in range(3)}
    for new, old in zip(model.modules(), plain.model.modules(), strict=True):
        if new not in of_heads:
            new._parameters, new._buffers = old._parameters, old._buffers
    for block in range(plain.n_blocks):
        for part in range(3):
            new, old = (model.qkv(block, part) for model in (wide, plain))
            for head, rows in enumerate(wide.stripes(block, part)):
                was = plain.stripes(block, part)[head if part == 0 else head // group]
                for weight_name, _ in old.named_parameters(recurse=False):
                    _rows(new, weight_name)[rows] = _rows(old, weight_name)[was]
    model.requires_grad_(False)
    return wide


def _rows(linear: Any, name: str) -> Tensor:
    """Weights, or biases, as [output, ...]: a view."""
    weight = getattr(linear, name).data
    return weight.T if type(linear).__name__ == "Conv1D" and weight.ndim == 2 else weight


@contextmanager
def in_float64() -> Iterator[None]:
    """Inside, what Hugging Face computes in float32, whatever the model's type, is float64.

    Norms and softmax are: numbers of models in float64 would be good to 1e-7 only.
    """
    with (
        default_dtype(t.float64),
        mock.patch.multiple(t, float32=t.float64, float=t.float64),
        mock.patch.object(Tensor, "float", Tensor.double),
    ):
        yield


@contextmanager
def default_dtype(dtype: t.dtype) -> Iterator[None]:
    """Inside, new tensors have this type."""
    before = t.get_default_dtype()
    t.set_default_dtype(dtype)
    try:
        yield
    finally:
        t.set_default_dtype(before)


# ------------------------------------------------------------------------------ nodes


@dataclass(frozen=True)
class Node:
    """kind: "start", "head", "mlp" or "end"; part: 0, 1, 2 for a head's q, k, v."""

    kind: str
    block: int = 0
    head: int = 0
    part: int = 0


def node(name: str) -> Node:
    """The node of a name: "Resid Start", "A1.2", "A1.2.K", "MLP 1", "Resid End"."""
    if match := re.fullmatch(r"A(\d+)\.(\d+)(?:\.([QKV]))?", name):
        part = "QKV".index(match[3] or "Q")
        return Node("head", int(match[1]), int(match[2]), part)
    if match := re.fullmatch(r"MLP (\d+)", name):
        return Node("mlp", int(match[1]))
    return Node({"Resid Start": "start", "Resid End": "end"}[name])


# ---------------------------------------------------------------------- what sources write


def in_out(linear: Any) -> Tensor:
    """Weights as [input, output]; GPT-2's Conv1D has them so, a Linear the other way."""
    is_conv = type(linear).__name__ == "Conv1D"
    return linear.weight if is_conv else linear.weight.T


def is_centred(norm: Module) -> bool:
    """Does the norm subtract the mean (layer norm) or not (RMS norm)?"""
    name = type(norm).__name__
    assert "LayerNorm" in name or "RMSNorm" in name, name
    return "LayerNorm" in name


def shares(norm: Any, parts: Tensor, whole: Tensor) -> Tensor:
    """What each part of a sum is after a norm of the sum: [... part d] and [... d].

    The norm without its bias multiplies each number by something that is the same for the
    sum and for its parts; layer norm takes each one's mean away before. The bias is
    nobody's.
    """
    centre = is_centred(norm)
    bias = getattr(norm, "bias", None)
    normed = norm.forward(whole) - (0 if bias is None else bias)
    centred = whole - whole.mean(-1, keepdim=True) if centre else whole
    parts = parts - parts.mean(-1, keepdim=True) if centre else parts
    return parts * (normed / centred).unsqueeze(-2)


@contextmanager
def hooks() -> Iterator[Callable[..., None]]:
    """A function that hooks a module: `add(module, before=f)` or `after=f`.

    f: (the hidden states that the module gets, or gives) -> others, or None.
    """
    with ExitStack() as stack:

        def add(
            module: Module, before: Any = None, after: Any = None, is_first: bool = False
        ) -> None:
            def pre_hook(module: Module, args: Any, kwargs: Any) -> Any:
                if args:
                    new = before(args[0])
                    return None if new is None else ((new, *args[1:]), kwargs)
                new = before(kwargs["hidden_states"])
                return None if new is None else ((), {**kwargs, "hidden_states": new})

            def hook(module: Module, args: Any, out: Any) -> Any:
                if isinstance(out, tuple):
                    new = after(out[0])
                    return None if new is None else (new, *out[1:])
                return after(out)

            if before is not None:
                handle = module.register_forward_pre_hook(pre_hook, with_kwargs=True)
                stack.callback(handle.remove)
            if after is not None:
                handle = module.register_forward_hook(hook, prepend=is_first)
                stack.callback(handle.remove)

        yield add


def written(plain: PlainModel, tokens: Tensor, **kwargs: Any) -> dict[str, Tensor]:
    """What every source writes into the residual stream, [batch seq d_model], by name."""
    plan, seen = plain.plan, dict[str, Tensor]()

    def save(name: str) -> Callable[[Tensor], None]:
        # A copy: Falcon adds attention's output to the MLP's in place.
        return lambda x: seen.update({name: x.clone().view(len(tokens), -1, x.shape[-1])})

    with t.no_grad(), hooks() as add:
        add(plain.block(0), before=save("Resid Start"))
        for block in range(plain.n_blocks):
            add(plain.part(block, plan.output), before=save(f"z{block}"))
            mlp_out = plan.mlp_post_norm or plan.mlp_out
            add(plain.part(block, mlp_out), after=save(f"MLP {block}"))
        plain.logits(tokens, **kwargs)
    sources = {"Resid Start": seen["Resid Start"]}
    for block in range(plain.n_blocks):
        heads = heads_written(plain, block, seen[f"z{block}"])
        sources |= {f"A{block}.{i}": head for i, head in enumerate(heads.unbind(-2))}
        sources[f"A{block}"] = heads.sum(-2)  # where the source is the whole layer
        sources[f"MLP {block}"] = plain.scale * seen[f"MLP {block}"]
    return sources


def heads_written(plain: PlainModel, block: int, z: Tensor) -> Tensor:
    """[batch seq head*d_head] -> [batch seq head d_model]."""
    output, n_heads = plain.part(block, plain.plan.output), plain.sizes.heads
    weights = in_out(output).unflatten(0, (n_heads, -1))
    heads = t.einsum("bshe,hed->bshd", z.unflatten(-1, (n_heads, -1)), weights)
    norm = plain.norm(block, plain.plan.attn_post_norm)
    if norm is not None:
        bias = getattr(output, "bias", None)
        heads = heads if bias is None else heads + bias / n_heads
        heads = shares(norm, heads, heads.sum(-2))
    return plain.scale * heads


# ----------------------------------------------------------------------- what single edges do


def patch_each_edge(
    plain: PlainModel, clean: Tensor, corrupt: Tensor, edges: Sequence[tuple[str, str]]
) -> Tensor:
    """[edge seq vocab]: the logits on `clean` [1 seq] with one edge's `corrupt` each."""
    on_clean, on_corrupt = written(plain, clean), written(plain, corrupt)
    change = t.cat([on_corrupt[src] - on_clean[src] for src, _ in edges])
    return change_each(plain, clean, change, [dest for _, dest in edges])


def change_each(
    plain: PlainModel, clean: Tensor, change: Tensor, names: Sequence[str]
) -> Tensor:
    """[edge seq vocab]: the logits where each destination alone reads a changed stream."""
    plan, n = plain.plan, len(names)
    dests = [node(name) for name in names]
    inputs: dict[Any, Tensor] = {}

    def changed(norm: Any, x: Tensor) -> Tensor:
        """What a norm gives if every edge's change is added to what it reads."""
        x = x + change.reshape(x.shape)
        return x if norm is None else norm.forward(x)

    def rows(*wanted: Any) -> list[int]:
        of = [(dest.kind, dest.block, dest.part) for dest in dests]
        return [i for i, found in enumerate(of) if found[: len(wanted)] == wanted]

    def set_rows(x: Tensor, other: Tensor, these: list[int]) -> Tensor:
        x = x.clone()
        x.view(n, -1, x.shape[-1])[these] = other.view(n, -1, x.shape[-1])[these]
        return x

    def patch_mlp(block: int) -> Callable[[Tensor], Tensor]:
        norm = plain.norm(block, plan.mlp_norm)
        return lambda y: set_rows(
            y, changed(norm, inputs.get(norm, y)), rows("mlp", block)
        )

    def patch_heads(block: int, part: int, linear: Any) -> Callable[[Tensor], Tensor]:
        norm, stripes = plain.norm(block, plan.attn_norm), plain.stripes(block, part)

        def patch(out: Tensor) -> Tensor:
            x = inputs[linear if norm is None else norm]
            other, out = linear.forward(changed(norm, x)), out.clone()
            for i in rows("head", block, part):
                own = stripes[dests[i].head]
                out[i, :, own] = other[i, :, own]
            return out

        return patch

    def save(module: Any) -> Callable[[Tensor], None]:
        return lambda x: inputs.update({module: x})

    with t.no_grad(), hooks() as add:
        for block in range(plain.n_blocks):
            for norm in {plain.norm(block, n) for n in (plan.attn_norm, plan.mlp_norm)}:
                if norm is not None:
                    add(norm, before=save(norm))
            for part in range(3):
                linear = plain.qkv(block, part)
                if rows("head", block, part):
                    add(linear, before=save(linear))
                    add(linear, after=patch_heads(block, part, linear))
            if rows("mlp", block):
                add(plain.part(block, plan.mlp_in), before=patch_mlp(block))
        add(plain.end(), before=lambda x: set_rows(x, changed(None, x), rows("end")))
        return plain.logits(clean.expand(n, -1))


# ----------------------------------------------------------------- gradients by other rules

Rules = Literal["none", "gim", "relp"]


class SofterBackward(t.autograd.Function):
    """Softmax, with the gradient s (g - <g, s>) of the softmax s at temperature 2."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        ctx.save_for_backward(scores)
        return scores.softmax(-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (scores,) = ctx.saved_tensors
        soft = (scores / 2).softmax(-1)
        return soft * (grads[0] - (grads[0] * soft).sum(-1, keepdim=True))


def scaled(x: Tensor, factor: float | Tensor) -> Tensor:
    """x, whose gradient is multiplied."""
    return x.detach() + factor * (x - x.detach())


def with_constant(x: Tensor, factor: Tensor, value: Tensor) -> Tensor:
    """`value`, with the gradient of x times a constant."""
    product = x * factor.detach()
    return value.detach() + (product - product.detach())


def _frozen_scale(norm: Any, args: Any, out: Tensor) -> Tensor:
    """y = gain (x - mean) / scale + bias, where the scale is a constant."""
    x = args[0] - args[0].mean(-1, keepdim=True) if is_centred(norm) else args[0]
    bias = getattr(norm, "bias", None)
    return with_constant(x, (out if bias is None else out - bias) / x, out)


def _linear_activation(module: Module, args: Any, out: Tensor) -> Tensor:
    """y = x (y / x), where the quotient is a constant."""
    return with_constant(args[0], out / args[0], out)


def _halved(module: Module, args: Any, out: Tensor) -> Tensor:
    return scaled(out, 0.5)


@contextmanager
def backward_rules(plain: PlainModel, rules: Rules) -> Iterator[None]:
    """Inside, gradients flow by the rules of GIM or of RelP; values are what they are.

    GIM: the softmax of attention has another gradient; queries and keys pass 1/4 of theirs,
    values 1/2. RelP: activations are linear. Both: scales of norms are constants, and the
    two factors of a gated MLP pass 1/2.
    """
    if rules == "none":
        yield
        return
    plan = plain.plan
    norms = [m for m in plain.model.modules() if "Norm" in type(m).__name__]
    hooked: list[tuple[Any, Any]] = [
        (norm, _frozen_scale) for norm in norms if not list(norm.children())
    ]
    for block in range(plain.n_blocks):
        hooked += [(plain.part(block, name), _halved) for name in plan.gated]
        if rules == "relp":
            assert plan.activation is not None
            hooked.append((plain.part(block, plan.activation), _linear_activation))
        else:
            hooked += _weaker_heads(plain, block)
    with ExitStack() as stack:
        for module, hook in hooked:
            stack.callback(module.register_forward_hook(hook).remove)
        if rules == "gim":
            stack.enter_context(_softer_softmax())
        yield


@contextmanager
def _softer_softmax() -> Iterator[None]:
    plain_softmax = t.nn.functional.softmax

    def softmax(
        scores: Tensor, dim: int = -1, dtype: Any = None, **kwargs: Any
    ) -> Tensor:
        if scores.ndim < 3:  # the weights of experts
            return plain_softmax(scores, dim=dim, dtype=dtype)
        assert dim in (-1, scores.ndim - 1)
        return SofterBackward.apply(scores if dtype is None else scores.to(dtype))  # type: ignore[no-any-return]

    with mock.patch.object(t.nn.functional, "softmax", softmax):
        yield


def _weaker_heads(plain: PlainModel, block: int) -> list[tuple[Any, Any]]:
    found = []
    for name in plain.plan.qkv:
        linear = plain.part(block, name)
        factors = t.ones(in_out(linear).shape[1], dtype=linear.weight.dtype)
        for part, factor in ((0, 0.25), (1, 0.25), (2, 0.5)):
            if plain.qkv(block, part) is linear:
                for rows in plain.stripes(block, part):
                    factors[rows] = factor
        found.append((linear, lambda m, args, out, factors=factors: scaled(out, factors)))
    return found


def edge_scores(
    plain: PlainModel,
    clean: Tensor,
    corrupt: Tensor,
    loss: Callable[[Tensor], Tensor],
    rules: Rules = "none",
) -> dict[tuple[str, str], float]:
    """Attribution of every pair: (the source's change) * (the gradient where it is read)."""
    on_clean, on_corrupt = written(plain, clean), written(plain, corrupt)
    with backward_rules(plain, rules):
        grads = _gradients(plain, clean, loss)
    return {
        (src, dest): float(((on_corrupt[src] - on_clean[src]) * grad).sum())
        for src in on_clean
        for dest, grad in grads.items()
    }


def _gradients(
    plain: PlainModel, tokens: Tensor, loss: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """The gradient at what each destination reads, [1 seq d_model], by name."""
    plan, seen = plain.plan, dict[Any, Tensor]()

    def save(place: Any) -> Callable[[Tensor], None]:
        return lambda x: seen.update({place: x})

    def save_alone(place: Any) -> Callable[[Tensor], Tensor]:
        """What nobody else reads: without a norm it is the residual stream itself."""
        return lambda x: seen.setdefault(place, x.view_as(x))

    with hooks() as add:
        add(plain.block(0), before=lambda x: x.detach().requires_grad_())
        for block in range(plain.n_blocks):
            for norm in {plain.norm(block, n) for n in (plan.attn_norm, plan.mlp_norm)}:
                if norm is not None:
                    add(norm, before=save(norm))
            for linear in {plain.qkv(block, part) for part in range(3)}:
                add(linear, before=save(("in", linear)))
                add(linear, after=save(("out", linear)), is_first=True)
            add(plain.part(block, plan.mlp_in), before=save_alone(("mlp", block)))
        add(plain.end(), before=save("end"))
        value = loss(plain.logits(tokens))
    places = [p for p in seen if p == "end" or (type(p) is tuple and p[0] != "in")]
    grads = dict(
        zip(places, t.autograd.grad(value, [seen[p] for p in places]), strict=True)
    )
    found = {"Resid End": grads["end"]}
    for block in range(plain.n_blocks):
        norm = plain.norm(block, plan.mlp_norm)
        x = seen.get(norm, seen["mlp", block])
        found[f"MLP {block}"] = _pulled_back(x, norm, None, grads["mlp", block])
        norm = plain.norm(block, plan.attn_norm)
        for part, letter in enumerate("QKV"):
            linear = plain.qkv(block, part)
            x = seen["in", linear] if norm is None else seen[norm]
            for head, rows in enumerate(plain.stripes(block, part)):
                grad = t.zeros_like(grads["out", linear])
                grad[..., rows] = grads["out", linear][..., rows]
                found[f"A{block}.{head}.{letter}"] = _pulled_back(x, norm, linear, grad)
    return {name: grad.reshape(1, -1, grad.shape[-1]) for name, grad in found.items()}


def _pulled_back(x: Tensor, norm: Any, linear: Any, grad: Tensor) -> Tensor:
    """The gradient before a norm and a linear map, from that after them."""
    x = x.detach().requires_grad_()
    y = x if norm is None else norm(x)
    y = y if linear is None else linear.forward(y)
    return t.autograd.grad(y, x, grad)[0] if y is not x else grad
