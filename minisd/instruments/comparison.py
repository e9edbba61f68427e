"""Where do two networks differ? Finds the first layer whose outputs differ, and suggests possible causes.

    print(minisd.compare(my_unet, unet, (x, t, context)))

Two networks that should compute the same are run on the same inputs, and the outputs of their layers are compared in
the order in which the layers run. A difference spreads to all later layers, so the first one shows where to look. If
the inputs of that layer agree, the mistake is in the layer: in its weights or its settings. If they do not, the mistake
is in what happens between the layers: an activation function, an addition, a reshape.

The names of the layers may be different, as they are in CompVis, in diffusers and in your own network. Then the layers
are paired as `diff` pairs the lines of two files: in order, by weights, kind and size. So an extra layer in one network
is reported as one extra layer, and the layers after it are still paired correctly.
"""

import math
import re
import textwrap
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from itertools import combinations
from operator import attrgetter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Network = nn.Module | Callable  # a module, or a method of one: `vae.encode`
Inputs = Tensor | tuple | list | Mapping
# What a comparison concludes from the first row that differs.
CONCLUSIONS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))


@dataclass(frozen=True)
class Row:
    """A layer of ours and the layer of theirs it is paired with. Numbers are nan if there is nothing to compare."""

    ours: str | None  # its name; None if there is no such layer
    theirs: str | None
    kind: str  # "Linear", or "Conv2d / Linear"; "output" for what the whole network returns
    shape: str  # of the output: "[2, 64, 8, 8]", or "ours / theirs" if they are not the same
    difference: float  # the largest absolute difference of the two outputs
    size: float  # the largest absolute number in them
    input_difference: float  # the largest absolute difference of the two inputs
    verdict: str  # "agree", "differ", "only in ours", "only in theirs", "error in ours", "not reached", ...

    @property
    def relative(self) -> float:
        return self.difference / self.size if self.size else self.difference

    @property
    def name(self) -> str:
        return " / ".join(dict.fromkeys(name for name in (self.ours, self.theirs) if name))


@dataclass(frozen=True, repr=False)
class Comparison:
    """The result of `compare`. Print it to see the report."""

    rows: list[Row]
    first: Row | None  # the first layer that differs; None if there is none
    conclusion: str  # the same in words
    hints: list[str] = field(default_factory=list)  # likely causes, and other useful facts
    errors: dict[str, str] = field(default_factory=dict)  # what "ours" or "theirs" raised, and where

    @property
    def equal(self) -> bool:
        return self.first is None and not self.errors

    def report(self, every: bool = False) -> str:
        """The table and the conclusion. The table has all layers with `every`, or those near the first difference."""
        here = [i for i, row in enumerate(self.rows) if row is self.first or row.verdict.startswith("error")]
        near = {0, len(self.rows) - 1}.union(*(range(i - 4, i + 4) for i in here or (0, len(self.rows) + 2)))
        near |= {i for i, row in enumerate(self.rows) if "only" in row.verdict or every or len(self.rows) <= 16}
        one_name = all(None in (row.ours, row.theirs) or row.ours == row.theirs for row in self.rows)
        head = ["layer"] if one_name else ["layer of ours", "layer of theirs"]
        lines = [["", *head, "kind", "shape", "largest difference", "relative", ""]]
        for i, row in enumerate(self.rows):
            if i in near:  # the other rows are replaced by three dots
                names = [row.name] if one_name else [row.ours or "-", row.theirs or "-"]
                much = f"{_number(row.difference)} of {_number(row.size)}" if row.difference >= 0 else ""
                verdict = f"{row.verdict} <- they part here" if row is self.first else row.verdict
                mark = ">" if row is self.first else ""
                lines.append([mark, *names, row.kind, row.shape, much, _number(row.relative), verdict])
            elif i - 1 in near:
                lines.append(["", "...", *[""] * (len(lines[0]) - 2)])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        lines.insert(1, ["-" * width for width in widths])
        table = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
        words = [*self.conclusion.splitlines(), *(f"  - {hint}" for hint in self.hints)]
        words = [textwrap.fill(line, 110, subsequent_indent="    ") for line in words]
        return "\n".join([*table, "", *words] if self.rows else words)

    def __repr__(self) -> str:
        return self.report()

    def check(self) -> "Comparison":
        """For tests: returns this comparison if the two networks agree.

        Raises:
            AssertionError: they differ. The message is the report.
        """
        if not self.equal:
            raise AssertionError(f"the two networks differ\n\n{self}")
        return self


