"""`d4s covariance`: key statistics of a model, estimated over a corpus and kept in a file."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from d4s.cli.arguments import add_model, check_file, count, loaded_model, whole_numbers
from d4s.cli.printing import print_json

HELP = "key statistics of a model over a corpus, all layers in one pass"


def add(verb: ArgumentParser) -> None:
    add_model(verb)
    verb.add_argument(
        "corpus", metavar="CORPUS", nargs="?", help="text file; default: sampled from the model"
    )
    verb.add_argument("--out", type=Path, required=True, help="safetensors file")
    verb.add_argument("--layers", type=whole_numbers, help="as 4,5,6; default: all")
    verb.add_argument("--tokens", type=count, help="key vectors; default: 10 · d_in")


def run(options: Namespace) -> None:
    from d4s.locate.covariance import estimate_covariance
    from d4s.models.readiness import check_ready

    check_file(options.out)
    model, tokenizer = loaded_model(options)
    check_ready(model, tokenizer)
    found = estimate_covariance(
        model, tokenizer, options.corpus, layers=options.layers, tokens=options.tokens, seed=options.seed
    )
    found.save(options.out)
    facts = {
        "file": str(options.out),
        "layers": list(found.layers),
        "keys": found.count,
        "fingerprint": found.fingerprint,
    }
    if options.json:
        print_json(facts)
    else:
        print(f"{options.out}: layers {facts['layers']}, {found.count} key vectors a layer")
