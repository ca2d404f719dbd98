"""Tasks: a behaviour of a model, prompts that show it and, if known, its circuit."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import FrozenInstanceError, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import torch as t
from torch.nn import Module

from auto_circuit.checks import check_count, checked
from auto_circuit.data import (
    PerSplit,
    PromptDataLoader,
    load_datasets_from_json,
    missing_prompts,
    per_split,
    pick_prompts,
)
from auto_circuit.errors import ConfigError, DataError, near_matches
from auto_circuit.files import repo_path_to_abs_path
from auto_circuit.fingerprints import FOR_READERS
from auto_circuit.memory import Limit, as_limit
from auto_circuit.metrics.official_circuits.circuits.docstring_official import (
    docstring_node_based_official_edges,
    docstring_true_edges,
)
from auto_circuit.metrics.official_circuits.circuits.greaterthan_official import (
    greaterthan_true_edges,
)
from auto_circuit.metrics.official_circuits.circuits.ioi_official import (
    ioi_head_based_official_edges,
    ioi_true_edges,
)
from auto_circuit.metrics.official_circuits.circuits.sports_players_official import (
    sports_players_true_edges,
)
from auto_circuit.metrics.official_circuits.circuits.tracr.reverse_official import (
    tracr_reverse_true_edges,
)
from auto_circuit.metrics.official_circuits.circuits.tracr.xproportion_official import (
    tracr_xproportion_official_edges,
)
from auto_circuit.prompt_files import READERS, Prompt, PromptFile, read_prompt_file
from auto_circuit.published_names import published_name as __getattr__  # noqa: F401
from auto_circuit.result_names import ONLY_IF_GIVEN
from auto_circuit.token_spans import Spans, spans_of_labels
from auto_circuit.types import AutoencoderInput, Edge, OutputSlice, TaskKey
from auto_circuit.utils.graph_utils import patchable_model
from auto_circuit.utils.patchable_model import PatchableModel


class FrozenTaskError(ConfigError, FrozenInstanceError):
    """A field of a Task is set, or deleted."""


@checked
@dataclass(frozen=True)
class Task:
    """A behaviour of a model: a frozen description; what it names loads on first use.

    key, name: its name in results, and for people.
    batch_size, batch_count: prompts per batch and batches, for (train, test) or both.
    token_circuit: does each token position have edges of its own?
    _model_def: a model (TransformerBridge, MicroModel), a Hugging Face hub name, or a
        local folder.
    _dataset_name: a prompt file: `datasets/<name>.json`, or a path to one, which ends in
        .json, .jsonl or .csv (see `load_datasets_from_json`).
    factorized, separate_qkv, slice_output: see `patchable_model`.
    autoencoder_input: see each MLP's output ("resid_delta_mlp") or neurons
        ("mlp_post_act") through a published sparse autoencoder, see `load_autoencoder`.
        Of its latents the autoencoder_max_latents are kept that are most active on the
        training prompts (with autoencoder_prune_with_corrupt on the corrupt ones too).
        autoencoder_pythia_size: which of Pythia's autoencoders.
    autoencoders: see the model through autoencoders and transcoders instead that say where
        they belong (`spliced`): a folder that has a folder for each, in SAELens's format.
        Of each the autoencoder_max_latents are kept that differ most between the clean and
        the corrupt training prompts.
    _true_edge_func: (model) or (model, token_positions, word_idxs, seq_start_idx) -> the
        true edges, those of the circuit; None if they are not known.
    dtype: the type in which the model is loaded, if it is named.
    device: where it is loaded and run; a GPU if there is one, when None.
    seed: shuffles the prompts.
    ungroup: see `patchable_model`. True gives the graph of EAP-IG and the MIB benchmark,
        with a key and a value for every query head.
    keep_positions: see `patchable_model`. True: zero and mean ablations keep position
        embeddings, as EAP-IG's tools do.
    prepend_bos: does every prompt begin with the tokenizer's BOS token? None: as the
        model's own `to_tokens` does (`cfg.default_prepend_bos`).
    depth: how many heads and MLPs in a row the behaviour needs, if that was measured
        (`path_depth` of `auto_circuit.metrics.path_lengths`). For readers: nothing uses it.
    memory_limit: the most that work on the model may take beside it; see `MemoryLimit`.
    span_circuit: does each span of the prompts have edges of its own, in the place of each
        token? The spans are those that the prompt file names; if it names none, tokens in a
        row with one of its `seq_labels` (see `auto_circuit.spans`).
    crossing: see `patchable_model`. True: the graph also has the edges that lead through
        attention from one position, or span, to another.

    A subclass may define `init_task` and set there, as in auto-circuit, `self._model`,
    `self._train_loader`, `self._test_loader` and `self._true_edges`; it runs on first use.

    It is frozen: `dataclasses.replace(task, batch_size=8)` gives another one. `free` drops
    what was loaded; `device` is what was asked for.
    """

    key: TaskKey
    name: str
    batch_size: PerSplit
    batch_count: PerSplit
    token_circuit: bool
    _model_def: Module | str | Path
    _dataset_name: str | Path
    factorized: bool = True
    separate_qkv: bool = True
    _true_edge_func: Callable[..., Collection[Edge]] | None = None
    slice_output: OutputSlice = "last_seq"
    autoencoder_input: AutoencoderInput | None = None
    autoencoder_max_latents: int | None = None
    autoencoder_pythia_size: str | None = None
    autoencoder_prune_with_corrupt: bool | None = None
    dtype: t.dtype = t.float32
    device: str | None = None
    seed: int = 42
    ungroup: bool = False
    keep_positions: bool = False
    prepend_bos: bool | None = None
    depth: int | None = field(default=None, metadata=FOR_READERS)
    autoencoders: str | Path | None = None
    memory_limit: Limit = None
    span_circuit: bool = field(default=False, metadata=ONLY_IF_GIVEN)
    crossing: bool = field(default=False, metadata=ONLY_IF_GIVEN)

    def init_task(self) -> None:
        """Load the model, the prompts and the true edges now, not on first use."""
        _ = self._model, self._train_loader, self._test_loader, self._true_edges
        self.__dict__["__init_complete__"] = True

    def _init_once(self) -> None:
        """Run the `init_task` of a subclass, which may set what is to be used."""
        is_plain = type(self).init_task is Task.init_task
        if not (is_plain or self.__dict__.get("__init_complete__")):
            self.__dict__["__init_complete__"] = True
            self.init_task()

    @property
    def model(self) -> PatchableModel:
        """The model, with its graph."""
        self._init_once()
        return self._model

    @cached_property
    def _model(self) -> PatchableModel:
        self.check_positions()
        train_loader, test_loader = self._train_loader, self._test_loader
        model = patchable_model(
            self._graph_model,
            factorized=self.factorized,
            slice_output=self.slice_output,
            seq_len=train_loader.seq_len if self.token_circuit else None,
            separate_qkv=self.separate_qkv,
            ungroup=self.ungroup,
            keep_positions=self.keep_positions,
            kv_caches=(train_loader.kv_cache, test_loader.kv_cache),
            spans=self._spans if self.span_circuit else None,
            crossing=self.crossing,
        )
        model.memory_limit = as_limit(self.memory_limit)
        return model

    @property
    def tells_positions_apart(self) -> bool:
        """Does each token position, or each span, have edges of its own?"""
        return self.token_circuit or self.span_circuit

    def check_positions(self) -> None:
        """Raise ConfigError if what it says of positions, spans and edges does not fit."""
        if self.token_circuit and self.span_circuit:
            raise ConfigError(
                f"The task {self.key!r} has `token_circuit` and `span_circuit`; expected one: "
                "edges of their own for each token, or for each span."
            )
        lacks = {
            "token_circuit=True` or `span_circuit=True": self.tells_positions_apart,
            "factorized=True": self.factorized,
            "separate_qkv=True": self.separate_qkv,
        }
        for what, is_given in lacks.items():
            if self.crossing and not is_given:
                raise ConfigError(
                    f"The task {self.key!r} has `crossing=True`: its edges lead from a head's "
                    f"keys and values at one position to the head at another. Give it `{what}` "
                    "too."
                )

    @property
    def _spans(self) -> Spans:
        loader = self._train_loader
        if loader.spans is not None:
            return loader.spans
        return spans_of_labels(loader.seq_labels or [])

    def _check_spans(self, file: PromptFile) -> None:
        if self.span_circuit and file.span_names is None and file.seq_labels is None:
            raise DataError(
                f"The task {self.key!r} has `span_circuit=True`, and its prompt file "
                f"{self.prompt_path} names no spans: give each prompt a field 'spans', or the "
                'file "seq_labels" (see docs/how-to/positions.md).'
            )

    @property
    def train_loader(self) -> PromptDataLoader:
        """The prompts that algorithms see."""
        self._init_once()
        return self._train_loader

    @property
    def test_loader(self) -> PromptDataLoader:
        """The prompts that circuits are measured on."""
        self._init_once()
        return self._test_loader

    @cached_property
    def _train_loader(self) -> PromptDataLoader:
        return self._loaders[0]

    @cached_property
    def _test_loader(self) -> PromptDataLoader:
        return self._loaders[1]

    @property
    def true_edges(self) -> Collection[Edge] | None:
        """The true edges, those of the task's circuit; None if they are not known."""
        self._init_once()
        return self._true_edges

    @cached_property
    def _true_edges(self) -> Collection[Edge] | None:
        if self._true_edge_func is None:
            return None
        if not self.token_circuit:
            return self._true_edge_func(self.model)
        return self._true_edge_func(
            self.model,
            token_positions=True,
            word_idxs=self.train_loader.word_idxs,
            seq_start_idx=self.train_loader.diverge_idx,
        )

    @property
    def true_edge_count(self) -> int | None:
        """How many true edges there are, or None."""
        return None if self.true_edges is None else len(self.true_edges)

    def read_prompts(self) -> tuple[list[Prompt], list[Prompt]]:
        """The (train, test) prompts as their file has them. No model is loaded.

        Raises DataError for a file that is not there, is not as it must be, or has too few
        prompts.
        """
        self.check_positions()
        file = read_prompt_file(self.prompt_path)
        self._check_spans(file)
        n_train, n_test = self._split_sizes
        missing = missing_prompts(file.prompts, (n_train, n_test))
        if missing is not None:
            raise DataError(missing)
        picked = pick_prompts(file.prompts, (n_train, n_test), self.seed)
        return picked[:n_train], picked[n_train:]

    @property
    def _split_sizes(self) -> tuple[int, int]:
        sizes = per_split("batch_size", self.batch_size)
        counts = per_split("batch_count", self.batch_count, at_least=0)
        return sizes[0] * counts[0], sizes[1] * counts[1]

    def with_seed(self, seed: int) -> Task:
        """The same task with the prompts of another seed, on the same model.

        The model loads now, unless it is there already, and stays until both are freed. A
        subclass with an `init_task` of its own loads what that says.
        """
        if type(self).init_task is not Task.init_task:
            return replace(self, seed=seed)
        return replace(self, seed=seed, _model_def=self._bare_model)

    def free(self) -> None:
        """Drop the model and the data; they load again when they are asked for."""
        names = {field.name for field in fields(self)}
        for name in [name for name in self.__dict__ if name not in names]:
            del self.__dict__[name]

    def __getstate__(self) -> dict[str, Any]:
        """What is copied or sent to another process: it loads there when it is first used."""
        return {field.name: self.__dict__[field.name] for field in fields(self)}

    @cached_property
    def _bare_model(self) -> Module:
        if isinstance(self._model_def, Module):
            return self._model_def
        # TransformerLens takes seconds to import: only when there is a model to load.
        from auto_circuit.model_utils.load_model import load_transformer
        from auto_circuit.model_utils.tracr_model_utils import (
            TRACR_TASK_KEY,
            get_tracr_model,
        )

        for program in get_args(TRACR_TASK_KEY):
            if self._model_def == program:
                return get_tracr_model(program, self._device)[0]
        return load_transformer(self._model_def, self._device, self.dtype)

    @property
    def _graph_model(self) -> Module:
        """The model whose graph it is: the bare one, or seen through autoencoders."""
        bridge = self._bare_model
        if not self.has_latents:
            return bridge
        from transformer_lens.model_bridge import TransformerBridge

        from auto_circuit.model_utils.sparse_autoencoders.autoencoder_transformer import (
            sae_model,
        )

        if not isinstance(bridge, TransformerBridge):
            raise ConfigError(
                f"The task {self.key!r} asks for sparse autoencoders "
                f"(`autoencoder_input`), but a {type(bridge).__name__} has none."
            )
        if self.autoencoder_input is None or self.autoencoders is not None:
            return self._spliced(bridge)
        saes = sae_model(
            bridge,
            self.autoencoder_input,
            load_pretrained=True,
            pythia_size=self.autoencoder_pythia_size,
        )
        return saes.pruned(
            self.train_loader,
            self.autoencoder_max_latents,
            include_corrupt=bool(self.autoencoder_prune_with_corrupt),
        )

    @property
    def has_latents(self) -> bool:
        """Does its graph have latents of autoencoders in the place of components?"""
        return self.autoencoder_input is not None or self.autoencoders is not None

    def _spliced(self, bridge: Any) -> Module:
        """The model with the latents that differ most between clean and corrupt."""
        from auto_circuit.features import active_latents, load_autoencoders, spliced

        if self.autoencoder_input is not None:
            raise ConfigError(
                f"The task {self.key!r} has both `autoencoders` and `autoencoder_input`; "
                "expected one of them."
            )
        found = load_autoencoders(self.autoencoders or "")
        latents = active_latents(
            bridge,
            found,
            self.train_loader,
            self.autoencoder_max_latents,
            prompts="differ",
        )
        return spliced(bridge, found, latents)

    @property
    def _device(self) -> t.device:
        if isinstance(self._model_def, Module):
            return next(self._model_def.parameters()).device
        return t.device(self.device or ("cuda" if t.cuda.is_available() else "cpu"))

    @cached_property
    def _loaders(self) -> tuple[PromptDataLoader, PromptDataLoader]:
        batch_sizes = per_split("batch_size", self.batch_size)
        split_sizes = self._split_sizes
        check_count("seed", self.seed, at_least=0)
        path = self.prompt_path
        # What is wrong with it is said before the model loads.
        file = read_prompt_file(path)
        self._check_spans(file)
        model: Any = self._bare_model
        has_tokenizer = getattr(model, "tokenizer", None) is not None
        return load_datasets_from_json(
            model=model if has_tokenizer else None,
            path=path,
            device=self._device,
            prepend_bos=self.prepend_bos,
            batch_size=batch_sizes,
            train_test_size=split_sizes,
            return_seq_length=self.token_circuit
            or (self.span_circuit and file.span_names is None),
            tail_divergence=has_tokenizer and _has_kv_cache(model),
            random_seed=self.seed,
        )

    @property
    def prompt_path(self) -> Path:
        """The prompt file. Raises DataError if it is not there, ConfigError for no name."""
        if not isinstance(self._dataset_name, (str, Path)):
            raise ConfigError(
                f"The task {self.key!r} has `_dataset_name` {self._dataset_name!r:.100}; "
                "expected a name or a path."
            )
        name = str(self._dataset_name)
        try:
            path = Path(name)
            if path.suffix.lower() not in READERS:
                path = repo_path_to_abs_path(f"datasets/{name}.json")
            exists = path.exists()
        except (OSError, ValueError) as error:
            raise DataError(
                f"The task {self.key!r} has `_dataset_name` {name!r:.100}, which cannot be "
                f"a path ({error!s:.100})."
            ) from None
        if not exists and name in GENERATORS:
            raise DataError(
                f"The task {self.key!r} needs the prompt file {path}, which is not part of "
                "the repository: its words must be tokens of the model's own tokenizer. "
                f"With a network connection, write it with `python {GENERATORS[name]}`."
            )
        if not exists:
            raise DataError(
                f"The task {self.key!r} needs the prompt file {path}, which does not "
                "exist. Write one in the format of `datasets/` (see "
                "`load_datasets_from_json`), or give the task another `_dataset_name`."
            )
        return path


