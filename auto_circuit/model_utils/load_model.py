"""Load a language model by hub name or from a local folder, and check what was loaded.

Or take one that is loaded already, as a Hugging Face model or a TransformerBridge.

A model that is loaded wrong gives numbers like any other. So the weights are compared with
what the configuration asks for, and what TransformerLens makes of the model with what the
model itself says.
"""

from __future__ import annotations

import logging
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch as t
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import Module
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components.base import (
    GeneralizedComponent,
)
from transformer_lens.model_bridge.sources._bridge_builder import (
    build_bridge_from_module,
)
from transformer_lens.model_bridge.sources._hf_format import (
    determine_architecture_from_hf_config,
)
from transformer_lens.model_bridge.sources.transformers.helpers import (
    get_hf_model_class_for_architecture,
)
from transformers import PreTrainedModel

from auto_circuit.checks import check_device, shown
from auto_circuit.errors import AutoCircuitError, ConfigError, ModelError, near_matches
from auto_circuit.model_utils.block_facts import (
    check_has_residual_stream,
    check_is_decoder,
)
from auto_circuit.model_utils.loaded_bridge import LoadedBridge, as_loaded
from auto_circuit.model_utils.transformer_lens_sites import (
    heads_by_weights,
    heads_switched_on,
    switch_on_heads,
)
from auto_circuit.weights import (
    MORE_THAN_WEIGHTS,
    check_not_offloaded,
    has_values,
    input_rounding,
    keep_differentiable,
)

MODEL_ALIASES = {
    "gpt2-small": "gpt2",
    "attn-only-4l": "NeelNanda/Attn_Only_4L512W_C4_Code",
}
"""TransformerLens's old short names -> hub names."""

LOG_PROB_TOLERANCES = {
    t.float64: 1e-6,  # many norms and rotations are computed in float32
    t.float32: 1e-3,
    t.float16: 0.02,
    t.bfloat16: 0.1,
}
"""By how much log-probabilities of two ways to compute a model may differ.

Root mean square, as a share of their standard deviation.
"""

N_PROBE_TOKENS = 8

BRIDGE = "_auto_circuit_bridge"
"""Where a Hugging Face model has the bridge that was made of it, and changed its modules.

A second bridge around these would be another graph.
"""

DeviceMap = str | Mapping[str, t.device | str | int]
"""What accelerate takes: "auto", "balanced", or module name -> device."""
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
"""Texts that say how accelerate spreads a model."""
OFFLOADED = ("cpu", "disk")
"""Where accelerate keeps what it moves to a device when it is needed."""


def load_transformer(
    name: str | Path | Module,
    device: t.device | str | None = None,
    dtype: t.dtype | None = None,
    device_map: DeviceMap | None = None,
    tokenizer: Any = None,
) -> LoadedBridge:
    """A model whose weights need no gradients, in eval mode.

    name: a Hugging Face hub name, or a local folder in Hugging Face format; or the model
        itself, a PreTrainedModel or a TransformerBridge. It becomes (a part of) what is
        returned, the same in each call, and its weights stay as they are.
    device: None: the CPU, or where the given model is.
    dtype: None: float32, or the given model's. In float32 the weights of a name are
        processed as auto-circuit does (layer norm folded, writing weights and unembedding
        centred), which changes no probabilities. In other types, over several devices, and
        where it would change them (Gemma 2), they are as they were published.
    device_map: instead of a device, which part of the model goes where, as for
        `from_pretrained`. The parts of a block go together.
    tokenizer: of a given PreTrainedModel.

    Raises ConfigError for a device that is not there, and for arguments that do not go
    together; ModelError, with the cause, if the model cannot be had, if its weights are not
    those that its configuration asks for or are not finite, and if TransformerLens's model
    says something else than the original.
    """
    if dtype is not None:
        _check_dtype(dtype)
    if device is not None:
        device = check_device("device", device)
    if device_map is not None:
        _check_device_map(device, device_map)
    if not isinstance(name, (str, Path, Module)):
        raise ModelError(
            f"A model is a name, a folder, or a model itself; this is {shown(name)}."
        )
    if isinstance(name, Module):
        if device_map is not None:
            raise ConfigError(
                "`device_map` says where the weights of a name or folder go; a model that "
                "is loaded has them somewhere. Load it by "
                "`from_pretrained(..., device_map=...)`."
            )
        return _bridge_of(name, device, dtype, tokenizer)
    if tokenizer is not None:
        raise ConfigError(
            "`tokenizer` is for a given PreTrainedModel; that of a name or folder is with it."
        )
    return _load(name, device or "cpu", dtype or t.float32, device_map)


