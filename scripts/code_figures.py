"""How large are functions, how many parameters have they, which tensors have a shape?

    python scripts/code_figures.py            # the figures, and what is beyond the limits
    python scripts/code_figures.py --all      # every function that counts against a limit

A body is what stands below the signature and the docstring, without blank and comment
lines. Parameters are counted without self and cls; those that a function has because the
published auto-circuit has them (tests/upstream_api.json) do not count. Exit status 1: a
limit is exceeded.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import re
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
PACKAGE = REPO / "auto_circuit"
ENGINE = PACKAGE / "engine"
"""Modules whose every tensor has a shape, and whose comments are counted."""
BARE_TENSOR = re.compile(r"(?<![\w.\]\"])(?:t\.)?Tensor(?!\s*,\s*[\"'])\b")
SHAPED_TENSOR = re.compile(r"\w+\[\s*(?:t\.)?Tensor\s*,\s*[\"']")
SHAPE_NAME = re.compile(r"^(\w+) = (?:\w+ \| )?\w+\[(?:t\.)?Tensor, [\"']", re.M)
"""A name that a module gives to a tensor of some shape: `Rows = Float[Tensor, "row d"]`."""


@dataclass(frozen=True)
class Limit:
    """A figure, and the least or the largest value that it may have."""

    name: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def holds(self) -> bool:
        """Is the value on the right side?"""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        mark = "" if self.holds else "   EXCEEDED"
        return f"{self.name:52s} {self.value:7.4g}   {sign} {self.limit:g}{mark}"


@dataclass(frozen=True)
class Function:
    """One function or method of the package."""

    name: str
    file: Path
    node: ast.FunctionDef | ast.AsyncFunctionDef
    body_lines: int
    upstream_parameters: frozenset[str]
    shape_names: frozenset[str]

    @property
    def place(self) -> str:
        """Where it is, for people."""
        return f"{self.file.relative_to(REPO)}:{self.node.lineno} {self.name}"

    @property
    def is_public(self) -> bool:
        """Has no part of its name a leading underscore (but for __init__ and the like)?"""
        return not any(
            part.startswith("_") and not part.endswith("__")
            for part in self.name.split(".")
        )

    @property
    def is_engine(self) -> bool:
        """Is it in one of the engine's modules?"""
        return self.file.parent == ENGINE

    @property
    def arguments(self) -> list[ast.arg]:
        """All parameters but self and cls."""
        args = self.node.args
        every = [*args.posonlyargs, *args.args, *args.kwonlyargs]
        return [arg for arg in every if arg.arg not in ("self", "cls")]

    @property
    def n_parameters(self) -> int:
        """How many, without those of the published function of the same name."""
        return sum(arg.arg not in self.upstream_parameters for arg in self.arguments)

    @property
    def tensor_annotations(self) -> list[str]:
        """The annotations that speak of a tensor, of parameters and of the result."""
        nodes = [arg.annotation for arg in self.arguments] + [self.node.returns]
        texts = [ast.unparse(node) for node in nodes if node is not None]
        return [
            text
            for text in texts
            if BARE_TENSOR.search(text)
            or SHAPED_TENSOR.search(text)
            or self.shape_names & set(re.findall(r"\w+", text))
        ]


def functions(upstream: dict[str, frozenset[str]]) -> Iterator[Function]:
    """Every function and method of the package, nested ones too."""
    files = sorted(PACKAGE.rglob("*.py"))
    shape_names = frozenset(
        name for file in files for name in SHAPE_NAME.findall(file.read_text())
    )
    for file in files:
        source = file.read_text()
        code_lines = _code_lines(source)
        module = ".".join(file.relative_to(REPO).with_suffix("").parts)
        for name, node in _defs(ast.parse(source), ""):
            start = node.body[0].lineno
            if ast.get_docstring(node) is not None:
                start = (node.body[0].end_lineno or 0) + 1
            n_lines = sum(start <= line <= (node.end_lineno or 0) for line in code_lines)
            # A class is listed with the parameters of its constructor.
            published = upstream.get(
                f"{module}:{name.removesuffix('.__init__')}", frozenset()
            )
            yield Function(name, file, node, n_lines, published, shape_names)


def _defs(
    tree: ast.AST, prefix: str
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for node in ast.iter_child_nodes(tree):
        inner = prefix
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inner = f"{prefix}{node.name}."
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{prefix}{node.name}", node
        yield from _defs(node, inner)


def _code_lines(source: str) -> set[int]:
    """Lines that hold code (or text), and not only a comment or nothing."""
    nothing = (
        *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE),
        *(tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER),
    )
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {
        line
        for token in tokens
        if token.type not in nothing
        for line in range(token.start[0], token.end[0] + 1)
    }


def upstream_parameters() -> dict[str, frozenset[str]]:
    """module:function -> the parameters that the published function has."""
    api = json.loads((REPO / "tests" / "upstream_api.json").read_text())
    return {
        name: frozenset(parameters)
        for name, parameters in api.items()
        if isinstance(parameters, list)
    }


def percentile(values: list[int], share: float) -> int:
    """The smallest value that so large a share of all values does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


def comment_share() -> float:
    """Comment lines of the engine, as % of its lines."""
    files = sorted(ENGINE.glob("*.py"))
    lines = [line.strip() for file in files for line in file.read_text().splitlines()]
    return 100 * sum(line.startswith("#") for line in lines) / len(lines)


def shaped_share(found: list[Function]) -> float:
    """Tensors with a shape, as % of all tensors in signatures."""
    texts = [text for function in found for text in function.tensor_annotations]
    return 100 * sum(not BARE_TENSOR.search(text) for text in texts) / max(1, len(texts))


def limits(found: list[Function]) -> list[Limit]:
    """All figures."""
    parameters = [function.n_parameters for function in found]
    bodies = [function.body_lines for function in found]
    with_shapes = [f for f in found if f.is_engine or f.is_public]
    return [
        Limit("parameters, nine of ten functions", percentile(parameters, 0.9), 5),
        Limit("parameters, the most", max(parameters), 10),
        Limit("lines of a body, nine of ten functions", percentile(bodies, 0.9), 20),
        Limit("lines of a body, the most", max(bodies), 60),
        Limit("% of tensors with a shape", shaped_share(with_shapes), 95, True),
        Limit("% of the engine's lines that are comments", comment_share(), 4, True),
    ]


def beyond(found: list[Function]) -> Iterator[str]:
    """What counts against a limit, function by function."""
    for function in found:
        if function.n_parameters > 10:
            yield f"{function.place}: {function.n_parameters} parameters"
        if function.body_lines > 60:
            yield f"{function.place}: {function.body_lines} lines"
        if function.is_engine or function.is_public:
            bare = [x for x in function.tensor_annotations if BARE_TENSOR.search(x)]
            if bare:
                yield f"{function.place}: no shape in {', '.join(bare)}"


def main() -> int:
    """Print the figures; 1 if one is beyond its limit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--all", action="store_true", help="name the functions")
    arguments = parser.parse_args()
    found = list(functions(upstream_parameters()))
    figures = limits(found)
    print(f"{len(found)} functions")
    print(*figures, sep="\n")
    if arguments.all:
        print(*beyond(found), sep="\n")
    return 0 if all(figure.holds for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
