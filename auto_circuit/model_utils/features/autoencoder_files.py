"""Autoencoders in SAELens's file format: a folder with `cfg.json` and .safetensors.

Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args
from zipfile import BadZipFile

import numpy as np
import torch as t
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from auto_circuit.checks import check_number, checked
from auto_circuit.errors import AutoCircuitError, ModelError
from auto_circuit.files import folder_written_whole, read_json
from auto_circuit.model_utils.features.autoencoder import Autoencoder, Kind, Normalization

CONFIG_FILE, WEIGHTS_FILE = "cfg.json", "sae_weights.safetensors"
GEMMA_SCOPE_FILES = ("params.npz", "params.safetensors")
ARCHITECTURES: dict[str, Kind] = {
    **{kind: kind for kind in get_args(Kind)},
    "matryoshka_batchtopk": "batchtopk",
    "transcoder": "standard",
    "skip_transcoder": "standard",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
"""SAELens's `architecture` -> the kind."""
CONVERT = (
    " Files that SAELens has a loader of its own for (Llama Scope, dictionary_learning, "
    "sparsify) are read once SAELens has saved them: `SAE.from_pretrained(release, "
    "sae_id).save_model(folder)`."
)
WEIGHT_NAMES: dict[Kind, dict[str, str]] = {
    "standard": {"b_enc": "encoder_bias"},
    "jumprelu": {"b_enc": "encoder_bias", "threshold": "threshold"},
    "topk": {"b_enc": "encoder_bias"},
    "batchtopk": {"b_enc": "encoder_bias", "threshold": "threshold"},
    "gated": {
        "b_gate": "encoder_bias",
        "b_mag": "magnitude_bias",
        "r_mag": "log_magnitude",
    },
}
"""SAELens's names of the weights that not all kinds have -> ours."""
COMMON = ("W_enc", "W_dec", "b_dec")
SKIP = "W_skip"
AVERAGE = "expected_average_only_in"
"""Activations are multiplied by one number, so that they have an average length."""
TRAINED_AS = "trained_as"
Weights = dict[str, Tensor]


@checked
def load_autoencoder_folder(
    folder: Path | str, norm_factor: float | None = None
) -> Autoencoder:
    """An autoencoder or a transcoder from a folder in SAELens's format, on the CPU.

    norm_factor: what activations are multiplied by before they are encoded, and decoded ones
        divided by, where the configuration says `normalize_activations`
        "expected_average_only_in". The file may say it itself (`norm_scaling_factor`).
    Known architectures: standard, jumprelu, topk, batchtopk (also matryoshka), gated,
    transcoder, jumprelu_transcoder, and both with a skip; of any version of SAELens. Factors
    of decoder norms, scaling and normalization by an average are folded into the weights,
    which are float32 at least. A folder of Gemma Scope (`params.npz`, `params.safetensors`)
    is read too; it does not say which `hook_name` it has (see `Placed`).

    Raises ModelError (DataError for what is no JSON) for other architectures, files that are
    missing or damaged, and weights that do not fit the configuration.
    """
    folder = Path(folder)
    for path in (folder / name for name in GEMMA_SCOPE_FILES):
        if path.is_file() and not (folder / CONFIG_FILE).exists():
            return _gemma_scope(path, norm_factor)
    config = read_config(folder)
    kind = _kind(folder, config)
    weights = _checked_weights(folder, config, kind, read_weights(weights_path(folder)))
    _fold_norm_factor(folder, config, weights, norm_factor)
    _fold_decoder_norms(config, weights)
    ours = {name: weights[theirs] for theirs, name in WEIGHT_NAMES[kind].items()}
    # Before version 6 also true and false, of which true is folded just above.
    normalization = config.get("normalize_activations") or "none"
    try:
        return Autoencoder(
            kind=kind,
            encoder_weight=weights["W_enc"].T.contiguous(),
            decoder_weight=weights["W_dec"],
            decoder_bias=weights["b_dec"],
            k=_k(config) if kind == "topk" else None,
            skip_weight=weights.get(SKIP),
            centres_input=_centres_input(config),
            normalization=(
                normalization if normalization in get_args(Normalization) else "none"
            ),
            hook_name=_fact(config, "hook_name"),
            hook_name_out=_fact(config, "hook_name_out"),
            **ours,
        )
    except AutoCircuitError as error:
        raise ModelError(f"{folder}: {error}") from error


@checked
def load_autoencoders(folder: Path | str) -> list[Autoencoder]:
    """Those in the folders of a folder, by their names. Raises as for one, and ModelError if
    there is none.
    """
    folders = sorted(path.parent for path in Path(folder).glob(f"*/{CONFIG_FILE}"))
    if not folders:
        raise ModelError(
            f"{folder} has no folder with a {CONFIG_FILE}; expected one for each autoencoder."
        )
    return [load_autoencoder_folder(path) for path in folders]


