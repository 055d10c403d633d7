"""`d4s import-config`: hyperparameter files of EasyEdit, ROME, MEMIT and AlphaEdit as presets."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from pathlib import Path

from d4s.cli.arguments import check_file, empty_folder
from d4s.cli.printing import print_json
from d4s.errors import ConfigError

HELP = (
    "read hyperparameter files of EasyEdit (YAML), ROME, MEMIT or AlphaEdit (JSON), write presets that --preset takes, "
    "and say what became of each name"
)


def add(verb: ArgumentParser) -> None:
    verb.add_argument("files", metavar="FILE", type=Path, nargs="+", help="a .yaml or .json file")
    verb.add_argument(
        "--method",
        help="whose settings they become; default: by the file's alg_name, or else its folder's name",
    )
    verb.add_argument(
        "--out",
        type=Path,
        required=True,
        help="a .json file for the preset; of several FILEs a new folder, in which each is METHOD-FILE.json",
    )


def run(options: Namespace) -> None:
    from d4s.methods.imported import import_config, summary

    found = [import_config(path, options.method) for path in options.files]
    if options.out.suffix == ".json":
        if len(found) > 1:
            raise ConfigError(f"--out {options.out}: {len(found)} files make as many presets; name a folder")
        places = [options.out]
        check_file(options)
    else:
        places = [options.out / f"{one.preset.method}-{Path(one.source).stem}.json" for one in found]
        if twice := sorted(str(place) for place in set(places) if places.count(place) > 1):
            raise ConfigError(
                f"--out {options.out}: two of the files would be {twice[0]}; import them one by one"
            )
        empty_folder(options.out)
    for one, place in zip(found, places, strict=True):
        one.preset.save(place)
    if options.json:
        print_json(
            [
                {
                    "file": one.source,
                    "preset": str(place),
                    "method": one.preset.method,
                    "fields": one.preset.fields,
                }
                | {"rows": [asdict(row) for row in one.rows]}
                for one, place in zip(found, places, strict=True)
            ]
        )
        return
    for one, place in zip(found, places, strict=True):
        print(f"{one.source} → {place}")
        print("\n".join(summary(one)))
        print(f"d4s edit MODEL EDITS --preset {place} --out run\n")
