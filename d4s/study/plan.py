"""What a sequence will take, before anything runs: bytes by place, passes through the model, and seconds.

Bytes that code decides come from that code's own arithmetic (`Method.holding`, `bytes_of_journal`, `bytes_of`), and are
told as they are. What depends on the texts is told as about so much, for edits of CounterFact's length; of these the
activations of a target's search are counted on a model without weights, by what its backward pass would keep.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from d4s.change.speed import Speed, seconds_a_call, speed_of
from d4s.errors import ConfigError
from d4s.locate.covariance import KEYS_A_DIMENSION
from d4s.locate.targets import batch_tokens_of, frozen
from d4s.methods import Method, sums_place
from d4s.methods.base import LayerSize, SumsOn
from d4s.methods.d4s import D4S
from d4s.methods.grace import GRACE
from d4s.methods.kn import KN
from d4s.methods.locate_then_edit import EDITS_AHEAD, TargetMethod
from d4s.models.architectures import Anatomy, text_config
from d4s.models.causal_lm import CausalLM
from d4s.models.forward import tokens_together
from d4s.models.trace import Trace, head_reads
from d4s.sequence.journaling import bytes_of_journal
from d4s.sequence.saving import bytes_of
from d4s.sequence.schedule import Schedule
from d4s.study.planned import (
    AFTER,
    DISK,
    EDITED,
    EVALUATIONS,
    LATER,
    MODEL,
    NEIGHBORS,
    PROMPT,
    SAVED,
    STATISTICS,
    TARGET,
    TESTS,
    VECTORS,
    Part,
    Pass,
    Plan,
    Rates,
)

MEASURING = 5.0  # seconds that a measurement takes, about


def plan(
    model: CausalLM,
    method: Method,
    edits: int,
    *,
    schedule: Schedule | None = None,
    keep_vectors: bool = True,
    saves: bool = True,
    statistics: bool = True,
    ranks: int = 1,
    sums_on: SumsOn = "auto",
    device: torch.device | str | None = None,
    measure: bool = False,
) -> Plan:
    """What `edit_sequence` of so many edits will take.

    model: also one on the meta device, without weights (`d4s.models.loading.skeleton`)
    saves: whether the edited model is written, as d4s edit does
    statistics: whether key statistics, where the method needs them, are still to be estimated
    ranks: how many devices share the edits' searches and evaluations, each with the whole model
    sums_on: as of `edit_sequence`; "auto": by what is free on the layers' devices now, the model not counted
    device: where a model without weights would be; None: cuda where there is one
    measure: take `MEASURING` seconds to measure this machine; not for a model without weights

    Raises ConfigError for a number of edits or ranks below 1, and for a measurement without weights.
    """
    for name, value in (("edits", edits), ("ranks", ranks)):
        if value < 1:
            raise ConfigError(f"{name}={value}, must be 1 or more")
    schedule = Schedule() if schedule is None else schedule
    anatomy = Anatomy(model)
    layers: tuple[int, ...] = tuple(method.value("layers"))
    anatomy.check_layers(layers)
    method.check_experts(anatomy, layers)
    sizes = {layer: LayerSize.of(anatomy, layer) for layer in layers}
    bare = any(p.is_meta for p in model.parameters())
    if bare and measure:
        raise ConfigError("nothing can be measured on a model without weights; --no-measure leaves it out")
    supposed = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    places = {i: _name(supposed if bare else anatomy.device_of(i)) for i in layers}
    of_model = _of_model(model, supposed if bare else None)
    taken = {part.place: part.bytes for part in of_model if bare}
    away = _on_host(method, sizes, places, edits, sums_on, taken)
    crossing: dict[str, int] = {}
    for layer in layers:
        if places[layer] != sums_place.HOST and method.sums_move:
            crossing[places[layer]] = max(crossing.get(places[layer], 0), method.crossing(sizes[layer]))
    parts = [
        *of_model,
        *_of_layers(method, sizes, places, edits, away),
        *_of_statistics(method, sizes),
        *_of_texts(anatomy, method, places[layers[-1]], edits, schedule),
        *_of_disk(model, method, sizes, edits, keep_vectors, saves),
    ]
    passes = _passes(anatomy, method, sizes, edits, schedule, statistics, ranks)
    rates = _measured(anatomy, method, sizes, bool(away)) if measure else None
    found = Plan(
        method.name,
        layers,
        edits,
        ranks,
        _joined(parts),
        tuple(passes),
        sizes,
        rates,
        sums_on_host=tuple(sorted(away)),
        crossing=crossing,
        later_passes=schedule.passes - 1,
    )
    return found if rates is None else _timed(found, method, rates, schedule)


def _name(device: torch.device) -> str:
    if device.type == "cuda" and device.index is None:
        return f"cuda:{torch.cuda.current_device() if torch.cuda.is_available() else 0}"
    return str(device)


def _joined(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Parts of one name and place together; without those that are nothing."""
    sums: dict[Part, int] = {}
    for p in parts:
        key = replace(p, bytes=0)
        sums[key] = sums.get(key, 0) + p.bytes
    return tuple(replace(key, bytes=total) for key, total in sums.items() if total)


