"""Encoders by name, weights from files, frozen encoders: what the parts around them rely on."""

import sys

import pytest
import torch
from safetensors.torch import save_file
from torchvision import models

from experiments.simclr import backbones
from experiments.simclr.augmentation import TwoViews
from experiments.simclr.backbones import input_size, load_weights, timm_encoder, torchvision_encoder
from experiments.simclr.encoders import ProjectionHead, SmallConvNet
from experiments.simclr.module import SimCLR
from experiments.simclr.program.errors import UserError

# every way in which torchvision ends a classifier
TORCHVISION = {
    "resnet18": 512,
    "mobilenet_v3_small": 1024,
    "squeezenet1_1": 512,
    "googlenet": 1024,
    "vit_b_32": 768,
    "swin_t": 768,
    "convnext_tiny": 768,
    "alexnet": 4096,
    "densenet121": 1024,
}


@pytest.mark.filterwarnings("ignore:The default weight initialization of GoogleNet")
@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvisions_models_without_their_classifier(name):
    size = 64
    with torch.device("meta"):  # shapes alone: nothing is initialised or computed
        encoder = torchvision_encoder(name, size)
        features = encoder.train()(torch.zeros(2, 3, size, size))
        whole = models.get_model(name, weights=None)
    assert features.shape == (2, TORCHVISION[name]) == (2, encoder.num_features)
    last = whole.get_submodule(encoder.dropped_head)
    assert getattr(last, "in_features", getattr(last, "in_channels", None)) == TORCHVISION[name]


@pytest.mark.parametrize(
    ("name", "features", "own_size"),
    [
        ("resnet18", 512, 224),
        ("mobilenetv3_small_050", 1024, 224),  # whose features are not its num_features
        ("vit_tiny_patch16_224", 192, 224),
        ("test_convnext", 64, 160),
    ],
)
def test_timms_models_without_their_classifier(name, features, own_size):
    pytest.importorskip("timm", reason="needs the extra timm")
    encoder = timm_encoder(name, 32).eval()
    assert encoder(torch.zeros(2, 3, 32, 32)).shape == (2, features) == (2, encoder.num_features)
    assert input_size("timm", name) == own_size


@pytest.mark.parametrize(
    ("build", "name", "message"),
    [
        (timm_encoder, "resnet81", "timm has no model 'resnet81'; near it there are .*resnet18"),
        (
            timm_encoder,
            "resnet18.nothing",
            r"no model 'resnet18.nothing'; near it .*resnet18\.[a-z0-9]+_in1k",
        ),
        (
            torchvision_encoder,
            "resnet81",
            "torchvision has no model 'resnet81'; near it .*resnet18",
        ),
        (torchvision_encoder, "fcn_resnet50", "torchvision has no model 'fcn_resnet50'"),
    ],
)
def test_an_unknown_name_is_answered_with_names_near_it(build, name, message):
    if build is timm_encoder:
        pytest.importorskip("timm", reason="needs the extra timm")
    with pytest.raises(UserError, match=message):
        build(name, 64)


def test_images_that_a_model_cannot_take_are_refused_with_its_size():
    with pytest.raises(UserError, match=r"alexnet takes no images of 8 x 8.*image_size=224"):
        torchvision_encoder("alexnet", 8)


def test_without_timm_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r'pip install -e "\.\[timm\]"'):
        timm_encoder("resnet18", 32)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_without_a_network_a_file_is_asked_for(monkeypatch, library):
    def unreachable(*arguments, **keywords):
        raise OSError("<urlopen error [Errno 111] Connection refused>\nand more")

    if library == "timm":
        timm = pytest.importorskip("timm", reason="needs the extra timm")
        monkeypatch.setattr(timm, "create_model", unreachable)
    else:
        monkeypatch.setattr(torch.hub, "load_state_dict_from_url", unreachable)
        monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    with pytest.raises(UserError, match=r"Connection refused.*model\.weights=FILE") as raised:
        getattr(backbones, f"{library}_encoder")("resnet18", 32, pretrained=True)
    assert "\n" not in str(raised.value)


def head_and_all():
    """torchvision's ResNet-18 as it is downloaded, and its features of some images."""
    torch.manual_seed(1)
    net = models.resnet18(weights=None).eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        hidden = torch.nn.Sequential(*list(net.children())[:-1])(images).flatten(1)
    return net, images, hidden


@pytest.mark.parametrize(
    "form", ["plain", "safetensors", "nested", "prefixed", "with a head of its own"]
)
def test_weights_from_a_file(tmp_path, form):
    net, images, expected = head_and_all()
    state = net.state_dict()
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth")
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save(
            {
                "plain": state,
                "nested": {"epoch": 3, "model": state},
                "prefixed": {"state_dict": {f"module.backbone.{n}": v for n, v in state.items()}},
                "with a head of its own": {"projector.0.weight": torch.ones(3)}
                | {f"encoder.{n}": v for n, v in state.items() if not n.startswith("fc.")},
            }[form],
            path,
        )
    encoder = torchvision_encoder("resnet18", 32).eval()
    load_weights(encoder, str(path))
    with torch.no_grad():
        torch.testing.assert_close(encoder(images), expected)


