"""Mistakes that nobody wrote down: the solution, and its arguments, with one small thing changed.

Each mutant is a solution and a sentence. If a student's function does on all cases what a mutant does, the sentence
says where the two part from the solution. (The idea is mutation testing's: DeMillo, Lipton & Sayward 1978, "Hints on
test data selection". There, one asks whether the tests notice; here, which of them a student has made.)

What is changed to what, and the sentences, stand in mutants.toml; here is where in a solution it can be done.
"""

import ast
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from .texts import placeholders, read, say

MODULES = {"torch", "F", "math", "nn", "einops"}
OPERATORS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.FloorDiv: "//", ast.Pow: "**",
             ast.MatMult: "@"}
COMPARISONS = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!="}

TABLES = read("mutants.toml")
PLACEHOLDERS = {  # that its sections may use
    "operators": {"text", "a", "b", "sign", "new"}, "names": {"text"}, "entries": {"table", "i"}, "calls": {"inner"},
    "arguments": {"a", "b", "x"},
}  # fmt: skip


def of_the_solution(solution: str, arguments: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(solution with one small change, sentence), for all small changes that we can think of."""
    text = ast.unparse(ast.parse(solution))  # in one form, without comments
    tree = ast.parse(text)
    if any(isinstance(node, ast.While) for node in ast.walk(tree)):
        return  # a loop that is changed may never end
    # What may be taken for one another: the arguments, and what the solution itself names.
    local = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    names, raw = local | set(arguments), text.encode()
    starts = list(itertools.accumulate([0, *map(len, raw.splitlines(keepends=True))]))
    seen = {text}
    for node in ast.walk(tree):
        if not isinstance(node, ast.expr | ast.slice):
            continue
        first = starts[node.lineno - 1] + node.col_offset
        last = starts[node.end_lineno - 1] + node.end_col_offset
        for new, sentence in _changes(node, names):
            mutant = (raw[:first] + f"({new})".encode() + raw[last:]).decode()
            if mutant not in seen:
                seen.add(mutant)
                yield mutant, sentence


def _changes(node: ast.expr, names: set[str]) -> Iterator[tuple[str, str]]:
    """(what may stand in the place of an expression, sentence)"""
    show = ast.unparse
    text = show(node)

    match node:
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            sign = OPERATORS[type(op)]
            a, b = (f"({show(n)})" if isinstance(n, ast.BinOp) else show(n) for n in (left, right))
            rows = [row for row in TABLES["operators"] if sign in row["of"].split()]
            yield from _rows(rows, a=a, b=b, sign=sign, text=text)
        case ast.Call(func=function, args=arguments, keywords=keywords):
            yield from _changes_of_a_call(function, arguments, keywords, text)
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in COMPARISONS:
            for kind, sign in COMPARISONS.items():
                if kind is not type(op):
                    yield f"{show(left)} {sign} {show(right)}", say("mutant.comparison", text=text, other=sign)
        case ast.Constant(value=bool()):
            yield str(not node.value), say("mutant.truth", text=text, other=not node.value)
        case ast.Constant(value=int() | float() as number):
            candidates = {number + 1, number - 1, -number, 2 * number, number / 2, 0, 1}
            for value in sorted(candidates - {number}, key=str):
                written = str(int(value) if value == int(value) else value)
                yield written, say("mutant.number", other=written, text=f"{number:g}")
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            yield show(operand), say("mutant.minus", text=show(operand))
        case ast.Name(id=name, ctx=ast.Load()) if name in names:
            for another in sorted(names - {name}):
                yield another, say("mutant.name", text=text, other=another)
            yield from _rows(TABLES["names"], text=name)
        case ast.Tuple(elts=[a, b]) | ast.List(elts=[a, b]):
            brackets = "[{}, {}]" if isinstance(node, ast.List) else "({}, {})"
            yield brackets.format(show(b), show(a)), say("mutant.order", first=show(a), second=show(b))
        case ast.Subscript(value=ast.Attribute(attr="shape") as shape, ctx=ast.Load()):
            for axis in (0, 1, 2, 3, -1, -2, -3, -4):
                new = f"{show(shape)}[{axis}]"
                yield new, say("mutant.size", text=text, other=new)
        case ast.Subscript(value=value, slice=ast.Name(id=i), ctx=ast.Load()):
            yield from _rows(TABLES["entries"], table=show(value), i=i)
        case ast.IfExp(test=test, body=body, orelse=orelse):
            yield show(body), say("mutant.no_else", text=show(test))
            yield show(orelse), say("mutant.no_if", text=show(test))


def _changes_of_a_call(function, arguments, keywords, text) -> Iterator[tuple[str, str]]:
    show = ast.unparse
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    owner = function.value if isinstance(function, ast.Attribute) else None
    is_method = owner is not None and not (isinstance(owner, ast.Name) and owner.id in MODULES)
    starred = any(isinstance(a, ast.Starred) for a in arguments)
    inner = show(owner) if is_method else (show(arguments[0]) if arguments else "")
    if inner and not (arguments and isinstance(arguments[0], ast.Starred)):
        missing = TABLES["calls"].get(name)
        yield inner, missing.format(inner=inner) if missing else say("mutant.call", name=name, inner=inner)
    for confused in TABLES["confused"].get(name, []):
        called = f"{show(owner)}.{confused}" if owner is not None else confused
        rest = ", ".join(map(show, [*arguments, *keywords]))
        yield f"{called}({rest})", say("mutant.confused", name=name, other=confused, inner=inner)
    for i, keyword in enumerate(keywords):
        if keyword.arg in ("dim", "ndim"):
            for dim in range(-3, 4):
                kept = [*keywords[:i], ast.keyword(keyword.arg, ast.Constant(dim)), *keywords[i + 1 :]]
                new = show(ast.Call(function, arguments, kept))
                yield new, say("mutant.axis", name=name, other=dim, right=show(keyword.value))
    if name == "transpose":
        for i, j in itertools.combinations(range(4), 2):
            yield f"{inner}.transpose({i}, {j})", say("mutant.axes", text=text, first=i, second=j)
    for i, j in () if starred else itertools.combinations(range(len(arguments)), 2):
        order = list(arguments)
        order[i], order[j] = order[j], order[i]
        new = show(ast.Call(function, order, keywords))
        yield new, say("mutant.exchanged", text=text, first=show(arguments[i]), second=show(arguments[j]))


def of_the_arguments(solution: str, args: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(the solution with other arguments, sentence): t + 1 for t, x_0 for noise, β for ᾱ, ... args: those of a case."""
    tables = TABLES["arguments"]
    for a, b in itertools.combinations(args, 2):
        if _kind(args[a]) and _kind(args[a]) == _kind(args[b]):
            for new, sentence in _rows(tables["pairs"], a=a, b=b):
                yield f"{new}\n{solution}", sentence
    for name, value in args.items():
        for kind in _tables_of(name, value):
            for new, sentence in _rows(tables[kind], x=name):
                yield f"{name} = {new}\n{solution}", sentence


def _rows(rows: list[dict[str, str]], **values: str) -> Iterator[tuple[str, str]]:
    for row in rows:
        new = row["new"].format(**values)
        yield new, row["sentence"].format(**values, new=new)


def _kind(value: Any) -> Any:
    """What two arguments have to share to be taken for one another."""
    if isinstance(value, Tensor):
        return value.dtype, value.shape
    return type(value) if isinstance(value, int | float | str | torch.nn.Module) else None


def _tables_of(name: str, value: Any) -> list[str]:
    """The tables of mutants.toml that an argument belongs to."""
    if isinstance(value, Tensor) and value.is_floating_point():
        tables = ["real"]
        if value.ndim:
            tables += ["real_with_axes", "table" if value.ndim == 1 else "batch"]
        if name in ("alphas_cumprod", "betas"):
            tables.append(name)
        if value.ndim > 2 and value.shape[-1] == value.shape[-2]:
            tables.append("square")
        return tables
    if isinstance(value, Tensor):
        return ["mask" if value.dtype == torch.bool else "whole"]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return ["number"]
    return ["list"] if isinstance(value, list) and value else []


def check_tables() -> None:
    """Hold mutants.toml to the placeholders that are filled in.

    Raises:
        ValueError: it has another one.
    """
    for section, known in PLACEHOLDERS.items():
        rows = TABLES[section]
        groups = rows.values() if isinstance(rows, dict) else [rows]
        for row in itertools.chain(*(group if isinstance(group, list) else [{"sentence": group}] for group in groups)):
            for text in (row.get("new", ""), row["sentence"]):
                placeholders(f'mutants.toml, {section} ("{row["sentence"]}")', text, known)
