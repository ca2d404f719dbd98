"""A look at what a model predicts; and the published path of caches and module names."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch as t
from jaxtyping import Float
from torch import Tensor

from auto_circuit.caches import load_cache as load_cache
from auto_circuit.caches import save_cache as save_cache
from auto_circuit.checks import checked
from auto_circuit.errors import ConfigError, DataError
from auto_circuit.files import repo_path_to_abs_path as repo_path_to_abs_path
from auto_circuit.modules import module_by_name as module_by_name
from auto_circuit.modules import remove_hooks as remove_hooks
from auto_circuit.modules import replaced_forward as replaced_forward
from auto_circuit.modules import set_module_by_name as set_module_by_name


@checked
def percent_gpu_mem_used(total_gpu_mib: int | float | None = None) -> str:
    """How much of the GPU's memory torch has allocated, such as "12.5%".

    total_gpu_mib: the memory in MiB; what the current device reports if None.
    "0.0%" without a GPU.
    """
    if not t.cuda.is_available():
        return "0.0%"
    if total_gpu_mib is None:
        total_gpu_mib = t.cuda.mem_get_info()[1] / 2**20
    return f"{100 * t.cuda.memory_allocated() / 2**20 / total_gpu_mib:.1f}%"


# ------------------------------------------------------------------------ predictions


class TokenRank(NamedTuple):
    """A token's place among a model's predictions; the most likely has rank 0."""

    rank: int
    token: str
    logit: float
    prob: float


@checked
def top_tokens(
    model: Any, logits: Float[Tensor, "vocab"], top_k: int = 10
) -> list[TokenRank]:
    """The `top_k` tokens with the highest logits, best first."""
    ids = logits.topk(min(top_k, logits.numel())).indices.tolist()
    return [_token_rank(model, logits, token_id) for token_id in ids]


def _token_rank(model: Any, logits: Tensor, token_id: int) -> TokenRank:
    rank = int((logits > logits[token_id]).sum())
    prob = float(logits.float().softmax(-1)[token_id])
    token = model.to_str_tokens(t.tensor([token_id]))[0]
    return TokenRank(rank, token, float(logits[token_id]), prob)


@checked
def run_prompt(
    model: Any,
    prompt: str,
    answer: str | None = None,
    top_k: int = 10,
    prepend_bos: bool = False,
) -> None:
    """Print a model's best next tokens for a prompt, and the rank of an answer.

    Raises DataError if the answer is not one token.
    """
    tokens = model.to_tokens(prompt, prepend_bos=prepend_bos)
    print("Prompt:", model.to_str_tokens(tokens[0]))
    with t.no_grad():
        logits = model(tokens)[0, -1]
    get_most_similar_embeddings(model, logits, answer, top_k)


@checked
def get_most_similar_embeddings(
    model: Any,
    out: Float[Tensor, "d"],
    answer: str | None = None,
    top_k: int = 10,
    apply_ln_final: bool = False,
    apply_unembed: bool = False,
    apply_embed: bool = False,
) -> None:
    """Print the tokens whose embeddings are most similar to a vector.

    out: logits, or a residual-stream vector with `apply_unembed` (compare with the
        unembedding) or `apply_embed` (with the embedding).
    answer: a token whose rank is printed too. apply_ln_final: normalise first.

    Raises ConfigError for both embeddings at once, DataError if the answer is not one
    token.
    """
    if apply_unembed and apply_embed:
        raise ConfigError("Give `apply_unembed` or `apply_embed`, not both.")
    with t.no_grad():
        vector = out[None, None]
        if apply_ln_final:
            vector = model.ln_final(vector)
        if apply_unembed:
            vector = model.unembed(vector)
        if apply_embed:
            vector = vector @ model.W_E.T
    logits = vector[0, 0]
    for row in top_tokens(model, logits, top_k):
        _print_rank(row)
    if answer is not None:
        print("Answer:")
        _print_rank(_token_rank(model, logits, _single_token(model, answer)))


def _single_token(model: Any, answer: str) -> int:
    ids = model.to_tokens(answer, prepend_bos=False)[0].tolist()
    if len(ids) != 1:
        raise DataError(f"The answer {answer!r} is {len(ids)} tokens; give a single one.")
    return ids[0]


def _print_rank(row: TokenRank) -> None:
    print(
        f"{row.rank:>6}  {row.token!r:<20} logit {row.logit:8.3f}  prob {row.prob:7.2%}"
    )
