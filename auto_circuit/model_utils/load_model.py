"""Load a language model by hub name or from a local folder, and check what was loaded.

A model that is loaded wrong gives numbers like any other. So the weights are compared with
what the configuration asks for, and what TransformerLens makes of the model with what the
model itself says.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch as t
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import Module
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._hf_format import (
    determine_architecture_from_hf_config,
)
from transformer_lens.model_bridge.sources.transformers.helpers import (
    get_hf_model_class_for_architecture,
)

from auto_circuit.checks import check_device
from auto_circuit.errors import ModelError
from auto_circuit.model_utils.loaded_bridge import LoadedBridge, as_loaded

MODEL_ALIASES = {
    "gpt2-small": "gpt2",
    "attn-only-4l": "NeelNanda/Attn_Only_4L512W_C4_Code",
}
"""TransformerLens's old short names -> hub names."""

LOG_PROB_TOLERANCES = {
    t.float64: 1e-7,
    t.float32: 1e-3,
    t.float16: 0.02,
    t.bfloat16: 0.1,
}
"""By how much log-probabilities of two ways to compute a model may differ.

Root mean square, as a share of their standard deviation.
"""

N_PROBE_TOKENS = 8


def load_transformer(
    name: str | Path,
    device: t.device | str = "cpu",
    dtype: t.dtype = t.float32,
) -> LoadedBridge:
    """A model whose weights need no gradients, in eval mode.

    name: a Hugging Face hub name, or a local folder in Hugging Face format.
    In float32 the weights are processed as auto-circuit does (layer norm folded, writing
    weights and unembedding centred), which changes no probabilities. In other types they
    are as they were published.

    Raises ConfigError for a device that is not there; ModelError, with the cause, if the
    model cannot be had, if its weights are not those that its configuration asks for or
    are not finite, and if TransformerLens's model says something else than the original.
    """
    device = check_device("device", device)
    _check_dtype(dtype)
    source = MODEL_ALIASES.get(str(name), str(name))
    _check_folder(name, source)
    original = _Original()
    try:
        model = TransformerBridge.boot_transformers(
            source, device=str(device), dtype=dtype, model_class=original
        )
        if dtype == t.float32:
            model.enable_compatibility_mode()
    except ModelError:
        raise
    except Exception as error:  # every file format, and the hub, have errors of their own
        raise ModelError(
            f"Cannot load the model {source!r}: {_first_line(error)} A hub name needs a "
            "network connection once (later the model is in the Hugging Face cache; "
            "HF_HUB_OFFLINE must not be 1 the first time); a local folder needs "
            "config.json, the weights and the tokenizer, each of them whole."
        ) from error
    model = as_loaded(model.eval().requires_grad_(False))
    if original.log_probs is not None:
        check_log_probs(model, original.log_probs, f"the model {source!r}")
    return model


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
        with _quiet():
            loaded: Any = model_class.from_pretrained(
                name, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
        model, info = loaded
        _check_names(name, info)
        _check_finite(name, model)
        model.eval()
        self.log_probs = probe_log_probs(
            lambda tokens: model(tokens, use_cache=False).logits, _n_words(model)
        )
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
    found = probe_log_probs(model, model.cfg.d_vocab, weight.device)
    if found.shape != expected.shape:
        raise ModelError(
            f"TransformerLens's output for {what} has the shape {tuple(found.shape)}, the "
            f"original model's {tuple(expected.shape)}."
        )
    # A word that is never said has a log-probability of -inf in both.
    distance = t.where(found == expected, 0.0, found - expected)
    error = float(distance.square().mean().sqrt())
    spread = float(expected[expected.isfinite()].std())
    if not error <= LOG_PROB_TOLERANCES[weight.dtype] * spread:
        raise ModelError(
            f"TransformerLens loads {what} wrong: its log-probabilities are off by "
            f"{error:.2g} (root mean square; they themselves spread by {spread:.2g}), so "
            "every number would be another model's. Try another dtype (in float32 weights "
            "are processed, in others they are not), or another version of "
            "transformer-lens."
        )


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


def _check_finite(name: str, model: Module) -> None:
    damaged = [
        key for key, weight in model.named_parameters() if not weight.isfinite().all()
    ]
    if damaged:
        raise ModelError(
            f"The weights of the model {name!r} are damaged: {len(damaged)} hold NaN or "
            f"infinity ({_listed(damaged)}). Load them again, or in a wider dtype."
        )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def _first_line(error: Exception) -> str:
    line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
    return line if line.endswith(".") else line + "."