def _load(
    name: str | Path,
    device: t.device | str,
    dtype: t.dtype,
    device_map: DeviceMap | None,
) -> LoadedBridge:
    source = MODEL_ALIASES.get(str(name), str(name))
    _check_folder(name, source)
    original = _Original()
    place = {"device": str(device)} if device_map is None else {"device_map": device_map}
    what = f"the model {source!r}"
    try:
        boot = partial(
            TransformerBridge.boot_transformers,
            source,
            dtype=dtype,
            model_class=original,
            **place,  # type: ignore[arg-type]
        )
        model, is_right = boot(), False
        if dtype == t.float32 and device_map is None:
            model.enable_compatibility_mode()
            # TransformerLens folds the norms of some families wrongly, such as Gemma 2's.
            is_right = _says(model, original.log_probs, what)
            model = model if is_right else boot()
    except AutoCircuitError:
        raise
    except Exception as error:  # every file format, and the hub, have errors of their own
        raise ModelError(
            f"Cannot load the model {source!r}: {_first_line(error)} A hub name needs a "
            "network connection once (later the model is in the Hugging Face cache; "
            "HF_HUB_OFFLINE must not be 1 the first time); a local folder needs "
            "config.json, the weights and the tokenizer, each of them whole."
        ) from error
    model = as_loaded(model.eval().requires_grad_(False))
    if not is_right and original.log_probs is not None:
        check_log_probs(model, original.log_probs, what)
    return model


def _says(
    model: TransformerBridge, expected: Float[Tensor, "1 seq vocab"] | None, what: str
) -> bool:
    """Does a bridge say what it should, as far as that is known?"""
    if expected is None:
        return True
    try:
        check_log_probs(model, expected, what)
    except ModelError:
        return False
    return True


def _bridge_of(
    given: Module, device: t.device | str | None, dtype: t.dtype | None, tokenizer: Any
) -> LoadedBridge:
    """A model that is loaded already, as a bridge."""
    what = f"this {type(given).__name__}"
    if not isinstance(given, (PreTrainedModel, TransformerBridge)):
        raise ModelError(
            f"A model is a name, a folder, a Hugging Face PreTrainedModel or a "
            f"TransformerBridge; {what} is none. {_instead_of(given)}"
        )
    bridge = given if isinstance(given, TransformerBridge) else vars(given).get(BRIDGE)
    if bridge is None and any(
        isinstance(module, GeneralizedComponent) for module in given.modules()
    ):
        raise ModelError(
            f"{what[0].upper()}{what[1:]} is part of a TransformerBridge already, which a "
            "second one would break. Give that one, of which there can be several graphs; "
            "or load the model again."
        )
    if device is not None:
        given.to(device)  # type: ignore[arg-type]
    if dtype is not None:
        _cast(given, dtype)
    _check_weights(what, given)
    if isinstance(given, PreTrainedModel):
        check_has_residual_stream(given)
    given.eval().requires_grad_(False)
    if bridge is not None:
        if tokenizer is not None:
            bridge.tokenizer = tokenizer
        return as_loaded(bridge.eval())
    try:
        log_probs = _said_by(given) if has_values(given) else None
        bridge = build_bridge_from_module(
            given, type(given).__name__, hf_config=given.config, tokenizer=tokenizer
        )
    except Exception as error:  # each architecture has errors of its own
        raise ModelError(
            f"TransformerLens cannot make a bridge of {what}: {_first_line(error)} Models "
            "that read tokens and say the next one are supported, where TransformerLens "
            "knows their architecture."
        ) from error
    model = as_loaded(bridge.eval())
    if log_probs is not None:
        check_log_probs(model, log_probs, what)
    vars(given)[BRIDGE] = model  # not by setattr: no part of it
    return model


