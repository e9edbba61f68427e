"""Mistakes that nobody wrote down: the solution, and the arguments, with one small thing changed.

Each mutant is a function and a sentence. If a student's function does on all cases what a mutant does, the sentence
says where the two part from the solution. (The idea is mutation testing's: DeMillo, Lipton & Sayward 1978, "Hints on
test data selection". There, one asks whether the tests notice; here, which of them a student has made.)
"""

import ast
import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .exercise import Exercise

# what is missing if a call is taken away
WRAPPERS = {
    "sqrt": "a square root is missing, that of `{}`",
    "exp": "the exponential is missing, exp of `{}`",
    "log": "a logarithm is missing, that of `{}`",
    "square": "a square is missing, that of `{}`",
    "abs": "the absolute value is missing, that of `{}`",
    "detach": "`{}` is not detached: the gradient must stop there",
    "clamp": "`{}` is not clamped",
    "mean": "the mean over `{}` is missing",
    "sum": "the sum over `{}` is missing",
    "softmax": "the softmax is missing: `{}` are scores, not weights that sum to 1",
    "sigmoid": "the sigmoid is missing around `{}`",
    "gelu": "the GELU is missing around `{}`",
    "normalize": "`{}` is not normalised to length 1",
    "cumprod": "the running product over `{}` is missing",
    "round": "`{}` is not rounded",
    "flip": "`{}` is the wrong way round",
}
# what a call may be confused with
CONFUSED = {
    "mean": ["sum", "amax"], "sum": ["mean"], "sin": ["cos"], "cos": ["sin"], "exp": ["log", "expm1"], "expm1": ["exp"],
    "log": ["exp", "log2", "log10"], "sqrt": ["square", "abs"], "square": ["abs", "sqrt"], "abs": ["square"],
    "argmin": ["argmax"], "argmax": ["argmin"], "min": ["max"], "max": ["min"], "softmax": ["sigmoid", "log_softmax"],
    "gelu": ["silu", "relu", "sigmoid"], "silu": ["gelu", "relu", "sigmoid"], "sigmoid": ["tanh", "relu"],
    "std": ["var"], "var": ["std"], "cumprod": ["cumsum"], "triu": ["tril"], "tril": ["triu"],
    "reversed": ["sorted"], "linspace": ["logspace"],
}  # fmt: skip
MODULES = {"torch", "F", "math", "nn", "einops"}
OPERATORS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.FloorDiv: "//", ast.Pow: "**",
             ast.MatMult: "@"}
COMPARISONS = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!="}


def of_the_solution(exercise: Exercise, solution: str | None = None) -> Iterator[tuple[str, str]]:
    """(solution with one small change, sentence), for all small changes that we can think of."""
    text = ast.unparse(ast.parse(exercise.solution if solution is None else solution))  # in one form, without comments
    tree = ast.parse(text)
    if any(isinstance(node, ast.While) for node in ast.walk(tree)):
        return  # a loop that is changed may never end
    names = _names(tree, exercise)
    lines = text.encode().splitlines(keepends=True)
    starts = list(itertools.accumulate([0, *map(len, lines)]))
    seen = {text}
    for node in ast.walk(tree):
        if not isinstance(node, ast.expr | ast.slice):
            continue
        first = starts[node.lineno - 1] + node.col_offset
        last = starts[node.end_lineno - 1] + node.end_col_offset
        raw = text.encode()
        for new, sentence in _changes(node, names):
            mutant = (raw[:first] + f"({new})".encode() + raw[last:]).decode()
            if mutant not in seen:
                seen.add(mutant)
                yield mutant, sentence


def _names(tree: ast.AST, exercise: Exercise) -> set[str]:
    """What may be taken for one another: the arguments, and what the solution itself names."""
    local = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return local | set(exercise.arguments)


