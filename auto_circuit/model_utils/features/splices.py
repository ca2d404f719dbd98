"""What takes the place of a component, or of the residual stream, in a spliced model.

What was written is the sum of what each latent writes and of an error: all the rest, exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch as t
from jaxtyping import Float
from torch import Tensor
from torch.nn import Identity, Linear, Module, ModuleList, Parameter

from auto_circuit.checks import shown
from auto_circuit.errors import ConfigError, one_line
from auto_circuit.model_utils.features.autoencoder import Autoencoder
from auto_circuit.model_utils.model_adapter import Norm

Encoded = Float[Tensor, "*lead d_in"]
Amounts = Float[Tensor, "*lead latent"]
"""How much of its direction each latent writes."""
Directions = Float[Tensor, "latent d_out"]
Decoded = Float[Tensor, "*lead d_out"]


class Latents(Module):
    """The latents that are nodes: how much each writes, and of what.

    linears: if a latent is a function of its own row of some linear maps, these maps.
    """

    linears: ModuleList

    @property
    def n_latents(self) -> int:
        """How many there are."""
        raise NotImplementedError

    def amounts(self, encoded: Encoded) -> Amounts:
        """How much each writes."""
        # Not by calling them: the engine stands in for that, where latents are destinations.
        return self.of_rows([type(m).forward(m, encoded) for m in self.linears])

    def of_rows(self, outs: Sequence[Amounts]) -> Amounts:
        """The same from what the linear maps give."""
        raise NotImplementedError

    def directions(self) -> Directions:
        """What each writes where its amount is 1."""
        raise NotImplementedError


class RowLatents(Latents):
    """Latents of an autoencoder that depend on their own rows of the encoder alone."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        weight = autoencoder.encoder_weight
        linear = Linear(weight.shape[1], weight.shape[0], device="meta")
        linear.weight = Parameter(weight, requires_grad=False)
        linear.bias = Parameter(autoencoder.folded_bias(), requires_grad=False)
        self.linears = ModuleList([linear])
        # Registered: whoever asks what the model's weights are is to see them.
        self.register_buffer("_directions", autoencoder.decoder_weight)
        self.autoencoder = autoencoder

    def _apply(self, *args: Any, **kwargs: Any) -> Module:
        super()._apply(*args, **kwargs)
        weight: Any = self.linears[0].weight
        self.autoencoder = self.autoencoder.to(weight.device, weight.dtype)
        return self

    @property
    def n_latents(self) -> int:
        """How many there are."""
        return self.autoencoder.n_latents

    def of_rows(self, outs: Sequence[Amounts]) -> Amounts:
        """The latents."""
        (encoded,) = outs
        return self.autoencoder.activate(encoded)

    def directions(self) -> Directions:
        """The decoder's rows."""
        return self._directions  # type: ignore[return-value]


class WholeLatents(Latents):
    """Some latents of anything that encodes and decodes; each may depend on all others.

    Raises ConfigError if decoding is not linear: latents then write no parts of a sum.
    """

    def __init__(
        self, autoencoder: Any, kept: Sequence[int], like: Encoded, d_out: int
    ) -> None:
        super().__init__()
        self.linears = ModuleList()
        self.kept = list(kept)
        self.__dict__["autoencoder"] = autoencoder
        is_ours = isinstance(autoencoder, Autoencoder)
        if is_ours:
            directions = autoencoder.decoder_weight[self.kept]
        else:
            directions = linear_directions(autoencoder, self.kept, like, d_out)
        self.register_buffer("_directions", directions.to(like))

    @property
    def n_latents(self) -> int:
        """How many there are."""
        return len(self.kept)

    def amounts(self, encoded: Encoded) -> Amounts:
        """How much each writes."""
        autoencoder = self.__dict__["autoencoder"]
        amounts = autoencoder.encode(encoded)[..., self.kept]
        if isinstance(autoencoder, Autoencoder):
            amounts = amounts * autoencoder.output_scale(encoded)
        return amounts.to(encoded.dtype)

    def directions(self) -> Directions:
        """What each decodes to."""
        return self._directions  # type: ignore[return-value]


