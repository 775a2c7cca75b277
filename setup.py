"""The CPU kernels, compiled once per level of vector instructions; all else is in pyproject.toml.

They hold no symbol of Python's or torch's: one wheel per platform is for every version of both.
Without a compiler that will do, the installation goes on, and eager operations compute.
"""

import platform
import re
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

FOLDER = Path("cosloss/kernels/native")
AVX512 = ["-march=x86-64-v4", "-mprefer-vector-width=512"]
LEVELS = {
    "avx512_bf16": [*AVX512, "-mavx512bf16"],
    "avx512": AVX512,
    "avx2": ["-march=x86-64-v3"],
    "baseline": [],
}
if platform.machine().lower() not in ("x86_64", "amd64"):
    LEVELS = {"baseline": []}  # of Arm NEON is in it
# errno and traps are not looked at; otherwise arithmetic is as IEEE 754 has it
OPTIONS = ["-std=c++17", "-O3", "-g0", "-fno-math-errno", "-fno-trapping-math"]
# torch has loaded the OpenMP that the kernels then find: none is linked
OPENMP, LINK = ["-fopenmp"], []
if sys.platform == "darwin":
    OPENMP, LINK = ["-Xpreprocessor", "-fopenmp"], ["-undefined", "dynamic_lookup"]
OLDEST_GLIBC = (2, 28)  # of the manylinux tag

# by its path: an import of cosloss would import torch, which a build goes without
spec = spec_from_file_location("stamp", FOLDER / "stamp.py")
stamp = module_from_spec(spec)
spec.loader.exec_module(stamp)


class BuildPython(build_py):
    """Writes the stamp beside the Python of a wheel, which leaves the sources out."""

    def run(self):
        super().run()
        if not self.editable_mode:
            Path(self.build_lib, FOLDER, stamp.WRITTEN).write_text(f"{stamp.stamp_of(FOLDER)}\n")


class BuildKernels(build_ext):
    """Begins without the kernels from before: no file's time tells of a stamp that changed, and one
    that no longer compiles must not stay.
    """

    def run(self):
        for folder in [self.build_lib, "."] if self.inplace else [self.build_lib]:
            for path in Path(folder, FOLDER).glob("_*.so"):
                path.unlink()
        super().run()

    def get_ext_filename(self, name):
        return f"{name.replace('.', '/')}.so"  # of no Python's version

    def build_extensions(self):
        if sys.platform == "linux" and self._is_clang():
            print(
                "cosloss: kernels are not compiled: clang's OpenMP is not the one in torch's Linux "
                "wheels; with GCC: CC=gcc CXX=g++ pip install --force-reinstall --no-deps .",
                file=sys.stderr,
            )
            self.extensions = []
        super().build_extensions()

    def _is_clang(self):
        compiler = getattr(self.compiler, "compiler_so_cxx", self.compiler.compiler_so)
        command = [*compiler[:1], "-dM", "-E", "-x", "c++", "/dev/null"]
        try:
            macros = subprocess.run(command, capture_output=True, text=True).stdout
        except OSError:  # there is none
            return False
        return "__clang__" in macros


class PlatformWheel(bdist_wheel):
    """For any Python, of the platform that its kernels need, or of any without kernels."""

    def get_tag(self):
        kernels = list(Path(self.bdist_dir).rglob("_*.so")) if self.bdist_dir else []
        if not kernels:
            return "py3", "none", "any"
        _, _, tag = super().get_tag()
        machine = tag.removeprefix("linux_")
        if machine != tag and _newest_glibc(kernels) <= OLDEST_GLIBC:
            tag = f"manylinux_{OLDEST_GLIBC[0]}_{OLDEST_GLIBC[1]}_{machine}"
        return "py3", "none", tag


def _newest_glibc(libraries):
    """The newest version of glibc that these ask for, which their string tables name."""
    wanted = [re.findall(rb"GLIBC_(\d+)\.(\d+)", path.read_bytes()) for path in libraries]
    versions = [(int(major), int(minor)) for found in wanted for major, minor in found]
    return max(versions, default=(sys.maxsize, 0))  # another C library has other tags


setup(
    cmdclass={"build_py": BuildPython, "build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
    # a folder on the path, which type checkers and editors follow, and no import hook
    options={"editable_wheel": {"mode": "compat"}},
    ext_modules=[
        Extension(
            f"cosloss.kernels.native._{level}",
            [str(path) for path in stamp.sources(FOLDER, [".cpp"])],
            depends=[str(path) for path in stamp.sources(FOLDER, [".h"])],
            define_macros=[("COSLOSS_STAMP", f'"{stamp.stamp_of(FOLDER)}"')],
            extra_compile_args=[*OPTIONS, *OPENMP, *options],
            extra_link_args=LINK,
            optional=True,
        )
        for level, options in LEVELS.items()
    ],
)
