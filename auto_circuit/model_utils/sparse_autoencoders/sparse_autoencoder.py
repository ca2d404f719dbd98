"""A sparse autoencoder: activations as sums of a few of many directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch as t
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn import Identity, Module, Parameter
from transformer_lens.model_bridge import TransformerBridge

from auto_circuit.checks import checked
from auto_circuit.errors import ConfigError, ModelError
from auto_circuit.files import repo_path_to_abs_path
from auto_circuit.model_utils.features.autoencoder_files import (
    load_autoencoder_folder,
    read_weights,
)
from auto_circuit.types import AutoencoderInput

CACHE_FOLDER = ".autoencoder_cache"
"""Where the weights of published autoencoders are looked for."""

SAE_LENS_WEIGHTS = {"W_enc", "W_dec", "b_enc", "b_dec"}
SAE_LENS_KINDS = ("standard", "jumprelu")

PARAMETERS = ("pre_bias", "encoder_weight", "latent_bias", "decoder_weight")
STATE_DICT_MAPS: tuple[Mapping[str, str], ...] = (
    dict(zip(PARAMETERS, PARAMETERS, strict=True)),
    {
        "pre_bias": "pre_bias",
        "encoder.weight": "encoder_weight",
        "latent_bias": "latent_bias",
        "decoder.weight": "decoder_weight",
    },
    {
        "bias": "pre_bias",
        "encoder.weight": "encoder_weight",
        "encoder.bias": "latent_bias",
        "decoder.weight": "decoder_weight",
    },
)
"""The names of the weights in files: ours, OpenAI's (GPT-2), Marks et al.'s (Pythia)."""


class SparseAutoencoder(Module):
    """latents = relu(W_e (x - b) + b_l); reconstruction = W_d latents + b.

    threshold: if given, a latent below its own is 0 (JumpReLU).

    wrapped_hook: the module whose output is encoded. n_latents, n_inputs: sizes.
    latent_idxs: which of the published latents these are (after `pruned`).
    latent_outs, error_outs: the modules through which pass what each latent writes into
        the residual stream, [batch seq latent d_model], and what none of them does. They
        change nothing: they are where the graph's sources are seen.

    Weights start at random, from `seed`, and need no gradients.
    Source: Bricken et al. 2023, "Towards Monosemanticity".
    """

    def __init__(
        self, wrapped_hook: Module, n_latents: int, n_inputs: int, seed: int = 0
    ) -> None:
        super().__init__()
        # Not registered: it is a part of another model.
        self.__dict__["wrapped_hook"] = wrapped_hook
        self.latent_idxs = tuple(range(n_latents))
        self.latent_outs, self.error_outs = Identity(), Identity()
        generator = t.Generator().manual_seed(seed)
        directions = t.randn(n_inputs, n_latents, generator=generator)
        directions /= directions.norm(dim=0, keepdim=True)
        self.pre_bias = Parameter(t.zeros(n_inputs), requires_grad=False)
        self.encoder_weight = Parameter(directions.T.clone(), requires_grad=False)
        self.latent_bias = Parameter(t.zeros(n_latents), requires_grad=False)
        self.decoder_weight = Parameter(directions, requires_grad=False)
        self.threshold: Parameter | None = None

    @property
    def n_latents(self) -> int:
        """The number of latents."""
        return self.latent_bias.shape[0]

    @property
    def n_inputs(self) -> int:
        """The size of the activations that are encoded."""
        return self.pre_bias.shape[0]

    @staticmethod
    def from_state_dict(
        wrapped_hook: Module, state_dict: Mapping[str, Shaped[Tensor, "*_weight"]]
    ) -> SparseAutoencoder:
        """An autoencoder with these weights, under any names of `STATE_DICT_MAPS`.

        Raises ModelError for other names and for shapes that do not fit together.
        """
        weights = _named_weights(state_dict)
        n_latents, n_inputs = weights["encoder_weight"].shape
        sae = SparseAutoencoder(wrapped_hook, n_latents, n_inputs)
        for name, values in weights.items():
            expected = getattr(sae, name).shape
            if values.shape != expected:
                raise ModelError(
                    f"The autoencoder's {name} has the shape {tuple(values.shape)}; "
                    f"with {n_latents} latents of {n_inputs} inputs it must be "
                    f"{tuple(expected)}."
                )
            getattr(sae, name).data = values.clone()
        return sae

    def pruned(self, latent_idxs: Sequence[int]) -> SparseAutoencoder:
        """An autoencoder with only some of the latents, counted as they were published.

        What the others write becomes part of the error. Raises ConfigError for latents
        that this one does not have.
        """
        unknown = set(latent_idxs) - set(self.latent_idxs)
        if unknown:
            raise ConfigError(
                f"The autoencoder has no latents {sorted(unknown)[:5]}; it has "
                f"{self.n_latents}, up to {max(self.latent_idxs, default=0)}."
            )
        kept = sorted(set(latent_idxs))
        rows = t.tensor([self.latent_idxs.index(idx) for idx in kept], dtype=t.long)
        sae = SparseAutoencoder(self.__dict__["wrapped_hook"], len(kept), self.n_inputs)
        sae.latent_idxs = tuple(kept)
        sae.pre_bias.data = self.pre_bias.data
        sae.encoder_weight.data = self.encoder_weight.data[rows]
        sae.latent_bias.data = self.latent_bias.data[rows]
        sae.decoder_weight.data = self.decoder_weight.data[:, rows]
        if self.threshold is not None:
            sae.threshold = Parameter(self.threshold.data[rows], requires_grad=False)
        return sae

    def encode(
        self, activations: Float[Tensor, "*lead inputs"]
    ) -> Float[Tensor, "*lead latents"]:
        """How active each latent is: 0 or more."""
        centred = activations - self.pre_bias
        latents = centred @ self.encoder_weight.T + self.latent_bias
        if self.threshold is None:
            return latents.relu()
        return latents.relu() * (latents > self.threshold)

    def decode(
        self, latents: Float[Tensor, "*lead latents"]
    ) -> Float[Tensor, "*lead inputs"]:
        """The activations that latents stand for."""
        return latents @ self.decoder_weight.T + self.pre_bias

    def forward(
        self, activations: Float[Tensor, "*lead inputs"]
    ) -> Float[Tensor, "*lead inputs"]:
        """The reconstruction."""
        return self.decode(self.encode(activations))

    def split(
        self,
        activations: Float[Tensor, "batch seq inputs"],
        written: Float[Tensor, "batch seq d_model"],
        write_weight: Float[Tensor, "inputs d_model"] | None = None,
    ) -> Float[Tensor, "batch seq d_model"]:
        """What the model writes, as the sum of the latents' parts and an error: the same.

        activations: what is encoded. written: what the model writes. write_weight: from
            activations to what is written; None: they are the same.
        """
        directions = self.decoder_weight.T
        if write_weight is not None:
            directions = directions @ write_weight
        parts = self.encode(activations).unsqueeze(-1) * directions
        error = written - parts.sum(2)
        return self.latent_outs(parts).sum(2) + self.error_outs(error)


def _named_weights(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if SAE_LENS_WEIGHTS <= state_dict.keys():
        raise ModelError(
            "These are the weights of an autoencoder of SAELens, whose kind is in its "
            "`cfg.json`. Put both files into a folder of the name that the weights' file "
            "has now, without its ending."
        )
    for names in STATE_DICT_MAPS:
        if names.keys() <= state_dict.keys():
            return {ours: state_dict[theirs] for theirs, ours in names.items()}
    raise ModelError(
        f"The autoencoder's file has the weights {sorted(state_dict)[:8]}; expected those "
        f"of one of {[sorted(names) for names in STATE_DICT_MAPS]}."
    )


@checked
def load_autoencoder(
    wrapped_hook: Module,
    model: TransformerBridge,
    layer_idx: int,
    autoencoder_input: AutoencoderInput,
    pythia_size: str | None = None,
) -> SparseAutoencoder:
    """A published autoencoder of one layer, from a file in the folder `CACHE_FOLDER`.

    wrapped_hook: the module whose output it encodes. pythia_size: "<n>_<latents>", which
        of the autoencoders of a Pythia model.
    The file is `<model>_<autoencoder_input>[_<pythia_size>]_<layer_idx>` with the ending
    .safetensors, or .pt, of which only tensors are read; or it is a folder of that name with
    SAELens's `cfg.json` and its .safetensors. Of SAELens's kinds "standard" and "jumprelu"
    are known. Raises ModelError without a file, for other kinds, and for damaged files.
    """
    name = Path(str(model.cfg.model_name)).name
    parts = [name, autoencoder_input, *([pythia_size] if pythia_size else [])]
    stem = "_".join([*parts, str(layer_idx)])
    folder = repo_path_to_abs_path(CACHE_FOLDER)
    if (folder / stem).is_dir():
        return load_sae_lens(wrapped_hook, folder / stem)
    for suffix in (".safetensors", ".pt"):
        path = folder / f"{stem}{suffix}"
        if path.exists():
            return SparseAutoencoder.from_state_dict(wrapped_hook, _read_weights(path))
    raise ModelError(
        f"There is no autoencoder {folder / stem}.safetensors (or .pt). Put the published "
        "weights there: OpenAI's for GPT-2 small "
        "(github.com/openai/sparse_autoencoder), Marks et al.'s for Pythia "
        "(github.com/saprmarks/dictionary_learning); or give autoencoders of your own to "
        "`AutoencoderTransformer`."
    )


def _read_weights(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return read_weights(path)
    try:
        content: Any = t.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError) as error:
        raise ModelError(
            f"{path} holds not only tensors, or it is damaged: loading it could run what "
            "is in it, so it is not loaded. Save the weights as .safetensors."
        ) from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a {type(content).__name__}; expected weights.")
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


def load_sae_lens(wrapped_hook: Module, folder: Path) -> SparseAutoencoder:
    """An autoencoder from a folder of SAELens: `cfg.json` and a .safetensors file.

    Raises ModelError for kinds other than `SAE_LENS_KINDS`, and for damaged files.
    """
    read = load_autoencoder_folder(folder)
    if read.kind not in SAE_LENS_KINDS or read.normalization != "none":
        raise ModelError(
            f"The autoencoder in {folder} is of the kind {read.kind!r}, with "
            f"`normalize_activations` {read.normalization!r}; known here are "
            f"{list(SAE_LENS_KINDS)} with 'none'. Use `spliced` for others "
            "(`auto_circuit.model_utils.features.spliced`)."
        )
    bias = read.encoder_bias
    if not read.centres_input:
        # Ours subtracts `b_dec` from the input: add what that takes away.
        bias = bias + read.encoder_weight @ read.decoder_bias
    sae = SparseAutoencoder.from_state_dict(
        wrapped_hook,
        {
            "pre_bias": read.decoder_bias,
            "encoder_weight": read.encoder_weight,
            "latent_bias": bias,
            "decoder_weight": read.decoder_weight.T.contiguous(),
        },
    )
    if read.threshold is not None:
        sae.threshold = Parameter(read.threshold, requires_grad=False)
    return sae
