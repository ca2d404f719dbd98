"""A transformer whose MLPs are seen through sparse autoencoders.

What an MLP writes is the sum of what its autoencoder's latents write and of an error that
they leave. The latents and the error are sources of the graph ("MLP 3 Latent 17", "MLP 3
Error") in place of the MLP; destinations are those of the transformer. Since the error is
kept, the model's outputs are the bare model's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from warnings import warn

import torch as t
from torch import Tensor
from torch.nn import Module, ModuleDict
from transformer_lens.model_bridge import TransformerBridge

from auto_circuit.checks import checked
from auto_circuit.data import PromptDataLoader
from auto_circuit.errors import ConfigError, ModelError
from auto_circuit.model_utils.features.active import whole_prompts
from auto_circuit.model_utils.model_adapter import GraphNodes, ModelAdapter, Port, SrcSite
from auto_circuit.model_utils.sparse_autoencoders.sparse_autoencoder import (
    SparseAutoencoder,
    load_autoencoder,
)
from auto_circuit.model_utils.transformer_lens_sites import (
    has_mlps,
    has_post_norm,
    hook_point,
)
from auto_circuit.model_utils.transformer_lens_utils import (
    TRANSFORMER_BRIDGE_ADAPTER,
    embed_tokens,
    factorized_dest_nodes,
    factorized_src_nodes,
    small_bridge,
)
from auto_circuit.published_names import published_name as __getattr__  # noqa: F401
from auto_circuit.types import AutoencoderInput, SrcNode
from auto_circuit.utils.module_use import in_use
from auto_circuit.utils.torch_state import in_own_state

SAE_HOOKS: Mapping[AutoencoderInput, str] = {
    "resid_delta_mlp": "hook_mlp_out",
    "mlp_post_act": "mlp.hook_post",
}
"""What is encoded: what an MLP writes, or its neurons' activations."""
LATENTS, ERROR = ".latents", ".error"


