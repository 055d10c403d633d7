"""What several verbs share: types of arguments, options that go together, and what is loaded by them."""

from __future__ import annotations

import json
import math
from argparse import Action, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from d4s.errors import ConfigError
from d4s.files import check_folder, check_place
from d4s.models.causal_lm import CausalLM
from d4s.ranks import here

# Types: what argparse makes of the text of an argument.


def whole_numbers(text: str) -> list[int]:
    """Whole numbers with commas, as --layers 4,5,6"""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise ArgumentTypeError(f"{text!r} must be whole numbers with commas, as 4,5,6") from None


def count(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} must be a whole number from 1 on")
    return int(text)


def limit(text: str) -> int:
    """A whole number from 0 on."""
    return 0 if text == "0" else count(text)


def seed(text: str) -> int:
    """What every generator of random numbers takes."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise ArgumentTypeError(f"{text!r} must be a whole number from 0 to 2³² − 1")
    return int(text)


def seeds(text: str) -> list[int]:
    """Seeds with commas, as --seeds 0,1,2"""
    return [seed(number) for number in text.split(",")]


def share(text: str) -> float:
    """A number from 0 to 1."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number <= 1:
        raise ArgumentTypeError(f"{text!r} must be a share from 0 to 1, as .9 for 90 %")
    return number


def device_map(text: str) -> Any:
    """A name that accelerate knows, or JSON, as {"model.embed_tokens": 0, "model.layers.0": 1}"""
    if not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ArgumentTypeError(f"{text!r} must be a JSON object of module → device ({error})") from None


def names(text: str) -> list[str]:
    """Names with commas, as --methods d4s,memit"""
    return [name.strip() for name in text.split(",") if name.strip()]


# Options: what a verb adds to its own, in the order in which its help lists them.


def add_model(verb: ArgumentParser, *, optional: bool = False) -> None:
    """optional: whether MODEL may be left out"""
    may_lack: dict[str, Any] = {"nargs": "?"} if optional else {}
    verb.add_argument(
        "model", metavar="MODEL", help="folder, hub name, .gguf file, 'embedded' or 'smollm2'", **may_lack
    )
    verb.add_argument("--device", help="cpu, cuda, cuda:1 …; default: cuda where there is one")
    verb.add_argument(
        "--device-map",
        type=device_map,
        metavar="MAP",
        help="over several devices: auto, balanced, sequential, or JSON of module → device (needs accelerate)",
    )
    verb.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "float16", "bfloat16"), help="of the weights"
    )


def add_edits(verb: ArgumentParser, *, optional: bool = False) -> None:
    """optional: whether EDITS may be left out"""
    may_lack: dict[str, Any] = {"nargs": "?"} if optional else {}
    verb.add_argument("edits", metavar="EDITS", help="file of edits, or 'embedded'", **may_lack)
    verb.add_argument("--limit", type=count, help="take the first LIMIT edits")
    add_skip_bad(verb)
    verb.add_argument(
        "--zsre-target",
        choices=("alt", "answer"),
        default="alt",
        help="zsRE: write the made-up answer, as EasyEdit (default), or the true one, as ROME and MEMIT",
    )


def add_chat(verb: ArgumentParser) -> None:
    verb.add_argument(
        "--chat",
        action="store_true",
        help="put every prompt into the user's turn of the model's chat template",
    )


def add_skip_bad(verb: ArgumentParser) -> None:
    verb.add_argument("--skip-bad", action="store_true", help="leave wrong records out, and list them")


def add_journal(verb: ArgumentParser) -> None:
    verb.add_argument("journal", metavar="DIR", help="a journal, or the --out of d4s edit")


def add_fields(verb: ArgumentParser, *, of: str = "") -> None:
    """of: whose fields, where a verb has several methods"""
    verb.add_argument(
        "--set",
        nargs="+",
        action="extend",
        metavar="FIELD=VALUE",
        help=f"fields of the method's configuration{of}",
    )


