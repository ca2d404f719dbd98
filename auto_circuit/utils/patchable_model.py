"""A model with its computation graph, whose edges can be patched."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from copy import deepcopy
from functools import cached_property
from typing import Any
from warnings import warn

import torch as t
from jaxtyping import Int, Shaped
from ordered_set import OrderedSet
from torch import Tensor
from torch.nn import Module, ModuleList, Parameter

from auto_circuit import devices
from auto_circuit.checks import checked, is_number, shown
from auto_circuit.edge_sequence import EdgeSequence, EdgeTable, NamedEdges
from auto_circuit.engine.buffers import PassBuffers
from auto_circuit.engine.edge_matrices import PatchPlan
from auto_circuit.engine.masks_put_back import MasksPutBack, MasksPutBackWarning
from auto_circuit.engine.patch_session import PatchSession
from auto_circuit.engine.patch_wrapper import PatchWrapperImpl
from auto_circuit.errors import (
    ConfigError,
    DataError,
    GraphError,
    ModelError,
    near_matches,
)
from auto_circuit.memory import MemoryLimit
from auto_circuit.model_utils.model_adapter import ModelAdapter
from auto_circuit.padding import (
    check_attention_mask,
    check_last_is_text,
    known_mask,
    padding_mask,
)
from auto_circuit.prefix_cache import (
    PrefixCache,
    begin_with,
    current_keywords,
    make_prefix_cache,
)
from auto_circuit.ranking import score_in_dtype, score_tensors
from auto_circuit.spans import Spans
from auto_circuit.types import DestNode, Edge, Node, PerEdge, PruneScores, SrcNode
from auto_circuit.utils.module_use import being_read, in_use, is_in_use
from auto_circuit.utils.torch_state import (
    all_modules,
    eval_mode,
    own_computation,
    own_defaults,
    own_state,
)
from auto_circuit.utils.user_hooks import UserHooks
from auto_circuit.weights import WeightFingerprint, has_values

LAST_POSITION = (slice(None), -1)
KNOWN_WORDS = "_auto_circuit_known_words"
"""Where a tensor of tokens has the version, and the vocabulary, that it was looked at for."""
EdgeDict = Mapping[int | None, Sequence[Edge]]


class PatchableModel(Module):
    """A model and its graph. Make one with `graph_utils.patchable_model`.

    Outside of `patch_mode` it is the wrapped model: same outputs, same speed.

    nodes, srcs, dests: the graph's nodes, in their fixed order.
    edges, edge_dict, edge_name_dict, n_edges: the edges, in their fixed order; by
        position (None without positions); by position and name; how many there are. No list
        of them is kept: an edge is made when it is asked for.
    crossings: the ends of crossing edges: a node for each head's keys and for its values, if
        the graph has them. They are not among `dests`, which read the residual stream.
    seq_dim, seq_len: the position dimension of activations, and the number of positions
        (or spans) if each has edges of its own.
    spans: what prompts have instead of positions, or None.
    wrappers, src_wrappers, dest_wrappers: the patch wrappers.
    patch_masks: destination module name -> mask [seq?, head?, src] (1 = patched).
    out_slice: index of the part of the output that counts: `model(x)[model.out_slice]`.
    is_factorized, is_transformer, separate_qkv: what kind of graph it is.
    kv_caches: the prefix that is put before every input, or None.
    keep_positions: do zero and mean ablations keep position embeddings?

    A prefix cache serves every batch size. Wrappers are never looked up by path in the wrapped
    model, so two PatchableModels over one model do not disturb each other one after the other.
    Attributes that it does not have are the wrapped model's.

    Threads: one at a time may record, patch or train on a module, and meanwhile no other may
    run it; plain passes may run side by side. While one PatchableModel is in `patch_mode`, no
    other may run the same module. Both raise GraphError. `copy.deepcopy` gives an independent
    model.
    """

    def __init__(
        self,
        nodes: OrderedSet[Node],
        srcs: OrderedSet[SrcNode],
        dests: OrderedSet[DestNode],
        seq_dim: int,
        seq_len: int | None,
        wrappers: OrderedSet[PatchWrapperImpl],
        src_wrappers: OrderedSet[PatchWrapperImpl],
        dest_wrappers: OrderedSet[PatchWrapperImpl],
        out_slice: slice | tuple[slice | int, ...],
        is_factorized: bool,
        is_transformer: bool,
        separate_qkv: bool | None,
        wrapped_model: Module,
        adapter: ModelAdapter,
        plan: PatchPlan,
        kv_caches: Sequence[PrefixCache | None] = (None,),
        keep_positions: bool = False,
        edge_dict: EdgeDict | None = None,
        edges: Sequence[Edge] | None = None,
        crossings: Sequence[DestNode] = (),
        spans: Spans | None = None,
    ) -> None:
        super().__init__()
        self.nodes = nodes
        self.srcs = srcs
        self.dests = dests
        self.crossings = tuple(crossings)
        self.spans = spans
        self.seq_dim = seq_dim
        self.seq_len = seq_len
        self.wrappers = wrappers
        self.src_wrappers = src_wrappers
        self.dest_wrappers = dest_wrappers
        self.out_slice = out_slice
        self.is_factorized = is_factorized
        self.is_transformer = is_transformer
        self.separate_qkv = separate_qkv
        self.adapter = adapter
        self.plan = plan
        self.kv_caches = _prefix_of(wrapped_model, _one_prefix(kv_caches))
        self.keep_positions = keep_positions
        self.wrapped_model = wrapped_model
        # Registered, so that `.to()` and `.state_dict()` reach the masks.
        self._wrapper_modules = ModuleList(wrappers)
        self._wrappers_by_name = {wrapper.module_name: wrapper for wrapper in wrappers}
        self.constants: dict[str, Tensor] = {}
        # Those that the constants belong to; None if nobody knows.
        self.weights: WeightFingerprint | None = None
        self.user_hooks = UserHooks(wrapped_model)
        # What the sources write: an empty tensor of their dtype, device and width.
        self.written: Tensor | None = None
        self.patch_session: PatchSession | None = None
        self.pass_buffers = PassBuffers()
        # See `limited_memory.memory_limited`.
        self.memory_limit: MemoryLimit | None = None
        # For warnings: no number depends on it.
        self.masks_put_back: MasksPutBack | None = None
        # Makes a graph like this one over another module.
        self.make_again: Callable[[Module], PatchableModel] | None = None
        if edge_dict is not None:
            self.__dict__["edge_dict"] = edge_dict
        if edges is not None:
            self.__dict__["edges"] = edges

    def __deepcopy__(self, memo: dict[int, Any]) -> PatchableModel:
        """A copy of the model, and a graph over it with the same masks.

        Raises GraphError inside of `patch_mode` and the like.
        """
        if self.make_again is None or is_in_use(self.wrapped_model):
            raise GraphError(
                "The model is in use (in `patch_mode`, `train_mask_mode` or the like), and "
                "cannot be copied like that. Leave the context first."
            )
        for module in all_modules(self.wrapped_model):
            _copy_leftovers(module, memo)
        copied = self.make_again(deepcopy(self.wrapped_model, memo))
        for name, mask in copied.patch_masks.items():
            mask.data.copy_(self.patch_masks[name].data)
        # Not `copied.train(...)`: that would reach the copied model, whose modes are its own
        # (a PatchableModel says that it is in train mode though its model is not).
        copied.training = self.training
        copied.memory_limit = self.memory_limit
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refused: loading a pickle can run code, and hooks cannot be pickled."""
        raise ModelError(
            "A PatchableModel cannot be pickled, nor copied by `copy.copy`. Save the weights "
            "(`torch.save(model.wrapped_model.state_dict(), path)`) and circuits "
            "(`save_circuit`), and make the model patchable again where you load them. "
            "For a second one in this process: `copy.deepcopy(model)`."
        )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "wrapped_model":
                raise
            return getattr(self.wrapped_model, name)

    # ---------------------------------------------------------------------- memory

    def free_buffers(self) -> None:
        """Let go of the memory that is kept for the next pass in a `patch_mode`.

        A model keeps one set of buffers between passes and contexts, since the first pass
        with new ones takes longer: as much as its last patched pass needed beside the model,
        or a larger one before, up to twice [batch seq source d_model]. `.to()` lets go of it
        too, as does a pass that it does not fit. In `patch_mode`, what a pass uses stays.
        """
        self.pass_buffers.free()

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.free_buffers()
        return super()._apply(*args, **kwargs)

    # ------------------------------------------------------------------- the graph

    @cached_property
    def edge_table(self) -> EdgeTable:
        """Which sources each destination reads."""
        in_srcs = [self.wrapper(dest.module_name).in_srcs for dest in self.dests]
        read = tuple(range(srcs.start, srcs.stop) for srcs in in_srcs if srcs is not None)
        return EdgeTable(
            tuple(self.srcs), tuple(self.dests), read, self.seq_len, self.crossings
        )

    @cached_property
    def edges(self) -> EdgeSequence:
        """All the edges: by position, destination and source. None is kept in memory."""
        return EdgeSequence(self.edge_table)

    @cached_property
    def edge_dict(self) -> EdgeDict:
        """The edges at each position; the only key is None without positions."""
        table = self.edge_table
        return {
            seq_idx: EdgeSequence(table, table.places_at(seq_idx))
            for seq_idx in table.positions
        }

    @cached_property
    def edge_name_dict(self) -> dict[int | None, NamedEdges]:
        """At each position: name -> edge."""
        positions = self.edge_table.positions
        return {seq_idx: NamedEdges(self.edge_table, seq_idx) for seq_idx in positions}

    @property
    def n_edges(self) -> int:
        """The number of edges, counted at each position if these are told apart."""
        return self.edge_table.n_edges

    def in_edge_order(self, values: Mapping[str, PerEdge]) -> Shaped[Tensor, "edges"]:
        """Scores (or masks, or a circuit) in the order of `edges`, on the CPU."""
        n_positions = len(self.edge_table.positions)
        # Destinations of a module follow each other, and so do its rows: a module of 2 heads
        # with 3 sources is [position 2 3], and [position 6] in the order of edges.
        modules = dict.fromkeys(dest.module_name for dest in self.edge_table.dests)
        parts = [values[name].detach().cpu().reshape(n_positions, -1) for name in modules]
        in_order = t.cat(parts, 1).flatten()
        return t.cat([in_order, *self._crossing_in_order(values)])

    def _crossing_in_order(self, values: Mapping[str, PerEdge]) -> list[Tensor]:
        """Those of crossing edges: by the position that they lead to, then by head."""
        if not self.crossings:
            return []
        crossing = self.crossings[0].crossing
        assert crossing is not None
        modules = dict.fromkeys(dest.module_name for dest in self.crossings)
        by_head = t.cat([values[name].detach().cpu() for name in modules])
        # Of 2 heads and 3 positions, [2 6], the columns 0, 1..2 and 3..5 one after the other.
        n_read = [len(crossing.srcs_of(i)) for i in range(crossing.n_positions)]
        return [part.flatten() for part in by_head.split(n_read, 1)]

    def wrapper(self, module_name: str) -> PatchWrapperImpl:
        """The wrapper at a module. Raises GraphError if no node is there."""
        if module_name not in self._wrappers_by_name:
            raise GraphError(
                f"No node of the graph is at the module {module_name!r}."
                + near_matches(module_name, self._wrappers_by_name)
            )
        return self._wrappers_by_name[module_name]

    @checked
    def find_edges(self, edge: Edge | str) -> list[Edge]:
        """The edges that an Edge or a name means.

        A name `"A0.1->MLP 2"` means the edge at every position (with a warning if there
        are several); `"A0.1->MLP 2 @ 3"` the one at position 3. Raises GraphError, with
        near matches, if the graph has no such edge.
        """
        table = self.edge_table
        if isinstance(edge, Edge):
            place = table.place(edge)
            if place is None:
                raise self._unknown_edge(repr(edge))
            return [table.edge(place)]
        name, position = split_edge_name(edge)
        seq_idxs = table.positions if position is None else [position]
        found = [table.named(name, seq_idx) for seq_idx in seq_idxs]
        edges = [edge for edge in found if edge is not None]
        # A crossing edge is not at all positions, others are at all or at none.
        if not edges:
            raise self._unknown_edge(edge)
        if len(edges) > 1:
            warn(
                f"{name!r} names no position, so it means the edge at all {len(edges)} "
                f'positions. Write "{name} @ 0" for the one at position 0.',
                stacklevel=3,
            )
        return edges

    @checked
    def check_edges(self, edges: Collection[Edge]) -> None:
        """Raise GraphError, with near matches, unless all are edges of this graph."""
        for edge in edges:
            self.find_edges(edge)

    def position_labels(self, seq_labels: list[str] | None) -> list[str] | None:
        """A name for each of its positions: of its spans, else those of the tokens."""
        return list(self.spans.names) if self.spans is not None else seq_labels

    def check_no_crossings(self, who: str) -> None:
        """Raise GraphError if the graph has crossing edges, of which `who` knows nothing."""
        if self.crossings:
            raise GraphError(
                f"{who} knows nothing of edges that lead through attention, and this graph "
                "has them (`crossing=True`). Use PEAP, EAP, EAP-IG activations, ACDC, exact edge "
                "patching or a training of masks, or a graph with `crossing=False`."
            )

    def _unknown_edge(self, name: str) -> GraphError:
        bare_name, _, position = name.partition(" @ ")
        where = f" The graph has {self.seq_len} positions." if self.seq_len else ""
        if position and self.seq_len is None:
            where = " The graph does not tell positions apart (`seq_len` is None)."
        hint = self.edge_table.hint(bare_name)
        return GraphError(f"The graph has no edge {name!r}.{hint}{where}")

    # -------------------------------------------------------------- masks and scores

    @property
    def patch_masks(self) -> dict[str, Parameter]:
        """Destination module name -> its mask.

        Differs from auto-circuit: `patch_mode(..., edges)` and `train_mask_mode` put the
        masks back when they are left. Read them inside.
        """
        return {wrapper.module_name: wrapper.mask for wrapper in self.dest_wrappers}

    def masks_are_put_back(self) -> bool:
        """Has a context put masks back that nobody has set since?"""
        noted = self.masks_put_back
        return noted is not None and noted.is_visible(self.patch_masks)

    def warn_of_masks_put_back(self, instead: str) -> None:
        """Say once that masks are not what they were inside of the last context."""
        noted = self.masks_put_back
        if noted is None:
            return
        visible = self.masks_are_put_back()
        self.masks_put_back = None
        if visible:
            warn(noted.explanation(instead), MasksPutBackWarning, stacklevel=3)

    @checked
    def new_prune_scores(self, init_val: float = 0.0) -> PruneScores:
        """A score of `init_val` for every edge. Raises ModelError on the meta device."""
        if any(wrapper.mask.is_meta for wrapper in self.dest_wrappers):
            raise ModelError(
                "The masks of this graph are on the meta device, as its model is, so that "
                "scores would have no values. `patchable_model(..., device='cpu')` has masks "
                "and scores, 4 bytes for each of the "
                f"{self.n_edges:,} edges."
            )
        scores = {}
        with own_computation():
            for wrapper in self.dest_wrappers:
                scores[wrapper.module_name] = t.full_like(wrapper.one_mask, init_val)
        return scores

    @checked
    def check_scores(self, prune_scores: PruneScores) -> PruneScores:
        """The scores, as tensors on the masks' device (see `score_tensors`).

        Raises GraphError for scores that are not of this graph: other names or shapes.
        """
        masks = {wrapper.module_name: wrapper.one_mask for wrapper in self.dest_wrappers}
        expected = {name: mask.shape for name, mask in masks.items()}
        found = score_tensors(prune_scores) if prune_scores else {}
        for module_name, scores in found.items():
            if module_name not in expected:
                hint = near_matches(module_name, expected)
                raise GraphError(
                    f"The scores name {module_name!r}, which is no destination.{hint} "
                    "Were they made for another model?"
                )
            if scores.shape != expected[module_name]:
                raise GraphError(
                    f"The scores of {module_name!r} have shape {tuple(scores.shape)}; the "
                    f"graph needs {tuple(expected[module_name])}, [position?, head?, "
                    "source]. Were they made for another model?"
                )
        missing = [name for name in expected if name not in prune_scores]
        if missing:
            raise GraphError(
                f"The scores lack {len(missing)} of the graph's {len(expected)} "
                f"destination modules, among them {missing[0]!r}. Start from "
                "`model.new_prune_scores()`."
            )
        return {
            name: scores if masks[name].is_meta else scores.to(masks[name].device)
            for name, scores in found.items()
        }

    @checked
    def circuit_prune_scores(
        self,
        edges: Collection[Edge | str] | None = None,
        edge_dict: Mapping[Edge, float] | Mapping[str, float] | None = None,
        bool: bool = False,
    ) -> PruneScores:
        """Scores that make a circuit: 1 (or the given value) at some edges, 0 elsewhere.

        edges: Edges or names. edge_dict: Edge or name -> score. bool: boolean tensors.
        Raises ConfigError unless exactly one of the two is given, GraphError for an
        unknown edge, for one that gets two scores, and for what is no score.
        """
        if (edges is None) == (edge_dict is None):
            raise ConfigError("Give either `edges` or `edge_dict`, not both or neither.")
        values: list[tuple[Any, Any]] = (
            [(edge, 1.0) for edge in edges or ()]
            if edge_dict is None
            else list(edge_dict.items())
        )
        scores = self.new_prune_scores()
        given: dict[Edge, float] = {}
        for edge_or_name, value in values:
            for edge in self.find_edges(edge_or_name):
                what = f"The score of {edge!r}"
                if not is_number(value):
                    raise GraphError(f"{what} is {shown(value)}; expected a number.")
                of_module = scores[edge.dest.module_name]
                score = score_in_dtype(what, value, of_module.dtype)
                if given.setdefault(edge, score) != score:
                    raise GraphError(f"{what} is given twice: {given[edge]} and {score}.")
                of_module[edge.patch_idx] = score
        if not bool:
            return scores
        with own_computation():
            return {name: score != 0 for name, score in scores.items()}

    def current_patch_masks_as_prune_scores(self) -> PruneScores:
        """The masks as scores: views that change with the masks.

        A MasksPutBackWarning says if a context has put them back: read them inside of it.
        """
        self.warn_of_masks_put_back(
            "Call `current_patch_masks_as_prune_scores` inside of it (and `.clone()` what "
            "you keep), or `circuit_prune_scores(edges)` for the scores of some edges."
        )
        return {name: mask.data for name, mask in self.patch_masks.items()}

    # ------------------------------------------------------------- running the model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped model's output; the prefix, if any, is put before the input.

        Whole prompts, that begin with the prefix, are run as they are. Padding is found by
        the tokenizer's padding token unless `attention_mask` says where it is. Raises
        DataError for prompts that have a BOS token but not the prefix, that end with
        padding where the last position counts, that are longer than the context, or that
        have tokens which the model has not; GraphError if padding cannot be told from text.
        """
        if "torch._dynamo" in sys.modules:  # somebody may have called `torch.compile`
            # It cannot compile our hooks.
            return t._dynamo.disable(self._pass)(*args, **kwargs)
        return self._pass(*args, **kwargs)

    def _pass(self, *args: Any, **kwargs: Any) -> Any:
        noted = self.masks_put_back
        # Not after training: what is trained on afterwards sets the masks itself.
        if noted is not None and self.patch_session and noted.context == "patch_mode":
            self.warn_of_masks_put_back(
                "This `patch_mode` names no edges, so it patches along the masks: pass "
                "`edges` again, or set the masks (`set_all_masks`)."
            )
        with self._running():
            args, kwargs = self._model_call(args, kwargs)
            if self.patch_session is not None:
                self.patch_session.positions = self._positions(args, kwargs)
            try:
                return self.wrapped_model(*args, **kwargs)
            except t.OutOfMemoryError:
                self.free_buffers()  # so that a smaller batch may have it all
                raise
            except (IndexError, RuntimeError) as error:
                explained = self._explained(args)
                if explained is None:
                    raise
                raise explained from error

    def _positions(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Int[Tensor, "example token"] | None:
        """The span of each token; padding, where no edge does anything, has the first."""
        tokens = args[0] if args else None
        if self.spans is None:
            return None
        if not isinstance(tokens, Tensor) or tokens.is_floating_point():
            raise DataError(
                "This graph has spans, which are found by the tokens of a prompt: call the "
                "model with tokens (`model.to_tokens(texts)`)."
            )
        positions = self.spans.positions(tokens, kwargs.get("attention_mask"))
        positions = positions.clamp(min=0)
        is_alike = bool((positions == positions[0]).all())
        return positions[:1] if is_alike else positions

    def sliced(self, *args: Any, **kwargs: Any) -> Shaped[Tensor, "batch *seq_vocab"]:
        """`model(...)[model.out_slice]`.

        If that is the last position, no other position is unembedded: with a large
        vocabulary a third of a small model's work.
        """
        with last_position_only(self):
            return self(*args, **kwargs)[self.out_slice]

    def run_with_cache(self, *args: Any, **kwargs: Any) -> Any:
        """TransformerLens's `run_with_cache`, with the prefix.

        The cache has what single heads read and write too (`hook_q_input`, `hook_result`),
        but not inside of `patch_mode`, which computes that in another way.
        """
        with self._running(), self._open_hooks():
            args, kwargs = self._model_call(args, kwargs)
            return self.wrapped_model.run_with_cache(*args, **kwargs)  # type: ignore[operator]

    @contextmanager
    def _running(self) -> Iterator[None]:
        """One pass. Patched, it runs in a state of its own; else in the caller's."""
        with ExitStack() as stack:
            stack.enter_context(being_read(self.wrapped_model, self))
            if self.patch_session is not None:
                stack.enter_context(own_computation())
                stack.enter_context(own_defaults())
                stack.enter_context(self.patch_session.called())
                inner = self.wrapped_model.__dict__.get("original_model")
                if self.wrapped_model.training or getattr(inner, "training", False):
                    # Since `patch_mode` was entered.
                    stack.enter_context(eval_mode(self.wrapped_model))
            yield

    def run_with_hooks(self, *args: Any, **kwargs: Any) -> Any:
        """TransformerLens's `run_with_hooks`, with the prefix."""
        with self._running(), self._open_hooks():
            args, kwargs = self._model_call(args, kwargs)
            return self.wrapped_model.run_with_hooks(*args, **kwargs)  # type: ignore[operator]

    def _open_hooks(self) -> AbstractContextManager[None]:
        if self.patch_session is not None:
            return nullcontext()
        return self.adapter.open_hooks(self.wrapped_model)

    def input_to_embed(self, *args: Any, **kwargs: Any) -> Any:
        """TransformerLens's `input_to_embed`, with positions that go on after the prefix.

        (the residual stream that the first block reads, tokens, None, attention mask)
        """
        if not self.is_transformer or self.kv_caches is None:
            return self.wrapped_model.input_to_embed(*args, **kwargs)  # type: ignore[operator]
        with self._running():
            (tokens, *rest), kwargs = self._model_call(args, kwargs)
            embedded = self.wrapped_model(tokens, *rest, stop_at_layer=0, **kwargs)
        return embedded, tokens, None, kwargs.get("attention_mask")

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """TransformerLens's `generate`. Raises GraphError in `patch_mode`, or with a prefix.

        It calls the model with other inputs than patches and prefix are for.
        """
        if self.patch_session is not None or self.kv_caches is not None:
            raise GraphError(
                "`generate` knows neither patches nor the prefix that this model puts before "
                "its inputs (`kv_caches`). Call `model.wrapped_model.generate(...)` with "
                "whole prompts, outside of `patch_mode`."
            )
        return self.wrapped_model.generate(*args, **kwargs)  # type: ignore[operator]

    def attention_mask(
        self, tokens: Shaped[Tensor, "..."]
    ) -> Int[Tensor, "batch seq"] | None:
        """0 where a row of tokens starts or ends with the tokenizer's padding token.

        The tokens of a loader's batch bring their mask along. None if nothing is padded,
        and for inputs that are no tokens [batch seq]. Raises GraphError if padding cannot
        be told from text.
        """
        known = known_mask(tokens)
        if known is not None:
            return known
        if not self.is_transformer or tokens.is_floating_point() or tokens.ndim != 2:
            return None
        return padding_mask(tokens, getattr(self.wrapped_model, "tokenizer", None))

    def _model_call(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Add what the wrapped model needs: the prefix cache and the attention mask."""
        if not self.is_transformer:
            return args, kwargs
        if not args and "input" in kwargs:
            kwargs = dict(kwargs)
            args = (kwargs.pop("input"),)
        tokens = args[0] if args else None
        # Also when it is None, as in auto-circuit: no prefix then.
        prefix = None if "past_kv_cache" in kwargs else self.kv_caches
        kwargs = current_keywords(self.wrapped_model, tokens, kwargs)
        if isinstance(tokens, list):
            return args, self._call_of_texts(kwargs)
        if not isinstance(tokens, Tensor) or tokens.is_floating_point():
            return args, kwargs
        tokens = tokens if tokens.ndim > 1 else tokens[None]
        return (tokens, *args[1:]), self._call_of_tokens(tokens, kwargs, prefix)

    def _call_of_texts(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Texts are whole prompts; TransformerLens masks what it pads on the left."""
        if self.out_slice != LAST_POSITION:
            return kwargs
        if kwargs.get("padding_side") == "right":
            raise DataError(
                "`padding_side` is 'right', but the output at the last position counts "
                "(`slice_output='last_seq'`); leave it out."
            )
        return {**kwargs, "padding_side": "left"}

    def _call_of_tokens(
        self,
        tokens: Int[Tensor, "batch seq"],
        kwargs: dict[str, Any],
        prefix: PrefixCache | None,
    ) -> dict[str, Any]:
        is_continued = kwargs.get("past_key_values") is not None
        mask = kwargs.get("attention_mask")
        prefix = None if is_continued else prefix
        n_prefix = 0 if prefix is None else prefix.seq_len
        if mask is None:
            mask = None if is_continued else self.attention_mask(tokens)
        elif not is_continued:
            check_attention_mask(mask, tokens.shape, n_prefix)
        if mask is not None and self.out_slice == LAST_POSITION:
            check_last_is_text(mask)
        if prefix is not None and self._are_whole(tokens, mask, prefix):
            prefix, n_prefix = None, 0
        self._check_length(n_prefix + tokens.shape[1])
        self._check_words(tokens)
        if prefix is not None:
            cache = self._current_prefix().past_key_values(tokens.shape[0])
            kwargs = {**kwargs, "past_key_values": cache}
            if mask is not None and mask.shape[1] == tokens.shape[1]:
                mask = t.cat([mask.new_ones(tokens.shape[0], n_prefix), mask], dim=1)
        return kwargs if mask is None else {**kwargs, "attention_mask": mask}

    def _are_whole(
        self, tokens: Tensor, mask: Tensor | None, prefix: PrefixCache
    ) -> bool:
        """Do the prompts begin with the prefix already?"""
        if mask is not None and mask.shape[1] != tokens.shape[1]:
            return False
        starts = None if mask is None else mask.int().argmax(1)
        tokenizer = getattr(self.wrapped_model, "tokenizer", None)
        whole = begin_with(tokens, prefix.tokens, starts)
        if whole.all():
            return True
        bos = getattr(tokenizer, "bos_token_id", None)
        firsts = tokens[:, :1] if starts is None else tokens.gather(1, starts[:, None])
        has_bos = prefix.tokens[0] == bos and bool((firsts == bos).any())
        if has_bos or whole.any():
            raise DataError(
                f"This model puts a prefix of {prefix.seq_len} tokens before every input "
                f"(`kv_caches`: {_shown(tokenizer, prefix.tokens)}), and some of these "
                "prompts have a beginning of their own. Give the batches of the loader "
                "that the prefix is from, or whole prompts that all begin with it; for "
                "any other text call `model.wrapped_model(...)`."
            )
        return False

    def _current_prefix(self) -> PrefixCache:
        """The prefix; computed again if weights have changed since it was."""
        prefix = self.kv_caches
        assert prefix is not None
        if prefix.weights is None or not prefix.weights.holds():
            if self.patch_session is not None:
                raise GraphError(
                    "The model's weights have changed inside of `patch_mode`, and with "
                    "them the keys and values of the prefix. Leave the context, and "
                    "compute the activations to patch in again."
                )
            prefix = make_prefix_cache(self.wrapped_model, prefix.tokens)
            self.kv_caches = prefix
        return prefix

    def refresh_prefix(self) -> None:
        """Compute the prefix again if weights have changed. Not inside of `patch_mode`."""
        if self.kv_caches is not None:
            self._current_prefix()

    def _check_length(self, n_positions: int) -> None:
        n_context = getattr(getattr(self.wrapped_model, "cfg", None), "n_ctx", None)
        if n_context is not None and n_positions > n_context:
            raise DataError(
                f"The input has {n_positions} positions; the model's context has "
                f"{n_context}. Use shorter prompts."
            )

    @property
    def _n_words(self) -> int | None:
        return getattr(getattr(self.wrapped_model, "cfg", None), "d_vocab", None)

    def _check_words(self, tokens: Shaped[Tensor, "batch seq *features"]) -> None:
        """Raise DataError for words that the model does not have, on a GPU.

        To look them up there would end all that the process does on the GPU; on a CPU it is
        an error that can be explained. Tokens are asked once.
        """
        if devices.device_of(tokens).type == "cpu":
            return
        known = (tokens._version, self._n_words)
        if getattr(tokens, KNOWN_WORDS, None) == known:
            return
        if (error := self._foreign_words(tokens)) is not None:
            raise error
        setattr(tokens, KNOWN_WORDS, known)

    def _explained(self, args: tuple[Any, ...]) -> DataError | None:
        """What an error of the model means, if its input shows it."""
        tokens = args[0] if args else None
        if not isinstance(tokens, Tensor) or tokens.is_floating_point():
            return None
        weight = next(self.wrapped_model.parameters(), tokens)
        here, there = devices.device_of(tokens), devices.device_of(weight)
        if here != there and not self.plan.devices:
            return DataError(
                f"The prompts are on the device {str(here)!r}, the model is on "
                f"{str(there)!r}. Load them with the model's `device`."
            )
        return self._foreign_words(tokens)

    def _foreign_words(
        self, tokens: Shaped[Tensor, "batch seq *features"]
    ) -> DataError | None:
        low, high = devices.low_and_high(tokens)
        if self._n_words is None or (0 <= low and high < self._n_words):
            return None
        return DataError(
            f"The tokens run from {low} to {high}, but the model has the words 0 to "
            f"{self._n_words - 1}. Is the tokenizer another model's?"
        )


def _copy_leftovers(module: Module, memo: dict[int, Any]) -> None:
    """What a module keeps of its last pass (attention patterns), without the pass's graph.

    torch refuses to copy the results of a pass with gradients.
    """
    for value in module.__dict__.values():
        if isinstance(value, Tensor) and not value.is_leaf:
            memo[id(value)] = value.detach().clone()


def _shown(tokenizer: Any, tokens: Tensor) -> str:
    ids = tokens.tolist()
    return repr(ids if tokenizer is None else tokenizer.decode(ids))


@checked
def split_edge_name(name: str) -> tuple[str, int | None]:
    """("A0.1->MLP 2", 3) for "A0.1->MLP 2 @ 3", and no position for "A0.1->MLP 2".

    Raises GraphError if what follows the first " @ " is no position.
    """
    bare_name, at, position = name.partition(" @ ")
    if not at:
        return name, None
    if re.fullmatch("0|[1-9][0-9]{0,8}", position) is None:
        raise GraphError(
            f'The graph has no edge {name[:200]!r}: what follows the "@" is no position. '
            f'Expected a whole number from 0 on, such as "{bare_name[:80]} @ 0".'
        )
    return bare_name, int(position)


@contextmanager
def last_position_only(model: PatchableModel) -> Iterator[None]:
    """Inside, outputs have one position, the last one, if that is all that counts.

    Of GPT-2 small that saves a quarter of a dense patched pass, and of EAP.
    """
    unembed = model.adapter.find_unembed(model.wrapped_model)
    if unembed is None or model.out_slice != LAST_POSITION:
        yield
        return

    with in_use(model.wrapped_model, model):
        handle = unembed.register_forward_pre_hook(_cut_to_last_position)
        try:
            yield
        finally:
            handle.remove()


def _cut_to_last_position(unembed: Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    if UserHooks(unembed).ids():
        return args  # they mean all positions
    # Contiguous: torch would otherwise multiply the examples one by one.
    return (args[0][:, -1:].contiguous(), *args[1:])


def check_has_values(model: PatchableModel) -> None:
    """Raise ModelError for a graph on the meta device, which cannot be run."""
    masks = model.patch_masks.values()
    if not has_values(model.wrapped_model) or any(mask.is_meta for mask in masks):
        raise ModelError(
            "This graph is on the meta device, where tensors have shapes and no values: its "
            "edges can be named and counted, but nothing can be run or patched. Load the "
            "model with its weights, and make that one patchable."
        )


@contextmanager
def unpatched(model: PatchableModel, grad: bool | None = None) -> Iterator[None]:
    """Inside, the model runs as it is, in a state of its own (see `own_state`).

    No other thread may run it meanwhile. Raises GraphError inside of `patch_mode`, where
    the pass would be a patched one.
    """
    check_has_values(model)
    with in_use(model.wrapped_model, model), own_state(model, grad):
        if model.patch_session is not None:
            raise GraphError(
                "This needs the model without patches, but it is in `patch_mode`. Record "
                "activations, and measure the full model, before you enter `patch_mode`."
            )
        yield


def _one_prefix(kv_caches: Sequence[PrefixCache | None]) -> PrefixCache | None:
    """The prefix that all the given caches hold, or None."""
    caches = [cache for cache in kv_caches if cache is not None]
    for cache in caches:
        if not isinstance(cache, PrefixCache):
            raise ConfigError(
                f"`kv_caches` holds a {type(cache).__name__}; expected the `kv_cache` of "
                "dataloaders made with `load_datasets_from_json(..., "
                "tail_divergence=True)`."
            )
        if not t.equal(cache.tokens, caches[0].tokens):
            raise ConfigError(
                "`kv_caches` holds two different prefixes: "
                f"{caches[0].tokens.tolist()} and {cache.tokens.tolist()}. Data sets "
                "with different prefixes need a PatchableModel each."
            )
    return caches[0] if caches else None


def _prefix_of(model: Module, prefix: PrefixCache | None) -> PrefixCache | None:
    """The prefix with this model's keys and values, if they are another's."""
    if prefix is None or (prefix.weights is not None and prefix.weights.is_of(model)):
        return prefix
    return make_prefix_cache(model, prefix.tokens)