def _of_model(model: CausalLM, supposed: torch.device | None) -> list[Part]:
    if supposed is not None:
        return [Part(_name(supposed), MODEL, bytes_of(model), loaded=True)]
    by_place: dict[str, dict[int, int]] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        by_place.setdefault(_name(tensor.device), {})[tensor.data_ptr()] = tensor.nbytes
    return [Part(place, MODEL, sum(found.values()), loaded=True) for place, found in by_place.items()]


def _on_host(
    method: Method,
    sizes: Mapping[int, LayerSize],
    places: Mapping[int, str],
    edits: int,
    sums_on: SumsOn,
    taken: Mapping[str, int],
) -> frozenset[int]:
    """Layers whose sums go to the CPU. taken: place → bytes of what is free now that the model will have"""

    def lacking() -> frozenset[int]:
        now = free_bytes(tuple(places.values()))
        free = {place: room - taken.get(place, 0) for place, room in now.items()}
        return sums_place.without_room(method, sizes, places, edits, free)

    return sums_place.moved(method, places, sums_on, lacking)


def _of_layers(
    method: Method,
    sizes: Mapping[int, LayerSize],
    places: Mapping[int, str],
    edits: int,
    away: Collection[int],
) -> list[Part]:
    """W0, the copy that a step can go back to, and what the method's editor holds."""
    fixed = (sums_place.COPIES, sums_place.CROSSING)
    return [
        Part(place, name, count, can_move=method.sums_move and place != sums_place.HOST and name not in fixed)
        for place, parts in sums_place.held(method, sizes, places, edits, away).items()
        for name, count in parts.items()
    ]


def _of_statistics(method: Method, sizes: Mapping[int, LayerSize]) -> list[Part]:
    """Σ k kᵀ as a file of key statistics is read, on the host."""
    if "covariance" not in method.needs:
        return []
    return [Part("cpu", "key statistics as read", sum(4 * s.experts * s.d_in**2 for s in sizes.values()))]


def _of_texts(anatomy: Anatomy, method: Method, place: str, edits: int, schedule: Schedule) -> list[Part]:
    """Activations of a target's search and of an evaluation, and targets that are kept: about."""
    parts = []
    config = text_config(anatomy.model)
    width = anatomy.width
    size = next(anatomy.model.parameters()).element_size()
    device = torch.device(place)
    if isinstance(method, TargetMethod):
        together = min(edits, EDITS_AHEAD if method.searches_ahead else schedule.batch_size)
        tokens = min(together * (method.rows_an_edit * AFTER + 1), batch_tokens_of(device))
        reads = tokens * TARGET // AFTER + 1
        logits = (
            reads * config.vocab_size * (size + 3 * 4)
        )  # as they are, log p, and both in the backward pass
        kept = tokens * _kept_a_token(anatomy, method.layers[-1])
        parts.append(Part(place, "activations of a target's search", kept + logits, certain=False))
        if method.searches_ahead:
            parts.append(Part("cpu", "kept targets", edits * (2 * width + 2) * 4))
    tokens = min(tokens_together(device), edits * (EDITED + NEIGHBORS) * (PROMPT + 2 * TARGET))
    heads: Any = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", 1)
    head: Any = getattr(config, "head_dim", None) or width // getattr(config, "num_attention_heads", 1)
    cache = 2 * len(anatomy) * heads * head * size
    logits = 2 * TARGET * config.vocab_size * (size + 4) // (PROMPT + 2 * TARGET)
    parts.append(Part(place, "an evaluation", tokens * (cache + logits + 8 * width * size), certain=False))
    return parts


