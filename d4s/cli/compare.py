"""`d4s compare`: the same edits with several methods."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

from d4s.cli.arguments import (
    Once,
    add_chat,
    add_collapse,
    add_edits,
    add_fields,
    add_model,
    add_passes,
    add_preset,
    add_scores,
    add_sequences,
    add_sums,
    add_targets,
    add_tensorboard,
    as_asked,
    check_room,
    configuration,
    count,
    loaded_covariance,
    loaded_edits,
    loaded_model,
    names,
    refuse,
    seeds,
    task_scores,
    watching,
)
from d4s.cli.printing import print_json, print_notes
from d4s.errors import ConfigError, unknown_name
from d4s.files import check_folder
from d4s.ranks import here

HELP = "the same edits with several methods"
SHARED = True


def add(verb: ArgumentParser) -> None:
    add_model(verb)
    add_edits(verb)
    add_chat(verb)
    add_sequences(verb, again="; or that of an earlier run, which then goes on")
    verb.add_argument(
        "--methods",
        action=Once,
        type=names,
        default=["d4s", "memit"],
        help="as d4s,memit,rome; a named preset behind a colon, as d4s:hold,d4s:fresh",
    )
    verb.add_argument("--evaluate-every", type=count, help="edits between evaluations; default: at the end")
    verb.add_argument("--seeds", type=seeds, help="as 0,1,2: means over them; default: --seed")
    verb.add_argument("--shuffle", action="store_true", help="each seed has its own order of the edits")
    verb.add_argument("--count", type=count, help="edits made, the first of that order; default: all")
    add_targets(verb)
    add_fields(verb, of="; METHOD.FIELD=VALUE for one of --methods, else for all that have it")
    add_preset(verb, before="; --set goes before them")
    verb.add_argument(
        "--front",
        nargs="*",
        action="extend",
        metavar="GRID",
        help="along each method's strength: values of λ, as 30,300,3000, or those of a method, as ft-m=1e-4,1e-3; "
        "without: multiples of each one's own",
    )
    add_sums(verb)
    add_passes(verb)
    add_collapse(verb)
    add_tensorboard(verb)
    add_scores(verb)


def run(options: Namespace) -> None:
    from d4s.sequence.compare import compare
    from d4s.study.front import front

    if options.seeds is not None:
        refuse(options, ("seed",), "--seeds")
    here().on_first(lambda: check_folder(options.out))
    watchers = watching(options)
    methods, grid = _with_fields(_configs(options), configuration(options)), _grid(options.front)
    if isinstance(grid, dict):
        grid = {_label_of(name, methods): values for name, values in grid.items()}
    edits = loaded_edits(options)
    model, tokenizer = loaded_model(options)
    edits = as_asked(options, edits, tokenizer)
    check_room(
        model,
        methods,
        min(len(edits), options.count or len(edits)),
        batch_size=options.batch_size or 1,
        sums_on=options.sums_on,
        out=None if (options.out / "journals").exists() else options.out,
        saves=False,
    )
    way: Any = compare if options.front is None else partial(front, grid=grid)
    found = way(
        model,
        tokenizer,
        edits,
        methods,
        out=options.out,
        covariance=loaded_covariance(options, model, tokenizer),
        targets=options.targets,
        batch_size=options.batch_size or 1,
        evaluate_every=options.evaluate_every,
        seeds=options.seeds or options.seed,
        shuffle=options.shuffle,
        count=options.count,
        sums_on=options.sums_on,
        neighborhood_limit=options.neighborhood_limit,
        generate=options.generate,
        measure=task_scores(options, model, tokenizer),
        passes=options.passes,
        stop_on_collapse=options.stop_on_collapse,
        observers=watchers,
    )
    here().on_first(lambda: found.save(options.out))
    if options.json:
        print_json(found.to_dict())
    else:
        print(found.summary())
        results = (found if options.front is None else found.comparison).results
        print_notes([record for by_seed in results.values() for record in by_seed.values()])
        print(f"table, histories, figures: {options.out}")


def _configs(options: Namespace) -> dict[str, Any]:
    """Label → its configuration: METHOD:PRESET has that named preset. Of the others --preset goes to the method that
    its file names, a name to all that have it, which are then called METHOD:PRESET, too."""
    from d4s.methods import METHODS
    from d4s.methods.preset import by_name, is_place, load_preset

    configs: dict[str, Any] = dict.fromkeys(options.methods)
    for label in configs:
        by_name(label)  # a wrong one is refused before the model is read
    if options.preset is None:
        return configs
    if is_place(options.preset):
        preset = load_preset(options.preset)
        if preset.method not in configs:
            raise ConfigError(
                f"--preset {options.preset}: is of {preset.method}, and --methods names {', '.join(configs)}; add it"
            )
        return configs | {preset.method: preset}
    having = [name for name in configs if name in METHODS and options.preset in METHODS[name].presets]
    plain = [label for label in configs if ":" not in label]
    if not plain:
        raise ConfigError(
            f"--preset {options.preset}: each of --methods {', '.join(configs)} names a preset of its own; leave one "
            "of the two out"
        )
    for name in having or plain[:1]:
        by_name(f"{name}:{options.preset}")  # where none has it, the first says so
    renamed = [f"{label}:{options.preset}" if label in having else label for label in configs]
    if len(set(renamed)) < len(renamed):
        raise ConfigError(
            f"--preset {options.preset}: makes {', '.join(renamed)} of --methods, one of them twice; leave it out"
        )
    return dict.fromkeys(renamed)


def _label_of(name: str, labels: Collection[str]) -> str:
    """METHOD for METHOD:PRESET, where it is the only one of that method; else the name as it is."""
    of = [label for label in labels if label.partition(":")[0] == name]
    return of[0] if name not in labels and len(of) == 1 else name


def _with_fields(configs: Mapping[str, Any], given: Mapping[str, Any] | None) -> dict[str, Any]:
    """--set: METHOD.FIELD goes to that label, a plain FIELD to all whose method has it. ConfigError if none does."""
    from d4s.methods import METHODS, Preset
    from d4s.methods.base import field_names
    from d4s.methods.preset import by_name

    found = dict(configs)
    fields = {label: set().union(*field_names(METHODS[by_name(label)[0]])) for label in found}
    # A method's own come last, and so hold.
    own_last = sorted((given or {}).items(), key=lambda item: "." in item[0])
    for name, value in own_last:
        label, dot, field = name.rpartition(".")
        label = _label_of(label, found)
        if dot and label not in found:
            raise ConfigError(f"--set {name}: {unknown_name('method of --methods', label, found)}")
        if dot and field not in fields[label]:
            raise ConfigError(f"--set {name}: {unknown_name(f'field of {label}', field, fields[label])}")
        to = [label] if dot else [one for one in found if field in fields[one]]
        if not to:
            raise ConfigError(
                f"--set {name}: none of {', '.join(found)} has this field; d4s methods NAME lists them"
            )
        for one in to:
            now = found[one]
            found[one] = (
                now.changed({field: value}) if isinstance(now, Preset) else {**(now or {}), field: value}
            )
    return found


def _grid(given: Sequence[str] | None) -> Any:
    """--front: numbers for λ, METHOD=numbers, or None without either."""
    if not given:
        return None
    plain: list[float] = []
    grids: dict[str, list[float]] = {}
    for item in given:
        method, equals, values = item.rpartition("=")
        try:
            numbers = [float(value) for value in values.split(",")]
        except ValueError:
            raise ConfigError(
                f"--front {item!r}: must be numbers with commas, as 30,300,3000, or METHOD=NUMBERS, as ft-m=1e-4,1e-3"
            ) from None
        if equals:
            grids.setdefault(method, []).extend(numbers)
        else:
            plain += numbers
    if plain and grids:
        raise ConfigError("--front: either values of λ for all methods, or METHOD=VALUES for each; not both")
    return grids or plain
