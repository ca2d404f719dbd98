"""Write the numbers that the published auto-circuit 1.0.1 gives.

It needs an environment of its own, since it runs on TransformerLens 2 only:

    python -m venv /tmp/upstream-venv
    /tmp/upstream-venv/bin/pip install torch==2.13.0 transformer-lens==2.18.0 \
        'pyarrow<20' auto-circuit==1.0.1
    HF_HUB_OFFLINE=1 /tmp/upstream-venv/bin/python tests/upstream/make_expected.py

Nothing is downloaded: the random models get their weights from their parameters' names,
the pocket model lies in this repository.
"""

from __future__ import annotations

import importlib
import json
import math
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import torch as t
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

HERE = Path(__file__).parent
# Only this folder's modules: the repository itself has an `auto_circuit` too.
sys.path = [path for path in sys.path if Path(path) != HERE]
sys.modules["tests"] = ModuleType("tests")
sys.modules["tests"].__path__ = [str(HERE.parent)]

import auto_circuit  # noqa: E402
from tests.upstream import parity_models  # noqa: E402
from tests.upstream.parity_models import SMALL, Size  # noqa: E402

SIGNIFICANT_DIGITS = 7


def main() -> None:
    assert "site-packages" in str(auto_circuit.__path__), auto_circuit.__path__
    _mend_installation()
    from tests.upstream import users_code

    makers = {"random": _random, "circuits": _known_circuits, "pocket": _pocket}
    for name in sys.argv[1:] or makers:
        _write(f"expected_{name}.json", makers[name](users_code))


def _random(users_code: Any) -> dict[str, Any]:
    models = {"gpt2": gpt2, "attention only": attention_only}
    expected = {}
    for graph_name, cases in users_code.RANDOM_MODEL_CASES.items():
        model_name, graph = graph_name.split("/")
        for case in cases:
            bare = models[model_name]("qkv" in graph)
            model = _in_fixed_order(users_code.graph_of(bare, graph))
            name = f"{graph_name}/{case}"
            expected[name] = _run(users_code.CASES[case], model, name)
    return expected


def _known_circuits(users_code: Any) -> dict[str, Any]:
    models = {
        "gpt2_circuits": gpt2(True, parity_models.GPT2_SMALL_GRAPH, "gpt2"),
        "docstring_circuits": attention_only(
            *(True, parity_models.ATTN_ONLY_4L_GRAPH, "Attn_Only_4L512W_C4_Code")
        ),
    }
    for model in models.values():  # these run no model, so both switches may be on
        model.cfg.use_attn_in = True
    return {
        name: _run(run, models[name], name)
        for name, run in users_code.KNOWN_CIRCUIT_CASES.items()
    }


def _pocket(users_code: Any) -> dict[str, Any]:
    return {
        name: _run(run, pocket_model(), name)
        for name, run in users_code.POCKET_CASES.items()
    }


def _mend_installation() -> None:
    """What a user of today has to do before it runs at all."""
    # It asks for a name that torch 2.13 no longer has.
    t.optim.adam = type("adam", (), {"Adam": t.optim.Adam})  # type: ignore
    # Its wheel has no prompt files; it looks for them beside the package.
    beside = Path(next(iter(auto_circuit.__path__))).parent / "datasets/pocket"
    shutil.copytree(
        parity_models.REPOSITORY / "datasets/pocket", beside, dirs_exist_ok=True
    )


def _in_fixed_order(model: Any) -> Any:
    """Its edges are a set of Python's; ACDC's result depends on their order. Ours is used."""

    def place(edge: Any) -> tuple[Any, ...]:
        dest, seq_idx, head_idx = edge.dest, edge.seq_idx, edge.dest.head_idx
        return (
            -1 if seq_idx is None else seq_idx,
            *(dest.layer, dest.module_name, -1 if head_idx is None else head_idx),
            edge.src.src_idx,
        )

    model.edges = sorted(model.edges, key=place)
    return model


def _run(run: Any, model: Any, name: str) -> dict[str, Any]:
    print(name, flush=True)
    try:
        with t.random.fork_rng(devices=[]):
            numbers = run(model)
    except Exception as error:  # what does not run there has no number
        print(f"  does not run: {type(error).__name__}: {error!s:.150}")
        return {"error": f"{type(error).__name__}: {error!s:.150}"}
    return {name: [_rounded(number) for number in row] for name, row in numbers.items()}


def _rounded(number: float) -> float | int | str:
    if not math.isfinite(number):
        return str(float(number))
    short = float(f"{number:.{SIGNIFICANT_DIGITS}g}")
    return int(short) if short.is_integer() else short