def _kept_a_token(anatomy: Anatomy, layer: int) -> int:
    """Bytes that the backward pass to δ at a block keeps of each token.

    Counted by a forward pass of the model as it would be without weights, where nothing is computed; by widths where
    a model cannot be run like that.
    """
    import copy

    size = next(anatomy.model.parameters()).element_size()
    above = len(anatomy) - 1 - layer
    config = text_config(anatomy.model)
    wide = getattr(config, "intermediate_size", None) or 4 * anatomy.width
    by_width = above * size * (16 * anatomy.width + 4 * wide)
    if anatomy.has_experts:
        return by_width
    rows, length = 4, PROMPT + AFTER
    held: dict[int, Tensor] = {}
    try:
        with torch.device("meta"):
            twin = type(anatomy.model)._from_config(copy.deepcopy(anatomy.model.config))  # type: ignore[attr-defined]
        twin = twin.to(next(anatomy.model.parameters()).dtype).eval()
        other = Anatomy(twin, anatomy.architecture)
        own = {id(p) for p in twin.parameters()}

        def keep(tensor: Tensor) -> Tensor:
            if id(tensor) not in own and id(tensor._base) not in own:
                held[id(tensor)] = tensor
            return tensor

        ids = torch.zeros(rows, length, dtype=torch.long, device="meta")
        mask = torch.zeros(rows, 1, length, length, dtype=torch.float32, device="meta")
        delta = torch.zeros(rows, 1, anatomy.width, device="meta", requires_grad=True)
        nothing = torch.zeros(1, dtype=torch.long, device="meta")

        def plus(output: Tensor) -> Tensor:
            return output + delta.to(output.dtype)

        with (
            frozen(twin),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            Trace(other.blocks[layer], edit=plus),
            head_reads(twin, nothing, nothing),
        ):
            twin(input_ids=ids, attention_mask=mask, use_cache=False)
    except Exception:  # whatever a model's own code raises where there are no numbers
        return by_width
    return sum(tensor.nbytes for tensor in held.values()) // (rows * length) or by_width


def _of_disk(
    model: CausalLM,
    method: Method,
    sizes: Mapping[int, LayerSize],
    edits: int,
    keep_vectors: bool,
    saves: bool,
) -> list[Part]:
    """What `d4s edit` writes: the model, what changed in it until then, and the journal."""
    base = sum(size.weight for size in sizes.values())
    parts = []
    if saves:
        parts.append(Part(DISK, SAVED, bytes_of(model)))
        parts.append(Part(DISK, "changed weights, until it is saved", base))
    state = sum(method.holding(size, edits).state for size in sizes.values())
    dense = [(size.d_out, size.d_in) for size in sizes.values()]
    sums = dense if method.keeps_sums and all(size.experts == 1 for size in sizes.values()) else []
    with_vectors, without = (
        bytes_of_journal(base, state, edits, sums, keys=method.keys_an_edit, keep_vectors=kept)
        for kept in (True, False)
    )
    parts.append(Part(DISK, "journal", without))
    if keep_vectors:
        parts.append(Part(DISK, VECTORS, with_vectors - without))
    return parts