def test_weights_of_timms_with_the_classifier_inside_a_head(tmp_path):
    timm = pytest.importorskip("timm", reason="needs the extra timm")
    whole = timm.create_model("test_convnext").eval()
    save_file(whole.state_dict(), tmp_path / "w.safetensors")
    encoder = timm_encoder("test_convnext", 160).eval()
    load_weights(encoder, str(tmp_path / "w.safetensors"))
    images = torch.rand(1, 3, 160, 160)
    with torch.no_grad():
        expected = whole.forward_head(whole.forward_features(images), pre_logits=True)
        torch.testing.assert_close(encoder(images), expected)


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (models.resnet34, "are too many, first layer1.2"),
        (models.mobilenet_v3_small, "not there, first conv1.weight"),
        (models.resnet50, "of another shape, first layer1.0.conv1.weight"),
    ],
)
def test_weights_of_another_model_are_refused(tmp_path, saved, message):
    torch.save(saved().state_dict(), tmp_path / "w.pth")
    encoder = torchvision_encoder("resnet18", 32)
    with pytest.raises(UserError, match=message):
        load_weights(encoder, str(tmp_path / "w.pth"))


@pytest.mark.parametrize("content", [b"", b"junk", None, "list"])
def test_what_is_no_file_of_weights_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "w.pth"
    if content == "list":
        torch.save([1, 2], path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"w\.pth") as raised:
        load_weights(SmallConvNet(4, 8), str(path))
    assert "\n" not in str(raised.value)


def simclr(encoder, **arguments):
    return SimCLR(
        encoder,
        lambda features: ProjectionHead(features, 8, 4),
        TwoViews(32, standardize_each=True),
        PairLoss(),
        lambda groups: torch.optim.SGD(groups, lr=0.1),
        **arguments,
    )


class PairLoss(torch.nn.Module):
    def forward(self, z1, z2):
        return (z1 - z2).square().mean()


def test_a_frozen_encoder_keeps_its_weights_and_its_statistics():
    model = simclr(SmallConvNet(4, 8), frozen=True).train()
    before = {name: value.clone() for name, value in model.encoder.state_dict().items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in model.projection_head.parameters()}
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    z1, z2 = (model.projection_head(model.encoder(view)) for view in model.views(images))
    model.loss(z1, z2).backward()
    torch.optim.SGD(trained, lr=1.0).step()
    for name, value in model.encoder.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not model.encoder.training
    assert model.projection_head.training


def test_the_encoders_own_normalisation_replaces_that_of_the_views():
    model = simclr(torchvision_encoder("resnet18", 32))
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    expected = models.ResNet18_Weights.DEFAULT.transforms(crop_size=32, resize_size=32)(images)
    torch.testing.assert_close(model.views.normalize(images), expected)
    assert not any(name.startswith("views") for name in model.state_dict())


def test_a_checkpoint_of_this_program_is_a_file_of_weights(smoke_run):
    encoder = SmallConvNet(8, 16)
    load_weights(encoder, str(smoke_run / "checkpoints/last.ckpt"))
    saved = torch.load(smoke_run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, saved[f"encoder.{name}"])


SMALL = (
    "experiment=finetune_imagefolder",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "trainer.max_epochs=1",
    "trainer.check_val_every_n_epoch=1",
    "data.batch_size=8",
    "callbacks=no_checks",
    "model.pretrained=false",
)


def test_the_recipe_trains_with_the_models_size_and_a_file_and_is_evaluated(
    train, in_process, tmp_path, pictures
):
    import evaluate

    timm = pytest.importorskip("timm", reason="needs the extra timm")
    whole = timm.create_model("test_convnext")
    save_file(whole.state_dict(), tmp_path / "w.safetensors")
    run = train(
        *SMALL,
        "model.name=test_convnext",
        f"model.weights={tmp_path}/w.safetensors",
        "model.frozen=true",
        f"data.root={pictures}",
        f"hydra.run.dir={tmp_path}/run",
    )
    assert run.status == 0, run.err
    saved = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    config = saved["hyper_parameters"]
    assert config["data"]["image_size"] == config["augmentation"]["image_size"] == 160
    state = {n: v for n, v in saved["state_dict"].items() if n.startswith("encoder.")}
    for name, value in state.items():
        assert torch.equal(value, whole.state_dict()[name.removeprefix("encoder.")])
    (tmp_path / "w.safetensors").unlink()  # the checkpoint has them
    again = in_process(evaluate.main, [f"ckpt_path={tmp_path}/run"])
    assert again.status == 0, again.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["model.name=resnet81"], "timm has no model 'resnet81'"),
        (["model=torchvision", "model.name=resnet81"], "torchvision has no model 'resnet81'"),
        (["model.name=null"], "model.name must be the name of a model; got None"),
        (["model.name=???"], "model.name"),
        (["model.knn_k=many"], "model.knn_k must be of type int"),
        (["model.weights=/nowhere.pth", "model.name=test_convnext"], "there is no such file"),
    ],
)
def test_mistakes_with_models_get_one_line(train, pictures, arguments, words):
    pytest.importorskip("timm", reason="needs the extra timm")
    run = train(*SMALL, f"data.root={pictures}", *arguments)
    assert run.status == 2, run.err
    assert len(run.err.strip().splitlines()) == 1, run.err
    assert words in run.err