class Once(Action):
    """Of an option whose second value would silently take the place of the first."""

    def __call__(
        self, parser: ArgumentParser, namespace: Namespace, values: Any, option: str | None = None
    ) -> None:
        given: set[str] = vars(namespace).setdefault("given_once", set())
        if self.dest in given:
            parser.error(f"argument {option}: given twice; name one")
        given.add(self.dest)
        setattr(namespace, self.dest, values)


def add_preset(verb: ArgumentParser, *, before: str = "; --set goes before them") -> None:
    """before: what of the verb's options goes before a preset's settings, as its help says it"""
    verb.add_argument(
        "--preset",
        action=Once,
        metavar="FILE|NAME",
        help="settings from a file made by d4s tune or import-config, or a method's named ones (of d4s: fresh, hold, "
        f"long, answers, paper){before}",
    )


def add_covariance(verb: ArgumentParser) -> None:
    verb.add_argument("--covariance", type=Path, help="file made by d4s covariance")


def add_sums(verb: ArgumentParser) -> None:
    verb.add_argument(
        "--sums-on",
        choices=("auto", "device", "cpu"),
        default="auto",
        help="where statistics, sums and Δ of a closed form live: on the layer's device, on the cpu, or (auto) on the "
        "cpu where the device has no room",
    )


def add_targets(verb: ArgumentParser) -> None:
    verb.add_argument(
        "--targets",
        type=Path,
        help="file made by d4s targets, or an earlier run's: the targets in it are not searched again",
    )


def add_passes(verb: ArgumentParser) -> None:
    verb.add_argument(
        "--passes",
        type=count,
        default=1,
        metavar="N",
        help="over the edits: in each behind the first those are made again that are not the greedy answer, or, with "
        "target_stop or target_eos, do not end behind it",
    )


def add_collapse(verb: ArgumentParser) -> None:
    verb.add_argument(
        "--stop-on-collapse",
        type=share,
        nargs="?",
        const=0.1,
        metavar="SHARE",
        help="end at a point where fewer of the edits made than SHARE (a tenth) are still the greedy answer",
    )


def add_tensorboard(verb: ArgumentParser) -> None:
    verb.add_argument(
        "--tensorboard",
        type=Path,
        metavar="DIR",
        help="also write scalars there for tensorboard --logdir DIR",
    )


def add_scores(verb: ArgumentParser) -> None:
    verb.add_argument("--generate", action="store_true", help="also score what the model freely says")
    add_downstream(verb)


def add_downstream(verb: ArgumentParser) -> None:
    verb.add_argument(
        "--tasks", type=names, help="downstream tasks of lm-evaluation-harness, as arc_challenge,mmlu"
    )
    verb.add_argument("--task-folder", type=Path, help="folder of local task files")
    verb.add_argument("--task-limit", type=count, help="questions of each task")
    verb.add_argument(
        "--trust-task-code",
        action="store_true",
        help="run the Python that the task files in --task-folder name (!function)",
    )


def add_sequences(verb: ArgumentParser, *, again: str = "") -> None:
    """Of verbs that edit with several methods. again: what else --out may name"""
    verb.add_argument("--out", type=Path, required=True, help=f"new folder for tables and figures{again}")
    add_covariance(verb)
    verb.add_argument("--batch-size", type=count, help="edits a step; default: 1")
    verb.add_argument(
        "--neighborhood-limit",
        type=limit,
        help="neighbours an edit that are scored on the way; default: all",
    )


# What the options name, loaded or made.


def loaded_model(options: Namespace) -> tuple[Any, Any]:
    """(model, tokenizer) of MODEL."""
    from d4s.models.loading import load_model

    if here().count > 1 and options.device not in (None, "cpu", "cuda"):
        raise ConfigError(
            f"--device {options.device}: of several processes each takes a GPU of its own; name cuda, cpu or none"
        )
    hide_loading_bars()
    try:
        return load_model(
            options.model, dtype=options.dtype, device=options.device, device_map=options.device_map
        )
    except ConfigError as error:  # of the device: the rest is checked by the parser
        raise ConfigError(f"--{error}") from None