def _refuse_to_set(task: Task, name: str, value: object) -> None:
    """Set an attribute of a Task: a subclass may set some that are no fields."""
    if type(task) is not Task and name not in {field.name for field in fields(task)}:
        object.__setattr__(task, name, value)
        return
    raise FrozenTaskError(
        f"A Task is frozen, so `{name}` cannot be set. Make another one: "
        f"`dataclasses.replace(task, {name}=...)`; for a model or loaders of your own, "
        "define `init_task` in a subclass."
    )


# The decorator's own says only that the field cannot be assigned to.
Task.__setattr__ = _refuse_to_set  # type: ignore[method-assign, assignment]


class _GoneCache(dict[Any, Any]):
    """Stands for a cache of auto-circuit's: whoever looks into it is told what to do."""

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise ConfigError(
            "There are no global caches of models and data (`MODEL_CACHE`, "
            "`DATASET_CACHE`): a Task keeps its own, and `task.free()` drops them. To share "
            "a model, give it to several tasks as `_model_def`."
        )

    __contains__ = __delitem__ = __getitem__ = __iter__ = __len__ = __setitem__ = _refuse
    clear = copy = get = items = keys = pop = popitem = values = _refuse
    setdefault = update = _refuse  # type: ignore[assignment]


MODEL_CACHE = _GoneCache()
DATASET_CACHE = _GoneCache()


