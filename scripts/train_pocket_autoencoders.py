"""Train sparse autoencoders of the pocket model's residual stream.

Of the place between its first two blocks (or more), on prompts as the model itself was trained on,
with BatchTopK (Bussmann et al. 2024): of all latents of a batch the largest are kept, `k` per
token on average. They are written to `auto_circuit/pocket_autoencoders/` in SAELens's format.
`make pocket-autoencoders` runs this; it takes about a minute on two cores.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch as t
import tyro
from jaxtyping import Float
from torch import Tensor

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO / "datasets" / "pocket"))

from docstring_generator import sample_docstring  # noqa: E402
from greaterthan_generator import sample_greaterthan  # noqa: E402
from ioi_generator import sample_ioi  # noqa: E402

from auto_circuit.experiment_utils import load_tl_model  # noqa: E402
from auto_circuit.model_utils.features.autoencoder import Autoencoder  # noqa: E402
from auto_circuit.model_utils.features.autoencoder_files import (  # noqa: E402
    save_autoencoder,
)
from auto_circuit.tasks import POCKET_AUTOENCODERS, POCKET_MODEL  # noqa: E402

Activations = Float[Tensor, "token d_model"]
SAMPLERS = (sample_ioi, sample_greaterthan, sample_docstring)


@dataclass(frozen=True)
class AutoencoderConfig:
    """How the autoencoders are trained."""

    out: Path = POCKET_AUTOENCODERS
    """The folder that they are written to, each in a folder of its own."""
    seed: int = 1
    """Of the initial weights, of the prompts and of their order."""
    blocks: tuple[int, ...] = (1,)
    """Before each of these blocks there is one."""
    n_prompts: int = 600
    """Of each behaviour."""
    n_latents: int = 512
    k: int = 16
    """How many latents are active, on average."""
    n_steps: int = 1200
    batch_tokens: int = 512
    learning_rate: float = 2e-3
    """The first one; it falls to 0 in a straight line."""


def activations(model: Any, config: AutoencoderConfig) -> dict[str, Activations]:
    """Hook point -> the residual stream there, at all tokens of the prompts."""
    rng = random.Random(config.seed)
    hooks = [f"blocks.{block}.hook_resid_pre" for block in config.blocks]
    found: dict[str, list[Tensor]] = {hook: [] for hook in hooks}
    for sample in SAMPLERS:
        texts = [str(sample(rng, False)["clean"]) for _ in range(config.n_prompts)]
        for start in range(0, len(texts), 50):
            encoded = model.tokenizer(
                [f"{model.tokenizer.bos_token} {text}" for text in texts[start:][:50]],
                add_special_tokens=False,
                padding=True,
                return_tensors="pt",
            )
            mask = encoded["attention_mask"]
            with t.no_grad():
                _, cache = model.run_with_cache(
                    encoded["input_ids"], attention_mask=mask, names_filter=hooks
                )
            for hook in hooks:
                found[hook].append(cache[hook][mask.bool()])
    return {hook: t.cat(parts) for hook, parts in found.items()}


def train(x: Activations, hook: str, config: AutoencoderConfig) -> Autoencoder:
    """An autoencoder of these activations."""
    generator = t.Generator().manual_seed(config.seed)
    directions = t.randn(config.n_latents, x.shape[1], generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    encoder, decoder = directions.clone().requires_grad_(), directions.requires_grad_()
    encoder_bias = t.zeros(config.n_latents, requires_grad=True)
    decoder_bias = x.mean(0).requires_grad_()
    weights = [encoder, decoder, encoder_bias, decoder_bias]
    optimizer = t.optim.Adam(weights, lr=config.learning_rate)
    threshold = 0.0
    for step in range(config.n_steps):
        optimizer.param_groups[0]["lr"] = config.learning_rate * (
            1 - step / config.n_steps
        )
        batch = x[t.randint(len(x), (config.batch_tokens,), generator=generator)]
        latents = ((batch - decoder_bias) @ encoder.T + encoder_bias).relu()
        n_active = config.k * len(batch)
        smallest = latents.detach().flatten().topk(n_active).values[-1]
        out = latents * (latents >= smallest) @ decoder + decoder_bias
        loss = (out - batch).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with t.no_grad():
            decoder /= decoder.norm(dim=1, keepdim=True)
        threshold = float(smallest) if step == 0 else 0.98 * threshold + 0.02 * smallest
    trained = Autoencoder(
        kind="batchtopk",
        encoder_weight=encoder.detach(),
        encoder_bias=encoder_bias.detach(),
        decoder_weight=decoder.detach(),
        decoder_bias=decoder_bias.detach(),
        threshold=t.full((config.n_latents,), float(threshold)),
        hook_name=hook,
    )
    _report(trained, x)
    return trained


def _report(autoencoder: Autoencoder, x: Activations) -> None:
    latents = autoencoder.encode(x)
    left = (autoencoder(x) - x).square().sum() / (x - x.mean(0)).square().sum()
    print(
        f"{autoencoder.hook_name}: {1 - left:.1%} of the variance explained by "
        f"{(latents > 0).float().sum(1).mean():.1f} latents per token; "
        f"{int((latents > 0).any(0).sum())} of {latents.shape[1]} ever active",
        flush=True,
    )


def main(config: AutoencoderConfig) -> None:
    """Train and save."""
    t.use_deterministic_algorithms(True)
    model = load_tl_model(POCKET_MODEL, "cpu")
    config.out.mkdir(exist_ok=True)
    for hook, x in activations(model, config).items():
        _, block, _ = hook.split(".")
        save_autoencoder(train(x, hook, config), config.out / f"resid_pre_{block}")


if __name__ == "__main__":
    main(tyro.cli(AutoencoderConfig))