class NeuronLatents(Latents):
    """Neurons of an MLP: their activations, and their rows of its last matrix.

    into: the MLP's linear maps into its neurons, as [neuron, d_in] weights and biases, or
        none if their activations are what is encoded. combine: the activations from what
        these give.
    """

    def __init__(
        self,
        neurons: Sequence[int],
        output_weight: Callable[[], Float[Tensor, "neuron d_out"]],
        into: Sequence[Module] = (),
        combine: Callable[[Sequence[Amounts]], Amounts] | None = None,
    ) -> None:
        super().__init__()
        self.neurons = list(neurons)
        self.linears = ModuleList(into)
        self.__dict__["output_weight"] = output_weight
        self.__dict__["combine"] = combine

    @property
    def n_latents(self) -> int:
        """How many there are."""
        return len(self.neurons)

    def amounts(self, encoded: Encoded) -> Amounts:
        """The neurons' activations."""
        if not len(self.linears):
            return encoded[..., self.neurons]
        return super().amounts(encoded)

    def of_rows(self, outs: Sequence[Amounts]) -> Amounts:
        """The activations."""
        return self.__dict__["combine"](outs)

    def directions(self) -> Directions:
        """The rows of the MLP's last matrix, as they are now."""
        return self.__dict__["output_weight"]()[self.neurons]


class NeuronRows(Module):
    """The linear map into some neurons, as the model's weights are now.

    weight_of, bias_of: all of the MLP's, [d_model neuron] and [neuron].
    """

    def __init__(
        self,
        neurons: Sequence[int],
        weight_of: Callable[[], Float[Tensor, "d_in neuron"]],
        bias_of: Callable[[], Float[Tensor, "neuron"] | None],
    ) -> None:
        super().__init__()
        self.neurons = list(neurons)
        self.__dict__.update(weight_of=weight_of, bias_of=bias_of)
        self.out_features = len(self.neurons)

    @property
    def weight(self) -> Float[Tensor, "neuron d_in"]:
        """A row for each of the neurons."""
        return self.__dict__["weight_of"]().T[self.neurons]

    @property
    def bias(self) -> Float[Tensor, "neuron"] | None:
        """Their biases."""
        bias = self.__dict__["bias_of"]()
        return None if bias is None else bias[self.neurons]

    def parameters(self, recurse: bool = True) -> Iterator[Parameter]:
        """The weight: does it need gradients?"""
        yield self.weight  # type: ignore[misc]

    def forward(self, x: Encoded) -> Amounts:
        """What goes into the neurons."""
        return t.nn.functional.linear(x, self.weight, self.bias)


class BareNorm(Module):
    """A norm without its weights: what `hook_normalized` shows."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Encoded) -> Encoded:
        """x centred, and divided by its scale."""
        centred = self.norm.centre(x)
        return (centred / self.norm.scale(centred)).to(x.dtype)


def linear_directions(
    autoencoder: Any, kept: Sequence[int], like: Encoded, d_out: int
) -> Directions:
    """What each latent decodes to, of anything with `encode` and `decode`.

    like: an activation, [d_in]. Raises ConfigError if it gives other shapes than expected, no
    numbers, or parts that do not add up.
    """
    with t.no_grad():
        latents = _called(autoencoder, "encode", like.expand(1, 2, -1), (1, 2, None))
        n_latents = latents.shape[-1]
        # What it decodes is of the type of what it gives, such as half precision.
        dtype = latents.dtype if latents.is_floating_point() else like.dtype
        alone = t.zeros(len(kept), n_latents, dtype=dtype, device=latents.device)
        alone[range(len(kept)), list(kept)] = 1.0
        amounts = t.arange(1.0, len(kept) + 1, dtype=dtype, device=latents.device)
        all_of_them = (amounts.unsqueeze(-1) * alone).sum(0, True)
        inputs = t.cat([t.zeros_like(alone[:1]), all_of_them, alone])
        decoded = _called(autoencoder, "decode", inputs, (len(inputs), d_out))
        decoded = decoded.to(t.promote_types(dtype, t.float32))
        nothing, together, directions = decoded[0], decoded[1], decoded[2:] - decoded[0]
        expected = amounts.to(decoded.dtype) @ directions
        error = (together - nothing - expected).abs().max()
        scale = expected.abs().max() + together.abs().max()
    if not error <= 1e3 * t.finfo(dtype).eps * scale:
        raise ConfigError(
            f"What a {type(autoencoder).__name__} decodes two latents to is not the sum of "
            f"what it decodes each to (they differ by {error:.1e}), so that latents cannot "
            "be sources. Expected a linear `decode`."
        )
    return directions


def _called(
    autoencoder: Any, name: str, given: Tensor, shape: tuple[int | None, ...]
) -> Float[Tensor, "..."]:
    """What somebody else's `encode` or `decode` gives. Raises ConfigError for what is odd."""
    what = f"`{name}` of a {type(autoencoder).__name__}"
    try:
        out = getattr(autoencoder, name)(given)
    except Exception as error:
        raise ConfigError(
            f"{what} cannot take {list(given.shape)} ({given.dtype}): {one_line(error):.200}"
        ) from error
    gives = shown(out) if isinstance(out, Tensor) else f"a {type(out).__name__}"
    is_right = isinstance(out, Tensor) and len(out.shape) == len(shape)
    if not is_right or any(
        b not in (None, a) for a, b in zip(out.shape, shape, strict=True)
    ):
        wanted = ["latents" if size is None else size for size in shape]
        raise ConfigError(
            f"{what} gives {gives} for {list(given.shape)}; expected a Tensor "
            f"[{', '.join(map(str, wanted))}]."
        )
    if not out.isfinite().all():
        raise ConfigError(f"{what} gives NaN or infinity.")
    return out


