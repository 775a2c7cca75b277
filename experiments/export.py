"""Export an encoder: python -m experiments.export ckpt_path=FILE|RUN|last [out=DIR] [format=onnx]

Writes, by default to the folder `export` in the run's directory: encoder.safetensors, the encoder's
parameters; encoder.pt2, a torch.export program from uint8 images to features, which needs torch
alone; with format=onnx (extra: onnx) encoder.onnx, the same for ONNX Runtime; and README.md, the
model card. What was written is loaded back and compared.
"""

if __name__ == "__main__":  # before the imports, which take seconds
    from experiments.simclr.program.interruption import end_at_signals

    end_at_signals()

import shutil
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from experiments.simclr.evaluation import model_card
from experiments.simclr.program.command_line import USER_ERRORS, command, one_line_errors
from experiments.simclr.program.errors import UserError
from experiments.simclr.program.quiet import silence_routine_messages
from experiments.simclr.program.saved_run import SavedRun, load_run

CARD = "README.md"
FORMATS = ("torch", "onnx")
ONNX = ("onnx", "onnxscript", "onnxruntime")


class Features(nn.Module):
    """Features (B, F) of uint8 images (B, 3, H, W): the encoder and what normalises its inputs."""

    def __init__(self, encoder: nn.Module, views: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.views = views

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder(self.views.normalize(images))


def main(arguments: list[str]) -> None:
    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    silence_routine_messages()
    with one_line_errors(expected=(*USER_ERRORS, ValueError, TypeError)):
        run = load_run(arguments, {"format": "torch"})
        if run.settings["format"] not in FORMATS:
            raise UserError(f"format must be torch or onnx; got {run.settings['format']}")
        if run.settings["format"] == "onnx" and not all(map(find_spec, ONNX)):
            raise UserError('format=onnx needs the extra onnx: pip install -e ".[onnx]"')
        out = Path(run.config.out or run.directory / "export")
        if out.exists():
            raise UserError(f"{out} is there already: choose another out=, or remove it")
        export(run, out)
    written = ", ".join(sorted(path.name for path in out.iterdir() if path.name != CARD))
    print(f"wrote {out}: {written} and their model card, {CARD}")


def export(run: SavedRun, out: Path) -> None:
    """Write the files to the folder `out`, whole or not at all."""
    run.never_compile()  # what torch.compile has made cannot be exported
    model = run.model().float()
    # what is saved has this layout, and torch.export warns of others
    model.encoder.to(memory_format=torch.contiguous_format)
    features = Features(model.encoder, model.views).eval()
    size = run.config.data.image_size
    images = torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8)
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        program = torch.export.export(features, (images,), dynamic_shapes=({0: batch},))
    temporary = out.with_name(f".{out.name}.tmp")
    temporary.mkdir(parents=True)
    try:
        parameters = {n: p.contiguous() for n, p in model.encoder.state_dict().items()}
        (temporary / "encoder.safetensors").write_bytes(save(parameters))
        torch.export.save(program, temporary / "encoder.pt2")
        if run.settings["format"] == "onnx":
            write_onnx(features, images, temporary / "encoder.onnx")
        (temporary / CARD).write_text(model_card.write(run, model.encoder, images))
        check(temporary, run, features)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_onnx(features: nn.Module, images: Tensor, path: Path) -> None:
    """Write the program from any number of uint8 `images` to `features`."""
    names = {"input_names": ["images"], "output_names": ["features"]}
    shapes = {"images": {0: "batch"}}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of what torch itself will change one day
        program = torch.onnx.export(
            features, (images,), **names, dynamic_shapes=shapes, dynamo=True, verbose=False
        )
    program.save(path)


def check(folder: Path, run: SavedRun, features: Features) -> None:
    """Raise RuntimeError unless what the folder holds gives the features of the model."""
    size = run.config.data.image_size
    images = torch.randint(0, 256, (5, 3, size, size), dtype=torch.uint8)
    encoder = run.new_encoder()
    encoder.load_state_dict(load_file(folder / "encoder.safetensors"))
    program = torch.export.load(folder / "encoder.pt2").module()
    with torch.no_grad():
        expected = features(images)
        loaded = {
            "encoder.safetensors": Features(encoder.eval(), features.views)(images),
            "encoder.pt2": program(images),
        }
    if (path := folder / "encoder.onnx").exists():
        loaded["encoder.onnx"] = run_onnx(path, images)
    for name, found in loaded.items():
        error = (found - expected).norm() / expected.norm()
        if not error < 1e-5:  # float32 sums in another order
            raise RuntimeError(f"{name} gives other features than the model: off by {error:.1e}")


def run_onnx(path: Path, images: Tensor) -> Tensor:
    """The features that ONNX Runtime computes, on the CPU, of the program at path."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["features"], {"images": images.numpy()})[0])


if __name__ == "__main__":
    with command():
        main(sys.argv[1:])
