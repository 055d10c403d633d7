"""`d4s edit`: a model edited in sequence, into a folder with its metrics."""

from __future__ import annotations

import shutil
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from d4s.cli.arguments import (
    Once,
    add_chat,
    add_collapse,
    add_covariance,
    add_edits,
    add_fields,
    add_model,
    add_passes,
    add_preset,
    add_scores,
    add_sums,
    add_targets,
    add_tensorboard,
    as_asked,
    check_room,
    configured,
    count,
    covariance_of,
    empty_folder,
    loaded_edits,
    loaded_model,
    task_scores,
    watching,
)
from d4s.cli.printing import print_json, print_notes, words
from d4s.errors import D4SError, EditingFailed, EditingInterrupted
from d4s.files import check_folder, whole, write_table
from d4s.interrupts import deferred
from d4s.models.causal_lm import CausalLM
from d4s.ranks import here

CHANGES = "weights.safetensors"  # in --out, until the model itself is there
HELP = (
    "edit a model in sequence. The same command again goes on where it was interrupted. Where the edits were made but "
    "the model could not be saved (a full disk), the same "
    f"command again only saves it, from {CHANGES} in --out"
)
SHARED = True


def add(verb: ArgumentParser) -> None:
    add_model(verb)
    add_edits(verb)
    add_chat(verb)
    verb.add_argument(
        "--method",
        action=Once,
        help="as d4s, or d4s:fresh for a named preset; default: that of a --preset file, else d4s",
    )
    verb.add_argument(
        "--out", type=Path, required=True, help="new folder for the edited model and its metrics"
    )
    add_covariance(verb)
    verb.add_argument("--batch-size", type=count, default=1, help="edits a step; default: 1")
    verb.add_argument("--evaluate-every", type=count, help="edits between evaluations")
    add_fields(verb)
    add_preset(verb)
    add_targets(verb)
    verb.add_argument(
        "--keep-vectors",
        choices=("yes", "no"),
        default="yes",
        help="no: a smaller journal, from which no single edit can be undone",
    )
    add_sums(verb)
    add_passes(verb)
    add_collapse(verb)
    add_tensorboard(verb)
    add_scores(verb)


def run(options: Namespace) -> None:
    from d4s.locate.covariance import fingerprint_of
    from d4s.methods import Preset
    from d4s.sequence.result import Result
    from d4s.sequence.run import edit_sequence
    from d4s.sequence.saving import bytes_of

    ranks = here()
    if ranks.from_first(lambda: _is_unsaved(options.out)):
        ranks.on_first(lambda: _save_again(options))
        return
    goes_on = ranks.from_first(lambda: _goes_on(options.out, options.passes))
    out = ranks.from_first(lambda: options.out if goes_on else empty_folder(options.out))
    edits, (method, config) = loaded_edits(options), configured(options, options.method)
    watchers = watching(options)
    model, tokenizer = loaded_model(options)
    edits = as_asked(options, edits, tokenizer)
    if not isinstance(config, Preset):
        _say_by_rule(options, model, method)
    ranks.on_first(lambda: _say_held(options.model))
    # The model, and what changed in it.
    ranks.on_first(lambda: check_folder(out, room=int(1.1 * bytes_of(model))))
    check_room(
        model,
        {method: config},
        len(edits),
        batch_size=options.batch_size,
        keep_vectors=options.keep_vectors == "yes",
        sums_on=options.sums_on,
        out=None if goes_on else out,  # what is on the disk takes no more room
    )
    covariance = covariance_of(method, options, model, tokenizer)
    unedited = fingerprint_of(model)
    try:
        result = edit_sequence(
            model,
            tokenizer,
            edits,
            method=method,
            config=config,
            covariance=covariance,
            targets=options.targets,
            batch_size=options.batch_size,
            evaluate_every=options.evaluate_every,
            generate=options.generate,
            measure=task_scores(options, model, tokenizer),
            passes=options.passes,
            stop_on_collapse=options.stop_on_collapse,
            seed=options.seed,
            journal=out / "journal",
            keep_vectors=options.keep_vectors == "yes",
            sums_on=options.sums_on,
            observers=watchers,
        )
    except EditingInterrupted as error:
        made: Result = error.result
        if not made.edits_table or not ranks.is_first:
            raise
        before = f"{len(made.edits_table)} edits were made before; they are in {out}; the same command goes on there"
        _save(made, unedited, out)
        if isinstance(error, EditingFailed):
            raise D4SError(f"{error}. {before}") from error
        print(f"d4s: {before}", file=sys.stderr)
        raise
    ranks.on_first(lambda: _save(result, unedited, out))
    if options.json:
        print_json(result.history[-1])
    else:
        print(result.summary())
        print_notes([result])
        print(f"edited model: {out / 'model'}\nmetrics: {out / 'history.csv'}, {out / 'result.json'}")


