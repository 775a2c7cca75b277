"""The commands that the pages show: every one is of a program that exists, and composes."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

ROOT = Path(__file__).parents[1]
PAGES = sorted(ROOT.glob("docs/*.md"))
# shown in a sentence or a table as well as in a block
TRAIN = r"^(?:srun )?python train\.py ([^`\n]*)$|`python train\.py ([^`]*)`"


def commands(pattern):
    found = []
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        for match in re.finditer(pattern, text, re.M):
            command = " ".join(next(group for group in match.groups() if group).split())
            found.append(pytest.param(command, id=f"{page.stem}: {command}"))
    assert found
    return found


@pytest.mark.parametrize("command", commands(TRAIN))
def test_train_commands_compose(command):
    words = [w for w in shlex.split(command.partition(" #")[0]) if w != "-m"]
    # of a sweep the first combination; hydra's own settings are not the application's
    overrides = [re.sub(r"=([^\[{,]*),.*", r"=\1", w) for w in words if not w.startswith("hydra")]
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose("train", overrides)
    for word in overrides:
        key, _, value = word.partition("=")
        if "." in key:
            node = config
            for part in key.split("."):
                node = node[part]
            assert str(node).lower() == value.lower() or float(node) == float(value)


@pytest.mark.parametrize("module", commands(r"^python -m ([\w.]+)|`python -m ([\w.]+)"))
def test_modules_that_are_run_exist(module):
    assert importlib.util.find_spec(module), module


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
