"""Users' hooks inside of `patch_mode`: they do what they do in a plain model, or raise.

The reference patches edges by plain TransformerLens hooks at every node, with the user's
hooks among them, and shares nothing with the engine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch as t
from torch import Tensor

from auto_circuit.errors import GraphError
from auto_circuit.utils.ablation_activations import src_ablations
from auto_circuit.utils.backward_modifiers import gim_backward
from auto_circuit.utils.graph_utils import (
    patch_mode,
    patchable_model,
    set_all_masks,
    starting_at,
    train_mask_mode,
)
from auto_circuit.utils.patchable_model import PatchableModel
from auto_circuit.utils.user_hooks import UserHooks
from tests.families import bridge_of, make
from tests.models import gpt2, llama, tokens
from tests.path_patching import set_switches

CLEAN, CORRUPT = tokens(3, 5, seed=1), tokens(3, 5, seed=2)
CLOSE: dict[str, Any] = {"atol": 2e-5, "rtol": 1e-5}

pytestmark = pytest.mark.filterwarnings("ignore:A forward hook edited hook_scale")

TAKE_EFFECT = (
    "blocks.0.hook_resid_pre",
    "blocks.1.hook_resid_pre",
    "blocks.0.attn.hook_q",
    "blocks.0.attn.hook_v",
    "blocks.0.attn.hook_pattern",
    "blocks.0.attn.hook_z",
    "blocks.0.hook_attn_out",
    "blocks.0.ln2.hook_in",
    "blocks.0.hook_mlp_in",
    "blocks.0.ln2.hook_scale",
    "blocks.0.ln2.hook_normalized",
    "blocks.0.ln2.hook_out",
    "blocks.0.mlp.hook_in",
    "blocks.0.mlp.out.hook_in",
    "blocks.0.hook_mlp_out",
    "blocks.1.hook_resid_post",
    "ln_final.hook_normalized",
    "unembed.hook_in",
)
REFUSED = (
    "blocks.1.ln1.hook_scale",
    "blocks.1.ln1.hook_normalized",
    "blocks.1.ln1.hook_out",
    "blocks.1.attn.hook_in",
    "blocks.1.attn.q.hook_in",
    "blocks.1.attn.v.hook_in",
)


@pytest.fixture(scope="module", params=[gpt2, llama])
def model(request: pytest.FixtureRequest) -> PatchableModel:
    return patchable_model(request.param(), True, separate_qkv=True)


@pytest.fixture(scope="module")
def one_model() -> PatchableModel:
    return patchable_model(gpt2(), True, separate_qkv=True)


def change(x: Tensor, hook: Any = None) -> Tensor:
    """A change that no norm takes out again, and another one at the first position."""
    changed = 0.5 * x + 0.3 * t.linspace(-1, 1, x.shape[-1])
    return t.cat([0.7 * changed[:, :1], changed[:, 1:]], 1)


def change_in_place(x: Tensor, hook: Any = None) -> None:
    x.mul_(0.5)


def random_masks(model: PatchableModel, share: float | None = None) -> None:
    generator = t.Generator().manual_seed(0)
    for mask in model.patch_masks.values():
        noise = t.rand(mask.shape, generator=generator)
        mask.data.copy_(noise if share is None else (noise < share).float())


def hooked(model: PatchableModel, site: str, hook: Any, how: str) -> Callable[[], Tensor]:
    """A pass with a hook that is only there while it lasts."""
    bridge: Any = model.wrapped_model

    def run() -> Tensor:
        if how == "run_with_hooks":
            return model.run_with_hooks(CLEAN, fwd_hooks=[(site, hook)])
        point = bridge.hook_dict[site]
        if point.hook_conversion is not None:  # only TransformerLens's hooks see heads
            point.add_hook(hook)
            handle = point.fwd_hooks[-1].hook
        else:
            handle = point.register_forward_hook(lambda module, args, x: hook(x))
        try:
            return model(CLEAN)
        finally:
            handle.remove()

    return run


def with_plain_hooks(
    model: PatchableModel, patch: Tensor, user: list[Any], is_first: bool
) -> Tensor:
    """Patch along all edges, by the masks, with hooks of TransformerLens alone."""
    bridge: Any = model.wrapped_model
    current: dict[int, Tensor] = {}
    hooks: list[Any] = []

    def read(x: Tensor, hook: Any, name: str) -> Tensor:
        mask, srcs = model.patch_masks[name], model.wrapper(name).in_srcs
        assert srcs is not None
        ids = range(srcs.start, srcs.stop)
        difference = t.stack([patch[i] - current[i] for i in ids])
        if mask.ndim == 2:
            return x + t.einsum("hs,sbpd->bphd", mask, difference)
        return x + t.einsum("s,sbpd->bpd", mask, difference)

    for name in model.patch_masks:
        hooks.append((name, lambda x, hook, name=name: read(x, hook, name)))
    for src in model.srcs:

        def write(x: Tensor, hook: Any, src: Any = src) -> None:
            current[src.src_idx] = x if src.head_idx is None else x[:, :, src.head_idx]

        hooks.append((src.module_name, write))
    set_switches(bridge, True)
    try:
        both = [*user, *hooks] if is_first else [*hooks, *user]
        return bridge.run_with_hooks(CLEAN, fwd_hooks=both)
    finally:
        set_switches(bridge, False)


CASES = [
    ("run_with_hooks", None),
    ("run_with_hooks", 0.98),
    pytest.param("run_with_hooks", 0.02, marks=pytest.mark.slow),
    pytest.param("torch", 0.98, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("how, share", CASES)
def test_hooks_take_effect(model: PatchableModel, how: str, share: float | None) -> None:
    """Whether some of all edges, a few, or all but a few are patched."""
    patch = src_ablations(model, CORRUPT)
    random_masks(model, share)
    with t.no_grad():
        plain = with_plain_hooks(model, patch, [], False)
        expected = {
            site: with_plain_hooks(model, patch, [(site, change)], False)
            for site in TAKE_EFFECT
        }
        # What is patched along all of its edges anyway cannot be changed.
        effects = [float((out - plain).abs().max()) for out in expected.values()]
        assert sum(effect > 1e-3 for effect in effects) > len(effects) / 3
        with patch_mode(model, patch):
            for site in TAKE_EFFECT:
                found = hooked(model, site, change, how)()
                assert_close(found, expected[site], site)
                assert_close(model(CLEAN), plain, f"after {site}")
    set_all_masks(model, 0.0)


@pytest.mark.parametrize("share", [0.98, pytest.param(None, marks=pytest.mark.slow)])
def test_hooks_that_were_there_before(model: PatchableModel, share: float | None) -> None:
    bridge: Any = model.wrapped_model
    patch = src_ablations(model, CORRUPT)
    random_masks(model, share)
    with t.no_grad():
        for site in TAKE_EFFECT[::3]:
            expected = with_plain_hooks(model, patch, [(site, change)], True)
            bridge.hook_dict[site].add_hook(change)
            try:
                with patch_mode(model, patch):
                    assert_close(model(CLEAN), expected, site)
            finally:
                bridge.reset_hooks()
    set_all_masks(model, 0.0)


def assert_close(found: Tensor, expected: Tensor, where: str) -> None:
    t.testing.assert_close(found, expected, msg=lambda text: f"{where}: {text}", **CLOSE)


def test_gradients_with_hooks_are_those_of_plain_hooks(model: PatchableModel) -> None:
    patch = src_ablations(model, CORRUPT)
    with train_mask_mode(model) as masks:
        random_masks(model)
        for site in TAKE_EFFECT:
            reference = with_plain_hooks(model, patch, [(site, change)], False)
            expected = t.autograd.grad(reference.square().sum(), list(masks.values()))
            with patch_mode(model, patch):
                found = hooked(model, site, change, "run_with_hooks")()
                grads = t.autograd.grad(found.square().sum(), list(masks.values()))
            for name, grad, right in zip(masks, grads, expected, strict=True):
                t.testing.assert_close(
                    grad,
                    right,
                    atol=1e-3 * float(right.abs().max()) + 1e-4,
                    rtol=1e-3,
                    msg=lambda m, where=(site, name): f"{where}: {m}",
                )


@pytest.mark.parametrize("grad", [False, True])
def test_hooks_that_heads_would_not_see_are_refused(
    one_model: PatchableModel, grad: bool
) -> None:
    patch = src_ablations(one_model, CORRUPT)
    random_masks(one_model, 0.5)
    with t.set_grad_enabled(grad), patch_mode(one_model, patch):
        for idx, site in enumerate(REFUSED):
            hooks = [change, change_in_place]
            if site.endswith(("scale", "normalized")):
                hooks.pop()  # TransformerLens passes over what is changed there in place
            for hook in hooks:
                how = ("run_with_hooks", "torch")[idx % 2]
                with pytest.raises(GraphError, match=f"A hook at `{site}` changes what"):
                    hooked(one_model, site, hook, how)()
    set_all_masks(one_model, 0.0)


def test_refused_hooks_that_were_there_before(one_model: PatchableModel) -> None:
    bridge: Any = one_model.wrapped_model
    patch = src_ablations(one_model, CORRUPT)
    bridge.add_hook("blocks.1.ln1.hook_normalized", change)
    with t.no_grad(), patch_mode(one_model, patch):
        with pytest.raises(GraphError, match="hook_normalized` changes what passes"):
            one_model(CLEAN)
    (hook,) = bridge.blocks[1].ln1.hook_normalized._forward_hooks.values()
    assert "transformer_lens" in hook.__module__  # its own again
    bridge.reset_hooks()


def test_changed_gradients_are_refused(one_model: PatchableModel) -> None:
    bridge: Any = one_model.wrapped_model
    patch = src_ablations(one_model, CORRUPT)
    site = "blocks.1.ln1.hook_out"
    with train_mask_mode(one_model), patch_mode(one_model, patch):
        for hook in (lambda x, hook: x.detach(), lambda x, hook: x * 1.0):
            with pytest.raises(GraphError, match=f"A hook at `{site}` changes"):
                one_model.run_with_hooks(CLEAN, fwd_hooks=[(site, hook)])
        for where in (site, "blocks.1.ln1.hook_in", "blocks.1.attn.hook_z"):
            bridge.add_hook(where, lambda grad, hook: None, dir="bwd")
            with pytest.raises(GraphError, match="a backward hook at"):
                one_model(CLEAN)
            bridge.reset_hooks()
        bridge.add_hook("blocks.1.mlp.hook_in", lambda grad, hook: None, dir="bwd")
        assert one_model(CLEAN).requires_grad
        bridge.reset_hooks()


@pytest.mark.parametrize("where", ["ln1", "attn", "attn.q", "attn.o", "ln1.inner"])
def test_torch_hooks_on_modules(one_model: PatchableModel, where: str) -> None:
    """Before a module that is passed by; for a norm also after."""
    block: Any = one_model.wrapped_model.blocks[1]  # type: ignore[union-attr, index]
    module: Any = block.get_submodule(where.removesuffix(".inner"))
    if where in ("ln1.inner", "attn.o"):
        module = module.original_component
    patch = src_ablations(one_model, CORRUPT)
    random_masks(one_model, 0.5)

    def before(module: Any, args: Any, kwargs: Any) -> Any:
        args = tuple(2 * x for x in args)
        return args, {k: 2 * x if t.is_tensor(x) else x for k, x in kwargs.items()}

    handle = module.register_forward_pre_hook(before, with_kwargs=True)
    with t.no_grad(), patch_mode(one_model, patch):
        with pytest.raises(GraphError, match=f"at `blocks.1.{where.split('.inner')[0]}`"):
            one_model(CLEAN)
        handle.remove()
        expected = one_model(CLEAN)
        seen: list[Any] = []
        handle = module.register_forward_pre_hook(lambda m, args: seen.append(args))
        t.testing.assert_close(one_model(CLEAN), expected, **CLOSE)
        assert seen
        handle.remove()
        if where.startswith("ln1"):
            handle = module.register_forward_hook(lambda m, args, out: 2 * out)
            with pytest.raises(GraphError, match="at `blocks.1.ln1` changes"):
                one_model(CLEAN)
            handle.remove()
    set_all_masks(one_model, 0.0)


def test_what_only_looks_on_sees_what_plain_hooks_see(model: PatchableModel) -> None:
    patch = src_ablations(model, CORRUPT)
    for share in (None, 0.02, 0.98):
        random_masks(model, share)
        reference: dict[str, Tensor] = {}

        def save(x: Tensor, hook: Any, to: dict[str, Tensor] = reference) -> None:
            to[hook.name] = x.detach().clone()

        sites = [s for s in (*TAKE_EFFECT, *REFUSED) if "hook_" in s]
        sites = [s for s in sites if not s.startswith("blocks.1.attn")]
        with t.no_grad():
            expected = with_plain_hooks(model, patch, [(s, save) for s in sites], False)
            with patch_mode(model, patch):
                for _ in range(2):
                    found, cache = model.run_with_cache(CLEAN)
                    t.testing.assert_close(found, expected, **CLOSE)
                    for name, value in reference.items():
                        t.testing.assert_close(
                            cache[name], value, msg=lambda m, n=name: f"{n} {m}", **CLOSE
                        )
    assert len(reference) > 15
    set_all_masks(model, 0.0)


def test_what_was_recorded_under_hooks_is_not_taken_for_the_model() -> None:
    """A graph made while a hook adds something; the hook is removed afterwards."""
    bridge: Any = gpt2()
    bridge.add_hook("blocks.0.hook_attn_out", lambda x, hook: x + 1.0)
    model = patchable_model(bridge, True, separate_qkv=True)
    bridge.reset_hooks()
    patch = src_ablations(model, CORRUPT)
    random_masks(model, 0.98)
    with t.no_grad():
        expected = with_plain_hooks(model, patch, [], False)
        with patch_mode(model, patch):
            t.testing.assert_close(model(CLEAN), expected, **CLOSE)


def test_a_pass_from_the_middle_under_other_hooks(one_model: PatchableModel) -> None:
    bridge: Any = one_model.wrapped_model
    patch = src_ablations(one_model, CORRUPT)
    (end,) = [dest for dest in one_model.dests if dest.name == "Resid End"]
    with t.no_grad(), patch_mode(one_model, patch, keeps_layers=True):
        one_model(CLEAN)
        bridge.add_hook("blocks.0.hook_mlp_out", change)
        with pytest.raises(GraphError, match="added or removed since the whole pass"):
            with starting_at(one_model, end):
                one_model(CLEAN)
        expected = one_model(CLEAN)
        with starting_at(one_model, end):
            t.testing.assert_close(one_model(CLEAN), expected, **CLOSE)
        bridge.reset_hooks()


def test_the_engines_own_modifiers_are_no_users_hooks(one_model: PatchableModel) -> None:
    patch = src_ablations(one_model, CORRUPT)
    with train_mask_mode(one_model), gim_backward(one_model):
        assert not one_model.user_hooks.ids()
        with patch_mode(one_model, patch):
            assert one_model(CLEAN).requires_grad


def test_a_hook_before_the_unembedding_sees_all_positions() -> None:
    model = patchable_model(gpt2(), True, separate_qkv=True, slice_output="last_seq")
    bridge: Any = model.wrapped_model
    plain = model.sliced(CLEAN)
    shapes = []
    bridge.add_hook("unembed.hook_in", lambda x, hook: shapes.append(x.shape))
    t.testing.assert_close(model.sliced(CLEAN), plain, **CLOSE)
    assert shapes == [(3, 5, 32)]


def test_hooks_of_transformer_lens_are_no_users_hooks() -> None:
    """In OPT it wires parts of blocks by hooks that it adds as a user would."""
    bridge = bridge_of(make("opt"))
    assert any(module._forward_hooks for module in bridge.modules())
    assert UserHooks(bridge).ids() == []
    bridge.add_hook("blocks.0.mlp.in.hook_in", lambda x, hook: None)
    assert len(UserHooks(bridge).ids()) == 1
