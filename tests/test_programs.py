"""evaluate.py, experiments.embed and experiments.export from a shell: output and signals."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PROGRAMS = ("evaluate", "experiments.embed", "experiments.export")
WRITTEN = dict(zip(PROGRAMS, ("results.json", "index.html", "encoder.pt2"), strict=True))


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_reader_that_has_gone_and_an_encoding_that_lacks_letters_cost_nothing(
    program, smoke_run, tmp_path
):
    out = tmp_path / "Bäume"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", program, f"ckpt_path={smoke_run}", f"out='{out}'"],
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        stdout=writer,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writer)
    assert done.returncode == 0, done.stderr
    assert (out / WRITTEN[program]).exists()


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("place", ["import of torch", "check_fits"])
def test_a_signal_ends_it_with_its_status_and_a_line_and_leaves_nothing(
    program, place, smoke_run, tmp_path
):
    if place == "check_fits":
        when = "from experiments.simclr.program import saved_run as m; m.check_fits = interrupt"
    else:
        (tmp_path / "torch.py").write_text("import os\nos.kill(os.getpid(), 15)\n")
        when = f"sys.path.insert(0, {str(tmp_path)!r})"
    arguments = [program, f"ckpt_path={smoke_run}", f"out={tmp_path}/out"]
    code = f"""
import os, runpy, sys
def interrupt(*arguments):
    os.kill(os.getpid(), {signal.SIGTERM.value})
{when}
sys.argv = {arguments}
runpy.run_module({program!r}, run_name="__main__")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    said = (done.stdout + done.stderr).strip().splitlines()
    assert said[-1] == "SIGTERM: ended before there was anything to save"
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("*out*"))