def _changes(node: ast.expr, names: set[str]) -> Iterator[tuple[str, str]]:
    text = ast.unparse(node)
    match node:
        case ast.BinOp(left=left, op=op, right=right):
            a, b, sign = ast.unparse(left), ast.unparse(right), OPERATORS.get(type(op))
            a, b = (f"({x})" if isinstance(n, ast.BinOp) else x for x, n in ((a, left), (b, right)))
            if sign in ("+", "-"):
                opposite = f"{a} {'-' if sign == '+' else '+'} {b}"
                yield opposite, f"a sign is wrong: it is `{a} {sign} {b}`, not `{opposite}`"
                yield f"{a} * {b}", f"it is `{text}`, not `{a} * {b}`"
                yield a, f"a term is missing: `{sign} {b}`"
                yield (b if sign == "+" else f"-{b}"), f"a term is missing: `{a}`, in `{text}`"
            if sign in ("*", "/"):
                other = "/" if sign == "*" else "*"
                yield f"{a} {other} {b}", f"it is `{text}`, not `{a} {other} {b}`"
                yield f"{a} + {b}", f"it is `{text}`, not `{a} + {b}`"
                yield a, f"the {'factor' if sign == '*' else 'divisor'} `{b}` is missing behind `{a}`"
                yield (b if sign == "*" else f"1 / {b}"), f"`{a}` is missing in `{text}`"
            if sign in ("-", "/", "//", "**", "@"):
                yield f"{b} {sign} {a}", f"`{text}` is the wrong way round"
            if sign == "**":
                yield a, f"the power is missing: it is `{text}`, not `{a}`"
            if sign in ("+", "-", "*", "/", "**"):
                yield f"({text}) ** 2", f"`{text}` is squared, but should not be"
                yield f"({text}) ** 0.5", f"a square root of `{text}` is taken, but should not be"
                yield f"-({text})", f"`{text}` has the wrong sign"
        case ast.Call(func=function, args=arguments, keywords=keywords):
            is_method = isinstance(function, ast.Attribute) and not (
                isinstance(function.value, ast.Name) and function.value.id in MODULES
            )
            name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            inner = ast.unparse(function.value) if is_method else (ast.unparse(arguments[0]) if arguments else "")
            if inner and not isinstance(arguments[0] if arguments else None, ast.Starred):
                yield inner, WRAPPERS.get(name, f"`{name}` is missing around `{{}}`").format(inner)
            for other in CONFUSED.get(name, []):
                called = f"{ast.unparse(function.value)}.{other}" if isinstance(function, ast.Attribute) else other
                rest = ", ".join(map(ast.unparse, [*arguments, *keywords]))
                yield f"{called}({rest})", f"it is `{name}`, not `{other}`, of `{inner}`"
            for i, keyword in enumerate(keywords):
                if keyword.arg in ("dim", "ndim"):
                    for dim in range(-3, 4):
                        kept = [*keywords[:i], ast.keyword(keyword.arg, ast.Constant(dim)), *keywords[i + 1 :]]
                        new = ast.unparse(ast.Call(function, arguments, kept))
                        yield new, f"`{name}` runs along the wrong axis: {dim} in place of {ast.unparse(keyword.value)}"
            if name == "transpose":
                for i, j in itertools.combinations(range(4), 2):
                    new = f"{inner}.transpose({i}, {j})"
                    yield new, f"the axes {i} and {j} are exchanged: it is `{text}`"
            if len(arguments) > 1 and not any(isinstance(a, ast.Starred) for a in arguments):
                for i, j in itertools.combinations(range(len(arguments)), 2):
                    order = list(arguments)
                    order[i], order[j] = order[j], order[i]
                    new = ast.unparse(ast.Call(function, order, keywords))
                    pair = f"`{ast.unparse(arguments[i])}` and `{ast.unparse(arguments[j])}`"
                    yield new, f"{pair} are exchanged in `{text}`"
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in COMPARISONS:
            for kind, sign in COMPARISONS.items():
                if kind is not type(op):
                    new = f"{ast.unparse(left)} {sign} {ast.unparse(right)}"
                    yield new, f"the comparison is off: it is `{text}`, not `{sign}`"
        case ast.Constant(value=bool()):
            yield str(not node.value), f"it is {node.value}, not {not node.value}"
        case ast.Constant(value=int() | float() as number):
            candidates = {number + 1, number - 1, -number, 2 * number, number / 2, 0, 1}
            for other in sorted(candidates - {number}, key=str):
                written = str(int(other) if other == int(other) else other)
                yield written, f"a number is off: {written} in place of {number:g}"
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            yield ast.unparse(operand), f"a minus sign is missing before `{ast.unparse(operand)}`"
        case ast.Name(id=name, ctx=ast.Load()) if name in names:
            for other in sorted(names - {name}):
                yield other, f"`{other}` stands where `{name}` belongs"
            yield f"1 - {name}", f"it is `{name}`, not `1 - {name}`"
            yield f"1 + {name}", f"it is `{name}`, not `{name} + 1`"
            yield f"{name} - 1", f"it is `{name}`, not `{name} - 1`"
            yield f"-{name}", f"`{name}` has the wrong sign"
            yield f"{name} ** 2", f"it is `{name}`, not its square"
            yield f"{name} ** 0.5", f"it is `{name}`, not its root"
            yield f"1 / {name}", f"it is `{name}`, not 1 / `{name}`"
            yield f"{name}.detach()", f"`{name}` is detached, but the gradient must flow through it"
        case ast.Tuple(elts=[a, b]) | ast.List(elts=[a, b]):
            new = f"{ast.unparse(b)}, {ast.unparse(a)}"
            brackets = "[{}]" if isinstance(node, ast.List) else "({})"
            yield brackets.format(new), f"`{ast.unparse(a)}` and `{ast.unparse(b)}` are in the wrong order"
        case ast.Subscript(value=ast.Attribute(attr="shape") as shape, ctx=ast.Load()):
            for axis in (0, 1, 2, 3, -1, -2, -3, -4):
                new = f"{ast.unparse(shape)}[{axis}]"
                yield new, f"the wrong size: `{new}` stands where `{text}` belongs"
        case ast.Subscript(value=value, slice=index, ctx=ast.Load()):
            if isinstance(index, ast.Name):
                at, i = ast.unparse(value), index.id
                yield f"{at}[({i} - 1).clamp(min=0)]", f"one step too early: `{at}` is read at {i} - 1, not at {i}"
                yield f"{at}[({i} + 1).clamp(max=len({at}) - 1)]", f"one step too late: `{at}` is read at {i} + 1"
                yield f"{at}[{i}[:1]]", f"`{at}` is read at the first {i} only, for the whole batch"
        case ast.IfExp(test=test, body=body, orelse=other):
            yield ast.unparse(body), f"the case is missing in which not `{ast.unparse(test)}`"
            yield ast.unparse(other), f"the case is missing in which `{ast.unparse(test)}`"