def _has_kv_cache(model: Any) -> bool:
    """TransformerLens's own models have none, so they run every prompt from its start."""
    return getattr(model.cfg, "architecture", None) != "TransformerLensNative"


GENERATORS: dict[str, str] = {
    "docstring_attn-only-4l_prompts": (
        "datasets/docstring_generator.py --model-name attn-only-4l --tokenizer "
        "NeelNanda/Attn_Only_4L512W_C4_Code"
    ),
    "sports-players/sports_players_pythia-2.8b-deduped_prompts": (
        "datasets/sports-players/sports_players_generator.py"
    ),
    "capital_cities_pythia-70m-deduped_prompts": "datasets/capital_cities_generator.py",
}
"""Prompt files that cannot be written offline -> the script that writes them."""


POCKET_MODEL = Path(__file__).parent / "pocket_model"
"""The folder of the small language model that comes with the package."""

POCKET_IOI_TASK = Task(
    key="Pocket IOI",
    name="Indirect Object Identification (pocket model)",
    batch_size=(16, 96),
    batch_count=(4, 1),
    token_circuit=False,
    _model_def=POCKET_MODEL,
    _dataset_name="pocket/ioi_prompts",
    depth=2,
)
POCKET_IOI_TOKEN_TASK = Task(
    key="Pocket IOI Tokens",
    name="Indirect Object Identification by position (pocket model)",
    batch_size=(16, 96),
    batch_count=(4, 1),
    token_circuit=True,
    _model_def=POCKET_MODEL,
    _dataset_name="pocket/ioi_single_template_prompts",
    depth=2,
)
POCKET_GREATERTHAN_TASK = Task(
    key="Pocket Greaterthan",
    name="Greater-than (pocket model)",
    batch_size=(16, 96),
    batch_count=(4, 1),
    token_circuit=False,
    _model_def=POCKET_MODEL,
    _dataset_name="pocket/greaterthan_prompts",
    depth=3,
)
POCKET_DOCSTRING_TASK = Task(
    key="Pocket Docstring",
    name="Docstring completion by position (pocket model)",
    batch_size=(16, 64),
    batch_count=(4, 1),
    token_circuit=True,
    _model_def=POCKET_MODEL,
    _dataset_name="pocket/docstring_prompts",
    depth=2,
)
POCKET_TASKS: tuple[Task, ...] = (
    POCKET_IOI_TASK,
    POCKET_IOI_TOKEN_TASK,
    POCKET_GREATERTHAN_TASK,
    POCKET_DOCSTRING_TASK,
)
"""Those of the default sweep."""