def compare(
    ours: Network, theirs: Network, inputs: Inputs, their_inputs: Inputs | None = None, tolerance: float = 2e-5
) -> Comparison:
    """Find the first layer at which two networks differ.

    A layer is a module that has parameters of its own. (Activation functions are not compared, because some authors
    write them as modules and others as functions.) Both networks run once, without gradients, in their current mode
    (train or eval), from the same random state. The random state and the buffers are restored afterwards. The inputs
    and outputs of all layers are kept in float32, so use a small input for a large network: a latent of 8x8 shows the
    same mistakes as one of 64x64. If a layer is initialised with zeros, its output does not depend on the layers before
    it, so their mistakes do not show. Fill such layers with random numbers first.

    Args:
        ours, theirs: modules, or methods of modules. If they return an object or several values, the first tensor in
            it is compared: `.sample`, `.last_hidden_state`, the mean of a distribution.
        inputs: a tensor, a tuple of arguments, or a dict of arguments by their names.
        their_inputs: the inputs of theirs, if it takes its arguments in another form.
        tolerance: the largest difference that counts as equal; relative to the layer's numbers if they exceed 1.

    If a network raises an error, the report says which layers ran before it, and quotes the message.

    Raises:
        TypeError: ours or theirs is neither a module nor a method of a module.
    """
    runs = {"ours": _run(ours, inputs), "theirs": _run(theirs, inputs if their_inputs is None else their_inputs)}
    errors = {name: run.error for name, run in runs.items() if run.error}
    pairs = _pair(runs["ours"].calls, runs["theirs"].calls)
    reached = max((i for i, pair in enumerate(pairs) if None not in pair), default=-1) if errors else len(pairs)
    rows = [_row(*pair, tolerance, i <= reached) for i, pair in enumerate(pairs)]
    first = differs = next((i for i, row in enumerate(rows) if row.verdict == "differ"), None)
    agree = [i for i, row in enumerate(rows[:differs]) if row.verdict == "agree"]  # all of them, if none differs

    hints = []
    if differs is None:
        where = _agreement([rows[i] for i in agree], bool(errors))
    else:
        inputs_agree = _close(*(call.input for call in pairs[differs]), tolerance)
        if not inputs_agree:  # an extra layer just before, which the other network lacks, may be the reason
            first = next((i for i in range(max(differs - 4, 0), differs) if "only" in rows[i].verdict), differs)
        where = _difference(rows[first], rows[differs], [rows[i] for i in agree], inputs_agree)
        hints += _hints(*pairs[differs], [pairs[i] for i in agree], tolerance)
        layers = [(a, b) for a, b in pairs if a and b and a.parameters]
        if 2 * (others := sum(_weights(a, b, how=lambda x, y: None) is not None for a, b in layers)) > len(layers) > 1:
            hints.append(f"{others} of {len(layers)} pairs of layers have other weights: first give both the same")
    for pair, row in zip(pairs, rows, strict=True):
        if row.verdict.startswith("error"):
            given = [_shape(call.input) for call in pair]
            hints += [f"{row.name} was given {given[0]} in ours and {given[1]} in theirs"] * (given[0] != given[1])
            hints += [f"{row.name}: {hint}"] if (hint := _weights(*pair)) else []
    alone = [row.name for row in rows if "only" in row.verdict] if differs is None and not errors else []
    hints += _notes(runs, [pairs[i] for i in agree], alone)
    text = "\n".join([*(f"{name.capitalize()} stopped {error}" for name, error in errors.items()), where])
    return Comparison(rows, None if first is None else rows[first], text, hints, errors)


# -- running a network -------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Call:
    """One call of one layer."""

    name: str
    module: nn.Module | None  # None for the output of the whole network
    input: Tensor | None
    output: Tensor | None = None  # None if it raised an error
    dtype: torch.dtype | None = None
    time: int = 1  # which call of this layer

    @property
    def kind(self) -> str:
        return type(self.module).__name__ if self.module is not None else "output"

    @property
    def operation(self) -> str:
        """The kind of layer. A 1x1 convolution counts as a Linear layer, because it computes the same."""
        return "Linear" if set(getattr(self.module, "kernel_size", ())) == {1} else self.kind

    @property
    def size(self) -> int | None:
        return None if self.output is None else self.output.numel()

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The layer's own parameters, without those of its submodules."""
        return dict(self.module.named_parameters(recurse=False)) if self.module is not None else {}


