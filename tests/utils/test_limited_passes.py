"""Under a memory limit: the same numbers, and not more memory than it says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from itertools import count
from typing import Any

import pytest
import torch as t
from torch import Tensor
from transformer_lens.model_bridge.sources._bridge_builder import (
    build_bridge_from_module,
)
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from auto_circuit.data import PromptDataLoader, PromptDataset
from auto_circuit.errors import ConfigError, GraphError, MemoryLimitError
from auto_circuit.memory import Guard, MemoryLimit, OverLimit, PeakMemory, Taken
from auto_circuit.prefix_cache import make_prefix_cache
from auto_circuit.prune import run_circuits
from auto_circuit.prune_algos.ACDC import removed_edges
from auto_circuit.prune_algos.acdc_after_eap import acdc_after_eap_prune_scores
from auto_circuit.prune_algos.activation_magnitude import (
    activation_magnitude_prune_scores,
)
from auto_circuit.prune_algos.circuit_probing import circuit_probing_prune_scores
from auto_circuit.prune_algos.edge_attribution_patching import (
    edge_attribution_patching_prune_scores,
)
from auto_circuit.prune_algos.edge_pruning import edge_pruning_prune_scores
from auto_circuit.prune_algos.exact_edge_patching import single_edge_effects
from auto_circuit.prune_algos.head_importance import head_importance_prune_scores
from auto_circuit.prune_algos.integrated_gradients import (
    activation_integrated_gradients_prune_scores,
    clean_corrupt_prune_scores,
    input_integrated_gradients_prune_scores,
)
from auto_circuit.prune_algos.mask_gradient import mask_gradient_prune_scores
from auto_circuit.prune_algos.matryoshka import matryoshka_prune_scores
from auto_circuit.prune_algos.peap import peap_prune_scores
from auto_circuit.prune_algos.prompt_scores import mask_gradient_prompt_scores
from auto_circuit.prune_algos.random_edges import random_prune_scores
from auto_circuit.prune_algos.subnetwork_probing import subnetwork_probing_prune_scores
from auto_circuit.types import AblationType
from auto_circuit.utils.ablation_activations import (
    batch_src_ablations,
    iter_src_ablations,
    src_ablations,
)
from auto_circuit.utils.backward_modifiers import gim_backward, relp_backward
from auto_circuit.utils.graph_utils import patch_mode, patchable_model, train_mask_mode
from auto_circuit.utils.limited_memory import keeping, measured, memory_limited
from auto_circuit.utils.patchable_model import PatchableModel
from tests.micro import micro_loader, micro_model
from tests.models import MORE_ARCHITECTURES, gpt2, mixtral, olmo, tokens

N_PROMPTS, SEQ = 16, 12
CLEAN, CORRUPT = tokens(N_PROMPTS, SEQ, seed=1), tokens(N_PROMPTS, SEQ, seed=2)
Found = Mapping[Any, Tensor]
MODELS = {**MORE_ARCHITECTURES, "mixtral": mixtral, "olmo": olmo}
OF_ANSWERS = {"grad_function": "logit", "answer_function": "avg_diff"}


@cache
def make(
    name: str = "gpt2", seq_len: int | None = None, dtype: t.dtype = t.float32
) -> PatchableModel:
    bridge = MODELS[name]().to(dtype)
    return patchable_model(bridge, True, "last_seq", seq_len, separate_qkv=True)


def loader(
    batch_size: int = N_PROMPTS, seq_len: int | None = None, n_prompts: int = N_PROMPTS
) -> PromptDataLoader:
    answers, wrong = ([t.tensor([word])] * n_prompts for word in (1, 2))
    dataset = PromptDataset(CLEAN[:n_prompts], CORRUPT[:n_prompts], answers, wrong)
    return PromptDataLoader(dataset, seq_len, 0, batch_size=batch_size)


def padded_loader() -> PromptDataLoader:
    masks = t.ones(N_PROMPTS, SEQ, dtype=t.long)
    for row in range(N_PROMPTS):
        masks[row, : row % 4] = 0
    answers, wrong = ([t.tensor([word])] * N_PROMPTS for word in (1, 2))
    dataset = PromptDataset(CLEAN, CORRUPT, answers, wrong, masks, masks)
    return PromptDataLoader(dataset, None, 0, batch_size=N_PROMPTS)


def with_prefix() -> tuple[PatchableModel, PromptDataLoader]:
    bridge = gpt2()
    prefix = make_prefix_cache(bridge, tokens(1, 3, seed=7)[0])
    model = patchable_model(
        bridge, True, "last_seq", separate_qkv=True, kv_caches=(prefix,)
    )
    answers, wrong = ([t.tensor([word])] * N_PROMPTS for word in (1, 2))
    dataset = PromptDataset(CLEAN, CORRUPT, answers, wrong)
    return model, PromptDataLoader(dataset, None, 3, prefix, batch_size=N_PROMPTS)


def prompt_scores(
    model: PatchableModel, prompts: PromptDataLoader, _: None, **options: Any
) -> Found:
    return mask_gradient_prompt_scores(model, prompts, **options)


def circuits(
    model: PatchableModel, prompts: PromptDataLoader, _: None, **options: Any
) -> Found:
    scores = random_prune_scores(model, None, None, seed=0)
    outputs = run_circuits(model, prompts, [5, 50], scores, **options)
    return {(size, key): out for size, of in outputs.items() for key, out in of.items()}


def exact_effects(
    model: PatchableModel, prompts: PromptDataLoader, _: None, **options: Any
) -> Found:
    some = list(model.edges)[::40]
    effects = single_edge_effects(model, prompts, some, **options)
    return {edge: t.tensor(effect) for edge, effect in effects.items()}


def recorded(
    model: PatchableModel, prompts: PromptDataLoader, _: None, **options: Any
) -> Found:
    return {"corrupt": src_ablations(model, CORRUPT, **options).clone()}


ALGORITHMS: dict[str, Callable[..., Found]] = {
    "EAP": edge_attribution_patching_prune_scores,
    "mask gradient": partial(mask_gradient_prune_scores, **OF_ANSWERS, mask_val=0.5),
    "IEG": partial(mask_gradient_prune_scores, **OF_ANSWERS, integrated_grad_samples=3),
    "EAP-IG inputs": partial(
        input_integrated_gradients_prune_scores, integrated_grad_samples=2
    ),
    "EAP-IG activations": partial(
        activation_integrated_gradients_prune_scores, integrated_grad_samples=2
    ),
    "EAP-IG sources": partial(
        activation_integrated_gradients_prune_scores,
        integrated_grad_samples=1,
        share_passes=False,
    ),
    "clean-corrupt": clean_corrupt_prune_scores,
    "HISP": head_importance_prune_scores,
    "activation magnitude": activation_magnitude_prune_scores,
    "EAP of prompts": prompt_scores,
    "circuits": circuits,
    "exact effects": exact_effects,
}


def peak_of(run: Callable[[], object], model: PatchableModel) -> int:
    model.free_buffers()
    with PeakMemory() as peak:
        run()
    model.free_buffers()
    return peak.n_bytes


def assert_same(found: Found, expected: Found) -> None:
    """To a share of the largest number, which is not 0."""
    assert list(found) == list(expected)
    is_exact = all(value.dtype == t.float64 for value in expected.values())
    share = 1e-10 if is_exact else 1e-6
    largest = max(float(value.abs().max()) for value in expected.values())
    assert largest > 0
    for key, value in expected.items():
        t.testing.assert_close(found[key], value, rtol=0.0, atol=share * largest)


def check_quarter(
    algorithm: Callable[..., Found], model: PatchableModel, prompts: PromptDataLoader
) -> None:
    """A quarter of the memory: the same numbers."""
    expected: Found = {}

    def unlimited() -> None:
        nonlocal expected
        expected = algorithm(model, prompts, None)

    limit = peak_of(unlimited, model) // 4
    found: Found = {}

    def limited() -> None:
        nonlocal found
        found = algorithm(model, prompts, None, memory_limit=limit)

    assert peak_of(limited, model) <= limit
    assert_same(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_quarter_of_the_memory_gives_the_same(name: str) -> None:
    # In float64: exact effects and importances are differences of larger numbers.
    check_quarter(ALGORITHMS[name], make(dtype=t.float64), loader())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral", "pythia"])
def test_a_quarter_on_other_architectures(name: str) -> None:
    for algorithm in ("EAP", "IEG"):
        check_quarter(ALGORITHMS[algorithm], make(name), loader())


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["EAP", "IEG", "EAP-IG inputs", "EAP of prompts"])
def test_a_quarter_with_positions_padding_and_a_prefix(algorithm: str) -> None:
    check_quarter(ALGORITHMS[algorithm], make(seq_len=SEQ), loader(seq_len=SEQ))
    check_quarter(ALGORITHMS[algorithm], make(), padded_loader())
    check_quarter(ALGORITHMS[algorithm], *with_prefix())


@pytest.mark.slow
@pytest.mark.parametrize("ablation", [*AblationType])
def test_a_quarter_with_every_ablation(ablation: AblationType) -> None:
    side = "corrupt" if "BATCH" in ablation.name or ablation.name == "RESAMPLE" else None
    eap = partial(
        mask_gradient_prune_scores,
        **OF_ANSWERS,
        mask_val=0.0,
        ablation_type=ablation,
        clean_corrupt=side,
    )
    model = make(dtype=t.float64)
    check_quarter(eap, model, loader())
    check_quarter(eap, model, padded_loader())


def least_of(algorithm: Callable[..., Found], *args: Any) -> int:
    """The smallest limit that works, as the error says."""
    with pytest.raises(MemoryLimitError, match="takes ([0-9,]+) bytes") as raised:
        algorithm(*args, None, memory_limit=1000)
    return int(str(raised.value).split("takes ")[1].split(" ")[0].replace(",", ""))


def check_limits(
    algorithm: Callable[..., Found],
    model: PatchableModel,
    prompts: PromptDataLoader,
    shares: Sequence[float] = (0.5, 0.25),
) -> None:
    """No limit is exceeded, also not while it is found out what fits; the same numbers."""
    found: list[Found] = []

    def peak(**options: Any) -> int:
        def run() -> None:
            found.append(algorithm(model, prompts, None, **options))

        return peak_of(run, model)

    whole, least = peak(), least_of(algorithm, model, prompts)
    for limit in [least, *(int(share * whole) for share in shares)]:
        limit = max(limit, least)
        assert peak(memory_limit=limit) <= limit
        assert_same(found[-1], found[0])


def test_no_limit_is_exceeded() -> None:
    check_limits(ALGORITHMS["EAP"], make(dtype=t.float64), loader(n_prompts=2), [])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral"])
def test_no_limit_is_exceeded_on_other_architectures(name: str) -> None:
    # What experts take depends on the words that come to them.
    check_limits(ALGORITHMS["EAP"], make(name), loader(n_prompts=4))


@pytest.mark.slow
def test_no_limit_is_exceeded_by_paths_with_positions_or_a_prefix() -> None:
    prompts = loader(seq_len=SEQ, n_prompts=2)
    check_limits(ALGORITHMS["IEG"], make(seq_len=SEQ), prompts, [0.6])
    check_limits(ALGORITHMS["EAP"], *with_prefix(), [0.25])


@pytest.mark.parametrize("n_operations", [300, 900])
def test_work_that_is_stopped_leaves_nothing(n_operations: int) -> None:
    """In a forward pass, and in a backward pass."""
    model, smaller = make("llama"), Taken(0, {})

    class Stop(Guard):
        def check(self, operation: Any, n_bytes: int) -> None:
            if next(n_done) == n_operations:
                raise OverLimit

    n_done = count()

    def run() -> None:
        ALGORITHMS["EAP"](model, loader(n_prompts=2), None)

    with PeakMemory() as peak:
        assert measured(model, run, Stop(0.0, smaller, 1.0)) is None
    assert peak.n_left < 100


@pytest.mark.slow
@pytest.mark.parametrize("modifier", [gim_backward, relp_backward])
def test_a_quarter_with_changed_backward_passes(modifier: Callable[..., Any]) -> None:
    model = make("llama")
    with modifier(model):
        check_quarter(ALGORITHMS["EAP"], model, loader())


# ------------------------------------------------------------------ how much it takes


def eap_peak(n_prompts: int, n_tokens: int, n_layers: int = 2) -> int:
    config = LlamaConfig(
        num_hidden_layers=n_layers,
        num_attention_heads=8,
        hidden_size=128,
        intermediate_size=128,
        vocab_size=40,
        max_position_embeddings=64,
    )
    bridge = build_bridge_from_module(
        LlamaForCausalLM(config), "LlamaForCausalLM", hf_config=config
    )
    model = patchable_model(
        bridge.eval().requires_grad_(False), True, "last_seq", separate_qkv=True
    )
    rows = [t.tensor([1])] * n_prompts, [t.tensor([2])] * n_prompts
    sides = tokens(n_prompts, n_tokens, seed=1), tokens(n_prompts, n_tokens, seed=2)
    prompts = PromptDataLoader(PromptDataset(*sides, *rows), None, 0, batch_size=99)
    return peak_of(
        lambda: edge_attribution_patching_prune_scores(model, prompts, None), model
    )


@pytest.mark.slow
def test_memory_grows_linearly_with_prompts_positions_and_sources() -> None:
    for small, middle, large in (
        (eap_peak(4, 12), eap_peak(8, 12), eap_peak(16, 12)),
        (eap_peak(4, 12), eap_peak(4, 24), eap_peak(4, 48)),
        (eap_peak(4, 12, 2), eap_peak(4, 12, 4), eap_peak(4, 12, 8)),
    ):
        # What the second doubling adds is twice what the first one did. (Attention patterns
        # grow with the square of positions: a little of it.)
        assert 1.8 < (large - middle) / (middle - small) < 2.25


def test_the_least_that_is_named_is_enough() -> None:
    model, prompts = make(), loader(n_prompts=3)
    eap = ALGORITHMS["EAP"]
    least = least_of(eap, model, prompts)
    assert_same(eap(model, prompts, None, memory_limit=least), eap(model, prompts, None))


@pytest.mark.slow
def test_limits_of_what_is_recorded() -> None:
    model, prompts = make(), loader(4)
    buffer = model.plan.n_srcs * 4 * SEQ * 32 * 4
    for ablation in (AblationType.RESAMPLE, AblationType.TOKENWISE_MEAN_CORRUPT):
        side = "corrupt" if ablation == AblationType.RESAMPLE else None
        expected = batch_src_ablations(model, prompts, ablation, side)
        found = batch_src_ablations(model, prompts, ablation, side, 10**7)
        assert_same(found, expected)
        for batch, outs in iter_src_ablations(model, prompts, ablation, side, 10**6):
            t.testing.assert_close(outs, expected[batch.key], rtol=1e-5, atol=1e-6)
    small = buffer + 90_000
    assert peak_of(
        lambda: src_ablations(model, CORRUPT[:4], memory_limit=small), model
    ) <= (small)
    found = src_ablations(model, CORRUPT[:4], memory_limit=small)
    t.testing.assert_close(found, src_ablations(model, CORRUPT[:4]), rtol=1e-5, atol=1e-6)
    with pytest.raises(MemoryLimitError, match="takes "):
        src_ablations(model, CORRUPT[:4], memory_limit=buffer)


@pytest.mark.slow
def test_a_models_own_limit_holds_for_all_that_is_done_with_it() -> None:
    model, prompts = make(), loader()
    algorithm = ALGORITHMS["circuits"]
    expected = algorithm(model, prompts, None)
    limit = peak_of(lambda: algorithm(model, prompts, None), model) // 3
    with memory_limited(model, limit):
        assert model.memory_limit == MemoryLimit(limit)
        assert peak_of(lambda: algorithm(model, prompts, None), model) <= limit
        assert_same(algorithm(model, prompts, None), expected)
    assert model.memory_limit is None


# ----------------------------------------------------- trainings, and one edge by another


def removed(model: PatchableModel, prompts: PromptDataLoader, _: None) -> Found:
    some = list(model.edges)[::12]
    found = removed_edges(model, prompts, 1e-3, edges_at_once=3, edges=some)
    return {"removed": t.tensor([float(edge in found) for edge in some])}


STEPWISE: dict[str, Callable[..., Found]] = {
    "probing": partial(
        subnetwork_probing_prune_scores, epochs=2, circuit_size=20, dropout_p=0.2
    ),
    "probing of means": partial(
        subnetwork_probing_prune_scores,
        epochs=2,
        mask_fn="sigmoid",
        tree_optimisation=True,
        ablation_type=AblationType.TOKENWISE_MEAN_CORRUPT,
    ),
    "circuit probing": partial(
        circuit_probing_prune_scores, epochs=2, circuit_sizes=(10, 30)
    ),
    "Edge Pruning": partial(edge_pruning_prune_scores, n_steps=3),
    "Matryoshka": partial(matryoshka_prune_scores, n_steps=3),
    "ACDC": removed,
    "ACDC after EAP": partial(
        acdc_after_eap_prune_scores, n_candidates=10, thresholds=[1e-3]
    ),
}


@pytest.mark.slow
def test_edges_through_attention_keep_to_a_limit() -> None:
    bridge = gpt2().to(t.float64)
    model = patchable_model(
        bridge, True, "last_seq", SEQ, separate_qkv=True, crossing=True
    )
    prompts = loader(seq_len=SEQ, n_prompts=4)
    for algorithm in (peap_prune_scores, ALGORITHMS["EAP"]):
        check_limits(algorithm, model, prompts, [0.5])


def in_limit(algorithm: Callable[..., Found]) -> Callable[..., Found]:
    """The same with the model's own limit."""

    def run(model: Any, prompts: Any, _: None, memory_limit: int | None = None) -> Found:
        with memory_limited(model, memory_limit):
            return algorithm(model, prompts, None)

    return run


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "Matryoshka" else pytest.mark.slow)
        for name in STEPWISE
    ],
)
def test_trainings_and_acdc_keep_to_a_limit(name: str) -> None:
    """Batches of three and of two, cut in parts: the same gates, drawn as for the whole."""
    prompts = loader(3, n_prompts=5)
    check_limits(in_limit(STEPWISE[name]), make(dtype=t.float64), prompts, [])


