"""The model card of an exported encoder, in Markdown with the front matter of model hubs."""

import json
import platform
from importlib.metadata import PackageNotFoundError, version

import yaml
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from experiments.simclr.evaluation.report import ROWS, percent
from experiments.simclr.program.saved_run import SavedRun

PACKAGES = ("cosloss", "torch", "torchvision", "lightning", "safetensors")

ONNX = """
`encoder.onnx` takes the same, for ONNX Runtime:

```python
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("encoder.onnx")
images = np.random.randint(0, 256, ({shape}), dtype=np.uint8)
(features,) = session.run(["features"], {{"images": images}})
```
"""


def write(run: SavedRun, encoder: nn.Module, images: Tensor) -> str:
    """The card's text; `images` are uint8 examples of what the encoder takes."""
    config = run.config
    _, channels, height, width = images.shape
    target = config.model.encoder["_target_"]
    module, _, name = target.rpartition(".")
    model = config.model.encoder.get("name", name)
    front = {
        "library_name": "pytorch",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["self-supervised", "simclr", "cosine-similarity"],
    }
    onnx = (
        ONNX.format(shape=f"4, {channels}, {height}, {width}")
        if run.settings["format"] == "onnx"
        else ""
    )
    saved = {"checkpoint": run.path.name, "steps": run.step}
    return f"""---
{yaml.safe_dump(front, sort_keys=False)}---

# {model} trained by SimCLR on {config.data["_target_"].rpartition(".")[2]}

- data: `{_call(config.data)}`
- loss: `{_call(config.model.loss)}`
- trained for {run.step:,} steps of {config.data.batch_size} images on each of its devices
- {encoder.num_features} features, {sum(p.numel() for p in encoder.parameters()):,} parameters

## Use

`encoder.pt2` takes any number of uint8 images, normalises them and needs torch alone:

```python
import torch

encoder = torch.export.load("encoder.pt2").module()
images = torch.randint(0, 256, (4, {channels}, {height}, {width}), dtype=torch.uint8)
features = encoder(images)  # float32, (4, {encoder.num_features})
```
{onnx}
`encoder.safetensors` holds the parameters, for use with the source of cosloss. This encoder takes
float32 images that the `views.normalize` of the configuration below has normalised:

```python
from safetensors.torch import load_file

from {module} import {name}

encoder = {_call(run.encoder_config)}
encoder.load_state_dict(load_file("encoder.safetensors"))
encoder.eval()
```

## Measured

{_scores(run)}

## Configuration

```yaml
{yaml.safe_dump(saved | OmegaConf.to_container(_trained(config)), sort_keys=False)}```

## Versions

Python {platform.python_version()}, {", ".join(f"{p} {_version(p)}" for p in PACKAGES)}.
"""


def _call(config: DictConfig) -> str:
    """Name(key=value, ...) of what the configuration builds."""
    values = OmegaConf.to_container(config, resolve=True)
    assert isinstance(values, dict)
    name = str(values.pop("_target_")).rpartition(".")[2]
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in values.items())})"


def _trained(config: DictConfig) -> DictConfig:
    # the model's copy of the loss, the optimizer and the augmentation is the one that was used
    return OmegaConf.masked_copy(config, ["name", "seed", "data", "model", "trainer"])


def _scores(run: SavedRun) -> str:
    """A table of the accuracies that were measured with exactly this checkpoint."""
    measured = {}
    for path in (run.directory / "results.json", run.directory / "evaluation/results.json"):
        if path.exists():
            results = json.loads(path.read_text())
            if results.get("steps") == run.step:
                measured[results["data"]] = results
    if not measured:
        return f"Not yet: `python evaluate.py ckpt_path={run.path}`, then export again."
    rows = [f"| | {' | '.join(measured)} |", "|---" * (len(measured) + 1) + "|"]
    for name, title in ROWS.items():
        figures = (
            percent(results[name], results.get("not_measured", "")) for results in measured.values()
        )
        rows.append(f"| {title} | {' | '.join(figures)} |")
    return "\n".join(rows)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # used from its source, without being installed
        return "from source"
