"""The CPU kernels, compiled once per level of vector instructions; all else is in pyproject.toml.

Without a compiler the installation goes on, and the eager kernels do their work.
"""

from pathlib import Path

from setuptools import Extension, setup

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

setup(
    ext_modules=[
        Extension(
            f"cosloss.kernels.native._{level}",
            sorted(map(str, FOLDER.glob("*.cpp"))),
            depends=sorted(map(str, FOLDER.glob("*.h"))),
            extra_compile_args=[*OPTIONS, *options],
            # no -fopenmp here: torch has loaded the OpenMP that the kernels then find
            optional=True,
        )
        for level, options in LEVELS.items()
    ]
)
