"""Helpers for notebooks and experiments."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch as t
from jaxtyping import Float
from torch import Tensor
from torch.nn import Module
from transformer_lens.model_bridge import TransformerBridge

from auto_circuit.checks import checked
from auto_circuit.data import PromptDataLoader, load_datasets_from_json
from auto_circuit.errors import ConfigError, DataError
from auto_circuit.files import repo_path_to_abs_path
from auto_circuit.metrics.official_circuits.circuits.ioi_official import (
    ioi_head_based_official_edges,
    ioi_true_edges,
    ioi_true_edges_mlp_0_only,
)
from auto_circuit.metrics.prune_metrics.answer_diff_percent import answer_diff_percent
from auto_circuit.model_utils.load_model import DeviceMap, load_transformer, show_heads
from auto_circuit.prompt_files import read_prompt_file
from auto_circuit.prune import run_circuits
from auto_circuit.prune_algos.objectives import FaithfulnessTarget
from auto_circuit.prune_algos.subnetwork_probing import (
    INIT_LOGIT,
    subnetwork_probing_prune_scores,
)
from auto_circuit.published_names import published_name as __getattr__  # noqa: F401
from auto_circuit.types import AblationType, Edge, PatchType, PruneScores
from auto_circuit.utils.graph_utils import patchable_model
from auto_circuit.utils.patchable_model import PatchableModel

IoiOrder = Literal["ABBA", "BABA"]
N_IOI_TEMPLATES = 15
LEARNED_TRAIN_FACTOR = 8
"""A learned circuit is found on this many prompts for each one that it is tested on."""


def load_tl_model(
    name: str | Path | Module,
    device: t.device | str | None = None,
    dtype: t.dtype | None = None,
    device_map: DeviceMap | None = None,
    tokenizer: Any = None,
) -> TransformerBridge:
    """A TransformerLens model, ready for `patchable_model`.

    name: a Hugging Face hub name ("gpt2", "EleutherAI/pythia-70m-deduped"), or a local
        folder in Hugging Face format; or a model that is loaded already, as a Hugging Face
        PreTrainedModel (it becomes a part of the result; its weights stay as they are) or a
        TransformerBridge (which is returned).
    device, dtype: None: the CPU and float32, or those of the given model.
    device_map: instead of a device, what `from_pretrained` takes ("auto", or module name ->
        device), with whole blocks on each device.
    tokenizer: of a given PreTrainedModel; without one, prompts are tokens.

    In eval mode and without gradients. In float32, on one device, the weights of a name are
    processed (layer norm folded, writing weights and unembedding centred); else they are as
    they were published. Masks and scores are float32 in any case (float64 for float64).

    What was loaded is checked by numbers against the Hugging Face model. Raises ModelError if
    it cannot be had, or is wrong; ConfigError for arguments that do not go together, and for
    a device map that splits a block.

    TransformerLens's hooks of single heads (`hook_result`, `hook_q_input` ...) and of MLPs'
    inputs are on, as in auto-circuit; they make passes outside of `patch_mode` slower, by
    about 40 % for GPT-2. `model.set_use_attn_result(False)` and the like switch them off, which
    changes no number here. (`hook_attn_in` is off: TransformerLens 4 does
    not have it beside `hook_q_input`.)
    """
    model = load_transformer(name, device, dtype, device_map, tokenizer)
    show_heads(model)
    return model


class IOI_CIRCUIT_TYPE(Enum):
    """Which published circuit of indirect object identification is tested.

    NODES: the heads. EDGES: the edges between heads, through the MLPs between them.
    EDGES_MLP_0_ONLY: of those, the edges without an MLP or with the first one.
    """

    NODES = 1
    EDGES = 2
    EDGES_MLP_0_ONLY = 3

    def __str__(self) -> str:
        return self.name.replace("_", " ").title()


IOI_CIRCUITS: dict[IOI_CIRCUIT_TYPE, Callable[..., set[Edge]]] = {
    IOI_CIRCUIT_TYPE.NODES: ioi_head_based_official_edges,
    IOI_CIRCUIT_TYPE.EDGES: ioi_true_edges,
    IOI_CIRCUIT_TYPE.EDGES_MLP_0_ONLY: ioi_true_edges_mlp_0_only,
}


class SingleTemplateResult(NamedTuple):
    """How much of the logit difference a circuit has on one template's prompts.

    n_edges: the circuit's edges. mean, std: in % of the full model's logit difference,
    over the prompts (std is 0 for the difference of means). percents: each prompt's, a
    tensor (empty for the difference of means). prune_scores: the scores that make the circuit.
    """

    n_edges: int
    mean: float
    std: float
    percents: Float[Tensor, "prompt"]
    prune_scores: PruneScores


@checked
def ioi_circuit_single_template_logit_diff_percent(
    gpt2: TransformerBridge,
    dataset_size: int,
    prepend_bos: bool,
    template: IoiOrder,
    template_idx: int,
    factorized: bool = False,
    circuit: IOI_CIRCUIT_TYPE = IOI_CIRCUIT_TYPE.NODES,
    ablation_type: AblationType = AblationType.TOKENWISE_MEAN_CORRUPT,
    tok_pos: bool = True,
    patch_type: PatchType = PatchType.TREE_PATCH,
    learned: bool = False,
    learned_faithfulness_target: FaithfulnessTarget = "logit_diff_percent",
    diff_of_mean_logit_diff: bool = False,
    batch_size: int | None = None,
    *,
    learned_epochs: int = 200,
) -> SingleTemplateResult:
    """What share of GPT-2's logit difference the IOI circuit has on one template.

    The study of Miller et al. 2024 (arXiv 2407.08734, figures 3 and 4): the percentage
    depends on how a circuit is tested. 100 is the full model's; it has no bounds.

    gpt2: GPT-2 small (`load_tl_model("gpt2")`), which is not changed.
    dataset_size: the number of prompts, the file's first ones. The repository's files have
        100; `python datasets/ioi/ioi_generator.py --single-templates` writes longer ones.
    prepend_bos: put BOS before each prompt.
    template, template_idx: which names come first ("ABBA": the indirect object), and
        which of the 15 templates.
    factorized: edges between all components, or (nodes only) a graph of components.
    tok_pos: does the circuit hold only at the token positions of the paper?
    ablation_type, patch_type: what is patched in, and where; see `run_circuits`.
    learned: test, in place of the published circuit, one of as many edges that
        subnetwork probing finds on `8 * dataset_size` other prompts, trained for
        `learned_faithfulness_target` in `learned_epochs` epochs.
    diff_of_mean_logit_diff: 100 * mean(circuit) / mean(model), else the mean over prompts
        of each one's percentage.
    batch_size: prompts per batch (what BATCH_* ablations mean over); None: all of them.

    Raises ConfigError for another model and for a template that does not exist, DataError
    (which says how to write it) without its prompt file or with too few prompts in it.

    The templates are not auto-circuit's, and so its published figures are others; the learned
    circuit is found by subnetwork probing with this ablation.
    """
    n_train = LEARNED_TRAIN_FACTOR * dataset_size if learned else 0
    model, train_loader, test_loader = _single_template_graph(
        gpt2,
        _ioi_prompt_file(template, template_idx, n_train + dataset_size),
        (n_train, dataset_size),
        batch_size or dataset_size,
        prepend_bos,
        factorized,
        tok_pos,
    )
    edges = IOI_CIRCUITS[circuit](
        model, token_positions=tok_pos, word_idxs=test_loader.word_idxs
    )
    if learned:
        prune_scores = subnetwork_probing_prune_scores(
            model,
            train_loader,
            None,
            epochs=learned_epochs,
            # From open gates on: through twelve layers of half-shut ones, no signal and no
            # gradient would come.
            init_val=-INIT_LOGIT,
            circuit_size=len(edges),
            size_warmup=0.5,
            tree_optimisation=patch_type == PatchType.TREE_PATCH,
            faithfulness_target=learned_faithfulness_target,
            ablation_type=ablation_type,
        )
    else:
        prune_scores = model.circuit_prune_scores(edges)
    outs = run_circuits(
        model, test_loader, [len(edges)], prune_scores, patch_type, ablation_type
    )
    means, stds, points = answer_diff_percent(
        model, test_loader, outs, diff_of_means=diff_of_mean_logit_diff
    )
    ((n_edges, mean),), ((_, std),), ((_, percents),) = means, stds, points
    return SingleTemplateResult(
        int(n_edges), float(mean), float(std), percents, prune_scores
    )


def _single_template_graph(
    gpt2: TransformerBridge,
    path: Path,
    train_test_size: tuple[int, int],
    batch_size: int,
    prepend_bos: bool,
    factorized: bool,
    tok_pos: bool,
) -> tuple[PatchableModel, PromptDataLoader, PromptDataLoader]:
    train_loader, test_loader = load_datasets_from_json(
        gpt2,
        path,
        device=next(gpt2.parameters()).device,
        prepend_bos=prepend_bos,
        batch_size=batch_size,
        train_test_size=train_test_size,
        return_seq_length=True,
        shuffle=False,
    )
    model = patchable_model(
        gpt2,
        factorized=factorized,
        slice_output="last_seq",
        seq_len=test_loader.seq_len if tok_pos else None,
        separate_qkv=True,
    )
    return model, train_loader, test_loader


def _ioi_prompt_file(template: IoiOrder, template_idx: int, n_prompts: int) -> Path:
    if template not in get_args(IoiOrder) or template_idx not in range(N_IOI_TEMPLATES):
        raise ConfigError(
            f"There is no IOI template {template!r} {template_idx!r}; expected one of "
            f"{list(get_args(IoiOrder))} and an index from 0 to {N_IOI_TEMPLATES - 1}."
        )
    name = f"ioi_{template}_template_{template_idx}_prompts"
    path = repo_path_to_abs_path(f"datasets/ioi/{name}.json")
    n_found = len(read_prompt_file(path).prompts) if path.exists() else 0
    if n_found < n_prompts:
        raise DataError(
            f"The study needs {n_prompts} prompts, and the file {path} "
            f"{f'has {n_found}' if n_found else 'does not exist'}. Write longer files with "
            "`python datasets/ioi/ioi_generator.py --single-templates --n-prompts "
            f"{n_prompts}`."
        )
    return path
