"""Builds d4s.ops._C by calling CMake against the torch of the target environment."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def flags_that_see_torch():
    """Interpreter flags with which `import torch` works here: [], ["-I"], ["-E"], or None where there is no torch.

    Under build isolation pip runs the target environment's own interpreter and hides the environment by
    PYTHONPATH, and the user's packages by PYTHONNOUSERSITE. -I ignores the first, and -E both, so the torch that
    d4s will run with is seen again. One that lies on the user's own PYTHONPATH is not: pip has written over that.
    """
    for flags in ([], ["-I"], ["-E"]):
        child = subprocess.run([sys.executable, *flags, "-c", "import torch"], capture_output=True)
        if child.returncode == 0:
            return flags
    return None


def cuda_compiler(last="/usr/local/cuda/bin"):
    """The nvcc that torch's own extensions take, in their order; "" where there is none.

    CMake by itself looks at CUDA_PATH and PATH only.
    """
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    folders = [*(f"{home}/bin" for home in homes if home), os.environ.get("PATH", ""), last]
    return shutil.which("nvcc", path=os.pathsep.join(folders)) or ""


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        flags = flags_that_see_torch()
        if flags is None:
            sys.exit(
                f"d4s is built against the torch it will run with, and {sys.executable} has none: "
                "install torch in the target environment, then run that environment's own 'pip install .'; "
                "'pip install --no-build-isolation .', with setuptools>=77, cmake and ninja installed, sees whatever "
                "torch 'import torch' finds"
            )
        build = Path(self.build_temp).resolve()
        options = [f"-DPython_EXECUTABLE={sys.executable}", f"-DD4S_PYTHON_FLAGS={';'.join(flags)}"]
        options += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        # --fresh: an earlier build's cache names a ninja that went away with its isolated environment.
        configure = ["cmake", "--fresh", "-S", ROOT, "-B", build, "-G", "Ninja", *options]
        subprocess.run(configure, check=True, env={"CUDACXX": cuda_compiler(), **os.environ})
        subprocess.run(["cmake", "--build", build], check=True)
        # CMake leaves the extension in d4s/ops/, so that Python started in the checkout finds it too.
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        if target.parent != ROOT / "d4s" / "ops":
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / "d4s" / "ops" / target.name, target)


# pip sets PYTHONNOUSERSITE while it builds in isolation with the target's own interpreter; only there does
# a torch fetched for the build agree with the one that the install then puts beside d4s.
fetch_torch = "PYTHONNOUSERSITE" in os.environ and flags_that_see_torch() is None

compiled = sorted(path for path in ROOT.glob("csrc/**/*") if path.is_file())
sources = ["CMakeLists.txt", *(str(path.relative_to(ROOT)) for path in compiled)]
setup(
    ext_modules=[Extension("d4s.ops._C", sources)],
    cmdclass={"build_ext": CMakeBuild},
    setup_requires=["torch>=2.6"] if fetch_torch else [],
)