def _passes(
    anatomy: Anatomy,
    method: Method,
    sizes: Mapping[int, LayerSize],
    edits: int,
    schedule: Schedule,
    statistics: bool,
    ranks: int,
) -> list[Pass]:
    blocks, layers = len(anatomy), list(sizes)
    below, above = (layers[-1] + 1) / blocks, (blocks - 1 - layers[-1]) / blocks
    passes = []
    if statistics and "covariance" in method.needs:
        wanted = max(KEYS_A_DIMENSION * s.d_in * s.experts // s.routed for s in sizes.values())
        passes.append(Pass(STATISTICS, math.ceil(wanted / 128), wanted, below))
    mine = math.ceil(edits / ranks)
    if isinstance(method, TargetMethod):
        rows, looks = mine * (method.rows_an_edit + 1), method.target.steps
        context = sum(method.context_lengths) / max(1, len(method.context_lengths)) if method.contexts else 0
        length = int(PROMPT + context)
        passes.append(Pass("text before the subject's end", rows, rows * (PROMPT - AFTER // 2), 1.0))
        tokens = mine * (method.rows_an_edit * AFTER + 1) * looks
        passes.append(Pass("targets", rows * looks, tokens, 2 * above))
        of_keys = edits * method.rows_an_edit
        # With a key of each context its row goes on to where its residual is measured.
        each = isinstance(method, D4S) and method.context_keys == "each"
        beside = isinstance(method, D4S) and method.prompt_weight != 0
        # A step's passes begin at the layer that it asked for before (d4s/locate/ascent.py).
        for begin, layer in zip([0, *layers[:-1]], layers, strict=True):
            to_layer, to_last = ((end + 1 - begin) / blocks for end in (layer, layers[-1]))
            passes.append(Pass("keys", of_keys, of_keys * length, to_last if each else to_layer))
            if beside:
                passes.append(Pass("keys", edits, edits * PROMPT, to_layer))
            if not each:
                passes.append(Pass("residuals", edits, edits * PROMPT, to_last))
    elif isinstance(method, KN):
        rows = edits * EDITED * len(layers) * (method.steps + 1)
        passes.append(Pass("neurons", rows, rows + edits * EDITED * len(layers) * PROMPT, 2.0))
    else:
        rows = edits * int(method.value("steps") or 1)
        share = 2 * above if isinstance(method, GRACE) else 2.0
        passes.append(Pass("training", rows, rows * (PROMPT + TARGET), share))
    asked, length = EDITED + NEIGHBORS, PROMPT + 2 * TARGET
    made = sum(_points(edits, schedule)) + 2 * edits  # the baseline, and the unedited model's figures
    rows = math.ceil(made * asked / ranks)
    passes.append(Pass(EVALUATIONS, rows, rows * length, 1.0))
    if schedule.original:
        rows = mine * EDITED
        passes.append(Pass(TESTS, rows, rows * length, 1.0))
    if schedule.passes > 1:
        rows = mine * (schedule.passes - 1)
        passes.append(Pass(LATER, rows, rows * (PROMPT + TARGET), 1.0))
    joined: dict[str, Pass] = {}
    for one in passes:  # keys of several layers are one line
        if (known := joined.get(one.name)) is None:
            joined[one.name] = one
        else:
            tokens = known.tokens + one.tokens
            share = (known.share * known.tokens + one.share * one.tokens) / tokens
            joined[one.name] = Pass(one.name, known.rows + one.rows, tokens, share)
    return list(joined.values())


def _points(edits: int, schedule: Schedule) -> list[int]:
    """The edits made at each evaluation after the first."""
    steps = list(range(schedule.batch_size, edits, schedule.batch_size))
    due = [made for made in steps if schedule.is_due(made - schedule.batch_size, made)]
    return [*due, edits]


def _measured(anatomy: Anatomy, method: Method, sizes: Mapping[int, LayerSize], sums_on_host: bool) -> Rates:
    model, device = anatomy.model, anatomy.device
    last = method.value("layers")[-1]
    rows, length = 16, PROMPT + 2 * TARGET
    vocabulary = text_config(model).vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (rows, length), generator=generator).to(device)
    reads = torch.arange(rows), torch.full((rows,), length - 1)
    share = MEASURING / 4

    def forward() -> None:
        with torch.no_grad(), head_reads(model, *reads):
            model(input_ids=ids, use_cache=False)

    def search() -> None:
        delta = torch.zeros(rows, 1, anatomy.width, device=anatomy.device_of(last), requires_grad=True)
        with frozen(model), Trace(_changed_module(anatomy, last), edit=lambda o: o + delta.to(o.dtype)):
            with head_reads(model, *reads):
                logits = model(input_ids=ids, use_cache=False).logits
            logits.float().logsumexp(-1).sum().backward()

    training = model.training
    model.eval()
    try:
        seconds = seconds_a_call(forward, share, device) / ids.numel()
        # The blocks up to δ run once a search, not at each look.
        both = seconds_a_call(search, share, device) / ids.numel() - seconds * (last + 1) / len(anatomy)
    finally:
        model.train(training)
    size = max(sizes.values(), key=lambda one: one.d_in)
    closed = speed_of(size.d_out, size.d_in, torch.device(sums_place.HOST) if sums_on_host else device, share)
    return Rates(seconds, max(both, seconds * 0.01), closed.update, closed.solve)


def _changed_module(anatomy: Anatomy, layer: int) -> nn.Module:
    return anatomy.blocks[layer]


def _timed(found: Plan, method: Method, rates: Rates, schedule: Schedule) -> Plan:
    """With seconds by the rates."""

    def seconds(one: Pass) -> float:
        if one.name == "targets":
            return one.tokens * rates.search
        return one.tokens * one.share * rates.forward

    passes = tuple(replace(one, seconds=seconds(one)) for one in found.passes)
    solving = 0.0
    steps = math.ceil(found.edits / schedule.batch_size)
    if isinstance(method, TargetMethod):
        speed = Speed(rates.update, rates.solve)
        for size in found.sizes.values():
            an_edit, whole = (of(size.d_out, size.d_in) for of in (speed.of_update, speed.of_solve))
            solving += min(found.edits * an_edit, steps * whole)
    return replace(found, passes=passes, solving=solving)


def free_bytes(places: Sequence[str], out: str | os.PathLike[str] | None = None) -> dict[str, int]:
    """Free memory of devices and of the host, as the system tells it; of `out`'s disk under "disk"."""
    import shutil

    found: dict[str, int] = {}
    for place in places:
        if place == DISK:
            if out is not None:
                found[place] = shutil.disk_usage(out).free
        elif place == sums_place.HOST:
            if (free := _host_bytes()) is not None:
                found[place] = free
        elif (free := sums_place.free_on(torch.device(place))) is not None:
            found[place] = free
    return found


def _host_bytes() -> int | None:
    """Memory that can be had without swapping; None where the system does not say.

    Free pages leave out those that only cache files, and would refuse what fits: Linux tells both together.
    """
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