@dataclass
class _Run:
    module: nn.Module
    calls: list[_Call] = field(default_factory=list)
    error: str | None = None


def _run(net: Network, inputs: Inputs) -> _Run:
    """Call the network, and record the input and output of each layer. The network is not changed."""
    module = getattr(net, "__self__", net)
    if not isinstance(module, nn.Module):
        raise TypeError(f"compare takes two modules, or methods of modules, not a {type(net).__name__}")
    run, inside, times = _Run(module), [], Counter()
    names = {layer: name or type(layer).__name__ for name, layer in module.named_modules()}

    def enter(layer, args, kwargs):
        inside.append(_Call(names[layer], layer, _copy(_tensor((args, kwargs)))))

    def leave(layer, args, kwargs, output):
        while (call := inside.pop()).module is not layer:
            pass  # a layer raised an error, and the network caught it
        if call.parameters and (output := _tensor(output)) is not None:
            times[layer] += 1
            call.name += f" (call {times[layer]})" if times[layer] > 1 else ""
            call.output, call.dtype, call.time = _copy(output), output.dtype, times[layer]
            run.calls.append(call)

    def fresh(value):  # a copy, in case a network writes into its input, which the other one also gets
        return value.clone() if isinstance(value, Tensor) else value

    args, kwargs = ((), inputs) if isinstance(inputs, Mapping) else (inputs, {})
    args = (args,) if isinstance(args, Tensor) else args
    cards = {parameter.device for parameter in module.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=cards), torch.no_grad(), ExitStack() as restore:
        for layer in names:
            restore.enter_context(layer.register_forward_pre_hook(enter, with_kwargs=True))
            restore.enter_context(layer.register_forward_hook(leave, with_kwargs=True))
        for buffer in module.buffers():
            restore.callback(buffer.copy_, buffer.clone())
        try:
            result = net(*map(fresh, args), **{name: fresh(value) for name, value in kwargs.items()})
            if (output := _tensor(result)) is None:
                raise TypeError(f"it returned no tensor, but a {type(result).__name__}: is a return missing?")
            run.calls.append(_Call("output", None, _copy(output), _copy(output), output.dtype))
        except Exception as error:  # of any kind: the report then shows where the network stopped
            run.error = f"with {type(error).__name__}: {str(error).strip()}"
            if inside:
                call = inside[-1]
                name = f"{call.name} ({call.kind})" if call.name != call.kind else call.name
                run.error = f"in {name}, which was given {_shape(call.input)}, {run.error}"
                run.calls += [call] if call.parameters else []
    return run


