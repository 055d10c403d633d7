"""What the build promises: it finds the right torch, and a wrong one is told in a sentence."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from d4s import ops
from d4s.ops import reference

ROOT = Path(__file__).resolve().parents[1]
# The build that sees whatever torch the environment does. 'pip install .' may build against another.
BESIDE_IT = "pip install --no-build-isolation ."


@pytest.fixture
def setup_file(monkeypatch):
    """setup.py run under a stand-in for setuptools: its names, and what it handed to `setup`."""
    handed: dict = {}
    monkeypatch.setitem(
        sys.modules,
        "setuptools",
        SimpleNamespace(Extension=lambda *a: a, setup=lambda **given: handed.update(given)),
    )
    monkeypatch.setitem(sys.modules, "setuptools.command", ModuleType("setuptools.command"))
    monkeypatch.setitem(sys.modules, "setuptools.command.build_ext", SimpleNamespace(build_ext=object))

    def run() -> SimpleNamespace:
        return SimpleNamespace(**runpy.run_path(str(ROOT / "setup.py")), handed=handed)

    return run


def test_the_extension_was_built_against_this_torch():
    assert ops._release(ops._C.torch_version) == ops._release(torch.__version__)


def test_torch_is_seen_through_build_isolation(setup_file, monkeypatch, tmp_path):
    assert setup_file().flags_that_see_torch() == []
    # pip hides the environment with what it puts first on PYTHONPATH.
    (tmp_path / "torch.py").write_text("raise ImportError('hidden')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONNOUSERSITE", "1")
    hidden = setup_file()
    if hidden.flags_that_see_torch() is None:
        pytest.skip("torch itself lies on PYTHONPATH here")
    assert hidden.flags_that_see_torch() == ["-I"]
    assert hidden.handed["setup_requires"] == []


def test_torch_of_the_user_is_seen_through_build_isolation(setup_file, monkeypatch, tmp_path):
    """pip hides the user's own packages by PYTHONNOUSERSITE, and what it fetched instead would not be what runs."""
    # A virtual environment looks at no packages of the user.
    base = getattr(sys, "_base_executable", sys.executable)
    monkeypatch.setenv("PYTHONUSERBASE", str(tmp_path / "user"))
    asked = [base, "-E", "-c", "import site; print(site.ENABLE_USER_SITE and site.getusersitepackages())"]
    site = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    if not site.startswith(str(tmp_path)):
        pytest.skip(f"{base} looks at no packages of the user")
    monkeypatch.setattr(sys, "executable", base)
    (tmp_path / "hiding").mkdir()
    (tmp_path / "hiding" / "torch.py").write_text("raise ImportError('hidden')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "hiding"))
    monkeypatch.setenv("PYTHONNOUSERSITE", "1")
    if setup_file().flags_that_see_torch() is not None:
        pytest.skip(f"{base} has a torch for all users")
    Path(site).mkdir(parents=True)
    (Path(site) / "torch.py").touch()
    seen = setup_file()
    assert seen.flags_that_see_torch() == ["-E"]
    assert seen.handed["setup_requires"] == []


def test_without_torch_pip_fetches_it_and_other_front_ends_are_told(setup_file, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    monkeypatch.setenv("PYTHONNOUSERSITE", "1")
    assert any(wanted.startswith("torch") for wanted in setup_file().handed["setup_requires"])
    monkeypatch.delenv("PYTHONNOUSERSITE")
    elsewhere = setup_file()
    assert elsewhere.handed["setup_requires"] == []
    with pytest.raises(SystemExit, match="install torch in the target environment") as ended:
        elsewhere.CMakeBuild().build_extension(None)
    assert BESIDE_IT in str(ended.value)


@pytest.mark.parametrize(
    ("there", "taken"),
    [
        (("home", "path", "on PATH", "last"), "home"),
        (("path", "on PATH", "last"), "path"),
        (("on PATH", "last"), "on PATH"),
        (("last",), "last"),
        ((), None),
    ],
)
def test_the_cuda_compiler_is_the_one_that_torchs_own_extensions_take(
    setup_file, monkeypatch, tmp_path, there, taken
):
    for name, place in {"CUDA_HOME": "home", "CUDA_PATH": "path"}.items():
        monkeypatch.setenv(name, str(tmp_path / place))
    monkeypatch.setenv("PATH", str(tmp_path / "on PATH" / "bin"))
    for place in there:
        (tmp_path / place / "bin").mkdir(parents=True)
        (tmp_path / place / "bin" / "nvcc").touch(mode=0o755)
    found = setup_file().cuda_compiler(last=str(tmp_path / "last" / "bin"))
    assert found == (str(tmp_path / taken / "bin" / "nvcc") if taken else "")


@pytest.mark.parametrize("named", [None, "mine/nvcc"])
def test_cmake_is_told_the_cuda_compiler_unless_the_user_names_one(setup_file, monkeypatch, tmp_path, named):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch(mode=0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    if named:
        monkeypatch.setenv("CUDACXX", named)
    else:
        monkeypatch.delenv("CUDACXX", raising=False)
    told = []

    def stop_at_cmake(command, **given):
        if command[0] == "cmake":
            told.append(given["env"])
            raise InterruptedError
        return SimpleNamespace(returncode=0)  # torch is seen

    build = setup_file().CMakeBuild()
    build.build_temp = str(tmp_path / "build")
    monkeypatch.setattr(subprocess, "run", stop_at_cmake)
    with pytest.raises(InterruptedError):
        build.build_extension(None)
    (environment,) = told
    assert environment["CUDACXX"] == (named or str(tmp_path / "bin" / "nvcc"))
    assert environment["PATH"] == os.environ["PATH"]


def test_the_extension_says_why_it_has_no_cuda_kernels():
    """The error of an op that is given a CUDA tensor quotes it."""
    if not hasattr(ops._C, "without_cuda"):
        pytest.skip("d4s.ops._C was built by an earlier version; run pip install . again")
    assert ops._C.with_cuda == (ops._C.without_cuda == "")
    if torch.version.cuda is None:
        assert ops._C.without_cuda in (
            f"torch {ops._C.torch_version} is not a CUDA build",
            "D4S_CUDA was OFF",
        )


@pytest.mark.parametrize(
    ("extension", "word"), [("SimpleNamespace(torch_version='1.2.0')", "1.2.0"), ("None", "pip install")]
)
def test_a_missing_or_foreign_extension_is_told_in_a_sentence(extension, word):
    code = (
        "import sys\nfrom types import SimpleNamespace\n"
        f"sys.modules['d4s.ops._C'] = {extension}\n"
        "try:\n    import d4s\nexcept ImportError as error:\n    print(type(error).__name__, error)\n"
    )
    path = os.pathsep.join(
        [str(Path(ops.__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.stdout.startswith("ExtensionError"), done.stderr
    assert word in done.stdout
    assert BESIDE_IT in done.stdout


def included(source: Path) -> Iterator[tuple[Path, str]]:
    """Every file that `source` includes, with the one that names it, through the files of csrc/."""
    for quote, name in re.findall(r'#include ([<"])([^>"]+)', source.read_text()):
        yield source, name
        if quote == '"':
            yield from included(source.parent / name)


def test_cuda_files_need_no_torch():
    sources = [*ROOT.glob("csrc/*/*.cu")]
    assert len(sources) >= 4
    for source in sources:
        names = [*included(source)]
        assert (source, f"{source.parent.name}.h") in names
        assert not [name for name in names if re.match(r"(torch|ATen|c10)/", name[1])]


def test_an_op_goes_by_one_name_everywhere():
    folders = {folder for folder in ROOT.glob("csrc/*/") if folder.name != "shared"}
    bound = re.findall(r"D4S_OP\((\w+)\);", (ROOT / "csrc" / "bindings.cpp").read_text())
    assert bound == sorted(folder.name for folder in folders)
    for folder in folders:
        op = folder.name
        halves = {f"{op}.h", "check.cpp"}
        kernels = halves | {"cpu.cpp", f"{op}_cuda.cu"}
        assert {path.name for path in folder.iterdir()} in (
            kernels,
            kernels | {"library.h", "library.cpp"},
            halves | {"any_device.cpp"},
        )
        names = {op, f"{op}_"}  # with the underscore where it changes an argument
        assert len(names & vars(ops).keys()) == 1
        assert names & vars(ops).keys() == names & vars(reference).keys() == names & vars(ops._C).keys()
