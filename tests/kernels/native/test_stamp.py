"""A library of other sources than the Python beside it is told by its stamp, and never called."""

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from cosloss.kernels import dispatch
from cosloss.kernels.native import library, stamp

from .conftest import forgotten

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")

ROOT = Path(__file__).parents[3]
NATIVE = ROOT / "cosloss" / "kernels" / "native"
SUFFIX = ".so"
STEPS = """
import sys
import torch
import cosloss
from cosloss.kernels import dispatch

assert cosloss.__file__.startswith(sys.argv[1]), cosloss.__file__
torch.manual_seed(0)
z1, z2 = (torch.randn(40, 24, requires_grad=True) for _ in range(2))


def step():
    loss = cosloss.nt_xent_loss(z1, z2) + cosloss.cosine_similarity(z1, z2).sum()
    return loss, *torch.autograd.grad(loss, (z1, z2))


found = step(), step()
with dispatch.use("eager"):
    torch.testing.assert_close(found, (step(), step()), rtol=0, atol=0)
"""
SAYS_ITS_STAMP = 'extern "C" const char* cosloss_stamp() { return COSLOSS_STAMP; }\n'


def compile_library(sources, path, its_stamp="other"):
    options = ["-std=c++17", "-O1", "-fPIC", "-shared", "-fopenmp-simd", "-w"]
    define = f'-DCOSLOSS_STAMP="{its_stamp}"'
    subprocess.run(["g++", *options, define, *map(str, sources), "-o", str(path)], check=True)


@pytest.fixture
def compiled():
    """Unlike in conftest.py, nothing is skipped: here the library may be one that is not used."""


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """`library_of(its_stamp)`: a library without a kernel that has this stamp, or None."""
    folder = tmp_path_factory.mktemp("libraries")
    source = folder / "library.cpp"

    def library_of(its_stamp):
        path = folder / f"{its_stamp}.so"
        if not path.exists():
            source.write_text("" if its_stamp is None else SAYS_ITS_STAMP)
            compile_library([source], path, its_stamp)
        return path

    return library_of


@pytest.fixture
def installed(tmp_path, monkeypatch, libraries):
    """`installed(avx2=..., baseline=...)`: the builds that there are, by their stamps."""
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    monkeypatch.setattr(library, "usable", lambda: ("avx2", "baseline"))

    def install(**stamps):
        for build, its_stamp in stamps.items():
            shutil.copy(libraries(its_stamp), tmp_path / f"_{build}{SUFFIX}")
        return tmp_path

    following = forgotten()
    next(following)
    yield install
    next(following, None)


@pytest.fixture
def checkout(installed):
    """As `installed`, with sources whose stamp `fresh` stands for."""

    def install(**stamps):
        folder = installed()
        (folder / "one.cpp").write_text("int one;")
        fresh = stamp.stamp_of(folder)
        return installed(**{build: fresh if s == "fresh" else s for build, s in stamps.items()})

    return install


def silently_loaded():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return library.loaded()


