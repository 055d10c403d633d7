"""Key statistics: the uncentred second moment C = E[k kᵀ] of every edited layer, in one pass over a corpus."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d4s import ops
from d4s.edits import Edit
from d4s.errors import ConfigError, CovarianceError, DataError, EditError, ModelError
from d4s.files import check_regular
from d4s.locate.keys import subject_rows
from d4s.models.architectures import Anatomy, Architecture, text_config
from d4s.models.causal_lm import CausalLM, plain_name
from d4s.models.forward import evaluating, most_positions
from d4s.models.prompts import pad_id, padded, sample, start_ids, text_ids, tokenizer_fingerprint
from d4s.models.readiness import check_askable
from d4s.models.trace import Trace, stopping
from d4s.progress import progress_bar
from d4s.ranks import here, split
from d4s.tensor_files import load_tensors, save_tensors

logger = logging.getLogger("d4s.locate.covariance")

KEYS_A_DIMENSION = 10  # key vectors per d_in: within .3 % of the full statistics (arXiv 2506.04226)
LONGEST_TEXT = 128  # tokens, the tokenizer's start token among them; longer texts are cut into pieces
FORMAT = "d4s-covariance-2"


class Covariance:
    """Sums of k kᵀ a layer and their counts, so that two statistics of one model add up.

    moments: layer -> [d_in, d_in] symmetric, float32 | float64; of a layer with experts [experts, d_in, d_in], the
        sums of g² k kᵀ over the tokens that are routed to each
    count: key vectors behind each sum
    routed: layer with experts -> how many of these were routed to each, [experts] int64
    fingerprint: of the model's weights, in float32 or bfloat16; "" matches every model
    """

    def __init__(
        self,
        moments: Mapping[int, Tensor],
        count: int,
        *,
        routed: Mapping[int, Tensor] | None = None,
        fingerprint: str = "",
        corpus: str = "",
    ) -> None:
        routed = dict(routed or {})
        for layer, moment in moments.items():
            if layer in routed:
                _check_routed(layer, moment, routed[layer], count)
                for expert, one in enumerate(moment):
                    _check_moment(f"layer {layer}, expert {expert}", one)
            else:
                _check_moment(f"layer {layer}", moment)
        if count < 1:
            raise CovarianceError("key statistics of no key vector; the corpus has no text")
        if lost := set(routed) - set(moments):
            raise CovarianceError(
                f"layer {min(lost)}: tokens are counted for experts that have no statistics; estimate them again"
            )
        self.moments, self.count, self.routed = dict(moments), count, routed
        self.fingerprint, self.corpus = fingerprint, corpus

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted(self.moments))

    def digest(self, layers: Sequence[int]) -> str:
        """Hex digest of the statistics of these layers, whatever else is held."""
        found = hashlib.sha256(f"{self.count}".encode())
        for layer in layers:
            if layer in self.routed:
                found.update(f"experts {self.routed[layer].tolist()}".encode())
                held = self.moments[layer]
            else:
                held = self.mean(layer)
            found.update(held.cpu().contiguous().numpy().data)
        return found.hexdigest()

    def mean(self, layer: int) -> Tensor:
        """C of a layer, [d_in, d_in] float64, on the statistics' device.

        CovarianceError if it is not held, or one an expert is (`of_experts`).
        """
        if layer in self.routed:
            raise CovarianceError(
                f"layer {layer}: the key statistics are those of {len(self.routed[layer])} experts; ask for one of them"
            )
        return self._held(layer).double() / self.count

    def of_experts(self, layer: int) -> tuple[Tensor, Tensor]:
        """Σ g² k kᵀ of each expert, [experts, d_in, d_in] as held, and its tokens, [experts] int64.

        CovarianceError if the layer is not held, or has no experts.
        """
        moments = self._held(layer)
        if layer not in self.routed:
            raise CovarianceError(
                f"layer {layer}: the key statistics are those of one matrix, not of experts; ask for the matrix"
            )
        return moments, self.routed[layer]

    def _held(self, layer: int) -> Tensor:
        if layer not in self.moments:
            raise CovarianceError(
                f"no key statistics of layer {layer}; held are those of {list(self.layers)}; "
                f"estimate again with layers including {layer}"
            )
        return self.moments[layer]

    def check(self, anatomy: Anatomy, layers: Sequence[int]) -> None:
        """CovarianceError unless these are statistics of this model, of all the layers, of the right size."""
        for layer in layers:
            wanted, found = anatomy.shape(layer)[1], self._held(layer).shape[-1]
            experts = anatomy.experts(layer)
            has = "one matrix" if experts is None else f"{experts.count} experts"
            hold = f"{len(self.routed[layer])} experts" if layer in self.routed else "one matrix"
            if has != hold:
                raise CovarianceError(
                    f"layer {layer}: the key statistics are those of {hold}, the model has {has} there; they belong to "
                    "another model"
                )
            if wanted != found:
                raise CovarianceError(
                    f"layer {layer}: the key statistics are {found} × {found}, the model's keys have {wanted} "
                    "dimensions; they belong to another model"
                )
        if self.fingerprint and self.fingerprint != (mine := fingerprint_of(anatomy.model, exact=False)):
            raise CovarianceError(
                f"the key statistics were taken on another model (weights {self.fingerprint[:12]}, "
                f"this one {mine[:12]}), or on this one before it was changed; estimate them on the unedited model"
            )

    def merge(self, other: Covariance) -> Covariance:
        """Statistics over both corpora. CovarianceError, naming what differs, unless they are of one model's layers."""
        self._check_alike(other)
        return Covariance(
            {layer: self.moments[layer] + other.moments[layer] for layer in self.layers},
            self.count + other.count,
            routed={layer: counts + other.routed[layer] for layer, counts in self.routed.items()},
            fingerprint=self.fingerprint,
            corpus=f"{self.corpus}+{other.corpus}",
        )

    def mixed(self, other: Covariance, share: float) -> Covariance:
        """(1 − share) C + share · C of the other, however many keys either is of. 0 ≤ share ≤ 1

        Raises ConfigError for another share; CovarianceError as `merge`, and for layers with experts, whose counts are
        of tokens.
        """
        if not 0 <= share <= 1:
            raise ConfigError(f"share={share!r}, must be from 0 to 1")
        self._check_alike(other)
        if self.routed:
            raise CovarianceError(
                f"layers {sorted(self.routed)} are mixtures of experts, whose statistics count tokens and cannot be "
                "weighed; leave out the facts to be retained"
            )
        # Keys that weigh nothing are not among those behind the sums.
        count = (self.count if share < 1 else 0) + (other.count if share > 0 else 0)
        own, others = (1 - share) * count / self.count, share * count / other.count
        return Covariance(
            {layer: own * moment + others * other.moments[layer] for layer, moment in self.moments.items()},
            count,
            fingerprint=self.fingerprint,
            corpus=f"{self.corpus}+{share:g}·{other.corpus}",
        )

    def _check_alike(self, other: Covariance) -> None:
        said = {
            "layers": lambda one: list(one.layers),
            "layers with experts": lambda one: sorted(one.routed),
            "shapes": lambda one: {layer: list(one.moments[layer].shape) for layer in one.layers},
            "model": lambda one: (
                f"weights {one.fingerprint[:12]}" if one.fingerprint else "of unknown weights"
            ),
        }
        for name, of in said.items():
            if of(self) != of(other):
                raise CovarianceError(
                    "statistics that are to add up must be of the same layers of the same model: "
                    f"{name} {of(self)} and {of(other)}"
                )

    def save(self, path: str | os.PathLike[str]) -> None:
        """One safetensors file, written beside its place and then renamed."""
        facts = {
            "format": FORMAT,
            "count": str(self.count),
            "fingerprint": self.fingerprint,
            "corpus": self.corpus,
        }
        # A layer with experts is under names of its own, which earlier versions refuse.
        tensors = {
            f"layer.{layer}" + (".experts" if layer in self.routed else ""): moment
            for layer, moment in self.moments.items()
        }
        tensors |= {f"layer.{layer}.routed": counts for layer, counts in self.routed.items()}
        save_tensors(path, tensors, facts)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Covariance:
        """Raises CovarianceError for a file that is not one that `save` wrote, or damaged."""
        file = load_tensors(path, FORMAT, "d4s covariance", CovarianceError)
        try:
            parts: dict[str, dict[int, Tensor]] = {"": {}, "experts": {}, "routed": {}}
            for name, tensor in file.tensors.items():
                layer, _, part = name.removeprefix("layer.").partition(".")
                parts[part][int(layer)] = tensor
            if parts["experts"].keys() != parts["routed"].keys():
                raise ValueError("sums of experts without counts of their tokens, or the reverse")
            found = Covariance(
                parts[""] | parts["experts"],
                int(file.facts["count"]),
                routed=parts["routed"],
                fingerprint=file.facts["fingerprint"],
                corpus=file.facts["corpus"],
            )
        except (KeyError, ValueError) as error:  # CovarianceError among them
            raise CovarianceError(
                f"{path}: not what Covariance.save wrote ({error}); get the file again, or estimate anew"
            ) from None
        file.check_intact(CovarianceError)
        return found