# ---------------------------------------------------------------- blocks that run again


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "pythia", "mixtral", "olmo"])
def test_blocks_that_run_again_give_the_same(name: str) -> None:
    model, limit = make(name), MemoryLimit(10**9, checkpoint=True)
    for algorithm in ("EAP", "mask gradient"):
        run = ALGORITHMS[algorithm]
        assert_same(
            run(model, loader(), None, memory_limit=limit), run(model, loader(), None)
        )


@pytest.mark.slow
def test_blocks_run_again_with_a_prefix_and_few_sources() -> None:
    model, prompts = with_prefix()
    limit = MemoryLimit(10**9, checkpoint=True)
    for name in ("EAP", "mask gradient"):
        run = ALGORITHMS[name]
        assert_same(
            run(model, prompts, None, memory_limit=limit), run(model, prompts, None)
        )


@pytest.mark.slow
def test_a_block_that_runs_again_records_nothing_twice() -> None:
    model = patchable_model(gpt2(6), True, "last_seq", separate_qkv=True)
    peaks = []
    eap = ALGORITHMS["mask gradient"]
    found = []
    for checkpoint in (False, True):
        limit = MemoryLimit(10**9, checkpoint)
        run = partial(eap, model, loader(), None, memory_limit=limit)
        peaks.append(peak_of(lambda run=run: found.append(run()), model))
    assert_same(found[1], found[0])
    assert peaks[1] < 0.75 * peaks[0]


