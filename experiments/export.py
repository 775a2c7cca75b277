"""Export a trained encoder: python -m experiments.export ckpt_path=FILE|RUN|last [out=DIR]

Writes, by default to the folder `export` in the run's directory: encoder.safetensors, the encoder's
parameters; encoder.pt2, a torch.export program from uint8 images to features, which needs torch
alone; and README.md, the model card. What was written is loaded back and compared.
"""

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from experiments import model_card
from experiments.command_line import USER_ERRORS, one_line_errors
from experiments.errors import UserError
from experiments.quiet import silence_routine_messages
from experiments.saved_run import SavedRun, load_run


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
        run = load_run(arguments)
        out = Path(run.config.out or run.directory / "export")
        if out.exists():
            raise UserError(f"{out} is there already: choose another out=, or remove it")
        export(run, out)
    print(f"wrote {out}: encoder.safetensors, encoder.pt2 and its model card, README.md")


def export(run: SavedRun, out: Path) -> None:
    """Write the three files to the folder `out`, whole or not at all."""
    encoder = run.config.model.encoder
    if encoder.get("compile"):
        encoder.compile = False  # what torch.compile has made cannot be exported
    model = run.model().float()
    features = Features(model.encoder, model.views).eval()
    size = run.config.data.image_size
    images = torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8)
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        program = torch.export.export(features, (images,), dynamic_shapes=({0: batch},))
    temporary = out.with_name(f".{out.name}.tmp")
    temporary.mkdir(parents=True)
    try:
        # in the usual layout: safetensors has no other
        parameters = {n: p.contiguous() for n, p in model.encoder.state_dict().items()}
        (temporary / "encoder.safetensors").write_bytes(save(parameters))
        torch.export.save(program, temporary / "encoder.pt2")
        (temporary / "README.md").write_text(model_card.write(run, model.encoder, images))
        check(temporary, run, features)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
    for name, found in loaded.items():
        error = (found - expected).norm() / expected.norm()
        if not error < 1e-5:  # float32 sums in another order
            raise RuntimeError(f"{name} gives other features than the model: off by {error:.1e}")


if __name__ == "__main__":
    main(sys.argv[1:])
