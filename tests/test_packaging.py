"""What is built and installed: the sdist, the wheel, `python -m cosloss`, types for editors."""

import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from cosloss import __main__ as program
from cosloss.kernels.native import library

ROOT = Path(__file__).parents[1]
LEFT_OUT = (".", "dist/", "cosloss.egg-info/")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the files that git knows, or that are new to it, where a build leaves its files."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    folder = tmp_path_factory.mktemp("checkout")
    for name in listed.stdout.splitlines():
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def setup(folder, *arguments):
    # -B: the folder stays free of what this process compiles
    command = [sys.executable, "-B", "setup.py", "--quiet", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_sdist_has_all_that_its_tests_and_programs_need(checkout):
    setup(checkout, "sdist")
    (path,) = (checkout / "dist").glob("cosloss-*.tar.gz")
    with tarfile.open(path) as archive:
        packed = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    tracked = {str(p.relative_to(checkout)) for p in checkout.rglob("*") if p.is_file()}
    wanted = {p for p in tracked if not p.startswith(LEFT_OUT)}
    assert wanted - packed == set()
    assert not [p for p in packed if p.endswith((".so", ".pyc"))]


def test_a_wheel_without_kernels_is_for_every_platform(checkout, monkeypatch):
    monkeypatch.setenv("CC", "false")
    monkeypatch.setenv("CXX", "false")
    setup(checkout, "bdist_wheel", "--dist-dir", "uncompiled")
    (path,) = (checkout / "uncompiled").iterdir()
    assert path.name.endswith("-py3-none-any.whl")


@pytest.mark.skipif(shutil.which("clang++") is None, reason="clang is not installed")
@pytest.mark.skipif(sys.platform != "linux", reason="it is the compiler there")
def test_clang_is_refused_in_one_line(checkout, monkeypatch):
    monkeypatch.setenv("CC", "clang")
    monkeypatch.setenv("CXX", "clang++")
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", "of_clang"]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("cosloss:")]
    assert "with GCC: CC=gcc CXX=g++ pip install" in line
    assert not list((checkout / "of_clang").rglob("*.so"))


def test_every_python_and_system_of_2018_can_load_the_kernels():
    builds = list(library.FOLDER.glob("_*.so"))
    if not builds or sys.platform != "linux":
        pytest.skip("the kernels are not compiled")
    for path in builds:
        content = path.read_bytes()
        assert not re.findall(rb"_?Py[A-Z_]\w+|c10|aten", content), path.name
        newest = max((int(a), int(b)) for a, b in re.findall(rb"GLIBC_(\d+)\.(\d+)", content))
        assert newest <= (2, 28), path.name
        assert re.fullmatch(r"_\w+\.so", path.name)


def test_python_m_cosloss_says_what_computes():
    done = subprocess.run([sys.executable, "-m", "cosloss"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr == ""
    for fact in (torch.__version__, f"{sys.version_info.major}.{sys.version_info.minor}", "GPU"):
        assert fact in done.stdout
    if library.build() is not None:
        assert f"build {library.build()}" in done.stdout


def test_python_m_cosloss_says_what_to_type_where_nothing_is_compiled(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    library.loaded.cache_clear()
    try:
        report = program.report()
    finally:
        library.loaded.cache_clear()
    assert "eager operations, which are slower" in report
    assert "pip install --force-reinstall --no-deps ." in report


def test_python_m_cosloss_tells_of_a_forced_backend(monkeypatch):
    monkeypatch.setenv("COSLOSS_BACKEND", "eager")
    assert "eager, which computes everything" in program.report()


@pytest.mark.slow
def test_type_checkers_follow_an_editable_installation(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "use.py").write_text("import cosloss\nreveal_type(cosloss.nt_xent_loss)\n")
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", "use.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert 'Revealed type is "def (z1:' in done.stdout, done.stdout