@checked
def save_autoencoder(autoencoder: Autoencoder, folder: Path | str) -> None:
    """Write a folder that SAELens, and `load_autoencoder_folder`, can read, whole or not.

    A BatchTopK one is written as the JumpReLU one that it is once trained, as SAELens does.
    Raises ConfigError if there is no place for the folder, FileError where the system refuses.
    """
    kind = autoencoder.kind
    named = {
        "W_enc": autoencoder.encoder_weight.T,
        "W_dec": autoencoder.decoder_weight,
        "b_dec": autoencoder.decoder_bias,
        **{
            theirs: getattr(autoencoder, name)
            for theirs, name in WEIGHT_NAMES[kind].items()
        },
    }
    if autoencoder.skip_weight is not None:
        named[SKIP] = autoencoder.skip_weight
    weights = {name: w.detach().cpu().contiguous().clone() for name, w in named.items()}
    with folder_written_whole(folder) as partial:
        save_file(weights, partial / WEIGHTS_FILE)
        (partial / CONFIG_FILE).write_text(
            json.dumps(_config_of(autoencoder), indent=1) + "\n", encoding="utf-8"
        )


def _config_of(autoencoder: Autoencoder) -> dict[str, Any]:
    kind = autoencoder.kind
    architecture: str = "jumprelu" if kind == "batchtopk" else kind
    config: dict[str, Any] = {
        "d_in": autoencoder.d_in,
        "d_sae": autoencoder.n_latents,
        "dtype": str(autoencoder.encoder_weight.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": autoencoder.centres_input,
        "normalize_activations": autoencoder.normalization,
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": "6.0.0",
            "hook_name": autoencoder.hook_name,
            "hook_name_out": autoencoder.hook_name_out,
            TRAINED_AS: kind,
        },
    }
    if autoencoder.is_transcoder:
        has_skip = autoencoder.skip_weight is not None
        names = {"standard": "transcoder", "jumprelu": "jumprelu_transcoder"}
        if has_skip:
            names = {
                kind: name.replace("trans", "skip_trans") for kind, name in names.items()
            }
        architecture = names.get(architecture, architecture)
        config["d_out"] = autoencoder.d_out
    if kind == "topk":
        config |= {"k": autoencoder.k, "rescale_acts_by_decoder_norm": False}
    return {"architecture": architecture, **config}


# ------------------------------------------------------------------------------ reading


def read_config(folder: Path) -> dict[str, Any]:
    """`cfg.json`. Raises DataError for what is no JSON, ModelError for no object."""
    config = read_json(folder / CONFIG_FILE)
    metadata = config.get("metadata") if isinstance(config, dict) else {}
    if not isinstance(config, dict) or not isinstance(metadata, dict | None):
        raise ModelError(
            f"{folder / CONFIG_FILE} holds no object, or `metadata` that is none; expected "
            "a configuration of SAELens."
        )
    return config


def weights_path(folder: Path) -> Path:
    """The file of weights. Raises ModelError unless there is one."""
    if (folder / WEIGHTS_FILE).is_file():
        return folder / WEIGHTS_FILE
    paths = sorted(folder.glob("*.safetensors"))
    if len(paths) != 1:
        raise ModelError(
            f"{folder} has {len(paths)} .safetensors files; expected one, {WEIGHTS_FILE}."
        )
    return paths[0]


def read_weights(path: Path) -> Weights:
    """The tensors of a .safetensors file. Raises ModelError if it is damaged."""
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ModelError(f"{path} is damaged: {error}.") from error


def _fact(config: Mapping[str, Any], name: str) -> str | None:
    """A text that newer files have under `metadata`."""
    older = config.get(name) or (
        config.get("hook_point") if name == "hook_name" else None
    )
    value = (config.get("metadata") or {}).get(name) or older
    if value is not None and not isinstance(value, str):
        raise ModelError(f"`{name}` is {value!r:.80} in {CONFIG_FILE}; expected a text.")
    return value


def _kind(folder: Path, config: Mapping[str, Any]) -> Kind:
    architecture = config.get("architecture") or "standard"
    activation = config.get("activation_fn", config.get("activation_fn_str")) or "relu"
    if architecture == "standard" and activation == "topk":
        architecture = "topk"
    is_known = isinstance(architecture, str) and architecture in ARCHITECTURES
    if not is_known or activation not in ("relu", "jumprelu", "topk", "batchtopk"):
        raise ModelError(
            f"The autoencoder in {folder} is of the kind {architecture!r:.80} (activation "
            f"{activation!r:.80}); known are {list(ARCHITECTURES)} with 'relu'. An object "
            "with `encode` and a linear `decode` can be placed by `Placed(object, "
            "hook_name)`."
        )
    _check_plain(folder, config)
    trained_as = (config.get("metadata") or {}).get(TRAINED_AS)
    if architecture == "jumprelu" and trained_as == "batchtopk":
        return "batchtopk"
    return ARCHITECTURES[architecture]