def _write(name: str, expected: dict[str, Any]) -> None:
    rows = [
        f"{json.dumps(case)}: {{\n"
        + ",\n".join(
            f"  {json.dumps(part)}: {json.dumps(numbers, separators=(',', ':'))}"
            for part, numbers in parts.items()
        )
        + "\n}"
        for case, parts in expected.items()
    ]
    text = "{\n" + ",\n".join(rows) + "\n}\n"
    (HERE / name).write_text(text)
    print(name, len(text) // 1000, "kB")


# ---- The models, as TransformerLens 2 has them


def gpt2(split_qkv: bool, size: Size = SMALL, name: str = "custom") -> Any:
    return _from_hugging_face(parity_models.random_gpt2(size), None, split_qkv, name)


def pocket_model() -> Any:
    folder = parity_models.POCKET_MODEL
    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    tokenizer_config = json.loads((folder / "tokenizer_config.json").read_text())
    # The class of transformers 5 that the file names is not in transformers 4.
    tokenizer_config["tokenizer_class"] = "PreTrainedTokenizerFast"
    with TemporaryDirectory() as copy:
        Path(copy, "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
        shutil.copy(folder / "tokenizer.json", copy)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(copy)
        return _from_hugging_face(model, tokenizer, split_qkv=True)


def _from_hugging_face(
    hf_model: Any, tokenizer: Any, split_qkv: bool, name: str = "custom"
) -> Any:
    lens: Any = importlib.import_module("transformer_lens")
    conversions: Any = importlib.import_module(
        "transformer_lens.pretrained.weight_conversions"
    )
    shape = hf_model.config
    config = lens.HookedTransformerConfig(
        n_layers=shape.n_layer,
        n_heads=shape.n_head,
        d_model=shape.n_embd,
        d_head=shape.n_embd // shape.n_head,
        d_mlp=4 * shape.n_embd,
        n_ctx=shape.n_positions,
        d_vocab=shape.vocab_size,
        act_fn="gelu_new",
        normalization_type="LN",
        eps=shape.layer_norm_epsilon,
        default_prepend_bos=True,
        model_name=name,
        device="cpu",
    )
    model = lens.HookedTransformer(config, tokenizer=tokenizer)
    model.load_and_process_state_dict(
        conversions.convert_gpt2_weights(hf_model, config),
        fold_ln=True,
        center_writing_weights=True,
        center_unembed=True,
    )
    return _with_switches(model, split_qkv)


def attention_only(split_qkv: bool, size: Size = SMALL, name: str = "custom") -> Any:
    lens: Any = importlib.import_module("transformer_lens")
    config = lens.HookedTransformerConfig(
        n_layers=size.n_layers,
        n_heads=size.n_heads,
        d_model=size.d_model,
        d_head=size.d_head,
        n_ctx=parity_models.N_CTX,
        d_vocab=parity_models.VOCAB,
        attn_only=True,
        normalization_type="LN",
        device="cpu",
        model_name=name,
    )
    model = lens.HookedTransformer(config)
    weights = parity_models.attention_only_weights(size)
    state = {
        "embed.W_E": weights["tok_embed.weight"],
        "pos_embed.W_pos": weights["pos.weight"],
        "ln_final.w": weights["ln_out.weight"],
        "ln_final.b": weights["ln_out.bias"],
        "unembed.W_U": weights["head.weight"].T,
    }
    heads = (size.n_heads, size.d_head)
    for layer in range(size.n_layers):
        ours, theirs = f"layers.{layer}.", f"blocks.{layer}."
        state[f"{theirs}ln1.w"] = weights[f"{ours}ln1.weight"]
        state[f"{theirs}ln1.b"] = weights[f"{ours}ln1.bias"]
        for part in "qkv":
            weight = weights[f"{ours}attn.{part}.weight"].unflatten(0, heads)
            state[f"{theirs}attn.W_{part.upper()}"] = weight.transpose(1, 2)
            bias = weights[f"{ours}attn.{part}.bias"].unflatten(0, heads)
            state[f"{theirs}attn.b_{part.upper()}"] = bias
        output = weights[f"{ours}attn.o.weight"].T.unflatten(0, heads)
        state[f"{theirs}attn.W_O"] = output
        state[f"{theirs}attn.b_O"] = weights[f"{ours}attn.o.bias"]
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [name for name in missing if "mask" not in name and "IGNORE" not in name]
    assert missing in ([], ["unembed.b_U"]) and not unexpected, (missing, unexpected)
    model.unembed.b_U.data.zero_()
    return _with_switches(model, split_qkv)


def _with_switches(model: Any, split_qkv: bool) -> Any:
    """As its `load_tl_model` sets them. With `use_split_qkv_input` TransformerLens 2 never
    reads the hook that graphs without `separate_qkv` patch, so for those it is off."""
    model.cfg.use_attn_result = True
    model.cfg.use_attn_in = not split_qkv
    model.cfg.use_split_qkv_input = split_qkv
    model.cfg.use_hook_mlp_in = True
    for parameter in model.parameters():
        parameter.requires_grad = False
    return model.eval()


if __name__ == "__main__":
    main()