def _tensor(value) -> Tensor | None:
    """The first tensor in the input or output of a module."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        value = list(value.values())
    elif not isinstance(value, tuple | list):
        value = [getattr(value, name, None) for name in ("sample", "last_hidden_state", "mean")]
        value = [part for part in value if isinstance(part, Tensor)]
    return next((tensor for part in value if (tensor := _tensor(part)) is not None), None)


def _copy(tensor: Tensor | None) -> Tensor | None:
    """A copy, since the network may write into the original later."""
    return None if tensor is None else tensor.detach().to("cpu", torch.float32, copy=True)


# -- pairing the layers ------------------------------------------------------------------------------------------------

# What two layers may have in common, from the most reliable sign to the least.
SIGNS = ("operation", "size", "name"), ("operation", "size"), ("operation",), ("size",), ("name",)


def _pair(ours: list[_Call], theirs: list[_Call]) -> list[tuple[_Call | None, _Call | None]]:
    """Pair the layers: by name if all names are the same; otherwise by weights, and the rest by SIGNS."""
    a, b = ({call.name: call for call in calls} for calls in (ours, theirs))
    if a.keys() != b.keys():
        # Layers with the same weights belong together, even if the networks call them in different orders: k before q,
        # or the skip connection first.
        a, b = ({_weights_key(call): call for call in calls} for calls in (ours, theirs))
    pair = {call: a[key] for calls in (a, b) for key, call in calls.items() if key in a.keys() & b.keys()}

    # The other layers are paired as `diff` pairs the lines of two files, between the pairs that are already known. Both
    # lists are read from the end. This also pairs a k with different weights that theirs calls before q.
    for signs in SIGNS:
        lists = ours[::-1], theirs[::-1]
        marks = ([pair.get(call) or attrgetter(*signs)(call) for call in calls] for calls in lists)
        for i, j, length in SequenceMatcher(None, *marks, autojunk=False).get_matching_blocks():
            for x, y in zip(lists[0][i : i + length], lists[1][j : j + length], strict=True):
                pair[x] = pair[y] = x

    # Sort the pairs in the order of ours. A layer that only theirs has follows the layer that precedes it in theirs.
    partner = {pair[call]: call for call in theirs if call in pair}
    pairs = [(call, partner.get(call)) for call in ours]
    for j, call in enumerate(theirs):
        if call not in pair:
            place = [other for _, other in pairs].index(theirs[j - 1]) + 1 if j else 0
            pairs.insert(place, (None, call))
    return pairs


def _weights_key(call: _Call):
    """The sum of a layer's weights. It does not depend on their shape: [c_out c_in] or [c_out c_in 1 1].

    Only matrices identify a layer, because all newly initialised norms have the same weights, and some layers are
    initialised with zeros. For any other layer the key is the call itself, which is equal to no other key.
    """
    total = sum(p.detach().double().abs().sum().item() for p in call.parameters.values() if p.ndim > 1)
    return (f"{total:.6e}", call.time) if total else call


def _row(a: _Call | None, b: _Call | None, tolerance: float, reached: bool) -> Row:
    calls = [call for call in (a, b) if call]
    numbers = [math.nan] * 3
    if len(calls) == 1:
        verdict = f"only in {'ours' if a else 'theirs'}" if reached else "not reached"
    elif stopped := [name for name, call in (("ours", a), ("theirs", b)) if call.output is None]:
        verdict = f"error in {' and '.join(stopped)}"
    else:
        numbers = [*_compare(a.output, b.output), _compare(a.input, b.input)[0]]
        same = _close(a.output, b.output, tolerance) and _close(a.input, b.input, tolerance) is not False
        verdict = "agree" if same else "differ"
    kind = " / ".join(dict.fromkeys(call.kind for call in calls))
    shape = " / ".join(dict.fromkeys(_shape(call.output) for call in calls if call.output is not None))
    return Row(a and a.name, b and b.name, kind, shape, *numbers, verdict)


# -- comparing numbers -------------------------------------------------------------------------------------------------


def _layouts(x: Tensor | None, like: Tensor | None) -> list[Tensor]:
    """x in the shape of `like`, in all possible ways: [b c h w] from [b hw c] or [b c hw], [b c] from [b c 1 1]."""
    if x is None or like is None or not x.numel() or x.numel() != like.numel():
        return []
    if [n for n in x.shape if n > 1] == [n for n in like.shape if n > 1]:
        return [x.reshape(like.shape)]
    flat, flat_like = (t.flatten(2) if t.ndim == 4 else t for t in (x, like))
    ways = [flat, flat.mT] if flat.ndim == flat_like.ndim == 3 and x.ndim != like.ndim else []
    return [way.reshape(like.shape) for way in ways if way.shape == flat_like.shape]


def _compare(x: Tensor | None, y: Tensor | None) -> tuple[float, float]:
    """The largest absolute difference and the largest absolute number; nan if the tensors cannot be compared."""
    ways = _layouts(y, x)
    if not ways:
        return math.nan, math.nan
    differences = [(x - way).abs().nan_to_num(math.inf, math.inf).max().item() for way in ways]
    return min(differences), max(t.nan_to_num(0.0, 0.0, 0.0).abs().max().item() for t in (x, y))


def _close(x: Tensor | None, y: Tensor | None, tolerance: float) -> bool | None:
    """Whether two tensors agree within the tolerance; None if they cannot be compared."""
    difference, size = _compare(x, y)
    return None if math.isnan(difference) else difference <= tolerance * max(1.0, size)


# -- in words ----------------------------------------------------------------------------------------------------------


def _number(x: float) -> str:
    return "" if math.isnan(x) else re.sub(r"e([+-])0", r"e\1", f"{x:.2g}")


def _shape(x: Tensor | None) -> str:
    return "no tensor" if x is None else str(list(x.shape))


def _list(names: list[str]) -> str:
    return ", ".join(names[:3]) + f", and {len(names) - 3} more" * (len(names) > 3)


def _agreement(rows: list[Row], stopped: bool) -> str:
    if not rows:
        return "No layer was compared before that."
    worst = max(rows, key=lambda row: row.difference)
    much = f": the largest difference is {_number(worst.difference)} of {_number(worst.size)}, in {worst.name}."
    which = f"Up to there, {len(rows)}" if stopped else f"The outputs and all {len(rows) - 1}"
    return f"{which} pairs of layers agree{much if worst.difference else ' exactly.'}"


def _difference(row: Row, differs: Row, before: list[Row], inputs_agree: bool | None) -> str:
    much = max((other.difference for other in before), default=0.0)
    exact = f" to {_number(much)}" if much else ""
    they = f"The first {len(before)} pairs of layers agree{exact}; they" if before else "They"
    size = f": largest difference {_number(row.difference)} of {_number(row.size)}" if row.difference >= 0 else ""
    where = f"between {before[-1].name} and it" if before else "to the inputs before it"
    inputs = {True: "inputs_agree", False: "inputs_differ", None: "inputs_have_another_shape"}[inputs_agree]
    case = "only" if "only" in row.verdict else "output" if row.kind == "output" else inputs
    by = _number(row.input_difference)
    return f"{they} part at " + CONCLUSIONS[case].format(row=row, size=size, by=by, where=where, next=differs.name)


def _notes(runs: dict[str, _Run], agree: list[tuple[_Call, _Call]], alone: list[str]) -> list[str]:
    """Facts about the two networks that may help, wherever they differ."""
    notes = []
    for name, run in runs.items():
        dropouts = sum(isinstance(layer, nn.Dropout) and layer.p > 0 for layer in run.module.modules())
        if run.module.training and dropouts:
            notes.append(f"{name} is in train mode, with {dropouts} layers that drop out: .eval() ends that")
    layers = [(a, b) for a, b in agree if a.module is not None]
    if zeros := [a.name for a, b in layers if not a.output.any() and not b.output.any()]:
        notes.append(f"layers that give nothing but zeros hide what is before them: {_list(zeros)}")
    if silent := [f"{a.name} ({text})" for a, b in layers if (text := _settings(a, b))]:
        notes.append(f"other settings, too little to show here: {_list(silent)}")
    if alone:
        notes.append(f"layers without a counterpart, which change nothing: {_list(alone)}")
    return notes


# -- likely causes -----------------------------------------------------------------------------------------------------

# Functions that a network may apply to the output of a layer before it passes it to the next.
OPERATIONS = {
    "{} itself": lambda x: x,
    "SiLU({})": F.silu,
    "GELU({})": F.gelu,
    "GELU({}) by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick-GELU({})": lambda x: x * torch.sigmoid(1.702 * x),
    "GEGLU({}), first the value and then the gate": lambda x: _geglu(*x.tensor_split(2, dim=-1)),
    "GEGLU({}), first the gate and then the value": lambda x: _geglu(*reversed(x.tensor_split(2, dim=-1))),
    "GEGLU({}) by tanh": lambda x: _geglu(*x.tensor_split(2, dim=-1), approximate="tanh"),
}
# The settings of a layer that can be wrong even if its weights are right.
SETTINGS = ("eps", "num_groups", "stride", "padding", "dilation", "groups", "padding_mode", "normalized_shape")


def _geglu(value: Tensor, gate: Tensor, approximate: str = "none") -> Tensor | None:
    return value * F.gelu(gate, approximate=approximate) if value.shape == gate.shape else None


def _changes(x: Tensor, y: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Candidates for how ours, x, may have been computed from theirs, y: a description, and the result for y."""
    u, v = (t.double() - t.double().mean() for t in (x, y))
    scale = (u * v).sum() / (v * v).sum()  # least squares
    offset = x.double().mean() - scale * y.double().mean()
    plus = f" plus {offset:.4g}" if abs(offset) > 1e-4 else ""
    yield f"ours is {scale:.4g} times theirs{plus}", (scale * y.double() + offset).float()
    for dim, n in enumerate(x.shape):
        if n % 2 == 0:
            yield f"the halves of dimension {dim} are swapped, as by a torch.cat or a chunk", y.roll(n // 2, dim)
    for i, j in combinations(range(x.ndim), 2):
        if x.shape[i] == x.shape[j]:
            yield f"dimensions {i} and {j} are swapped: transposed", y.transpose(i, j)


def _relation(x: Tensor | None, y: Tensor | None, tolerance: float) -> str | None:
    """How ours, x, can be computed from theirs, y; None if no simple relation is found."""
    if x is None or y is None:
        return None
    if x.numel() != y.numel():
        return f"the shape is {_shape(x)} in ours and {_shape(y)} in theirs"
    for way in _layouts(y, x):
        for words, changed in _changes(x, way):
            if _close(x, changed, tolerance):
                return words
        differs, stretches = ~((x - way).abs() <= tolerance * max(1.0, x.abs().max().item())), []
        for dim, n in enumerate(x.shape):
            at = differs.movedim(dim, 0).reshape(n, -1).any(dim=1).nonzero().flatten().tolist()
            if 0 < len(at) < n and at[-1] - at[0] == len(at) - 1:
                which = f"{at[0]} to {at[-1]}" if len(at) > 1 else f"number {at[0]}"
                stretches.append((len(at) / n, f"only {which} of the {n} along dimension {dim}"))
        if stretches:
            return min(stretches)[1]
    if _close(x.flatten().sort()[0], y.flatten().sort()[0], tolerance):
        return "the same numbers in another order: look for a reshape, a permute or a rearrange"
    return None


def _weights(a: _Call, b: _Call, how: Callable = lambda x, y: _relation(x, y, 1e-6)) -> str | None:
    """Describes the first parameter that differs. `how` returns how ours can be computed from theirs."""
    for name in a.parameters | b.parameters:
        x, y = (_copy(call.parameters.get(name)) for call in (a, b))
        if x is None or y is None:
            return f"only {'theirs' if x is None else 'ours'} has a {name}"
        much, size = _compare(x, y)
        if math.isnan(much):
            return f"its {name} has the shape {_shape(x)} in ours and {_shape(y)} in theirs"
        if much > 1e-6 * size:
            relation = how(x, y)
            text = f"its {name} differs by up to {_number(much)} of {_number(size)}"
            return f"{text}: {relation}" if relation else text
    return None


def _settings(a: _Call, b: _Call) -> str | None:
    if type(a.module) is not type(b.module):
        return None
    both = ((name, *(getattr(call.module, name, None) for call in (a, b))) for name in SETTINGS)
    return next((f"{name} is {x} in ours and {y} in theirs" for name, x, y in both if x != y), None)


def _operation(call: _Call, before: list[_Call], tolerance: float) -> str | None:
    """Where a layer's input comes from: which earlier layer's output it is, and which function was applied to it."""
    found = None
    for earlier in before[-8:]:
        for words, function in OPERATIONS.items():
            out = earlier.output
            if out.ndim and out.any() and _close(call.input, function(out), tolerance):
                found = words.format(earlier.name)
    return found


def _addition(a: _Call, b: _Call, before: list[tuple[_Call, _Call]], tolerance: float) -> str | None:
    """A term that one of the networks does not add, such as a residual connection or an embedding."""
    for sign, lacks in ((1, "ours"), (-1, "theirs")):
        for way in _layouts(b.input, a.input):
            rest = sign * (way - a.input)
            for earlier, _ in reversed(before):
                for verb, term in (("comes out of", earlier.output), ("goes into", earlier.input)):
                    if term is not None and term.shape == rest.shape[:2]:
                        term = term[(...,) + (None,) * (rest.ndim - 2)].expand(rest.shape)  # a vector, for all pixels
                    if term is not None and term.any() and _close(rest, term, tolerance):
                        return f"{lacks} lacks an addition: of what {verb} {earlier.name}"
    return None


def _hints(a: _Call, b: _Call, before: list[tuple[_Call, _Call]], tolerance: float) -> list[str]:
    """Likely causes of the difference in this pair of layers, given the earlier pairs that agree."""
    calls = {"ours": a, "theirs": b}
    hints = [f"{name} gives NaN or infinity" for name, call in calls.items() if not call.output.isfinite().all()]
    if a.dtype != b.dtype:
        hints.append(f"ours computes in {a.dtype} and theirs in {b.dtype}".replace("torch.", ""))
    if _close(a.input, b.input, tolerance):
        causes = [cause for cause in (_weights(a, b), _settings(a, b)) if cause]
        if not causes and (how := _relation(a.output, b.output, tolerance)):
            causes = [f"what comes out: {how}"]
        return hints + causes
    done = [_operation(call, [pair[side] for pair in before], tolerance) for side, call in enumerate((a, b))]
    what = "what goes in" if a.module is not None else "what comes out"
    if lacking := _addition(a, b, before, tolerance):
        hints.append(lacking)
    elif None in done and (how := _relation(a.input, b.input, tolerance)):
        hints.append(f"{what}: {how}")
    elif done != [None, None] and done[0] != done[1]:
        ours, theirs = (words or "something else" for words in done)
        hints.append(f"{what} is, in ours: {ours}; in theirs: {theirs}")
    return hints