class AutoencoderTransformer(Module):
    """A TransformerBridge and an autoencoder for each of some blocks.

    wrapped_model: the transformer, which is not changed. saes: block index -> its
    autoencoder (or a sequence of them, from block 0 on).
    sae_input: what they encode.

    Called, it is the wrapped model. Attributes that it does not have are that one's.
    """

    @checked
    def __init__(
        self,
        wrapped_model: TransformerBridge,
        saes: Mapping[int, SparseAutoencoder] | list[SparseAutoencoder],
        sae_input: AutoencoderInput = "resid_delta_mlp",
    ) -> None:
        super().__init__()
        self.wrapped_model = wrapped_model
        by_block = saes if isinstance(saes, Mapping) else dict(enumerate(saes))
        self._saes = ModuleDict({str(block): sae for block, sae in by_block.items()})
        self.sae_input: AutoencoderInput = sae_input
        _check(self)
        param = next(wrapped_model.parameters())
        self._saes.to(param.device, param.dtype)
        self.eval()

    @property
    def saes(self) -> dict[int, SparseAutoencoder]:
        """Block index -> its autoencoder."""
        return {int(block): sae for block, sae in self._saes.items()}  # type: ignore[misc]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("wrapped_model", "_saes"):
                raise
            return getattr(self.wrapped_model, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped model's output."""
        return self.wrapped_model(*args, **kwargs)

    @checked
    def pruned(
        self,
        dataloader: PromptDataLoader,
        max_latents: int | None = None,
        include_corrupt: bool = False,
    ) -> AutoencoderTransformer:
        """Keep, in each block, the latents that are most active on some prompts.

        max_latents: at most so many, by their mean activation; None: all that are ever
            active. include_corrupt: the corrupt prompts count too. Padding does not count.
        """
        sums = self._activation_sums(dataloader, include_corrupt)
        kept = {}
        for block, sae in self.saes.items():
            order = sums[block].argsort(descending=True, stable=True)[:max_latents]
            active = [int(i) for i in order if sums[block][i] > 0]
            kept[block] = sae.pruned([sae.latent_idxs[i] for i in active])
        return AutoencoderTransformer(self.wrapped_model, kept, self.sae_input)

    @in_own_state(grad=False)
    def _activation_sums(
        self, dataloader: PromptDataLoader, include_corrupt: bool
    ) -> dict[int, Tensor]:
        sums = {b: t.zeros(s.n_latents, dtype=t.float64) for b, s in self.saes.items()}

        is_text = t.empty(0)

        def add(block: int, activations: Tensor) -> None:
            latents = self.saes[block].encode(activations) * is_text
            sums[block] += latents.double().flatten(0, -2).sum(0).cpu()

        with in_use(self.wrapped_model, self), _seen(self, add):
            for batch in dataloader:
                for side in ("clean", "corrupt") if include_corrupt else ("clean",):
                    tokens, mask = whole_prompts(
                        self.wrapped_model, batch, side, dataloader.kv_cache
                    )
                    is_text = mask.unsqueeze(-1)
                    self.wrapped_model(tokens, attention_mask=mask)
        return sums


@checked
def sae_model(
    model: TransformerBridge,
    sae_input: AutoencoderInput,
    load_pretrained: bool,
    n_latents: int | None = None,
    pythia_size: str | None = None,
    new_instance: bool = True,
) -> AutoencoderTransformer:
    """A model with an autoencoder for every block: published ones, or random ones.

    load_pretrained: from files, see `load_autoencoder`. Else random, of `n_latents`.
    new_instance: False warns: the model is never changed, so it is not copied.
    Raises ConfigError without `n_latents` where they are needed and for "resid", ModelError
    without the files.
    """
    if not new_instance:
        warn(
            "`new_instance=False` means nothing here: the model is never changed, so there "
            "is no copy to avoid; leave it out.",
            stacklevel=2,
        )
    hook = _hook_name(sae_input)
    _check_mlps(model, sae_input)
    if not load_pretrained and n_latents is None:
        raise ConfigError("Random autoencoders need `n_latents`, or load published ones.")
    saes = {}
    for block in range(model.cfg.n_layers):
        module = _find_hook(model, block, hook)
        if load_pretrained:
            saes[block] = load_autoencoder(module, model, block, sae_input, pythia_size)
        else:
            n_inputs = _n_inputs(model, block, sae_input)
            saes[block] = SparseAutoencoder(module, n_latents or 0, n_inputs, seed=block)
    return AutoencoderTransformer(model, saes, sae_input)


def _hook_name(sae_input: AutoencoderInput) -> str:
    if sae_input not in SAE_HOOKS:
        raise ConfigError(
            f"Autoencoders of {sae_input!r} cannot be put into the graph: the residual "
            "stream itself is no source, but the sum of all. Expected one of "
            f"{list(SAE_HOOKS)}."
        )
    return SAE_HOOKS[sae_input]


def _find_hook(model: TransformerBridge, block: int, hook: str) -> Module:
    return hook_point(model, f"blocks.{block}.{hook}")


def _n_inputs(model: TransformerBridge, block: int, sae_input: AutoencoderInput) -> int:
    if sae_input == "resid_delta_mlp":
        return model.cfg.d_model
    return _write_weight(model, block).shape[0]


def _write_weight(model: TransformerBridge, block: int) -> Tensor:
    return model.blocks[block].mlp.W_out


def _check_mlps(model: TransformerBridge, sae_input: AutoencoderInput) -> None:
    if not has_mlps(model):
        raise ModelError("The model has no MLPs, so it has nothing for autoencoders.")
    if sae_input == "mlp_post_act" and has_post_norm(model):
        raise ModelError(
            "The model normalises what its MLPs write, so neurons write no parts of it. Use "
            "autoencoders of 'resid_delta_mlp'."
        )


def _check(model: AutoencoderTransformer) -> None:
    bridge, sae_input = model.wrapped_model, model.sae_input
    _hook_name(sae_input)
    _check_mlps(bridge, sae_input)
    for block, sae in model.saes.items():
        if block not in range(bridge.cfg.n_layers):
            raise ConfigError(
                f"There is an autoencoder for block {block}; the model has "
                f"{bridge.cfg.n_layers} blocks, from 0 on."
            )
        n_inputs = _n_inputs(bridge, block, sae_input)
        if sae.n_inputs != n_inputs:
            raise ConfigError(
                f"The autoencoder of block {block} encodes {sae.n_inputs} numbers, but "
                f"{sae_input!r} of this model has {n_inputs}: it is another model's."
            )


# ---------------------------------------------------------------------------- the graph


def _graph_nodes(
    model: Module, factorized: bool, separate_qkv: bool | None, ungroup: bool = False
) -> GraphNodes:
    assert isinstance(model, AutoencoderTransformer)
    if not factorized or separate_qkv is None:
        raise ConfigError(
            "A model with autoencoders has a factorized graph only, and needs "
            "`separate_qkv`: make it patchable with `factorized=True, separate_qkv=True` "
            "(or False)."
        )
    srcs: list[SrcNode] = []
    for node in factorized_src_nodes(model.wrapped_model):
        for part in _parts(model, node):
            srcs.append(replace(part, src_idx=len(srcs)))
    return srcs, factorized_dest_nodes(model.wrapped_model, separate_qkv, ungroup)


def _parts(model: AutoencoderTransformer, node: SrcNode) -> list[SrcNode]:
    """The latents and the error of an MLP with an autoencoder; else the node itself."""
    sae = _sae_of(model, node)
    if sae is None:
        return [node]
    latents = [
        replace(
            node,
            name=f"{node.name} Latent {latent_idx}",
            module_name=node.module_name + LATENTS,
            head_idx=row,
            head_dim=2,
            weight=None,
        )
        for row, latent_idx in enumerate(sae.latent_idxs)
    ]
    error = replace(
        node,
        name=f"{node.name} Error",
        module_name=node.module_name + ERROR,
        weight=None,
    )
    return [*latents, error]


def _sae_of(model: AutoencoderTransformer, node: SrcNode) -> SparseAutoencoder | None:
    """The autoencoder of the MLP that a source of the transformer is, if it has one."""
    if node.component is None or node.kind != "mlp" or node.component.block is None:
        return None
    return model.saes.get(node.component.block)


def _src_site(model: Module, module_name: str) -> SrcSite:
    assert isinstance(model, AutoencoderTransformer)
    for node in factorized_src_nodes(model.wrapped_model):
        sae = _sae_of(model, node)
        if sae is not None and module_name == node.module_name + LATENTS:
            return SrcSite(sae.latent_outs)
        if sae is not None and module_name == node.module_name + ERROR:
            return SrcSite(sae.error_outs)
    return TRANSFORMER_BRIDGE_ADAPTER.src_site(model.wrapped_model, module_name)


def _ports(
    model: Module,
    module_names: Sequence[str],
    separate_qkv: bool | None,
    bridge_adapter: ModelAdapter = TRANSFORMER_BRIDGE_ADAPTER,
) -> tuple[Port, ...]:
    assert isinstance(model, AutoencoderTransformer)
    ports = bridge_adapter.ports(model.wrapped_model, module_names, separate_qkv)
    if model.sae_input != "mlp_post_act":
        return ports
    # An MLP whose neurons are encoded must run: what it gave before does not say what they
    # were.
    return tuple(
        replace(port, component=None) if port.block in model.saes else port
        for port in ports
    )


@contextmanager
def _seen(model: AutoencoderTransformer, see: Any) -> Iterator[None]:
    """Inside, `see(block, activations)` is called with what each autoencoder encodes."""
    with ExitStack() as stack:
        for block in model.saes:

            def hook(module: Module, args: Any, out: Tensor, block: int = block) -> None:
                see(block, out)

            site = _find_hook(model.wrapped_model, block, SAE_HOOKS[model.sae_input])
            stack.callback(site.register_forward_hook(hook).remove)
        yield


@contextmanager
def _open_sites(model: Module, separate_qkv: bool | None) -> Iterator[None]:
    """Inside, what MLPs write passes through their autoencoders' latents and errors."""
    assert isinstance(model, AutoencoderTransformer)
    bridge = model.wrapped_model
    encoded: dict[int, Tensor] = {}
    with ExitStack() as stack:
        stack.enter_context(TRANSFORMER_BRIDGE_ADAPTER.open_sites(bridge, separate_qkv))
        stack.callback(encoded.clear)
        stack.enter_context(_seen(model, encoded.__setitem__))
        for block, sae in model.saes.items():

            def splice(
                module: Module,
                args: Any,
                out: Tensor,
                block: int = block,
                sae: SparseAutoencoder = sae,
            ) -> Tensor:
                is_neurons = model.sae_input == "mlp_post_act"
                weight = _write_weight(bridge, block) if is_neurons else None
                return sae.split(encoded.pop(block), out, weight)

            site = _find_hook(bridge, block, SAE_HOOKS["resid_delta_mlp"])
            stack.callback(site.register_forward_hook(splice).remove)
        yield


def _ungrouped(model: Module) -> ModelAdapter:
    assert isinstance(model, AutoencoderTransformer)
    assert TRANSFORMER_BRIDGE_ADAPTER.ungrouped is not None
    bridge_adapter = TRANSFORMER_BRIDGE_ADAPTER.ungrouped(model.wrapped_model)
    return replace(
        AUTOENCODER_TRANSFORMER_ADAPTER,
        graph_nodes=partial(_graph_nodes, ungroup=True),
        ports=partial(_ports, bridge_adapter=bridge_adapter),
    )


AUTOENCODER_TRANSFORMER_ADAPTER = ModelAdapter(
    name="AutoencoderTransformer",
    about="TransformerLens models whose MLPs are seen through sparse autoencoders.",
    tried=("GPT-2", "Pythia"),
    handles=lambda model: isinstance(model, AutoencoderTransformer),
    graph_nodes=_graph_nodes,
    src_site=_src_site,
    ports=_ports,
    open_sites=_open_sites,
    probe_input=lambda model: TRANSFORMER_BRIDGE_ADAPTER.probe_input(
        model.wrapped_model  # type: ignore[arg-type]
    ),
    find_unembed=lambda model: getattr(model, "unembed", None),
    blocks=lambda model: TRANSFORMER_BRIDGE_ADAPTER.blocks(
        model.wrapped_model  # type: ignore[arg-type]
    ),
    is_transformer=True,
    ungrouped=_ungrouped,
    embed_tokens=lambda model, tokens: embed_tokens(model.wrapped_model, tokens),  # type: ignore[arg-type]
    example=lambda: sae_model(
        small_bridge(), "resid_delta_mlp", load_pretrained=False, n_latents=3
    ),
)
