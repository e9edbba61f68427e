"""Where a student's function goes in minisd: the forms of `swap` that several exercises have.

Each makes a `swap`, which takes the student's function and returns (object, attribute or key, what to put there).
"""

import inspect
from collections.abc import Callable, Mapping
from operator import attrgetter
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from minisd.latent_diffusion import Cond
from minisd.noising import NoiseSchedule
from minisd.sampling import SAMPLERS, predict_x0

Swap = Callable[[Callable], list[tuple[Any, str, Any]]]


def function(name: str, *modules: ModuleType) -> Swap:
    """The function of that name, in each module that has it."""
    return lambda f: [(module, name, f) for module in modules]


def method(owner: type, name: str, *fields: str) -> Swap:
    """A method. The student's function is given the method's arguments, and then these fields of the object."""

    def swap(f: Callable) -> list:
        def called(self, *args):
            return f(*args, *(attrgetter(field)(self) for field in fields))

        return [(owner, name, called)]

    return swap


def of_the_schedule(name: str) -> Swap:
    """A method of NoiseSchedule. The student's function is given the table ᾱ as well."""

    def swap(f: Callable) -> list:
        parameters = inspect.signature(getattr(NoiseSchedule, name))

        def called(*args, **named):
            self, x, *others = parameters.bind(*args, **named).args
            return f(x, *others, self.alphas_cumprod.to(x.device)).to(x)

        return [(NoiseSchedule, name, called)]

    return swap


def instead_of(name: str, *owners: type | ModuleType) -> Callable[[Callable], Swap]:
    """A swap made of a function, which is called in the place of minisd's own: in all modules, or in the class.

    The function is given the student's function, minisd's own, and then what minisd's own is called with.
    """

    def decorate(call: Callable) -> Swap:
        def swap(f: Callable) -> list:
            real = getattr(owners[0], name)

            def called(*args, **named):
                return call(f, real, *args, **named)

            return [(owner, name, called) for owner in owners]

        return swap

    return decorate


def context_of(model: Callable, cond: Cond, samples: slice = slice(None)) -> tuple[Tensor | None, Callable]:
    """What some samples are told: the context, which an exercise is about, and a model that knows the rest already."""
    cond = cond if isinstance(cond, Mapping) else {"c_crossattn": cond}
    context, maps = (
        part if part is None else (part if isinstance(part, Tensor) else torch.cat(list(part), dim=1))[samples]
        for part in (cond.get("c_crossattn"), cond.get("c_concat"))
    )
    if maps is None:
        return context, model

    def told(x, t, context):
        # for guidance, a student asks about each sample twice in one call
        return model(x, t, {"c_crossattn": context, "c_concat": maps.repeat(len(x) // len(maps), 1, 1, 1)})

    return context, told


def rule_of(sampler: str) -> Callable[[Callable], Swap]:
    """The same for the rule of a sampler."""

    def decorate(call: Callable) -> Swap:
        takes = inspect.signature(call)
        own = takes.replace(parameters=list(takes.parameters.values())[2:])  # what the sampler reads off its rule

        def swap(f: Callable) -> list:
            real = SAMPLERS[sampler].rule

            def rule(x_t, eps, a_t, *args, clip_denoised=False, **named):
                if clip_denoised:  # into the ε that leads to the clamped x̂_0
                    x0 = predict_x0(x_t, eps, a_t).clamp(-1, 1)
                    eps = (x_t - a_t**0.5 * x0) / (1 - a_t) ** 0.5
                return call(f, real, x_t, eps, a_t, *args, **named).to(x_t)

            rule.__signature__ = own
            return [(SAMPLERS[sampler], "rule", rule)]

        return swap

    return decorate