def hide_loading_bars() -> None:
    """transformers draws a bar for every file it loads; this command line has bars of its own."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def loaded_edits(options: Namespace) -> list[Any]:
    """Those of EDITS."""
    if options.edits == "embedded":
        from d4s.embedded import load_demo_edits

        refuse(options, ("zsre_target",), "the embedded edits, which are none of zsRE")
        return load_demo_edits(options.limit)
    from d4s.edits.formats import load_edits

    edits = load_edits(
        options.edits, limit=options.limit, skip_bad=options.skip_bad, zsre_target=options.zsre_target
    )
    if not any(_is_towards_truth(edit) for edit in edits):
        refuse(options, ("zsre_target",), f"{options.edits}, which holds no records of zsRE")
    return edits


def _is_towards_truth(edit: Any) -> bool:
    """Whether it is what --zsre-target answer makes: of an edit as d4s saved it, which is not made anew, too."""
    return edit.tags.get("source") in ("zsre", "zsre_flat") and edit.target_true is None


def as_asked(options: Namespace, edits: list[Any], tokenizer: Any) -> list[Any]:
    """The edits, with --chat in the tokenizer's chat template. Raises TokenizerError where it has none."""
    if not options.chat:
        return edits
    from d4s.models.chat import in_chat

    return in_chat(edits, tokenizer)


def covariance_of(method: str, options: Namespace, model: CausalLM, tokenizer: Any) -> Any:
    """`loaded_covariance` where the method needs any; else None. A file is read also then: a wrong one is refused."""
    from d4s.locate.covariance import Covariance
    from d4s.methods import METHODS

    if "covariance" in getattr(METHODS.get(method), "needs", ()):
        return loaded_covariance(options, model, tokenizer)
    if options.covariance:
        Covariance.load(options.covariance)
    return None


def loaded_covariance(options: Namespace, model: CausalLM, tokenizer: Any) -> Any:
    """--covariance, or the embedded model's own; None: estimated and cached where a method needs it."""
    from d4s.locate.covariance import Covariance

    if options.covariance:
        return Covariance.load(options.covariance)
    if options.model == "embedded":
        from d4s.embedded.statistics import demo_covariance
        from d4s.models.architectures import Anatomy

        return demo_covariance(model, tokenizer, layers=tuple(range(len(Anatomy(model)))))
    return None


def configuration(options: Namespace) -> dict[str, Any] | None:
    """--set FIELD=VALUE …, each value as JSON where it is JSON, or numbers with commas."""
    fields: dict[str, Any] = {}
    for item in options.set or ():
        name, equals, value = item.partition("=")
        if not equals:
            raise ConfigError(f"--set {item!r}: must be FIELD=VALUE, as --set prior_weight=20000")
        try:
            fields[name] = json.loads(value)
        except json.JSONDecodeError:
            fields[name] = _plain(value)
        except (
            ValueError,
            RecursionError,
        ) as error:  # a number of thousands of digits, lists in lists in lists
            why = "is nested too deeply" if isinstance(error, RecursionError) else "has too many digits"
            raise ConfigError(f"--set {name}: its value, {value[:20]}…, {why}; give a shorter one") from None
    return fields or None


def _plain(value: str) -> Any:
    """What is no JSON: .1, numbers with commas, as 4,5 for [4, 5], or text."""
    try:
        return float(value)
    except ValueError:
        pass
    try:
        numbers = json.loads(f"[{value}]")
    except (ValueError, RecursionError):
        return value
    return numbers if numbers and all(isinstance(one, int | float) for one in numbers) else value


def configured(options: Namespace, method: str | None) -> tuple[str, Any]:
    """(method, config) by --preset and --set. method: that of the verb's options; None: the preset's, or d4s"""
    from d4s.methods.preset import by_name, with_preset

    fields = configuration(options)
    if options.preset is not None:
        return with_preset(method, options.preset, fields)
    name, named = by_name(method or "d4s")
    return name, {**named, **(fields or {})} or None