@dataclass(frozen=True, eq=False)
class Shown:
    """Where something can be seen, and how it follows from what is seen there.

    hook: the hook point. scale: what the block multiplies it by before it is added to the
    residual stream (Granite). by_position: from [token d] where it is shown so (OPT).
    """

    hook: str
    scale: float = 1.0
    by_position: Callable[[Tensor], Float[Tensor, "batch seq d"]] | None = None

    def of(self, out: Float[Tensor, "*token d"]) -> Float[Tensor, "batch seq d"]:
        """It, from what the hook point shows."""
        if self.by_position is not None and out.ndim == 2:
            out = self.by_position(out)
        return out if self.scale == 1.0 else self.scale * out

    def back(
        self, value: Float[Tensor, "batch seq d"], like: Float[Tensor, "*token d"]
    ) -> Float[Tensor, "*token d"]:
        """What the hook point must show, so that `of` gives the value."""
        return value.reshape(like.shape) / self.scale


@dataclass(frozen=True, eq=False)
class SpliceSite:
    """Where a component is replaced.

    name: of the nodes ("MLP 3", "Resid Pre 2").
    key: what its modules' names begin with.
    block, component: which block it is in, and what of it is replaced: "attention", "mlp"
        or, if the residual stream is cut, "residual".
    reads, writes: what is encoded, and what the parts add up to.
    linear: if what is written is linear in something: where that is seen, and the matrix.
    to_written: from what is decoded to what is written; None: the same. Linear.
    shows: the hook point of the residual stream that latents read, if each is a
        destination; norm: what lies between; closed_form: of the norm.
    normalized: if what is encoded is computed from `reads`, by `norm`: the hook point that
        shows it too, for which TransformerLens computes it without gradients.
    before: of a cut inside of a block, the hook point of the residual stream to which
        `writes` is added there.
    post_norm: if the parts' sum is normed before it is added: where that sum is seen, the
        norm, and from what is decoded to that sum.
    enters: if the MLP shares a norm with the heads: the hook point of what it reads, and
        that norm.
    """

    name: str
    key: str
    block: int
    component: str
    reads: Shown
    writes: Shown
    linear: tuple[str, Callable[[], Float[Tensor, "d_in d_model"]]] | None = None
    to_written: Callable[[Decoded], Decoded] | None = None
    shows: str | None = None
    norm: Module | None = None
    closed_form: Norm | None = None
    normalized: str | None = None
    before: str | None = None
    post_norm: PostNorm | None = None
    enters: tuple[str, Module] | None = None


@dataclass(frozen=True, eq=False)
class PostNorm:
    """A norm of what a component writes: all parts are divided by the scale of their sum.

    sums: where the sum is seen. to_sum: from what is decoded to it; None: the same.
    """

    sums: Shown
    norm: Norm
    to_sum: Callable[[Decoded], Decoded] | None = None

    def share(self, part: Decoded) -> Decoded:
        """What a part of the sum becomes where the scale is 1."""
        part = part if self.to_sum is None else self.to_sum(part)
        return self.norm.centre(part) * self.norm.gain()


