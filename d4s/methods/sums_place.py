"""Where the sums of a closed form live: beside their layer's W or, where W's device has no room for them, on the CPU.

λC with its factor, A, B, P and Δ of a layer are kept and solved with in one place. On the CPU, keys and residuals come
to it and Δ, d_out · d_in in float64, crosses to W's device at each step, where alone W is written. Results are the same
to rounding, as they are on another device.

`Workbench.sums_on` says which: "device", "cpu", or "auto", by which what is certain to be held on a device, the copies
of W among it, is held against the memory that is free there, once, before the method's first editor.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping

import torch

from d4s.change.speed import speed_of
from d4s.methods.base import LayerSize, Method, SumsOn, Workbench
from d4s.progress import amount, duration, note
from d4s.ranks import here

logger = logging.getLogger(__name__)

HOST = "cpu"
COPIES = "copies of edited weights"
CROSSING = "change on its way to W"
MEASURING = 0.1  # seconds that each measurement of the CPU takes, about, where sums come to live there


def held(
    method: Method,
    sizes: Mapping[int, LayerSize],
    places: Mapping[int, str],
    edits: int,
    away: Collection[int] = (),
) -> dict[str, dict[str, int]]:
    """Place → what is held there → bytes, all of it certain: W0, the copy that a step can go back to, the editor's own.

    places: of each layer's W; away: layers whose sums are on the host
    """
    found: dict[str, dict[str, int]] = {}
    for layer, size in sizes.items():
        own = found.setdefault(places[layer], {})
        own[COPIES] = own.get(COPIES, 0) + 2 * size.weight
        there = found.setdefault(HOST, {}) if layer in away else own
        for name, count in method.holding(size, edits).parts.items():
            there[name] = there.get(name, 0) + count
        if layer in away and places[layer] != HOST:  # one layer after another
            own[CROSSING] = max(own.get(CROSSING, 0), method.crossing(size))
    return found


def without_room(
    method: Method,
    sizes: Mapping[int, LayerSize],
    places: Mapping[int, str],
    edits: int,
    free: Mapping[str, int],
) -> frozenset[int]:
    """Layers for whose sums there is no room beside W. free: place → bytes; others are taken to have room"""
    if not method.sums_move:
        return frozenset()
    needed = {place: sum(parts.values()) for place, parts in held(method, sizes, places, edits).items()}
    return frozenset(
        layer
        for layer, place in places.items()
        if place != HOST and place in free and needed[place] > free[place]
    )


def moved(
    method: Method, places: Mapping[int, str], sums_on: SumsOn, lacking: Callable[[], Iterable[int]]
) -> frozenset[int]:
    """Layers whose sums are on the CPU while their W is not. lacking: for "auto", those without room"""
    if sums_on == "device" or not method.sums_move:
        return frozenset()
    if sums_on == "cpu":
        return frozenset(layer for layer, place in places.items() if place != HOST)
    return frozenset(lacking())


def free_on(device: torch.device) -> int | None:
    """Bytes that can still be had on a GPU, those that torch keeps in reserve among them; None: not known."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reserve


def on_host(bench: Workbench, method: Method, edits: int = 1) -> frozenset[int]:
    """Layers whose sums live on the CPU while their W does not: decided when first asked for, and said.

    edits: how many are to be made, on which what a layer of experts holds depends
    Of several processes each asks at the same place; what has no room in one is on the CPU in all.
    Raises ConfigError for layers that the model has not, or that the method does not edit.
    """
    if not method.sums_move:
        return frozenset()
    layers: tuple[int, ...] = tuple(method.value("layers"))
    key = (method.name, layers)
    if key in bench.sums_on_host:
        return bench.sums_on_host[key]
    anatomy = bench.anatomy
    anatomy.check_layers(layers)
    method.check_experts(anatomy, layers)
    sizes = {layer: LayerSize.of(anatomy, layer) for layer in layers}
    devices = {layer: anatomy.device_of(layer) for layer in layers}
    places = {layer: str(device) for layer, device in devices.items()}
    free: dict[str, int] = {}

    def lacking() -> list[int]:
        for place, device in dict(zip(places.values(), devices.values(), strict=True)).items():
            if place != HOST and (room := free_on(device)) is not None:
                free[place] = room
        return sorted(without_room(method, sizes, places, edits, free))

    def anywhere() -> Iterable[int]:
        return (layer for part in here().gather("place of sums", lacking) for layer in part)

    away = moved(method, places, bench.sums_on, anywhere)
    bench.sums_on_host[key] = away
    if away and here().is_first:
        needed = held(method, sizes, places, edits)
        why = [
            f"{place} has {amount(free[place])} free, and {amount(sum(needed[place].values()))} would be held there"
            for place in dict.fromkeys(places[layer] for layer in sorted(away))
            if place in free and sum(needed[place].values()) > free[place]
        ]
        said = _said(method, {layer: sizes[layer] for layer in sorted(away)}, why)
        logger.info("%s", said)
        note(said, shown=bench.progress)
    return away


def device_of_sums(bench: Workbench, method: Method, layer: int) -> torch.device:
    """Of one of the method's layers."""
    return torch.device(HOST) if layer in on_host(bench, method) else bench.anatomy.device_of(layer)


def _said(method: Method, sizes: Mapping[int, LayerSize], why: list[str]) -> str:
    """That these layers' sums live on the CPU, why, and what it costs."""
    widest = max(sizes.values(), key=lambda size: size.d_in)
    speed = speed_of(widest.d_out, widest.d_in, torch.device(HOST), MEASURING)
    crossing = max(method.crossing(size) for size in sizes.values())
    update = sum(speed.of_update(size.d_out, size.d_in) for size in sizes.values())
    solve = sum(speed.of_solve(size.d_out, size.d_in) for size in sizes.values())
    of = " of each expert that is changed" if widest.experts > 1 else ""
    because = f", for {' and '.join(why)}" if why else ""
    return (
        f"{method.name}: the sums of layers {', '.join(map(str, sizes))} live on the CPU{because}; at each step "
        f"{amount(crossing)} a layer{of} cross to W's device, and in all layers together an update by a single edit "
        f"takes about {duration(update)} there, a solve {duration(solve)}"
    )