POCKET_LLAMA_MODEL = Path(__file__).parent / "pocket_llama"
"""A small Llama: grouped-query attention, RMS norm, a gated MLP, rotary positions."""
POCKET_GEMMA_MODEL = Path(__file__).parent / "pocket_gemma"
"""A small Gemma 2: the same with norms after attention and MLP too, and soft caps."""


def _on_another_pocket_model(
    title: str, model: Path, depths: dict[str, int]
) -> tuple[Task, ...]:
    """The pocket tasks that `depths` names, and induction, on another small model."""
    induction = Task(
        key="Pocket Induction",
        name="Induction on random words (pocket model)",
        batch_size=(16, 96),
        batch_count=(4, 1),
        token_circuit=False,
        _model_def=model,
        _dataset_name="pocket/induction_prompts",
    )
    named = {task.key: task for task in (*POCKET_TASKS, induction)}
    return tuple(
        replace(
            named[f"Pocket {behaviour}"],
            key=f"Pocket {title} {behaviour}",
            name=named[f"Pocket {behaviour}"].name.replace("model", title),
            _model_def=model,
            depth=depth,
        )
        for behaviour, depth in depths.items()
    )


POCKET_LLAMA_TASKS = _on_another_pocket_model(
    "Llama",
    POCKET_LLAMA_MODEL,
    {"IOI": 3, "IOI Tokens": 3, "Greaterthan": 4, "Docstring": 2, "Induction": 3},
)