@pytest.mark.slow
def test_changed_sources_beside_old_kernels_are_computed_by_eager(tmp_path):
    """In a process of its own: a mirror of a struct that has changed would end it."""
    package, changed = tmp_path / "cosloss", tmp_path / "changed"
    shutil.copytree(ROOT / "cosloss", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copytree(package / "kernels" / "native", changed)
    for name, line, field in (
        ("params.h", "struct InBatchParams {", "  int64_t inserted;"),
        ("library.cpp", "constexpr Field FIELDS[] = {", "    FIELD(inserted),"),
    ):
        text = (changed / name).read_text()
        assert line in text
        (changed / name).write_text(text.replace(line, f"{line}\n{field}"))
    path = package / "kernels" / "native" / f"_baseline{SUFFIX}"
    compile_library(stamp.sources(changed, [".cpp"]), path, stamp.stamp_of(changed))

    def run(**environment):
        program = [sys.executable, "-c", STEPS, str(tmp_path)]
        environment = os.environ | {"PYTHONPATH": str(tmp_path)} | environment
        return subprocess.run(
            program, capture_output=True, text=True, cwd=tmp_path, env=environment
        )

    done = run()
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("UserWarning") == 1
    for fact in (stamp.stamp_of(changed), stamp.stamp_of(NATIVE), "pip install -e .", "eager"):
        assert fact in done.stderr
    done = run(COSLOSS_BACKEND="native")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("RuntimeError: backend native: _baseline")
    assert "pip install -e ." in last


def test_kernels_of_the_same_sources_are_used(checkout):
    checkout(avx2="fresh", baseline="other")
    assert silently_loaded()._name.endswith(f"_avx2{SUFFIX}")


@pytest.mark.parametrize(
    ("its_stamp", "told"), [("other", "the C\\+\\+ sources other"), (None, "without a stamp")]
)
def test_other_kernels_are_not_used(checkout, its_stamp, told):
    checkout(avx2=its_stamp, baseline=its_stamp)
    with pytest.warns(UserWarning, match=f"_avx2.*{told}.*pip install -e \\..*eager") as told_of:
        assert library.loaded() is None
    assert len(told_of) == 1
    assert silently_loaded() is None  # it has been said
    with dispatch.use("native"), pytest.raises(RuntimeError, match=r"_avx2.*pip install -e \."):
        dispatch.wants_native()


def test_a_lesser_build_is_used_only_with_its_own_stamp(checkout):
    checkout(avx2="other", baseline="fresh")
    with pytest.warns(UserWarning, match=r"_avx2.*pip install -e \..*_baseline") as told_of:
        assert library.loaded()._name.endswith(f"_baseline{SUFFIX}")
    assert len(told_of) == 1


def test_without_kernels_it_is_said_once(checkout, installed):
    checkout()
    with pytest.warns(
        UserWarning, match=r"without its compiled .*pip install -e \..*eager"
    ) as told:
        assert library.loaded() is None
    assert len(told) == 1
    assert silently_loaded() is None


def test_a_wheel_without_kernels_says_how_to_get_them(installed):
    installed()
    with pytest.warns(UserWarning, match=r"without its compiled .*pip install --force-reinstall"):
        assert library.loaded() is None


def test_kernels_that_do_not_load_are_said_once_with_the_reason(installed, tmp_path):
    installed()
    (tmp_path / f"_avx2{SUFFIX}").write_text("not a library")
    with pytest.warns(
        UserWarning, match=r"_avx2.so does not load \(.*file too short.*eager"
    ) as told:
        assert library.loaded() is None
    assert len(told) == 1


def test_tensors_that_no_compiled_kernel_takes_do_not_ask_for_one(installed):
    installed()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not dispatch.wants_native(torch.ones(2, 3, device="meta"))


def test_a_wheels_kernels_are_those_of_the_stamp_that_was_written_down(installed):
    folder = installed(baseline="other")
    (folder / stamp.WRITTEN).write_text("other\n")
    assert silently_loaded() is not None


@pytest.mark.parametrize("written", ["another\n", "", None])
@pytest.mark.parametrize("its_stamp", ["other", "", None])
def test_a_wheel_with_other_kernels_is_to_be_installed_again(installed, its_stamp, written):
    folder = installed(baseline=its_stamp)
    if written is not None:
        (folder / stamp.WRITTEN).write_text(written)
    with pytest.warns(UserWarning, match=r"_baseline.*pip install --force-reinstall") as told_of:
        assert library.loaded() is None
    assert len(told_of) == 1


def test_every_build_has_the_stamp_of_the_sources():
    expected = stamp.stamp_of(NATIVE)
    builds = [path for path in (NATIVE / f"_{b}{SUFFIX}" for b in library.BUILDS) if path.exists()]
    if not builds:
        pytest.skip("the kernels are not compiled")
    assert [path.name for path in builds if expected.encode() not in path.read_bytes()] == []


def test_a_stamp_is_of_names_and_contents(tmp_path):
    def stamp_of(**files):
        for path in tmp_path.iterdir():
            path.unlink()
        for name, text in files.items():
            (tmp_path / name.replace("_", ".")).write_text(text)
        return stamp.stamp_of(tmp_path)

    assert stamp_of() is None
    assert stamp_of(a_cpp="x", b_h="y") == stamp_of(b_h="y", a_cpp="x", a_py="z")
    cases = [{"a_cpp": "x"}, {"b_cpp": "x"}, {"a_cpp": "y"}, {"a_h": "x"}]
    cases += [{"a_cpp": "x", "a_h": ""}, {"a_cpp": "x", "b_h": "y"}, {"a_cpp": "y", "b_h": "x"}]
    cases += [{"a_cpp": "xb.h\ny"}]  # as two files would read without their lengths
    assert len({stamp_of(**files) for files in cases}) == len(cases)


def test_setup_compiles_every_build_again_and_leaves_none_behind(tmp_path):
    """With a source that says its stamp and a header, of which setuptools sees no change."""
    pytest.importorskip("setuptools")
    folder = tmp_path / NATIVE.relative_to(ROOT)
    folder.mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copy(NATIVE / "stamp.py", folder)
    source, header = folder / "library.cpp", folder / "params.h"
    source.write_text(SAYS_ITS_STAMP)

    def build(command, *options):
        program = [sys.executable, "setup.py", "--quiet", command, *options]
        subprocess.run(program, cwd=tmp_path, check=True, capture_output=True)

    def builds():
        return [path.read_bytes() for path in sorted(folder.glob("*.so"))]

    for text in ("// one", "// two"):
        header.write_text(text)
        os.utime(header, (0, 0))
        build("build_ext", "--inplace")
        expected = stamp.stamp_of(folder)
        assert [expected.encode() in binary for binary in builds()] == 4 * [True]
    build("build_py", "--build-lib", str(tmp_path / "wheel"))
    (written,) = (tmp_path / "wheel").rglob(stamp.WRITTEN)
    assert written.read_text().split() == [expected]
    assert not (folder / stamp.WRITTEN).exists()
    source.write_text("it does not compile")
    build("build_ext", "--inplace")
    assert builds() == []