class Splice(Module):
    """Latents and an error in the place of what a module gives.

    idxs: the latents as they are counted where they come from; part: what they are called.
    skip: of a transcoder with a linear path beside its latents, that path's matrix.
    latents_out, skip_out, error_out: where sources are seen; latents_in, skip_in, error_in:
    where destinations are. They change nothing.
    """

    def __init__(
        self,
        site: SpliceSite,
        latents: Latents,
        idxs: Sequence[int],
        part: str = "Latent",
        skip: Float[Tensor, "d_out d_in"] | None = None,
    ) -> None:
        super().__init__()
        self.site = site
        self.latents, self.idxs, self.part = latents, tuple(idxs), part
        self.register_buffer("skip", skip)
        self.latents_out, self.skip_out, self.error_out = (Identity() for _ in range(3))
        self.latents_in, self.skip_in, self.error_in = (Identity() for _ in range(3))

    @property
    def name(self) -> str:
        """Of the nodes."""
        return self.site.name

    @property
    def is_cut(self) -> bool:
        """Does it replace all that the residual stream has at that place?"""
        return self.site.component == "residual"

    @property
    def rest(self) -> str:
        """What the error is called: of neurons it is what the others write."""
        return f"{self.name} {'Error' if self.part == 'Latent' else 'Rest'}"

    def written(self, decoded: Decoded) -> Decoded:
        """What becomes of something that is decoded (where the scale of a norm is 1)."""
        to_written, post_norm = self.site.to_written, self.site.post_norm
        decoded = decoded if post_norm is None else post_norm.share(decoded)
        return decoded if to_written is None else to_written(decoded)

    def written_directions(self) -> Directions:
        """What each latent writes into the residual stream where its amount is 1."""
        return self.written(self.latents.directions())

    def normed(self, x: Float[Tensor, "*lead d_model"]) -> Encoded:
        """What is encoded where the residual stream is x."""
        norm = self.site.norm
        return x if norm is None else norm(x)

    def encoded(self, out: Float[Tensor, "*token d"]) -> Encoded:
        """What is encoded, from what the hook point that is read shows."""
        x = self.site.reads.of(out)
        return x if self.site.normalized is None else self.normed(x)

    def read(self, encoded: Encoded) -> Parts:
        """The parts where this is encoded."""
        skip: Any = self.skip
        beside = None if skip is None else encoded @ skip.T
        return Parts(self.latents.amounts(encoded), beside)

    def read_as_dests(self, x: Float[Tensor, "batch seq d_model"]) -> Parts:
        """The parts, each with an input of its own (x, where none is patched)."""
        skip: Any = self.skip
        amounts = self._amounts_as_dests(x)  # first: in the order of the ports
        beside = None if skip is None else self.normed(self.skip_in(x)) @ skip.T
        return Parts(amounts, beside)

    def _amounts_as_dests(self, x: Float[Tensor, "batch seq d_model"]) -> Amounts:
        if len(self.latents.linears):
            normed = self.normed(self.latents_in(x))
            return self.latents.of_rows(
                [linear(normed) for linear in self.latents.linears]
            )
        rows = x.unsqueeze(2).expand(-1, -1, len(self.idxs), -1)
        return self._amounts_of_each(self.latents_in(rows))

    def _amounts_of_each(
        self, rows: Float[Tensor, "batch seq latent d_model"]
    ) -> Amounts:
        # All rows are one: nothing is patched, and no row's gradient is asked for.
        is_one = rows.stride(2) == 0 and not (t.is_grad_enabled() and rows.requires_grad)
        if is_one:
            return self.latents.amounts(self.normed(rows[:, :, 0]))
        each = [
            self.latents.amounts(self.normed(rows[:, :, i]))[..., i]
            for i in range(rows.shape[2])
        ]
        return t.stack(each, -1)

    def decoded(self, parts: Parts) -> Float[Tensor, "batch seq d_out"]:
        """What the parts decode to, without the error."""
        out = parts.amounts @ self.latents.directions()
        return out if parts.skip is None else out + parts.skip

    def split(
        self,
        written: Float[Tensor, "batch seq d_model"],
        parts: Parts,
        of_error: Parts,
    ) -> Float[Tensor, "batch seq d_model"]:
        """What is written, as the sum of what the latents, the skip and the error write.

        of_error: the parts as they would be if they read what the error reads.
        """
        directions = self.written_directions()
        error = written - of_error.amounts @ directions
        total = self.latents_out(parts.amounts) @ directions
        if parts.skip is not None and of_error.skip is not None:
            error = error - self.written(of_error.skip)
            total = total + self.skip_out(self.written(parts.skip))
        return total + self.error_out(error)


@dataclass(frozen=True, eq=False)
class Parts:
    """How much each latent writes; and what the skip of a transcoder decodes to, if any."""

    amounts: Amounts
    skip: Float[Tensor, "batch seq d_out"] | None = None

    def over(self, scale: Float[Tensor, "batch seq 1"]) -> Parts:
        """The same, divided by a scale."""
        skip = None if self.skip is None else self.skip / scale
        return Parts(self.amounts / scale, skip)
