"""The CPU kernels, compiled once per level of vector instructions; all else is in pyproject.toml.

Without a compiler the installation goes on, and the eager kernels do their work.
"""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from setuptools import Extension, setup
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
# errno and traps are not looked at; otherwise arithmetic is as IEEE 754 has it
OPTIONS = ["-std=c++17", "-O3", "-g0", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"]

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
            for extension in self.extensions:
                Path(folder, self.get_ext_filename(extension.name)).unlink(missing_ok=True)
        super().run()


setup(
    cmdclass={"build_py": BuildPython, "build_ext": BuildKernels},
    ext_modules=[
        Extension(
            f"cosloss.kernels.native._{level}",
            [str(path) for path in stamp.sources(FOLDER, [".cpp"])],
            depends=[str(path) for path in stamp.sources(FOLDER, [".h"])],
            define_macros=[("COSLOSS_STAMP", f'"{stamp.stamp_of(FOLDER)}"')],
            extra_compile_args=[*OPTIONS, *options],
            # no -fopenmp here: torch has loaded the OpenMP that the kernels then find
            optional=True,
        )
        for level, options in LEVELS.items()
    ],
)
