"""What computes here, and why nothing faster: python -m cosloss"""

import os
import platform
import warnings
from importlib.metadata import PackageNotFoundError, version

import torch

from cosloss.kernels import dispatch
from cosloss.kernels.native import library


def report() -> str:
    """A few lines: versions, the CPU's kernels, the GPU's, the choice that the user made."""
    forced = os.environ.get("COSLOSS_BACKEND")
    lines = {
        "cosloss": f"{_version('cosloss')}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}",
        "CPU": f"{torch.get_num_threads()} threads; {_cpu()}",
        "GPU": _gpu(),
        "COSLOSS_BACKEND": f"{forced}, which computes everything" if forced else "not set",
    }
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines.items())


def _cpu() -> str:
    lacking, best = library.absence(), library.usable()[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is said here
        build = library.build()
    if build is None:
        return f"eager operations, which are slower. {lacking}"
    if lacking is not None:
        return f"compiled kernels, build {build} in place of {best}. {lacking}"
    return f"compiled kernels, build {build}, the best for this CPU"


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    name = torch.cuda.get_device_name()
    triton = _version("triton")
    if dispatch.runs_triton(torch.device("cuda", torch.cuda.current_device())):
        return f"{name}: Triton {triton} kernels"
    if triton is None:
        return f"{name}: eager operations, since Triton is not installed: `pip install triton`"
    oldest = ".".join(map(str, dispatch.OLDEST_GPU))
    return f"{name}: eager operations, since Triton needs compute capability {oldest}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    print(report())
