"""Compile the two tracr models: transformers whose circuits are known by construction.

tracr turns a program of RASP into weights. This writes, for `reverse` and `xproportion`,
`auto_circuit/model_utils/tracr_weights/<key>.safetensors` (the weights) and `<key>.json`
(sizes, token ids, what each dimension of the residual stream means), and tracr's own
outputs on every input to `tests/model_utils/tracr_outputs.safetensors`.

tracr needs JAX, which AutoCircuit does not, so it runs in an environment of its own and
imports nothing of AutoCircuit:

    python3.11 -m venv /tmp/tracr
    /tmp/tracr/bin/pip install tracr-pypi==1.0.0 safetensors
    /tmp/tracr/bin/python scripts/compile_tracr_models.py
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp  # pyright: ignore[reportMissingImports]
import numpy as np
from safetensors.numpy import save
from tracr.compiler import compiling, lib  # pyright: ignore[reportMissingImports]
from tracr.rasp import rasp  # pyright: ignore[reportMissingImports]

REPO = Path(__file__).resolve().parents[1]
WEIGHTS = REPO / "auto_circuit" / "model_utils" / "tracr_weights"
OUTPUTS = REPO / "tests" / "model_utils" / "tracr_outputs.safetensors"
BOS = "BOS"
MAX_SEQ_LEN = 5
ATTENTION_PARTS = ("query", "key", "value", "linear")
MLP_PARTS = ("linear_1", "linear_2")


@dataclass(frozen=True)
class Program:
    """A RASP program and the words that it reads."""

    key: str
    make: Callable[[], Any]
    words: tuple[int | str, ...]


PROGRAMS = (
    Program("reverse", lambda: lib.make_reverse(rasp.tokens), (1, 2, 3)),
    Program(
        "xproportion",
        lambda: lib.make_frac_prevs((rasp.tokens == "x").named("is_x")),
        ("w", "x", "y", "z"),
    ),
)


def output_columns(labels: list[str], program_label: str) -> list[int]:
    """The dimensions of the residual stream that hold the program's result."""
    return [
        column
        for column, label in enumerate(labels)
        if label == program_label or label.startswith(f"{program_label}:")
    ]


def weights(assembled: Any, columns: list[int]) -> dict[str, np.ndarray]:
    """All weights, [input output], by short names.

    tracr hides its unembedding in a closure; it is a selection of columns.
    """
    params = assembled.params
    tensors = {
        "embed": params["token_embed"]["embeddings"],
        "pos_embed": params["pos_embed"]["embeddings"],
        "unembed": np.eye(len(assembled.residual_labels))[:, columns],
    }
    for layer in range(assembled.model_config.num_layers):
        parts = [f"attn/{part}" for part in ATTENTION_PARTS]
        for part in (*parts, *(f"mlp/{part}" for part in MLP_PARTS)):
            module = params[f"transformer/layer_{layer}/{part}"]
            name = f"layer_{layer}.{part.replace('/', '.')}"
            tensors[f"{name}.w"], tensors[f"{name}.b"] = module["w"], module["b"]
    return {name: np.asarray(value, np.float32) for name, value in tensors.items()}


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write a safetensors file."""
    # safetensors writes the memory as it lies, whatever the strides are.
    rows = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    path.write_bytes(save(rows))


def description(
    program: Program, assembled: Any, label: str, columns: list[int]
) -> dict[str, Any]:
    """What the weights mean: sizes, token ids, residual dimensions, outputs."""
    config = assembled.model_config
    token_ids = assembled.input_encoder.encoding_map
    return {
        "program": label,
        "n_layers": config.num_layers,
        "n_heads": config.num_heads,
        "d_head": config.key_size,
        "d_mlp": config.mlp_hidden_size,
        "d_model": len(assembled.residual_labels),
        "max_seq_len": MAX_SEQ_LEN,
        "vocabulary": [str(word) for word in sorted(token_ids, key=token_ids.get)],
        "words": [str(word) for word in program.words],
        "outputs": [assembled.residual_labels[column] for column in columns],
        "residual_labels": assembled.residual_labels,
    }


def all_outputs(
    program: Program, assembled: Any, columns: list[int]
) -> dict[str, np.ndarray]:
    """tracr's results for every input: tokens, output columns, what tracr decodes.

    Of the last input also each residual stream after the embedding, attention, MLP, ...
    """
    inputs = list(itertools.product(program.words, repeat=MAX_SEQ_LEN))
    token_ids = [assembled.input_encoder.encode([BOS, *words]) for words in inputs]
    output = assembled.forward(assembled.params, jnp.array(token_ids))
    transformer = output.transformer_output
    stream = [transformer.input_embeddings, *transformer.residuals]
    tensors = {
        "tokens": np.asarray(token_ids, np.int64),
        "outputs": np.asarray(transformer.output[..., columns], np.float32),
        "unembedded": np.asarray(output.unembedded_output, np.float32),
        "last_residuals": np.stack([np.asarray(x[-1], np.float32) for x in stream]),
    }
    return {f"{program.key}.{name}": value for name, value in tensors.items()}


def main() -> None:
    """Write the files."""
    WEIGHTS.mkdir(exist_ok=True)
    outputs = {}
    for program in PROGRAMS:
        sop = program.make()
        assembled = compiling.compile_rasp_to_model(
            sop, vocab=set(program.words), max_seq_len=MAX_SEQ_LEN, compiler_bos=BOS
        )
        columns = output_columns(assembled.residual_labels, sop.label)
        path = WEIGHTS / f"{program.key}.safetensors"
        write_tensors(path, weights(assembled, columns))
        text = json.dumps(description(program, assembled, sop.label, columns), indent=2)
        path.with_suffix(".json").write_text(text + "\n")
        outputs |= all_outputs(program, assembled, columns)
    OUTPUTS.parent.mkdir(exist_ok=True)
    write_tensors(OUTPUTS, outputs)


if __name__ == "__main__":
    main()
