"""`d4s patch`: what editing changed in a model, as a file that is applied, taken off again, or loaded as an adapter."""

from __future__ import annotations

from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from d4s.cli.arguments import add_model, check_file, count, empty_folder, loaded_model
from d4s.cli.printing import print_json, words
from d4s.errors import ConfigError
from d4s.files import check_folder, whole

HELP = (
    "what editing changed, as a small file: export, apply, remove; or as an adapter for PEFT, vLLM, llama.cpp"
)


def add(verb: ArgumentParser) -> None:
    actions = verb.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, help: str) -> ArgumentParser:
        made = actions.add_parser(name, help=help, description=help)
        # As after the verb itself; without a default, which would undo what was said there.
        made.add_argument("--json", action="store_true", default=SUPPRESS, help="figures as JSON")
        add_model(made)
        return made

    export = action(
        "export",
        "write what differs between MODEL, unedited, and EDITED; or what a journal has changed: d4s patch export DIR "
        "PATCH, DIR being a journal or the --out of d4s edit",
    )
    export.add_argument(
        "edited",
        metavar="EDITED",
        nargs="?",
        help="the model after editing, as MODEL is named; none of a journal",
    )
    export.add_argument("patch", metavar="PATCH", type=Path, nargs="?", help="safetensors file to write")
    export.add_argument("--as-lora", type=Path, metavar="DIR", help="also, or only: a PEFT adapter folder")
    export.add_argument(
        "--as-gguf-lora", type=Path, metavar="FILE", help="also, or only: an adapter for llama.cpp"
    )
    export.add_argument("--rank", type=count, help="of the adapters; default: the exact rank of each weight")
    for name, help in (
        ("apply", "MODEL, which is the unedited one, with the patch"),
        ("remove", "MODEL, to which the patch was applied, without it"),
    ):
        way = action(name, help)
        way.add_argument("patch", metavar="PATCH", type=Path, help="file made by d4s patch export")
        way.add_argument("--out", type=Path, required=True, help="new folder for the model")


def run(options: Namespace) -> None:
    {"export": _export, "apply": _apply, "remove": _remove}[options.action](options)


def _export(options: Namespace) -> None:
    from d4s.journal.lora import export_gguf_lora, export_lora
    from d4s.journal.patch import export_patch

    journal = _journal(options.model)
    if journal is not None:
        if options.patch is not None:
            raise ConfigError("a journal knows its model; leave EDITED out, as d4s patch export DIR PATCH")
        options.patch, options.edited = None if options.edited is None else Path(options.edited), None
    elif options.edited is None:
        raise ConfigError("name MODEL and EDITED, or a journal")
    wanted = (options.patch, options.as_lora, options.as_gguf_lora)
    if not any(wanted):
        raise ConfigError("name a PATCH to write, --as-lora DIR, or --as-gguf-lora FILE")
    if options.rank is not None and not (options.as_lora or options.as_gguf_lora):
        raise ConfigError(
            "--rank means nothing without --as-lora or --as-gguf-lora, for a patch is exact; leave it out"
        )
    if options.patch is not None:
        check_file(options, "patch", positional=True)
    if options.as_gguf_lora is not None:
        check_file(options, "as_gguf_lora")
    if options.as_lora is not None:
        empty_folder(options.as_lora)
    model, fingerprint, changes, edits = _changes(options, journal)
    say, report = words(options), dict[str, Any]()
    if options.patch is not None:
        sizes = export_patch(
            changes,
            options.patch,
            fingerprint=fingerprint,
            edits=edits,
        )
        report["patch"] = {"file": str(options.patch), "bytes": sizes}
        whole_bytes = sum(change.base.numel() * change.base.element_size() for change in changes)
        say(
            f"{options.patch}: {len(sizes)} weights, {sum(sizes.values()) / 1e6:.2f} MB (the weights themselves: "
            f"{whole_bytes / 1e6:.2f} MB), {len(edits) or 'no'} edits named"
        )
    for name, place, write in (
        ("lora", options.as_lora, export_lora),
        ("gguf_lora", options.as_gguf_lora, export_gguf_lora),
    ):
        if place is not None:
            adapter = write(changes, place, model=model, rank=options.rank)
            report[name] = {
                "path": adapter.path,
                "rank": adapter.rank,
                "fits": {weight: vars(fit) for weight, fit in adapter.fits.items()},
                "notes": adapter.notes,
            }
            _say_adapter(say, adapter)
    if options.json:
        print_json(report)


def _journal(path: str) -> Any:
    """The journal in a folder; None: there is none."""
    from d4s.journal.folder import Folder
    from d4s.journal.journal import Journal

    return Journal(path) if Folder.exists(path) or Folder.exists(Path(path) / "journal") else None


def _changes(options: Namespace, journal: Any) -> tuple[Any, str, Any, Any]:
    """(the unedited model, where it is needed, its fingerprint, what changed, the edits that changed it)."""
    from d4s.journal.edits_card import read_edits_card
    from d4s.journal.patch import changes_between
    from d4s.locate.covariance import fingerprint_of

    if journal is not None:
        head, model = journal.head, None
        if options.as_lora or options.as_gguf_lora:
            model, _ = loaded_model(
                Namespace(**vars(options) | {"model": head["source"], "dtype": head["dtype"]})
            )
            if fingerprint_of(model) != head["model"]:
                raise ConfigError(
                    f"{head['source']} is no longer the unedited model of {journal.path}; name MODEL and EDITED"
                )
        return model, head["model"], journal.changes(), journal.edits
    model, _ = loaded_model(options)
    edited, _ = loaded_model(Namespace(**vars(options) | {"model": options.edited}))
    card = read_edits_card(options.edited)
    return model, fingerprint_of(model), changes_between(model, edited), () if card is None else card.edits


def _say_adapter(say: Callable[[str], None], adapter: Any) -> None:
    say(f"{adapter.path}: adapter of rank {adapter.rank}")
    width = max(map(len, adapter.fits))
    for weight, fit in adapter.fits.items():
        say(
            f"  {weight:{width}}  rank {fit.rank} of {fit.exact_rank}, left out: {fit.frobenius:.2g} of Δ "
            f"(Frobenius), {fit.spectral:.2g} (spectral)"
        )
    for note in adapter.notes:
        say(f"note: {note}")


def _apply(options: Namespace) -> None:
    from d4s.journal.edits_card import write_edits_card
    from d4s.journal.folder import now
    from d4s.journal.patch import apply_patch

    def card(patch: Any, folder: Path) -> None:
        if patch.edits:
            write_edits_card(
                folder,
                patch.edits,
                base_fingerprint=patch.fingerprint,
                base_name=options.model,
                method="patch",
                when=now()["at"],
            )

    _change(options, apply_patch, "with", card)


def _remove(options: Namespace) -> None:
    from d4s.journal.patch import remove_patch

    _change(options, remove_patch, "without", lambda patch, folder: None)


def _change(
    options: Namespace,
    way: Callable[[Any, Path], Any],
    said: str,
    card: Callable[[Any, Path], None],
) -> None:
    from d4s.sequence.saving import bytes_of

    out = empty_folder(options.out)
    model, tokenizer = loaded_model(options)
    patch = way(model, options.patch)
    check_folder(out, room=bytes_of(model))
    with whole(out) as beside:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        card(patch, beside)
    if options.json:
        weights = [weight.label for weight in patch.weights]
        print_json({"model": str(out), "weights": weights, "edits": [edit.id for edit in patch.edits]})
    else:
        print(f"{out}: the model {said} {options.patch} ({len(patch.weights)} weights)")
