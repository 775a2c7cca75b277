"""SimCLR, the experiment that shows cosloss at work."""

from omegaconf import OmegaConf


def _input_size(library: str, name: str) -> int:
    from experiments.simclr.backbones import input_size

    return input_size(library, name)


# a configuration's ${input_size:timm,NAME} is the size of the images that the model was made for
OmegaConf.register_new_resolver("input_size", _input_size, replace=True)