def _check_plain(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise ModelError for what would change the numbers, and is not read."""
    known = (*get_args(Normalization), AVERAGE, None, True, False)
    reshape = config.get("reshape_activations")
    for name, value, choices in (
        ("normalize_activations", config.get("normalize_activations"), known),
        ("reshape_activations", reshape, ("none", "hook_z", None)),
    ):
        # A list could not be looked up in a set.
        if not any(value is choice or value == choice for choice in choices):
            raise ModelError(
                f"The autoencoder in {folder} has `{name}` {value!r:.80}; expected one of "
                f"{list(choices)}."
            )
    head = _head(config)
    if head is not None:
        raise ModelError(
            f"The autoencoder in {folder} is one of a single head (`hook_head_index` "
            f"{head!r:.80}), which is not supported. Use one of all heads' values "
            "(`attn.hook_z`)."
        )
    for name in ("apply_b_dec_to_input", "rescale_acts_by_decoder_norm"):
        if not isinstance(config.get(name), bool | None):
            raise ModelError(
                f"The autoencoder in {folder} has `{name}` {config[name]!r:.80}; expected "
                "true or false."
            )


def _head(config: Mapping[str, Any]) -> Any:
    owner = config.get("metadata") or config
    return owner.get("hook_head_index", owner.get("hook_point_head_index"))


def _centres_input(config: Mapping[str, Any]) -> bool:
    # SAELens's transcoders never do.
    is_transcoder = str(config.get("architecture")).endswith("transcoder")
    given = config.get("apply_b_dec_to_input")
    return not is_transcoder and (True if given is None else given)


def _k(config: Mapping[str, Any]) -> Any:
    k = config.get("k")
    if k is None and isinstance(config.get("activation_fn_kwargs"), dict):
        k = config["activation_fn_kwargs"].get("k")
    return k


def _checked_weights(
    folder: Path, config: Mapping[str, Any], kind: Kind, weights: Weights
) -> Weights:
    """The weights that a kind has, float32 at least, with a threshold for each latent."""
    weights = dict(weights)
    if "log_threshold" in weights and "threshold" not in weights:
        weights["threshold"] = weights.pop("log_threshold").exp()
    common = kind == "batchtopk" and "threshold" not in weights
    if common and "topk_threshold" in weights:
        threshold = weights.pop("topk_threshold")
        n_latents = weights["b_enc"].shape if "b_enc" in weights else (0,)
        if threshold.numel() == 1:
            weights["threshold"] = threshold.reshape(()).expand(n_latents)
    elif common:
        raise ModelError(
            f"The BatchTopK autoencoder in {folder} has no `threshold`: without one, which "
            "latents are active depends on the other prompts. Save it from SAELens, which "
            "estimates one while it trains."
        )
    scaling = _scaling_factor(folder, config, weights)
    needed = {*COMMON, *WEIGHT_NAMES[kind]}
    if "skip" in str(config.get("architecture")):
        needed.add(SKIP)
    if weights.keys() != needed:
        raise ModelError(
            f"The autoencoder in {folder} has the weights {sorted(weights)[:8]}; one of the "
            f"kind {config.get('architecture') or kind!r} has {sorted(needed)}.{CONVERT}"
        )
    for name, w in weights.items():
        if not w.is_floating_point() or not w.isfinite().all():
            raise ModelError(
                f"The autoencoder in {folder} has numbers in {name} that are not finite, or "
                f"of the type {w.dtype}."
            )
        weights[name] = w.to(t.promote_types(w.dtype, t.float32))
    _check_sizes(folder, config, weights)
    if scaling is not None:
        _check_shape(folder, "scaling_factor", scaling, weights["W_dec"].shape[:1])
        weights["W_dec"] = weights["W_dec"] * scaling.unsqueeze(-1)
    return weights


def _scaling_factor(
    folder: Path, config: Mapping[str, Any], weights: Weights
) -> Float[Tensor, "latent"] | None:
    """What latents are multiplied by before they are decoded, if by anything; taken out.

    For some time SAELens saved ones that meant nothing.
    """
    scaling = weights.pop("scaling_factor", None)
    if scaling is None or bool((scaling == 1).all()):
        return None
    if not config.get("finetuning_scaling_factor"):
        raise ModelError(
            f"The autoencoder in {folder} has a `scaling_factor`, and {CONFIG_FILE} does not "
            "say whether it is used. Set `finetuning_scaling_factor` to true if it is, or "
            "take the factor out."
        )
    return scaling


def _check_sizes(folder: Path, config: Mapping[str, Any], weights: Weights) -> None:
    """Raise ModelError where weights are not as large as the configuration says."""
    d_in, d_sae = config.get("d_in"), config.get("d_sae")
    _check_shape(folder, "W_enc", weights["W_enc"], (d_in, d_sae))
    _check_shape(folder, "W_dec", weights["W_dec"], (d_sae, config.get("d_out", d_in)))


def _check_shape(
    folder: Path, name: str, weight: Float[Tensor, "..."], expected: Any
) -> None:
    given = tuple(weight.shape)
    fits = len(given) == len(expected) and all(
        said is None or said == size for size, said in zip(given, expected, strict=True)
    )
    if not fits:
        raise ModelError(
            f"The autoencoder in {folder} has {name} of the shape {given}; its {CONFIG_FILE} "
            f"says {tuple(expected)}."
        )


def _gemma_scope(path: Path, norm_factor: float | None) -> Autoencoder:
    """One of Gemma Scope: JumpReLU, and nothing taken from its input. Its skip is [in out]."""
    if norm_factor is not None:
        raise ModelError(f"{path} needs no `norm_factor`: leave it out.")
    named = read_weights(path) if path.suffix == ".safetensors" else _read_npz(path)
    named = {re.sub("^w_", "W_", name.lower()): w for name, w in named.items()}
    skip = named.pop("affine_skip_connection", None)
    config = {"architecture": "jumprelu", "apply_b_dec_to_input": False}
    weights = _checked_weights(path, config, "jumprelu", named)
    try:
        return Autoencoder(
            kind="jumprelu",
            encoder_weight=weights["W_enc"].T.contiguous(),
            encoder_bias=weights["b_enc"],
            decoder_weight=weights["W_dec"],
            decoder_bias=weights["b_dec"],
            threshold=weights["threshold"],
            skip_weight=None if skip is None else skip.float().T.contiguous(),
            centres_input=False,
        )
    except AutoCircuitError as error:
        raise ModelError(f"{path}: {error}") from error


def _read_npz(path: Path) -> Weights:
    """The arrays of a .npz file, as tensors. Raises ModelError if it is damaged."""
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            return {name: t.from_numpy(file[name]) for name in file.files}
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        BadZipFile,
    ) as error:
        raise ModelError(f"{path} is damaged: {error}.") from error


# ------------------------------------------------------------------------------ folding


def _fold_norm_factor(
    folder: Path, config: Mapping[str, Any], weights: Weights, given: float | None
) -> None:
    """Scale the weights instead of the activations."""
    is_needed = config.get("normalize_activations") in (AVERAGE, True)
    factor = _norm_factor(config) if given is None else given
    if not is_needed and given is None:
        return
    if not is_needed or factor is None:
        problem = "no" if is_needed else "another"
        raise ModelError(
            f"The autoencoder in {folder} has `normalize_activations` "
            f"{config.get('normalize_activations')!r}, and {problem} factor is said. Give "
            "`norm_factor` (1.0 if it is folded into the weights already) for "
            f"{AVERAGE!r}, and none otherwise."
        )
    check_number("norm_factor", factor)
    if factor <= 0:
        raise ModelError(f"{folder}: `norm_factor` is {factor!r}; expected it above 0.")
    weights["W_enc"] = weights["W_enc"] * factor
    weights["W_dec"] = weights["W_dec"] / factor
    weights["b_dec"] = weights["b_dec"] / factor
    if _is_rescaled(config) and "threshold" in weights:
        # In units of the decoder's norms, which have just changed.
        weights["threshold"] = weights["threshold"] / factor


def _norm_factor(config: Mapping[str, Any]) -> Any:
    factor = config.get("norm_scaling_factor")
    return (config.get("metadata") or {}).get("norm_scaling_factor", factor)


def _is_rescaled(config: Mapping[str, Any]) -> bool:
    # SAELens knows it of these alone, and a BatchTopK one that it saved is a JumpReLU one.
    kinds = ("topk", "batchtopk", "matryoshka_batchtopk")
    is_topk = config.get("architecture") in kinds
    return is_topk and bool(config.get("rescale_acts_by_decoder_norm"))


def _fold_decoder_norms(config: Mapping[str, Any], weights: Weights) -> None:
    """Latents in units of their directions' length, where the file asks for it."""
    if not _is_rescaled(config):
        return
    norms = weights["W_dec"].norm(dim=-1)
    if not (norms > 0).all():
        raise ModelError("An autoencoder's latents are scaled by directions of length 0.")
    weights["W_enc"] = weights["W_enc"] * norms
    weights["b_enc"] = weights["b_enc"] * norms
    weights["W_dec"] = weights["W_dec"] / norms.unsqueeze(-1)