def of_the_arguments(exercise: Exercise, function: Callable, args: dict[str, Any]) -> Iterator[tuple[Callable, str]]:
    """(the function, called with other arguments; sentence): t + 1 for t, x_0 for noise, β for ᾱ, ..."""

    def other(**changes: Callable) -> Callable:
        def call(*values):
            given = dict(zip(exercise.arguments, values, strict=True))
            return function(*{**given, **{name: change(given) for name, change in changes.items()}}.values())

        return call

    kinds = {name: _kind(value) for name, value in args.items()}
    for a, b in itertools.combinations(args, 2):
        if kinds[a] and kinds[a] == kinds[b]:
            exchanged = other(**{a: lambda given, b=b: given[b], b: lambda given, a=a: given[a]})
            yield exchanged, f"`{a}` and `{b}` are exchanged"
            yield other(**{a: lambda given, b=b: given[b]}), f"`{b}` stands where `{a}` belongs, and `{a}` is not used"
            yield other(**{b: lambda given, a=a: given[a]}), f"`{a}` stands where `{b}` belongs, and `{b}` is not used"
    for name, value in args.items():
        for change, sentence in _other_values(name, value):
            yield other(**{name: lambda given, change=change, name=name: change(given[name])}), sentence


def _kind(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, value.shape
    return type(value) if isinstance(value, int | float | str | torch.nn.Module) else None


def _other_values(name: str, value: Any) -> Iterator[tuple[Callable, str]]:
    if isinstance(value, Tensor) and value.is_floating_point():
        yield torch.zeros_like, f"`{name}` has no influence on your result"
        yield torch.ones_like, f"your result is the same for every `{name}`, as if it were 1"
        yield torch.neg, f"`{name}` comes in with the wrong sign"
        yield lambda x: x**2, f"it is `{name}` that belongs there, not its square"
        yield lambda x: x.sqrt(), f"it is `{name}` that belongs there, not its root"
        yield lambda x: 1 - x, f"it is `{name}` that belongs there, not 1 - `{name}`"
        yield lambda x: 2 * x, f"`{name}` counts twice"
        yield lambda x: x / 2, f"`{name}` counts half"
        if value.ndim:
            yield lambda x: x.flip(-1), f"`{name}` is read backwards"
            yield lambda x: x[:1].expand_as(x), f"only the first entry of `{name}` is used, for the whole batch"
            if value.ndim == 1:
                wraps = "(at the ends the table is read from its other side)"
                yield lambda x: x.roll(1), f"`{name}` is read one place too early, at t - 1 {wraps}"
                yield lambda x: x.roll(-1), f"`{name}` is read one place too late, at t + 1 {wraps}"
            else:
                yield lambda x: x.roll(1, 0), f"`{name}` is off by one along its first axis"
                yield lambda x: x.roll(-1, 0), f"`{name}` is off by one along its first axis"
        if name == "alphas_cumprod":
            yield _alphas, "you used α_t = 1 - β_t of the single step: it is ᾱ_t, the product of all up to t"
            yield lambda a: 1 - _alphas(a), "you used β_t of the single step: it is ᾱ_t, the product of all α up to t"
        if name == "betas":
            yield lambda b: 1 - b, "you took α for β: α_t = 1 - β_t"
            yield lambda b: 1 - torch.cumprod(1 - b, 0), "you took 1 - ᾱ_t for β_t: β_t belongs to one step only"
        if value.ndim > 2 and value.shape[-1] == value.shape[-2]:
            yield lambda x: x.transpose(-1, -2), f"the last two axes of `{name}` are exchanged"
    elif isinstance(value, Tensor) and value.dtype == torch.bool:
        yield torch.logical_not, f"`{name}` is the wrong way round"
        yield torch.zeros_like, f"`{name}` is not used: your result is the same for every `{name}`"
        yield torch.ones_like, f"`{name}` is not used: your result is the same for every `{name}`"
    elif isinstance(value, Tensor):
        yield lambda t: (t - 1).clamp(min=0), f"one too early: `{name}` - 1 stands where `{name}` belongs"
        yield lambda t: t + 1, f"one too late: `{name}` + 1 stands where `{name}` belongs"
        yield lambda t: t[:1].expand_as(t), f"only the first entry of `{name}` is used, for the whole batch"
        yield lambda t: t.max().expand_as(t), f"the largest entry of `{name}` is used, for the whole batch"
        yield torch.zeros_like, f"your result is the same for every `{name}`"
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield lambda n: n + 1, f"`{name}` is one too large"
        yield lambda n: n - 1, f"`{name}` is one too small"
        yield lambda n: 1 - n, f"it is `{name}`, not 1 - `{name}`"
        yield lambda n: -n, f"`{name}` has the wrong sign"
        yield lambda n: n**2, f"`{name}` is squared, but should not be"
        yield lambda n: n**0.5, f"a root of `{name}` is taken, but should not be"
        yield lambda n: 1 / n, f"you divided by `{name}` where one multiplies, or the other way round"
        yield lambda n: 2 * n, f"`{name}` counts twice"
        yield lambda n: n / 2, f"`{name}` counts half"
        yield lambda n: type(n)(1), f"your result is the same for every `{name}`, as if it were 1"
        yield lambda n: type(n)(0), f"your result is the same for every `{name}`, as if it were 0"
    elif isinstance(value, list) and value:
        yield lambda x: x[::-1], f"`{name}` is read in the wrong order, the last first"
        yield lambda x: x[:1], f"only the first entry of `{name}` is used"
        yield lambda x: x[1:], f"the first entry of `{name}` is not used"
        yield lambda x: x[:-1], f"the last entry of `{name}` is not used"


def _alphas(alphas_cumprod: Tensor) -> Tensor:
    return torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])


def takes(function: Callable, exercise: Exercise) -> bool:
    """Whether the function can be called with the exercise's arguments."""
    try:
        inspect.signature(function).bind(*exercise.arguments)
    except TypeError:
        return False
    except ValueError:  # a built-in that does not say
        return True
    return True
