"""An autoencoder, or a transcoder, as data: activations as sums of a few of many directions.

The formulas are those of SAELens, whose files `autoencoder_files` reads and writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, cast

import torch as t
from jaxtyping import Float, Shaped
from torch import Tensor

from auto_circuit.checks import check_count, checked
from auto_circuit.errors import ConfigError, ModelError

Kind = Literal["standard", "jumprelu", "topk", "batchtopk", "gated"]
Normalization = Literal["none", "layer_norm", "constant_norm_rescale"]
PER_LATENT: dict[Kind, tuple[str, ...]] = {
    "standard": (),
    "jumprelu": ("threshold",),
    "topk": (),
    "batchtopk": ("threshold",),
    "gated": ("magnitude_bias", "log_magnitude"),
}
"""Which numbers of each latent a kind has, besides its encoder and its bias."""
Weight = Shaped[Tensor, "..."]
"""Of a shape that is checked here: what is in a file may be anything."""


@checked
@dataclass(frozen=True, eq=False)
class Autoencoder:
    """latents = activation(encoder (x - b) + encoder_bias); decoder latents + b is about x.

    kind: how latents follow from what the encoder gives, p:
        "standard": relu(p).
        "jumprelu", "batchtopk": p where it is above `threshold` (and 0), else 0.
        "topk": relu(p) of the `k` largest of a token.
        "gated": relu(exp(log_magnitude) (p - encoder_bias) + magnitude_bias) where p > 0.
    encoder_weight, decoder_weight: a row for each latent, [latent d_in], [latent d_out].
    encoder_bias, decoder_bias: [latent], [d_out]; of a gated one the gate's.
    skip_weight: of a transcoder with a linear path beside its latents: [d_out d_in].
    centres_input: is `decoder_bias` taken from x first (`apply_b_dec_to_input`)?
    normalization: of x, token by token, and back: "layer_norm", or a fixed length
        ("constant_norm_rescale"). A transcoder's output is not scaled back.
    hook_name: the TransformerLens hook point whose output it encodes; hook_name_out: if it
        is a transcoder, the one that it stands for.

    Raises ModelError for weights that do not fit together.
    Sources: Bricken et al. 2023; Rajamanoharan et al. 2024 (gated, JumpReLU); Gao et al.
    2024 (TopK); Bussmann et al. 2024 (BatchTopK); Dunefsky et al. 2024 (transcoders).
    """

    kind: Kind
    encoder_weight: Weight
    encoder_bias: Weight
    decoder_weight: Weight
    decoder_bias: Weight
    threshold: Weight | None = None
    k: int | None = None
    magnitude_bias: Weight | None = None
    log_magnitude: Weight | None = None
    skip_weight: Weight | None = None
    centres_input: bool = True
    normalization: Normalization = "none"
    hook_name: str | None = None
    hook_name_out: str | None = None

    def __post_init__(self) -> None:
        if self.kind == "topk":
            k = check_count("k", self.k)
            if k > self.n_latents:
                raise ModelError(
                    f"The autoencoder keeps the k = {k} largest of {self.n_latents} latents."
                )
        self._check_shapes()
        if self.centres_input and self.d_in != self.d_out:
            raise ModelError(
                f"The autoencoder takes its decoder's bias, of {self.d_out} numbers, from "
                f"its input, of {self.d_in}: it is a transcoder, whose configuration must "
                "say `apply_b_dec_to_input` false."
            )

    def _check_shapes(self) -> None:
        n, d_in, d_out = self.n_latents, self.d_in, self.d_out
        expected: dict[str, tuple[int, ...]] = {
            "encoder_weight": (n, d_in),
            "encoder_bias": (n,),
            "decoder_weight": (n, d_out),
            "decoder_bias": (d_out,),
            **{name: (n,) for name in PER_LATENT[self.kind]},
        }
        if self.skip_weight is not None:
            expected["skip_weight"] = (d_out, d_in)
        for name, shape in expected.items():
            value = getattr(self, name)
            given = tuple(value.shape) if isinstance(value, Tensor) else value
            if given != shape or 0 in shape:
                raise ModelError(
                    f"The {self.kind} autoencoder's {name} has the shape {given}; "
                    f"with {n} latents from {d_in} to {d_out} numbers it must be {shape}."
                )

    @property
    def n_latents(self) -> int:
        """The number of latents."""
        return self.encoder_weight.shape[0]

    @property
    def d_in(self) -> int:
        """The size of the activations that are encoded."""
        return self.encoder_weight.shape[-1]

    @property
    def d_out(self) -> int:
        """The size of the activations that are decoded to."""
        return self.decoder_weight.shape[-1]

    @property
    def is_transcoder(self) -> bool:
        """Does it decode to other activations than it encodes?"""
        return self.hook_name_out not in (None, self.hook_name)

    def to(self, device: t.device | str, dtype: t.dtype) -> Autoencoder:
        """The same with its weights elsewhere, or of another type."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        weights = {
            name: value.to(device, dtype)
            for name, value in given.items()
            if isinstance(value, Tensor)
        }
        return replace(self, **weights)

    # --------------------------------------------------------------- encode and decode

    def encode(
        self, activations: Float[Tensor, "*lead d_in"]
    ) -> Float[Tensor, "*lead latent"]:
        """How active each latent is: 0 or more."""
        x = self._normalized(activations)
        if self.centres_input:
            x = x - self.decoder_bias
        return self.activate(x @ self.encoder_weight.T + self._added_bias())

    def folded_bias(self) -> Float[Tensor, "latent"]:
        """The bias of an encoder that takes nothing from its input."""
        if not self.centres_input:
            return self._added_bias()
        return self._added_bias() - self.encoder_weight @ self.decoder_bias

    def _added_bias(self) -> Float[Tensor, "latent"]:
        """What is added before `activate`, where a gated one's two biases differ."""
        is_gated = self.kind == "gated"
        return t.zeros_like(self.encoder_bias) if is_gated else self.encoder_bias

    def activate(
        self, encoded: Float[Tensor, "*lead latent"]
    ) -> Float[Tensor, "*lead latent"]:
        """Latents from what the encoder gives; of a gated one, without its bias."""
        if self.kind in ("jumprelu", "batchtopk"):
            return encoded.relu() * (encoded > cast(Tensor, self.threshold))
        if self.kind == "gated":
            size = encoded * cast(Tensor, self.log_magnitude).exp()
            size = (size + cast(Tensor, self.magnitude_bias)).relu()
            return size * (encoded + self.encoder_bias > 0)
        if self.kind == "topk":
            values, idxs = encoded.topk(cast(int, self.k), dim=-1)
            return t.zeros_like(encoded).scatter(-1, idxs, values.relu())
        return encoded.relu()

    def decode(
        self,
        latents: Float[Tensor, "*lead latent"],
        encoded: Float[Tensor, "*lead d_in"] | None = None,
    ) -> Float[Tensor, "*lead d_out"]:
        """The activations that latents stand for, without those of a skip.

        encoded: those that were encoded, which a `normalization` scales back to (ConfigError
        without them).
        """
        out = latents @ self.decoder_weight + self.decoder_bias
        if self.normalization == "none" or self.is_transcoder:
            return out
        if encoded is None:
            raise ConfigError(
                f"This autoencoder's normalization is {self.normalization!r}: what latents "
                "stand for depends on what was encoded. Use `decode(latents, activations)`."
            )
        centre, scale = self._centre_and_scale(encoded)
        return out * scale + centre

    def __call__(
        self, activations: Float[Tensor, "*lead d_in"]
    ) -> Float[Tensor, "*lead d_out"]:
        """The reconstruction."""
        decoded = self.decode(self.encode(activations), activations)
        skip = self.skip_weight
        return decoded if skip is None else decoded + activations @ skip.T

    def output_scale(
        self, activations: Float[Tensor, "*lead d_in"]
    ) -> Float[Tensor, "*lead 1"] | float:
        """What decoded latents are multiplied by where these activations were encoded."""
        if self.normalization == "none" or self.is_transcoder:
            return 1.0
        return self._centre_and_scale(activations)[1]

    def _normalized(self, x: Float[Tensor, "*lead d_in"]) -> Float[Tensor, "*lead d_in"]:
        if self.normalization == "none":
            return x
        centre, scale = self._centre_and_scale(x)
        # SAELens adds it where it divides, and not where it multiplies.
        epsilon = 1e-5 if self.normalization == "layer_norm" else 0.0
        return (x - centre) / (scale + epsilon)

    def _centre_and_scale(
        self, x: Float[Tensor, "*lead d_in"]
    ) -> tuple[Tensor | float, Float[Tensor, "*lead 1"]]:
        if self.normalization == "layer_norm":
            return x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        return 0.0, x.norm(dim=-1, keepdim=True) / self.d_in**0.5

    # ------------------------------------------------------------------------- a part

    @property
    def is_separable(self) -> bool:
        """Does each latent depend on its own row of the encoder alone?"""
        return self.kind != "topk" and self.normalization == "none"

    def rows(self, latents: Sequence[int]) -> Autoencoder:
        """One with some of the latents only. Raises ConfigError for "topk"."""
        if self.kind == "topk":
            raise ConfigError(
                "Which latents of a TopK autoencoder are active depends on all of them: it "
                "cannot be cut."
            )
        idxs = t.tensor(list(latents), device=self.encoder_weight.device)
        names = ("encoder_weight", "encoder_bias", "decoder_weight")
        parts: dict[str, Any] = {
            name: getattr(self, name)[idxs] for name in (*names, *PER_LATENT[self.kind])
        }
        return replace(self, **parts)
