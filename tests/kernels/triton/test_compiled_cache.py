"""Machine code is packed for a card, and unpacked elsewhere nothing is left to compile."""

import os
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_what_is_unpacked_is_not_compiled_again(tmp_path):
    def run(*arguments):
        command = [sys.executable, "-W", "ignore", "-m", "tests.kernels.triton.compiled_cache"]
        environment = {**os.environ, "TRITON_INTERPRET": "0"}
        done = subprocess.run(
            [*command, *map(str, arguments)], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()[-1]

    def names():
        return {path.relative_to(cache) for path in cache.rglob("*") if path.is_file()}

    some = "--ops", "cosine_embedding_loss", "--dtypes", "bfloat16"
    cache = tmp_path / "elsewhere"
    filled = run("fill", tmp_path / "cache.tar.xz", *some)
    assert " kernels for sm_90" in filled
    kernels = filled.split(": ")[1].split()[0]
    assert (
        run("unpack", tmp_path / "cache.tar.xz", "--cache", cache)
        == f"{cache}: {kernels} kernels more"
    )
    unpacked = names()
    assert {path.suffix for path in unpacked} == {".cubin", ".json"}
    run("fill", tmp_path / "again.tar.xz", *some, "--cache", cache)
    assert names() == unpacked  # a compilation would leave what it went through