POCKET_GEMMA_TASKS = _on_another_pocket_model(
    "Gemma",
    POCKET_GEMMA_MODEL,
    {"IOI": 3, "IOI Tokens": 3, "Greaterthan": 3, "Docstring": 2, "Induction": 3},
)

POCKET_AUTOENCODERS = Path(__file__).parent / "pocket_autoencoders"
"""Autoencoders of the pocket model's residual stream, between its blocks."""

POCKET_IOI_FEATURES_TASK = replace(
    POCKET_IOI_TASK,
    key="Pocket IOI Features",
    name="Indirect Object Identification by features (pocket model)",
    autoencoders=POCKET_AUTOENCODERS,
    autoencoder_max_latents=64,
    depth=None,
)

# The published tasks: their models come from the hub.

SPORTS_PLAYERS_TOKEN_CIRCUIT_TASK = Task(
    key="Sports Players Token Circuit",
    name="Sports Players",
    batch_size=(10, 20),
    batch_count=(10, 5),
    token_circuit=True,
    _model_def="EleutherAI/pythia-2.8b-deduped",
    _dataset_name="sports-players/sports_players_pythia-2.8b-deduped_prompts",
    separate_qkv=False,
    _true_edge_func=sports_players_true_edges,
)
SPORTS_PLAYERS_COMPONENT_CIRCUIT_TASK = Task(
    key="Sports Players Component Circuit",
    name="Sports Players",
    batch_size=15,
    batch_count=7,
    token_circuit=False,
    _model_def="EleutherAI/pythia-2.8b-deduped",
    _dataset_name="sports-players/sports_players_pythia-2.8b-deduped_prompts",
    separate_qkv=False,
    dtype=t.bfloat16,
    _true_edge_func=sports_players_true_edges,
)
IOI_TOKEN_CIRCUIT_TASK = Task(
    key="Indirect Object Identification Token Circuit",
    name="Indirect Object Identification",
    batch_size=(300, 100),
    batch_count=1,
    token_circuit=True,
    _model_def="gpt2-small",
    _dataset_name="ioi/ioi_vanilla_template_prompts",
    _true_edge_func=ioi_head_based_official_edges,
)
IOI_COMPONENT_CIRCUIT_TASK = Task(
    key="Indirect Object Identification Component Circuit",
    name="Indirect Object Identification",
    batch_size=64,
    batch_count=2,
    token_circuit=False,
    _model_def="gpt2-small",
    _dataset_name="ioi/ioi_prompts",
    _true_edge_func=ioi_true_edges,
)
DOCSTRING_TOKEN_CIRCUIT_TASK = Task(
    key="Docstring Token Circuit",
    name="Docstring",
    batch_size=128,
    batch_count=2,
    token_circuit=True,
    _model_def="attn-only-4l",
    _dataset_name="docstring_attn-only-4l_prompts",
    _true_edge_func=docstring_node_based_official_edges,
)
DOCSTRING_COMPONENT_CIRCUIT_TASK = Task(
    key="Docstring Component Circuit",
    name="Docstring",
    batch_size=128,
    batch_count=2,
    token_circuit=False,
    _model_def="attn-only-4l",
    _dataset_name="docstring_attn-only-4l_prompts",
    _true_edge_func=docstring_true_edges,
)
GREATERTHAN_COMPONENT_CIRCUIT_TASK = Task(
    key="Greaterthan Component Circuit",
    name="Greaterthan",
    batch_size=64,
    batch_count=2,
    token_circuit=False,
    _model_def="gpt2-small",
    _dataset_name="greaterthan_gpt2-small_prompts",
    _true_edge_func=greaterthan_true_edges,
)