def show_heads(model: LoadedBridge) -> None:
    """Let hook points of single heads fire, where there are any.

    Raises ModelError if the model computes something else then.
    """
    if heads_by_weights(model) or not has_values(model):
        switch_on_heads(model)
        return
    weight = next(model.parameters())
    ask = partial(probe_log_probs, model, model.cfg.d_vocab, weight.device)
    expected = ask()
    with heads_switched_on(model):
        found = ask()
    error = _distance(found, expected)
    if not error <= _tolerance(model, weight.dtype) * _spread(expected):
        raise ModelError(
            f"This {model.cfg.architecture} model computes something else where what its "
            f"heads read and write can be seen: its log-probabilities are off by {error:.2g} "
            f"(root mean square). {MORE_THAN_WEIGHTS}"
        )
    switch_on_heads(model)


def _instead_of(given: Module) -> str:
    """What to do with a model of another kind."""
    if hasattr(given, "_orig_mod"):
        return "Give what was compiled by `torch.compile`: its `_orig_mod`."
    if hasattr(given, "merge_and_unload"):
        return "Put its adapter into the weights: `merge_and_unload()` gives the model."
    return "`patchable_model(..., adapter=...)` takes models of other kinds."


def _cast(model: Module, dtype: t.dtype) -> None:
    """Parameters alone: rotary frequencies stay in float32."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def _said_by(model: Any) -> Float[Tensor, "1 seq vocab"]:
    """What a Hugging Face model says of the probe."""
    weight = model.get_input_embeddings().weight
    return probe_log_probs(
        lambda tokens: model(tokens, use_cache=False).logits,
        _n_words(model),
        weight.device,
    )


def _check_device_map(device: t.device | str | None, device_map: DeviceMap) -> None:
    """Raise ConfigError for a map that cannot be, before anything is loaded."""
    if device is not None:
        raise ConfigError("Give either `device` or `device_map`, not both.")
    if isinstance(device_map, str):
        if device_map not in DEVICE_MAPS:
            check_device("device_map", device_map)
        return
    is_map = isinstance(device_map, Mapping) and bool(device_map)
    if not is_map or not all(isinstance(name, str) for name in device_map):
        raise ConfigError(
            f"`device_map` is {shown(device_map)}; expected {', '.join(DEVICE_MAPS)}, or a "
            "dictionary from the names of modules to devices."
        )
    check_whole_blocks(device_map)
    for name, place in device_map.items():
        if place not in OFFLOADED:
            check_device(f"device_map[{name!r}]", place)


def _check_modules(
    device_map: Mapping[str, t.device | str | int], model_class: Any, config: Any
) -> None:
    """Raise ConfigError for a map with names of no modules, or that leaves some out."""
    make = getattr(model_class, "from_config", None) or model_class._from_config
    with t.device("meta"):
        shapes: Module = make(config)
    names = [name for name, _ in shapes.named_modules()]
    weights = [name for name, _ in shapes.named_parameters()]
    unknown = [name for name in device_map if name not in (*names, *weights)]
    if unknown:
        raise ConfigError(
            f"`device_map` names {unknown[0]!r}, which this {type(shapes).__name__} does not "
            f"have.{near_matches(unknown[0], names)}"
        )
    homeless = [
        weight
        for weight in weights
        if not any(f"{weight}.".startswith(f"{n}." if n else "") for n in device_map)
    ]
    if homeless:
        raise ConfigError(
            f"`device_map` does not say where {homeless[0]!r} goes ({len(homeless)} weights "
            'in all are left out). Name their modules, or add "", which is the rest.'
        )


def check_whole_blocks(device_map: Mapping[str, t.device | str | int]) -> None:
    """Raise ConfigError for a device map that puts parts of one block on two devices."""
    for name in device_map:
        block = re.match(r".*?\.\d+(?=\.)", name)
        if block is None:
            continue
        inside = f"{block[0]}."
        # What is said of the block's parts, and of all that it is in.
        devices = {
            str(device)
            for part, device in device_map.items()
            if part.startswith(inside) or inside.startswith(f"{part}." if part else "")
        }
        if len(devices) > 1:
            raise ConfigError(
                f"`device_map` splits the block {block[0]!r} over the devices "
                f"{' and '.join(sorted(devices))}. What a block's heads and MLP read and "
                "write must be on one device: give each block a device as a whole."
            )


class _Original:
    """Stands where TransformerLens expects a Hugging Face class, and checks what it loads.

    TransformerLens changes the model that it is given, so what the model says is asked
    before.
    """

    def __init__(self) -> None:
        self.log_probs: Tensor | None = None

    def from_pretrained(self, name: str, **kwargs: Any) -> Any:
        architecture = determine_architecture_from_hf_config(kwargs["config"])
        model_class = get_hf_model_class_for_architecture(architecture)
        device_map = kwargs.get("device_map")
        if isinstance(device_map, Mapping):
            _check_modules(device_map, model_class, kwargs["config"])
        with _quiet():
            loaded: Any = model_class.from_pretrained(
                name, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
        model, info = loaded
        _check_names(name, info)
        _check_weights(name, model)
        check_has_residual_stream(model)
        model.eval()
        self.log_probs = _said_by(model)
        return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, transformers does not print its own table of missing weights."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _n_words(model: Any) -> int:
    return model.get_input_embeddings().weight.shape[0]


def probe_log_probs(
    call: Callable[[Int[Tensor, "1 seq"]], Float[Tensor, "1 seq vocab"]],
    n_words: int,
    device: t.device | str = "cpu",
) -> Float[Tensor, "1 seq vocab"]:
    """What a model says of a few tokens from all over its vocabulary."""
    with t.no_grad():
        logits = call(_probe_tokens(n_words).to(device))
    return logits.double().log_softmax(-1).cpu()


def _probe_tokens(n_words: int) -> Int[Tensor, "1 seq"]:
    # Steps of the golden ratio: spread evenly, and in no order.
    return ((t.arange(1, 1 + N_PROBE_TOKENS) * 0.618034 % 1) * n_words).long()[None]


def check_log_probs(
    model: TransformerBridge, expected: Float[Tensor, "1 seq vocab"], what: str
) -> None:
    """Raise ModelError if a bridge says something else than the model that it is made of."""
    weight = next(model.parameters())
    device = "cpu" if weight.is_meta else weight.device
    try:
        found = probe_log_probs(model, model.cfg.d_vocab, device)
    except Exception as error:  # each architecture has errors of its own
        check_is_decoder(model)
        raise ModelError(
            f"TransformerLens's model of {what} cannot be run: {_first_line(error)}"
        ) from error
    if found.shape != expected.shape:
        raise ModelError(
            f"TransformerLens's output for {what} has the shape {tuple(found.shape)}, the "
            f"original model's {tuple(expected.shape)}."
        )
    error, spread = _distance(found, expected), _spread(expected)
    if not error <= _tolerance(model, weight.dtype) * spread:
        raise ModelError(
            f"TransformerLens loads {what} wrong: its log-probabilities are off by "
            f"{error:.2g} (root mean square; they themselves spread by {spread:.2g}), so "
            "every number would be another model's. Try another dtype (in float32 weights "
            "are processed, in others they are not), or another version of "
            "transformer-lens."
        )


def _distance(found: Float[Tensor, "..."], expected: Float[Tensor, "..."]) -> float:
    """Root mean square. A word that is never said has a log-probability of -inf in both."""
    distance = t.where(found == expected, 0.0, found - expected)
    return float(distance.square().mean().sqrt())


def _spread(expected: Float[Tensor, "..."]) -> float:
    return float(expected[expected.isfinite()].std())


def _tolerance(model: Module, dtype: t.dtype) -> float:
    widest = LOG_PROB_TOLERANCES[t.bfloat16]  # also of embeddings in 8 bits
    return max(LOG_PROB_TOLERANCES.get(dtype, widest), input_rounding(model))


def _check_dtype(dtype: t.dtype) -> None:
    if dtype not in LOG_PROB_TOLERANCES:
        known = ", ".join(map(str, LOG_PROB_TOLERANCES))
        raise ModelError(f"`dtype` is {dtype!r}; expected one of {known}.")


def _check_folder(name: str | Path, source: str) -> None:
    """Raise ModelError for a path at which there is no model."""
    path = Path(source).expanduser()
    looks_like_path = isinstance(name, Path) or source.startswith((".", "/", "~"))
    if not looks_like_path and not path.exists():
        return
    if not path.is_dir():
        found = "a file" if path.exists() else "nothing"
        raise ModelError(
            f"The model's path {source!r} must be a folder in Hugging Face format "
            f"(config.json, the weights, the tokenizer); there is {found}."
        )
    if not (path / "config.json").is_file():
        raise ModelError(
            f"The model's folder {source!r} has no config.json; a local folder needs "
            "config.json, the weights and the tokenizer."
        )
    tokenizer_files = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
    if not any((path / file).is_file() for file in tokenizer_files):
        others = [file.name for file in path.iterdir() if "token" in file.name.lower()]
        if not [name for name in others if name != "tokenizer_config.json"]:
            raise ModelError(
                f"The model's folder {source!r} has no tokenizer (tokenizer.json, or the "
                "like). Save it there: `tokenizer.save_pretrained(folder)`."
            )


def _check_names(name: str, info: Any) -> None:
    """Raise ModelError unless the weights are just those that the configuration needs."""
    for kind, meaning in (
        ("missing_keys", "the model needs and its files lack, so they would be random"),
        ("unexpected_keys", "the files hold and the model has no place for"),
        ("mismatched_keys", "have another shape than the model needs"),
    ):
        keys = sorted(str(key) for key in info.get(kind) or ())
        if keys:
            raise ModelError(
                f"The weights of the model {name!r} do not belong to its config.json: there "
                f"are {len(keys)} that {meaning} ({_listed(keys)}). Is the number of layers "
                "right, and are all the weights' files there?"
            )


def _check_weights(name: str, model: Module) -> None:
    """Raise ModelError for weights that are no numbers, or that are not there to be read."""
    check_not_offloaded(model)
    keep_differentiable(model)
    damaged = [
        key
        for key, weight in model.named_parameters()
        if not weight.is_meta and not weight.isfinite().all()
    ]
    if damaged:
        raise ModelError(
            f"The weights of the model {name!r} are damaged: {len(damaged)} hold NaN or "
            f"infinity ({_listed(damaged)}). Load them again, or in a wider dtype."
        )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def _first_line(error: Exception) -> str:
    line = str(error).strip().splitlines()[0] if str(error).strip() else _failed(error)
    return line if line.endswith(".") else line + "."


def _failed(error: Exception) -> str:
    """Of an error without a text (`assert ...`): what it is, and the line that raised it."""
    frame = traceback.extract_tb(error.__traceback__)[-1:]
    return type(error).__name__ + "".join(f" at `{f.line}`" for f in frame)