def _say_held(model: str) -> None:
    """On standard error, of a model that was edited before, that this run's sums know nothing of it."""
    from d4s.journal.edits_card import read_edits_card

    card = read_edits_card(model) if Path(model).is_dir() else None
    if card is not None and card.edits:
        print(
            f"{model} holds {len(card.edits)} edits already ({card.method}); to this run it is the unedited model, and "
            "they are in none of its sums. d4s merge adds up sequences that were made on one model",
            file=sys.stderr,
        )


def _say_by_rule(options: Namespace, model: CausalLM, method: str) -> None:
    """`by_rule` on standard error: a long run should not have ended before it is said."""
    if said := by_rule(model, method):
        print(
            f"{said}, where --set does not say otherwise; none is tried on it. d4s tune {options.model} "
            f"{options.edits} --out preset.json tries them, on edits set aside",
            file=sys.stderr,
        )


def by_rule(model: CausalLM, method: str) -> str:
    """What the settings rest on, where nothing is published or measured for the model; else nothing."""
    from d4s.methods import method_for
    from d4s.methods.published import is_known
    from d4s.models.architectures import Anatomy, text_config

    anatomy = Anatomy(model)
    if is_known(anatomy):
        return ""
    chosen = method_for(method, anatomy)
    said = (
        [f"layers {', '.join(map(str, layers))} by its depth"] if (layers := chosen.value("layers")) else []
    )
    if chosen.strength == "prior_weight" and chosen.value("prior_weight") is None:
        said.append("λ (prior_weight) by the share of the first edits that arrives, told at the end")
    return (
        f"settings of {method}: nothing is published or measured for a {text_config(model).model_type} of "
        f"{len(anatomy)} blocks, so {' and '.join(said) or 'they go by its rule'}"
    )


def _save(result: Any, unedited: str, out: Path) -> None:
    """First what cannot be made again, which is small; then the model, which can be made from it.

    Raises D4SError that says what is kept, if any of it cannot be written.
    """
    from d4s.sequence.saving import save_changes

    failed: list[str] = []

    def write(name: str, function: Callable[[Path], None]) -> None:
        try:
            function(out / name)
        except OSError as error:
            failed.append(f"{out / name} ({error.strerror or error})")

    try:
        with deferred():
            write(CHANGES, lambda path: save_changes(result, unedited, path))
            write("result.json", result.save)
            write("baseline.json", result.baseline.save)
            write("history.csv", lambda path: write_table(result.to_frame(), path))
            if (found := result.editor.bench.targets) is not None and len(found):
                write("targets.safetensors", found.save)
        write("model", lambda path: _save_model(result.model, result.editor.tokenizer, path, out))
    except KeyboardInterrupt:
        if (out / CHANGES).exists():
            print(f"d4s: the model was not saved; repeat the command with --out {out}", file=sys.stderr)
        raise
    if not failed:
        (out / CHANGES).unlink()
        return
    kept = ", ".join(sorted(path.name for path in out.iterdir()))
    says = f"could not be written: {'; '.join(failed)}. In {out} there is: {kept or 'nothing'}"
    if _is_unsaved(out):
        says += f". Make room, and repeat the command with --out {out}: it then only saves the model"
    raise D4SError(says)


def _save_model(model: CausalLM, tokenizer: Any, path: Path, out: Path) -> None:
    """With the card of its edits; in the place of an earlier model, which a part of the sequence had made."""
    from d4s.journal.journal import Journal

    new, old = (path.with_name(f"{path.name}.{end}") for end in ("new", "old"))
    for left in (new, old):  # by a save that was killed: what it was to be is made anew
        if left.is_dir():
            shutil.rmtree(left)
    if not path.exists():
        new = path
    with whole(new) as beside:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        if (out / "journal").exists():  # an earlier version's runs have none
            Journal(out).write_card(beside)
    if new != path:
        path.rename(old)
        new.rename(path)
        shutil.rmtree(old)


def _goes_on(out: Path, passes: int) -> bool:
    """Whether a sequence was begun there that has not come to its end, or has made fewer passes."""
    from d4s.journal.folder import Folder

    return Folder.exists(out / "journal") and not Folder.open(out / "journal").is_complete(passes)


def _is_unsaved(out: Path) -> bool:
    """Whether a sequence has ended there without its model, or beside one of fewer edits: what it has changed goes as
    its model is saved."""
    return (out / CHANGES).is_file()


def _save_again(options: Namespace) -> None:
    """The model of a sequence that has ended, from what changed in it; no edit is made."""
    from d4s.sequence.saving import bytes_of, load_changes_

    out = options.out
    model, tokenizer = loaded_model(options)
    check_folder(out, room=bytes_of(model))
    load_changes_(model, tokenizer, out / CHANGES)
    _save_model(model, tokenizer, out / "model", out)
    (out / CHANGES).unlink()
    words(options)(
        f"the edits of {out} had been made, and their model is saved now; no other was made\n"
        f"edited model: {out / 'model'}"
    )