def test_backward_passes_that_come_too_late_are_refused() -> None:
    model = make()
    with keeping(model, None, recomputes=True), train_mask_mode(model):
        patch = src_ablations(model, CORRUPT)
        with patch_mode(model, patch):
            loss = model.sliced(CLEAN).sum()
        with pytest.raises(GraphError, match="inside of the context"):
            loss.backward()


def test_a_model_without_blocks_cannot_run_them_again() -> None:
    limit = MemoryLimit(10**9, checkpoint=True)
    with pytest.raises(ConfigError, match="names none"):
        ALGORITHMS["EAP"](micro_model(), micro_loader(), None, memory_limit=limit)


@pytest.mark.slow
def test_a_long_prompt_runs_under_a_limit() -> None:
    n_tokens = 2048
    config = GPT2Config(
        n_layer=2, n_head=2, n_embd=32, vocab_size=40, n_positions=n_tokens
    )
    bridge = build_bridge_from_module(
        GPT2LMHeadModel(config), "GPT2LMHeadModel", hf_config=config
    )
    model = patchable_model(
        bridge.eval().requires_grad_(False), True, "last_seq", separate_qkv=True
    )
    sides = tokens(2, n_tokens, 1), tokens(2, n_tokens, 2)
    dataset = PromptDataset(*sides, [t.tensor([1])] * 2, [t.tensor([2])] * 2)
    prompts = PromptDataLoader(dataset, None, 0, batch_size=2)
    found: list[Found] = []
    eap = partial(edge_attribution_patching_prune_scores, model, prompts, None)
    whole = peak_of(lambda: found.append(eap()), model)
    # Most of it are attention patterns, [head position position] of each prompt.
    limit = MemoryLimit(int(0.55 * whole), checkpoint=True)
    assert peak_of(lambda: found.append(eap(memory_limit=limit)), model) <= limit.limit
    assert_same(found[1], found[0])