def _check_moment(name: str, moment: Tensor) -> None:
    """Raises CovarianceError unless it can be a sum of k kᵀ."""
    if moment.ndim != 2 or moment.shape[0] != moment.shape[1]:
        raise CovarianceError(f"{name}: moment is {list(moment.shape)}, must be square [d_in, d_in]")
    if moment.dtype not in (torch.float32, torch.float64):
        raise CovarianceError(f"{name}: moment is {moment.dtype}, must be float32 or float64")
    if not torch.isfinite(moment).all():
        raise CovarianceError(f"{name}: the key statistics hold NaN or infinity; estimate them again")
    largest = float(moment.diagonal().abs().max()) if len(moment) else 0.0
    if len(moment) and float(moment.diagonal().min()) < 0:
        raise CovarianceError(
            f"{name}: a sum of squares in the key statistics is negative; estimate them again"
        )
    if float((moment - moment.T).abs().max() if len(moment) else 0) > 1e-5 * largest:
        raise CovarianceError(f"{name}: the key statistics are not symmetric; estimate them again")


def _check_routed(layer: int, moment: Tensor, routed: Tensor, count: int) -> None:
    """Raises CovarianceError unless these can be counts of the tokens behind each expert's sum."""
    if moment.ndim != 3 or routed.dtype != torch.int64 or tuple(routed.shape) != (len(moment),):
        raise CovarianceError(
            f"layer {layer}: moments are {list(moment.shape)} and counts {list(routed.shape)} {routed.dtype}; must be "
            "[experts, d_in, d_in] and [experts] torch.int64"
        )
    if int(routed.min()) < 0 or int(routed.max()) > count:
        raise CovarianceError(
            f"layer {layer}: an expert's tokens are none of the {count} that were read; estimate the statistics again"
        )


