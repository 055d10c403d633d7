"""`d4s covariance`: key statistics of a model, estimated over a corpus and kept in a file."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from d4s.cli.arguments import add_model, check_file, count, loaded_model, refuse, share, whole_numbers
from d4s.cli.printing import print_json, words
from d4s.errors import ConfigError, CovarianceError
from d4s.ranks import here

if TYPE_CHECKING:
    from d4s.locate.covariance import Covariance

HELP = "key statistics of a model over a corpus, all layers in one pass; or those of several files added up"
SHARED = True
RETAIN_SHARE = 0.5


def add(verb: ArgumentParser) -> None:
    add_model(verb, optional=True)
    verb.add_argument(
        "corpus", metavar="CORPUS", nargs="?", help="text file; default: sampled from the model"
    )
    verb.add_argument("--out", type=Path, required=True, help="safetensors file")
    verb.add_argument("--layers", type=whole_numbers, help="as 4,5,6; default: all")
    verb.add_argument("--tokens", type=count, help="key vectors; default: 10 · d_in")
    verb.add_argument(
        "--merge",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="instead of MODEL and CORPUS: statistics of one model, taken apart on texts that differ",
    )
    verb.add_argument(
        "--from-npz",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="instead of CORPUS: files that ROME, MEMIT, AlphaEdit or EasyEdit have kept, one a layer; MODEL, where it "
        "is named, must fit them",
    )
    verb.add_argument(
        "--retain",
        type=Path,
        metavar="FACTS",
        help="facts that are to stay, in a file as of edits: keys at their subjects are mixed in",
    )
    verb.add_argument(
        "--retain-share", type=share, metavar="SHARE", help="of C that is from --retain; default: .5"
    )


def run(options: Namespace) -> None:
    if options.merge is not None and options.from_npz is not None:
        raise ConfigError(
            "--merge adds up files of d4s, and --from-npz reads others; name one of --merge and --from-npz"
        )
    if options.from_npz is not None:
        found = _imported(options)
    else:
        found = _estimated(options) if options.merge is None else _merged(options)
    here().on_first(lambda: found.save(options.out))
    facts = {
        "file": str(options.out),
        "layers": list(found.layers),
        "keys": found.count,
        "fingerprint": found.fingerprint,
    }
    widest = max(moment.shape[-1] for moment in found.moments.values())
    if found.count < widest:
        words(options)(
            f"note: {found.count} key vectors are fewer than the {widest} dimensions of a key, so that some directions "
            "count for nothing; 10 a dimension is the rule: take more text, or a larger --tokens"
        )
    if options.json:
        print_json(facts)
    else:
        print(f"{options.out}: layers {facts['layers']}, {found.count} key vectors a layer")


def _estimated(options: Namespace) -> Covariance:
    from d4s.edits.formats import load_edits
    from d4s.locate.covariance import covariance_at_subjects, estimate_covariance
    from d4s.models.readiness import check_ready

    if options.model is None:
        raise ConfigError("MODEL lacks; without it --merge FILE FILE adds up statistics that are there")
    if options.retain is None:
        refuse(options, ("retain_share",), "--retain", beside=False)
    here().on_first(lambda: check_file(options))
    model, tokenizer = loaded_model(options)
    check_ready(model, tokenizer)
    facts = None if options.retain is None else load_edits(options.retain)
    found = estimate_covariance(
        model, tokenizer, options.corpus, layers=options.layers, tokens=options.tokens, seed=options.seed
    )
    if facts is None:
        return found
    # Each process takes them all: they are a few thousand rows.
    return found.mixed(
        covariance_at_subjects(model, tokenizer, facts, layers=options.layers),
        RETAIN_SHARE if options.retain_share is None else options.retain_share,
    )


def _imported(options: Namespace) -> Covariance:
    """Those of --from-npz."""
    from d4s.locate.npz_statistics import covariance_from_npz

    refuse(options, ("layers", "tokens", "retain", "retain_share", "seed"), "--from-npz")
    if options.corpus is not None:
        raise ConfigError(f"{options.corpus}: is a text, and --from-npz takes none; leave it out")
    if options.model is None:
        refuse(options, ("device", "device_map", "dtype"), "MODEL", beside=False)
    here().on_first(lambda: check_file(options))
    model = None if options.model is None else loaded_model(options)[0]
    return covariance_from_npz(options.from_npz, model=model)


def _merged(options: Namespace) -> Covariance:
    """The sum of --merge. CovarianceError, naming the file and what differs, for one of another model or layers."""
    from d4s.locate.covariance import Covariance

    if options.model is not None:
        raise ConfigError(
            f"--merge takes files alone, and {options.model} is named beside it as MODEL; leave that out"
        )
    refuse(
        options,
        ("layers", "tokens", "device", "device_map", "dtype", "seed", "retain", "retain_share"),
        "--merge",
    )
    if len(options.merge) < 2:
        raise ConfigError(f"--merge {options.merge[0]}: is one file; name two or more")
    here().on_first(lambda: check_file(options))
    first, *others = options.merge
    found = Covariance.load(first)
    for path in others:
        try:
            found = found.merge(Covariance.load(path))
        except CovarianceError as error:
            raise CovarianceError(f"{path}, beside {first}: {error}") from None
    return found