def task_scores(options: Namespace, model: CausalLM, tokenizer: Any) -> Any:
    """--tasks: their scores, taken when called; None without."""
    if not options.tasks:
        refuse(options, ("task_folder", "task_limit", "trust_task_code"), "--tasks", beside=False)
        return None
    from d4s.measure.downstream import TaskScores, require_harness
    from d4s.measure.task_files import check_task_files

    require_harness()
    trusted = {"trust_task_code": True} if options.trust_task_code else {}
    if options.task_folder is not None and not trusted:
        check_task_files(options.task_folder)  # before the edits are made, not after
    return TaskScores(
        model,
        tokenizer,
        options.tasks,
        limit=options.task_limit,
        include_path=options.task_folder,
        seed=options.seed,
        **trusted,
    )


def watching(options: Namespace) -> list[Any]:
    """Who watches a sequence, in the first process: the live view where a terminal and rich are there, and
    --tensorboard."""
    if not here().is_first:
        return []
    from d4s.report.live import Live, is_there
    from d4s.report.tensorboard import TensorBoard

    live = [Live()] if is_there() else []
    return [*live, *([] if options.tensorboard is None else [TensorBoard(options.tensorboard)])]


# Checks of what the options name together.

# What an option is where it is not given, if that is not None.
_NOT_GIVEN = {
    "dtype": "auto", "seed": 0, "skip_bad": False, "sums_on": "auto", "trust_task_code": False, "zsre_target": "alt",
}  # fmt: skip


def check_room(
    model: CausalLM,
    configs: Mapping[str, Any],
    edits: int,
    *,
    batch_size: int,
    keep_vectors: bool = True,
    sums_on: Any = "auto",
    out: Path | None = None,
    saves: bool = True,
) -> None:
    """ConfigError, naming the option that would, if what one of the methods is certain to hold fits nowhere.

    configs: method, or label, → its configuration, as of `d4s.compare`
    out: a folder that is there, whose disk has to hold it; None: the disk is not looked at
    """
    from d4s.models.architectures import Anatomy
    from d4s.sequence.compare import configured_methods
    from d4s.sequence.schedule import Schedule
    from d4s.study.plan import free_bytes, plan

    anatomy = Anatomy(model)
    for method in configured_methods(configs, anatomy).values():
        found = plan(
            model,
            method,
            edits,
            schedule=Schedule(batch_size=batch_size),
            keep_vectors=keep_vectors,
            saves=saves,
            sums_on=sums_on,
        )
        found.check(free_bytes(found.places, out), loaded=True)


def refuse(options: Namespace, meaningless: Sequence[str], where: str, *, beside: bool = True) -> None:
    """ConfigError if one of these options is given, which mean nothing with what `where` names.

    beside: False: they mean nothing without it
    """
    for name in meaningless:
        if getattr(options, name) != _NOT_GIVEN.get(name):
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(
                f"{option} means nothing with {where}; leave it out"
                if beside
                else f"{option} means nothing without {where}; name {where} too, or leave it out"
            )


def empty_folder(path: Path) -> Path:
    """The folder, made if need be. ConfigError if it already holds something: nothing is overwritten."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        check_place(path)
        raise ConfigError(f"--out {path}: already holds files; name a new or empty folder")
    check_folder(path)
    return path


_NAMES = ("verb", "action", "method", "methods")  # arguments that are words, and no files of that name


def check_file(options: Namespace, name: str = "out", *, positional: bool = False) -> None:
    """Of an argument that names a file to be written. ConfigError where a folder stands in its place, or another
    argument is read from it; OSError where its own folder cannot be made or written to."""
    path: Path = getattr(options, name)
    option = f"{name.upper() if positional else f'--{name}'.replace('_', '-')} {path}"
    if path.is_dir():
        raise ConfigError(f"{option}: is a folder; name a file in it")
    check_place(path)
    check_folder(path.parent)
    read = {other: values for other, values in vars(options).items() if other not in (name, *_NAMES)}
    for other, values in read.items():
        for value in values if isinstance(values, list | tuple) else (values,):
            if isinstance(value, str | Path) and _same_file(path, Path(value)):
                raise ConfigError(
                    f"{option}: is the file that is read ({other.replace('_', '-')}); name another"
                )


def _same_file(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except (OSError, ValueError):  # not there, or no path at all
        return False