def fingerprint_of(model: CausalLM, *, exact: bool = True) -> str:
    """Hex digest of the parameters' names, shapes, a few hundred values and the sums of all: one read.

    exact: of types and values as they are. Otherwise of the values rounded to bfloat16, so that a model has the same
        one in float32 and in bfloat16; its float16 weights, rounded otherwise, have one of their own.

    The sums are of 64 bits at a time as whole numbers: exact in any order, so the same on every device; compiled or
    not makes no difference.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        if not exact and flat.is_floating_point():
            flat = flat.to(torch.bfloat16)
        some = flat[:: max(1, flat.numel() // 256)][:256].double().tolist()
        rest = flat.numel() % (8 // flat.element_size())
        if flat.storage_offset() * flat.element_size() % 8:
            flat = flat.clone()
        total = int(flat[: flat.numel() - rest].view(torch.int64).sum())
        some += flat[flat.numel() - rest :].double().tolist()
        digest.update(f"{plain_name(name)} {tuple(parameter.shape)} {flat.dtype} {total} {some}".encode())
    return digest.hexdigest()


def _texts_of(corpus: str | os.PathLike[str] | Iterable[str]) -> Iterator[str]:
    """Non-blank lines of a text file, or the texts themselves."""
    if not isinstance(corpus, (str, os.PathLike)):
        for number, text in enumerate(corpus, 1):
            if not isinstance(text, str):
                raise DataError(f"text {number} of the corpus is a {type(text).__name__}, must be a string")
            if text.strip():
                yield text
        return
    try:
        check_regular(corpus, "texts")
        with open(corpus, encoding="utf-8") as file:
            yield from (line.strip() for line in file if line.strip())
    except FileNotFoundError:
        raise DataError(f"{os.fspath(corpus)}: there is no such file; name one that is there") from None
    except OSError as error:
        raise DataError(
            f"{os.fspath(corpus)}: cannot be read ({error.strerror or error}); name a file that can"
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{os.fspath(corpus)}: cannot be read as UTF-8 text ({error}); save it as UTF-8"
        ) from None


def _longest(model: CausalLM) -> int:
    """Tokens a piece of text: what the model has positions for, at most LONGEST_TEXT."""
    return min(LONGEST_TEXT, most_positions(model) or LONGEST_TEXT)


@torch.no_grad()
def _sampled_ids(model: CausalLM, tokenizer: Any, tokens: int, seed: int) -> Iterator[list[int]]:
    """Texts that the model itself says, from its start token on, at temperature 1."""
    device = next(model.parameters()).device
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else pad_id(tokenizer)
    made = 0
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        while made < tokens:
            begin = torch.full((64, 1), start, device=device)
            rows = sample(model, tokenizer, begin, max_new_tokens=_longest(model) - 1).tolist()
            for row in rows:
                # After the first end token there is padding only.
                ends = [
                    i for i, t in enumerate(row[1:], 1) if t in (tokenizer.eos_token_id, pad_id(tokenizer))
                ]
                kept = row[: ends[0]] if ends else row
                if len(kept) > 1:
                    made += len(kept)
                    yield kept
            if made == 0:
                raise CovarianceError(
                    "the model samples no text from its start token; pass a corpus of texts"
                )


def estimate_covariance(
    model: CausalLM,
    tokenizer: Any,
    corpus: str | os.PathLike[str] | Iterable[str] | None = None,
    *,
    layers: Sequence[int] | None = None,
    tokens: int | None = None,
    dtype: torch.dtype = torch.float32,
    batch_tokens: int = 4_096,
    architecture: Architecture | None = None,
    seed: int = 0,
    progress: bool = True,
    on_batch: Callable[[int], None] | None = None,
) -> Covariance:
    """C of the layers in one pass that ends after the last of them.

    corpus: a UTF-8 text file, one text a line; or texts; or None: texts sampled from the model itself.
    layers: which blocks; None: all.
    tokens: key vectors to take; None: 10 · d_in (arXiv 2506.04226), and as many more as a layer has experts for each
        that a token is routed to, so that the average expert sees as many
    dtype: of the sums, float32 | float64; one [d_in, d_in] a layer in memory.
    on_batch: called with the number of key vectors after each batch.

    Of several processes (`d4s.ranks`) the first reads the corpus, each takes its part of the batches, and the sums are
    added in float64; `on_batch` is told of the process's own.

    Every token of a text counts, padding does not. Texts longer than 128 tokens are cut into pieces, each of which
    starts as the tokenizer starts a text: a model's first positions are like no others, and what stands there without
    the start token is no key that it ever sees.
    """
    if dtype not in (torch.float32, torch.float64):
        raise CovarianceError(f"dtype={dtype}: sums must be float32 or float64, never half precision")
    anatomy = Anatomy(model, architecture)
    chosen = tuple(sorted(set(layers))) if layers is not None else tuple(range(len(anatomy)))
    anatomy.check_layers(chosen)
    if tokens is not None and tokens < 1:
        raise CovarianceError(f"tokens={tokens}, must be 1 or more, or None for 10 · d_in")
    ranks = here()
    wanted = tokens if tokens is not None else max(_enough(anatomy, i) for i in chosen)
    check_askable(model, tokenizer)
    device, longest = anatomy.device, _longest(model)  # where ids go in
    known = getattr(model.get_input_embeddings(), "num_embeddings", 1 << 62)

    def pieces() -> Iterator[list[int]]:
        if corpus is None:
            yield from _sampled_ids(model, tokenizer, wanted, seed)
            return
        start = start_ids(tokenizer)
        for text in _texts_of(corpus):
            (ids,) = text_ids(tokenizer, (text,), are_cut=True)
            if max(ids, default=0) >= known:
                raise ModelError(
                    f"the corpus has the token {tokenizer.convert_ids_to_tokens(max(ids))!r} (id {max(ids)}), and the "
                    f"model's embeddings end at {known - 1}; take the tokenizer the model was trained with"
                )
            body = ids[len(start) :]
            step = max(1, longest - len(start))
            for at in range(0, len(body), step):
                yield start + body[at : at + step]

    def read() -> list[list[int]]:
        rows: list[list[int]] = []
        left = wanted
        for ids in pieces():
            rows.append(list(ids[:left]))
            left -= len(rows[-1])
            if left == 0:
                break
        return rows

    moments, routed = _none_yet(anatomy, chosen, dtype)
    with evaluating(model):
        rows = ranks.from_first(read)
        total, digest = sum(map(len, rows)), hashlib.sha256("".join(map(repr, rows)).encode())
        batches = _batches(rows, batch_tokens)
        own = split([len(batch) * len(batch[-1]) for batch in batches], ranks.count)[ranks.rank]
        mine = sum(len(row) for i in own for row in batches[i])

        def add() -> None:
            with progress_bar(mine, "key", "key covariance", shown=progress, unit_scale=True) as bar:
                for i in own:
                    ranks.look()
                    batch, mask = (t.to(device) for t in padded(batches[i], pad_id(tokenizer)))
                    counted = _add_batch(anatomy, moments, routed, batch, mask)
                    bar.update(counted)
                    if i == own[0]:
                        _check_finite(moments, next(model.parameters()).dtype)
                    if on_batch is not None:
                        on_batch(counted)

        ranks.gather("key covariance", add)
    if ranks.count > 1:
        for moment in moments.values():
            moment.copy_(ranks.sum_(moment.double()))
        for counts in routed.values():
            counts.copy_(ranks.sum_(counts.double()))
    return _covariance(model, moments, routed, total, digest)


def covariance_at_subjects(
    model: CausalLM,
    tokenizer: Any,
    facts: Sequence[Edit],
    *,
    layers: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    batch_tokens: int = 4_096,
    architecture: Architecture | None = None,
) -> Covariance:
    """C over the keys at the subject's last token of facts' prompts: where edits write, and where what they disturb is
    read. A key a fact; what a fact is to become does not count.

    `Covariance.mixed` puts it beside the statistics of a corpus, so that the closed form is told which facts stay.
    Arguments as of `estimate_covariance`. Raises EditError where there is no fact.
    """
    if not facts:
        raise EditError("no facts are given; name some that are to stay")
    anatomy = Anatomy(model, architecture)
    chosen = tuple(sorted(set(layers))) if layers is not None else tuple(range(len(anatomy)))
    anatomy.check_layers(chosen)
    check_askable(model, tokenizer)
    rows = [list(ids) for ids in subject_rows(tokenizer, facts).ids]
    moments, routed = _none_yet(anatomy, chosen, dtype)
    with evaluating(model):
        for batch in _batches(rows, batch_tokens):
            ids, mask = (t.to(anatomy.device) for t in padded(batch, pad_id(tokenizer)))
            last = torch.zeros_like(mask)
            last[torch.arange(len(batch)), [len(row) - 1 for row in batch]] = 1
            _add_batch(anatomy, moments, routed, ids, mask, last)
        _check_finite(moments, next(model.parameters()).dtype)
    return _covariance(model, moments, routed, len(rows), hashlib.sha256("".join(map(repr, rows)).encode()))


def _none_yet(
    anatomy: Anatomy, layers: Sequence[int], dtype: torch.dtype
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """(Σ k kᵀ, tokens of each expert) of no key, by layer."""
    moments = {
        i: torch.zeros(
            *_stacked(anatomy, i), *[anatomy.shape(i)[1]] * 2, dtype=dtype, device=anatomy.device_of(i)
        )
        for i in layers
    }
    routed = {i: torch.zeros(stack, dtype=torch.int64) for i in layers if (stack := _stacked(anatomy, i))}
    return moments, routed


def _covariance(
    model: CausalLM, moments: dict[int, Tensor], routed: dict[int, Tensor], count: int, digest: Any
) -> Covariance:
    for layer, moment in moments.items():
        for one in moment if layer in routed else (moment,):
            ops.symmetrize_(one)
    return Covariance(
        moments,
        count,
        routed=routed,
        fingerprint=fingerprint_of(model, exact=False),
        corpus=digest.hexdigest(),
    )


def _batches(rows: list[list[int]], batch_tokens: int) -> list[list[list[int]]]:
    """Rows that go through the model together, of similar length: little padding."""
    rows = sorted(rows, key=len)
    found, at = [], 0
    while at < len(rows):
        stop = at + 1
        while stop < len(rows) and (stop + 1 - at) * len(rows[stop]) <= batch_tokens:
            stop += 1
        found.append(rows[at:stop])
        at = stop
    return found


def _stacked(anatomy: Anatomy, layer: int) -> tuple[int, ...]:
    """(experts,) of a layer that has any."""
    experts = anatomy.experts(layer)
    return () if experts is None else (experts.count,)


def _enough(anatomy: Anatomy, layer: int) -> int:
    """Tokens for the statistics of a layer."""
    wanted = KEYS_A_DIMENSION * anatomy.shape(layer)[1]
    experts = anatomy.experts(layer)
    if experts is None:
        return wanted
    each = getattr(text_config(anatomy.model), "num_experts_per_tok", None) or 1
    return -(-wanted * experts.count // each)


def _check_finite(moments: Mapping[int, Tensor], dtype: torch.dtype) -> None:
    for layer, moment in moments.items():
        if not torch.isfinite(moment.diagonal(dim1=-2, dim2=-1)).all():
            half = dtype == torch.float16
            cure = (
                "float16 ends at 65504: load it in bfloat16 or float32"
                if half
                else "load it from intact files"
            )
            raise CovarianceError(f"layer {layer}: the model's keys are NaN or infinite; {cure}")


@torch.no_grad()
def _add_batch(
    anatomy: Anatomy,
    moments: Mapping[int, Tensor],
    routed: Mapping[int, Tensor],
    ids: Tensor,
    mask: Tensor,
    counted: Tensor | None = None,
) -> int:
    """counted: 1 at the tokens whose keys are taken [rows, positions]; None: at all that `mask` has"""
    layers = list(moments)
    counted = mask if counted is None else counted
    # Rows of one length, of which most batches are, need no gathering in any layer.
    keep = None if bool(counted.all()) else counted.bool()
    with ExitStack() as stack:
        stack.enter_context(stopping())
        traces = {}
        for i in layers:
            experts = anatomy.experts(i)
            module = anatomy.projection(i) if experts is None else experts.module
            traces[i] = stack.enter_context(Trace(module, stop=i == layers[-1]))
        anatomy.model(input_ids=ids, attention_mask=mask, use_cache=False)
    for layer, trace in traces.items():
        if (experts := anatomy.experts(layer)) is not None:
            for expert, tokens, keys in experts.parts(trace):
                here = None if keep is None else keep.flatten().to(tokens.device)[tokens]
                added = ops.accumulate_key_covariance_(moments[layer][expert], keys, here)
                routed[layer][expert] += added
            continue
        keys = trace.input.view(ids.shape[0], ids.shape[1], -1)
        here = None if keep is None else keep.to(keys.device)
        ops.accumulate_key_covariance_(moments[layer], keys, here)
    return int(counted.sum())


def cached_covariance(
    model: CausalLM,
    tokenizer: Any,
    layers: Sequence[int],
    *,
    architecture: Architecture | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Covariance:
    """Statistics over text sampled from the model itself, kept in the user's cache folder for the next time.

    The folder is $D4S_CACHE, else $XDG_CACHE_HOME/d4s, else ~/.cache/d4s; a file is named after all that decides what
    is in it: the model's fingerprint, where its keys are read, the tokenizer, the layers and the seed.
    """
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    root = os.environ.get("D4S_CACHE") or os.path.join(caches, "d4s")
    weights = fingerprint_of(model, exact=False)
    ranks = here()
    places = json.dumps(asdict(Anatomy(model, architecture).architecture), sort_keys=True, default=str)
    words = f"{tokenizer_fingerprint(tokenizer)} {tokenizer.bos_token_id} {tokenizer.eos_token_id}"
    identity = f"{FORMAT} {weights} {places} {words} {sorted(layers)} {seed} {KEYS_A_DIMENSION} {LONGEST_TEXT} float32"
    path = Path(root) / f"covariance-{hashlib.sha256(identity.encode()).hexdigest()[:24]}.safetensors"
    homeless = root.startswith("~")  # what expanduser leaves where nobody's home is known

    def kept() -> Covariance | None:
        if not homeless and path.exists():
            try:
                return Covariance.load(path)
            except CovarianceError as error:
                logger.warning("%s; it is made again", error)
        return None

    if (known := ranks.from_first(kept)) is not None:
        return known
    found = estimate_covariance(
        model, tokenizer, None, layers=layers, architecture=architecture, seed=seed, progress=progress
    )
    if not ranks.is_first:
        return found
    if homeless:
        logger.warning(
            "there is no home folder: the key statistics are not kept; D4S_CACHE names a place for them"
        )
        return found
    try:
        found.save(path)
    except OSError as error:  # a home that is read-only or full: the statistics are there all the same
        logger.warning(
            "%s: the key statistics are not kept for the next time (%s)", path, error.strerror or error
        )
    return found
