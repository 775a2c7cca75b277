"""python -m experiments.export: what it writes gives the checkpoint's features."""

import re
import subprocess
import sys

import pytest
import torch
from hydra.utils import instantiate
from safetensors.torch import load_file

from experiments import export as program


@pytest.fixture
def export(in_process):
    """export("ckpt_path=...", ...) runs experiments.export."""
    return lambda *arguments: in_process(program.main, list(arguments))


@pytest.fixture
def exported(export, smoke_run, tmp_path):
    """The folder of an exported smoke run."""
    run = export(f"ckpt_path={smoke_run}", f"out={tmp_path}/out")
    assert run.status == 0, run.err
    assert f"{tmp_path}/out" in run.out
    return tmp_path / "out"


def trained(smoke_run):
    """The model of the run's last checkpoint, built here from the checkpoint alone."""
    saved = torch.load(smoke_run / "checkpoints/last.ckpt", weights_only=True)
    model = instantiate(saved["hyper_parameters"]["model"])
    model.load_state_dict(saved["state_dict"])
    return model.eval()


def images(rows):
    return torch.randint(0, 256, (rows, 3, 16, 16), dtype=torch.uint8)


@torch.no_grad()
def test_the_program_gives_the_models_features(exported, smoke_run):
    model, program = trained(smoke_run), torch.export.load(exported / "encoder.pt2").module()
    for rows in (1, 2, 7, 33):
        batch = images(rows)
        torch.testing.assert_close(program(batch), model(batch), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_the_parameters_give_the_models_features(exported, smoke_run):
    model, batch = trained(smoke_run), images(4)
    expected = model(batch)
    parameters = load_file(exported / "encoder.safetensors")
    assert parameters.keys() == model.encoder.state_dict().keys()
    for parameter in model.encoder.parameters():
        parameter.zero_()
    assert not torch.allclose(model(batch), expected)
    model.encoder.load_state_dict(parameters)
    assert torch.equal(model(batch), expected)


@pytest.mark.slow
def test_the_cards_code_runs_and_its_figures_are_the_runs(exported):
    card = (exported / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == 2
    # the program needs torch alone
    alone = f"import sys; sys.modules |= dict.fromkeys(['experiments', 'cosloss'])\n{blocks[0]}"
    code = f"{alone}\nassert features.shape == (4, 16), features.shape"
    subprocess.run([sys.executable, "-c", code], cwd=exported, check=True)
    names: dict = {}
    source = blocks[1].replace("encoder.safetensors", str(exported / "encoder.safetensors"))
    exec(source, names)
    assert not names["encoder"].training
    assert "RandomImages(batch_size=32" in card
    assert "CosineEmbeddingLoss(margin=0.0" in card
    assert "| test k-NN accuracy | 8.3 % |" in card
    assert f"torch {torch.__version__.partition('+')[0]}" in card


def test_another_checkpoint_of_the_run_has_no_figures(export, smoke_run, tmp_path):
    saved = torch.load(smoke_run / "checkpoints/last.ckpt", weights_only=True)
    saved["global_step"] -= 1
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (tmp_path / "results.json").write_bytes((smoke_run / "results.json").read_bytes())
    torch.save(saved, folder / "last.ckpt")
    assert export(f"ckpt_path={tmp_path}").status == 0
    card = (tmp_path / "export/README.md").read_text()
    assert "python evaluate.py ckpt_path=" in card
    assert "k-NN accuracy" not in card


def test_an_existing_folder_and_a_failed_check_leave_nothing(
    export, smoke_run, tmp_path, monkeypatch
):
    (tmp_path / "mine").mkdir()
    run = export(f"ckpt_path={smoke_run}", f"out={tmp_path}/mine")
    assert run.status == 2
    assert "is there already" in run.err

    def wrong(data):
        return {name: value + 1 for name, value in load_file(data).items()}

    monkeypatch.setattr(program, "load_file", wrong)
    with pytest.raises(RuntimeError, match=r"encoder\.safetensors gives other features"):
        export(f"ckpt_path={smoke_run}", f"out={tmp_path}/out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]


@pytest.fixture
def onnx(export, smoke_run, tmp_path):
    """The folder of a smoke run exported for ONNX Runtime too."""
    for package in program.ONNX:
        pytest.importorskip(package, reason="needs the extra onnx")
    run = export(f"ckpt_path={smoke_run}", f"out={tmp_path}/out", "format=onnx")
    assert run.status == 0, run.err
    assert "encoder.onnx, encoder.pt2, encoder.safetensors" in run.out
    return tmp_path / "out"


@torch.no_grad()
def test_onnx_runtime_gives_the_models_features_of_any_number_of_images(onnx, smoke_run):
    import onnxruntime

    model, session = trained(smoke_run), onnxruntime.InferenceSession(onnx / "encoder.onnx")
    (takes,), (gives,) = session.get_inputs(), session.get_outputs()
    assert (takes.name, takes.type, takes.shape) == (
        "images",
        "tensor(uint8)",
        ["batch", 3, 16, 16],
    )
    assert (gives.name, gives.shape) == ("features", ["batch", 16])
    for rows in (1, 2, 33):
        batch = images(rows)
        found = torch.from_numpy(session.run(None, {"images": batch.numpy()})[0])
        torch.testing.assert_close(found, model(batch), rtol=1e-5, atol=1e-6)
    code = re.findall(r"```python\n(.*?)```", (onnx / "README.md").read_text(), re.DOTALL)[1]
    checked = f"{code}\nassert features.shape == (4, 16), features.shape"
    subprocess.run([sys.executable, "-c", checked], cwd=onnx, check=True)


def test_onnx_that_gives_other_features_is_not_left(export, smoke_run, tmp_path, monkeypatch):
    for package in program.ONNX:
        pytest.importorskip(package, reason="needs the extra onnx")
    monkeypatch.setattr(program, "run_onnx", lambda path, images: torch.ones(len(images), 16))
    with pytest.raises(RuntimeError, match=r"encoder\.onnx gives other features"):
        export(f"ckpt_path={smoke_run}", f"out={tmp_path}/out", "format=onnx")
    assert not list(tmp_path.iterdir())


def test_formats_that_are_not_there(export, smoke_run, tmp_path, monkeypatch):
    run = export(f"ckpt_path={smoke_run}", f"out={tmp_path}/out", "format=tflite")
    assert (run.status, run.err) == (2, "error: format must be torch or onnx; got tflite\n")
    monkeypatch.setattr(program, "find_spec", lambda name: None)
    run = export(f"ckpt_path={smoke_run}", f"out={tmp_path}/out", "format=onnx")
    assert run.status == 2
    assert 'pip install -e ".[onnx]"' in run.err