# MLPs seen through sparse autoencoders, whose latents are sources of the graph.

IOI_GPT2_AUTOENCODER_COMPONENT_CIRCUIT_TASK = Task(
    key="Indirect Object Identification GPT2 Autoencoder Component Circuit",
    name="Indirect Object Identification",
    batch_size=1,
    batch_count=2,
    token_circuit=False,
    _model_def="gpt2-small",
    _dataset_name="ioi/ioi_prompts",
    autoencoder_input="resid_delta_mlp",
    autoencoder_max_latents=200,
)
GREATERTHAN_GPT2_AUTOENCODER_COMPONENT_CIRCUIT_TASK = Task(
    key="Greaterthan GPT2 Autoencoder Component Circuit",
    name="Greaterthan",
    batch_size=1,
    batch_count=2,
    token_circuit=False,
    _model_def="gpt2-small",
    _dataset_name="greaterthan_gpt2-small_prompts",
    autoencoder_input="resid_delta_mlp",
    autoencoder_max_latents=200,
)
ANIMAL_DIET_GPT2_AUTOENCODER_COMPONENT_CIRCUIT_TASK = Task(
    key="Animal Diet GPT2 Autoencoder Component Circuit",
    name="Animal Diet",
    batch_size=2,
    batch_count=16,
    token_circuit=False,
    _model_def="gpt2-small",
    _dataset_name="animal_diet_short_prompts",
    autoencoder_input="resid_delta_mlp",
    autoencoder_max_latents=200,
)
CAPITAL_CITIES_PYTHIA_70M_AUTOENCODER_TOKEN_CIRCUIT_TASK = Task(
    key="Capital Cities Pythia 70M Autoencoder Token Circuit",
    name="Capital Cities",
    batch_size=2,
    batch_count=4,
    token_circuit=True,
    _model_def="EleutherAI/pythia-70m-deduped",
    _dataset_name="capital_cities_pythia-70m-deduped_prompts",
    autoencoder_input="resid_delta_mlp",
    autoencoder_max_latents=200,
    autoencoder_pythia_size="2_32768",
)
AUTOENCODER_TASKS: tuple[Task, ...] = (
    IOI_GPT2_AUTOENCODER_COMPONENT_CIRCUIT_TASK,
    GREATERTHAN_GPT2_AUTOENCODER_COMPONENT_CIRCUIT_TASK,
    ANIMAL_DIET_GPT2_AUTOENCODER_COMPONENT_CIRCUIT_TASK,
    CAPITAL_CITIES_PYTHIA_70M_AUTOENCODER_TOKEN_CIRCUIT_TASK,
)

