"""How the paper made its tables and figures, as data: the sizes are its own, the embedded model has small ones."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

TASKS = ("arc_challenge", "hellaswag", "mmlu", "truthfulqa_mc2", "winogrande", "gsm8k")


@dataclass(frozen=True)
class Protocol:
    """How the paper made a table or figure.

    data: what EDITS should hold; methods: the paper's; counts: edits at which is scored, the paper's where its
    text says them, up to 1,000 otherwise; small: the same for the embedded model
    """

    about: str
    data: str
    methods: tuple[str, ...]
    counts: tuple[int, ...]
    small: tuple[int, ...]
    retained: bool = False  # needs facts that are not edited
    tasks: tuple[str, ...] = ()


_TENTHS = tuple(range(100, 1001, 100))


def _of_the_inside(
    about: str,
    methods: tuple[str, ...] = ("memit", "d4s"),
    small: Iterable[int] = range(25, 151, 25),
    retained: bool = False,
) -> Protocol:
    return Protocol(about, "zsRE or CounterFact", methods, _TENTHS, tuple(small), retained)


PROTOCOLS: dict[str, Protocol] = {
    "table2": Protocol(
        "methods on zsRE",
        "zsRE",
        ("rome", "memit", "pmet", "grace", "d4s"),
        (100, 500, 1000),
        (10, 25, 50),
    ),
    "table3": Protocol(
        "methods on CounterFact and MQuAKE",
        "CounterFact and MQuAKE",
        ("ft-l", "rome", "memit", "grace", "d4s"),
        (1000,),
        (50,),
    ),
    "table4": Protocol(
        "downstream scores before and after",
        "zsRE",
        ("memit", "d4s"),
        (10_000,),
        (100,),
        retained=True,
        tasks=TASKS,
    ),
    "fig2": Protocol(
        "decline by data set",
        "zsRE, ELKEN, 20Q and a commonsense set (PEP3k)",
        ("kn", "rome", "memit"),
        _TENTHS,
        (5, 10),
        retained=True,
    ),
    "fig3": Protocol(
        "decline by form of question",
        "facts with known old answers",
        ("rome", "memit"),
        _TENTHS,
        (10, 20, 30),
        retained=True,
    ),
    "fig5": _of_the_inside("bottleneck and norms", ("rome", "memit"), range(10, 61, 10)),
    "fig6": _of_the_inside("norms and downstream scores with D4S", retained=True),
    "fig7": _of_the_inside("forgetting"),
    "fig8": _of_the_inside("metrics against edits"),
}