# Compiled programs, whose circuits are known exactly. Their models come with the package.

TRACR_REVERSE_TOKEN_CIRCUIT_TASK = Task(
    key="Tracr reverse Token Circuit",
    name="Tracr reverse",
    batch_size=11,
    batch_count=11,
    token_circuit=True,
    _model_def="reverse",
    _dataset_name="tracr/tracr_reverse_len_5_prompts",
    slice_output="not_first_seq",
    _true_edge_func=tracr_reverse_true_edges,
)
TRACR_XPROPORTION_TOKEN_CIRCUIT_TASK = Task(
    key="Tracr xproportion Token Circuit",
    name="Tracr xproportion",
    batch_size=64,
    batch_count=8,
    token_circuit=True,
    _model_def="xproportion",
    _dataset_name="tracr/tracr_xproportion_len_5_prompts",
    slice_output="not_first_seq",
    _true_edge_func=tracr_xproportion_official_edges,
)
TRACR_TASKS: tuple[Task, ...] = (
    TRACR_REVERSE_TOKEN_CIRCUIT_TASK,
    TRACR_XPROPORTION_TOKEN_CIRCUIT_TASK,
)

TASKS: tuple[Task, ...] = (
    *POCKET_TASKS,
    POCKET_IOI_FEATURES_TASK,
    *POCKET_LLAMA_TASKS,
    *POCKET_GEMMA_TASKS,
    *TRACR_TASKS,
    SPORTS_PLAYERS_TOKEN_CIRCUIT_TASK,
    SPORTS_PLAYERS_COMPONENT_CIRCUIT_TASK,
    IOI_TOKEN_CIRCUIT_TASK,
    IOI_COMPONENT_CIRCUIT_TASK,
    DOCSTRING_TOKEN_CIRCUIT_TASK,
    DOCSTRING_COMPONENT_CIRCUIT_TASK,
    GREATERTHAN_COMPONENT_CIRCUIT_TASK,
    *AUTOENCODER_TASKS,
)
TASK_DICT: dict[TaskKey, Task] = {task.key: task for task in TASKS}


@checked
def find_task(key: str) -> Task:
    """The task with this key. Raises ConfigError, with the known keys, for others."""
    if key not in TASK_DICT:
        raise ConfigError(
            f"There is no task {key!r}.{near_matches(key, TASK_DICT)} "
            f"Known: {', '.join(TASK_DICT)}; of a sweep also prompt files of your own "
            f"({', '.join(READERS)})."
        )
    return TASK_DICT[key]


MAX_BATCH = 64
"""Prompts per batch of a task that is a prompt file."""


@checked
def task_of_prompts(path: str | Path, model: str | Path | Module = POCKET_MODEL) -> Task:
    """A task that is a prompt file: half of the prompts are for algorithms, half to test.

    path: ends in .json, .jsonl or .csv (see `load_datasets_from_json`). It is also the
        task's key.
    model: a Hugging Face hub name, a local folder or a model.

    If the file names spans, each has edges of its own (`span_circuit`).
    Batches are equal and have at most 64 prompts, so that of n batches up to n - 1 prompts
    may be left out, others with another seed. `dataclasses.replace` changes the task.

    Raises DataError for a file that is not there, is not as it must be, or has one prompt.
    """
    file = read_prompt_file(path)
    n_prompts = len(file.prompts)
    if n_prompts < 2:
        raise DataError(
            f"The prompt file {path} has one prompt; expected two or more: half of them are "
            "for algorithms, the others to test circuits."
        )
    n_batches = -(-(n_prompts // 2) // MAX_BATCH)
    return Task(
        key=str(path),
        name=Path(path).stem,
        batch_size=n_prompts // 2 // n_batches,
        batch_count=n_batches,
        token_circuit=False,
        _model_def=model,
        _dataset_name=path,
        span_circuit=file.span_names is not None,
    )
