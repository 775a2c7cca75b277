"""The pages: code and commands are run or parsed, links lead somewhere, and the site is built."""

import argparse
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser
from tensorboard.program import TensorBoard
from torch.distributed.run import get_args_parser

import evaluate
from cosloss import distributed, functional, verify
from cosloss.testing import OPS
from experiments import embed, export

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
PROGRAM = re.compile(r"(python|pip|pytest|pre-commit|tensorboard|srun|torchrun|\.ci/run) ?")

# commands of train.py that are composed, and not run
COMPOSED_ALONE = {
    "experiment=simclr trainer=gpu": "a GPU",
    "experiment=simclr_cifar10 trainer=ddp": "GPUs",
    "experiment=simclr_cifar10 trainer=ddp trainer.num_nodes=2 trainer.devices=8 "
    "hydra.run.dir=logs/two_nodes": "two machines",
    "experiment=simclr trainer=ddp trainer.accelerator=cpu trainer.devices=2 "
    "model.encoder.norm=group trainer.precision=32-true": "processes: test_ddp_training.py",
    "-m hydra/launcher=slurm experiment=simclr_cifar10 loss=nt_xent,cosine_embedding "
    "seed=0,1,2": "a cluster: test_launcher.py",
    "-m hydra/launcher=submitit_local experiment=simclr_smoke seed=0,1": "an extra: "
    "test_launcher.py",
    "experiment=finetune_imagefolder data.root=DIR model.name=convnext_tiny": "a download",
    "experiment=finetune_imagefolder data.root=DIR model=torchvision model.name=resnet50": "a "
    "download",
}
# other commands of which no more is known than that the program is there
NOT_RUN = {
    "pytest": "runs this",
    "pytest -m slow": "CI runs it",
    ".ci/run": "runs pytest",
    "pre-commit install": "changes the checkout",
    "python -m cosloss": "test_packaging.py runs it",
    "python -m tests.kernels.triton.compiled_cache fill cache.tar.xz --card 90": "minutes: "
    "test_compiled_cache.py",
    "python -m tests.kernels.triton.compiled_cache unpack cache.tar.xz": "the same",
    "python -m zensical serve": "goes on until it is stopped; the site is built below",
}


def commands() -> list[str]:
    """Every command of a block or a sentence, once; of scripts see `scripts`."""
    found = []
    for page in PAGES:
        text = page.read_text()
        for language, body in FENCE.findall(text):
            if language == "sh" and "$" not in body:
                lines = body.replace("\\\n", " ").splitlines()
                found += [c for line in lines for c in line.partition("#")[0].split(" && ")]
        spans = re.findall(r"`([^`]+)`", FENCE.sub("", text))
        found += [span for span in spans if PROGRAM.match(span) and "…" not in span]
    return list(dict.fromkeys(c for c in (" ".join(c.split()) for c in found) if c))


def after(*prefixes: str) -> list[str]:
    """The arguments of the commands that begin so."""
    found = [re.fullmatch(rf"(?:{p}) ?(.*)", c) for p in prefixes for c in commands()]
    return list(dict.fromkeys(match[1] for match in found if match))


TRAIN = after("(?:srun )?python train.py", "torchrun .* train.py")
INSTALL = after("pip install")
VERIFY = after("python -m cosloss.verify")
SAVED = after("python (?=evaluate.py)", "python -m (?=experiments.(?:embed|export))")
PARSED = after("python -m (?=experiments.(?:benchmarks|studies))")


def test_no_command_is_left_out():
    begun = (r"(?:srun )?python train.py", r"torchrun .* train.py", "pip install",
             "python -m cosloss.verify", "python evaluate.py", "tensorboard",
             r"python -m experiments.(?:embed|export|benchmarks|studies)")  # fmt: skip
    rest = [c for c in commands() if not re.match("|".join(begun), c) and c not in ("srun",)]
    assert set(rest) == set(NOT_RUN)
    assert set(COMPOSED_ALONE) <= set(TRAIN)
    for command in NOT_RUN:
        program, *words = command.split()
        assert shutil.which(str(ROOT / program) if "/" in program else program), program
        if program == "python":
            assert importlib.util.find_spec(words[1]), words[1]


def test_blocks_are_of_languages_that_are_looked_at():
    blocks = [(page.name, *block) for page in PAGES for block in FENCE.findall(page.read_text())]
    assert {language for _, language, _ in blocks} <= {"python", "py", "sh", "text", "diff", ""}
    # POT is not installed; what test_swaps.py makes of a diff needs the extra bench
    assert [page for page, language, _ in blocks if language == "py"] == ["silent-gradients.md"]
    shown = "\n".join(body for _, language, body in blocks if language in ("text", ""))
    assert not re.search(rf"^(?:{PROGRAM.pattern})", shown, re.M), "a command in a block of output"


WITH_PYTHON = [page for page in PAGES if "\n```python" in page.read_text()]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.stem)
def test_a_page_s_python_runs(page):
    """Its blocks in one namespace, from top to bottom."""
    parsers = [PythonCodeBlockParser(), SkipParser()]
    examples = list(Sybil(parsers=parsers).parse(page).examples())
    assert len(examples) >= page.read_text().count("\n```python")
    for example in examples:
        example.evaluate()


def composed(overrides: list[str]):
    """The configuration of these overrides; of a sweep the first combination."""
    parser, once = OverridesParser.create(), []
    for override in map(parser.parse_override, overrides):
        if override.is_interval_sweep():
            once.append(f"{override.key_or_group}={override.value().start}")
        elif override.is_sweep_override():
            value = next(iter(override.sweep_string_iterator()))
            once.append(f"{override.key_or_group}={value}")
        elif not override.key_or_group.startswith("hydra"):
            once.append(override.input_line)
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose("train", once)
    for word in once:
        key, _, value = word.lstrip("+~").partition("=")
        if "." in key:
            node = config
            for part in key.split("."):
                node = node[part]
            assert str(node).lower() == value.lower() or float(node) == float(value)


@pytest.mark.parametrize("command", TRAIN)
def test_train_commands_compose(command):
    composed([w for w in shlex.split(command) if w not in ("-m", "--help")])


def settings() -> list[tuple[str, str]]:
    """What the sentences set, with the experiment that they speak of: `trainer.devices=2`.

    Where a value is left open, as in `model.name=NAME`, there is nothing to compose.
    """
    key = r"\+*(?:data|augmentation|model|loss|optimizer|trainer|callbacks|logger|experiment)"
    setting = re.compile(rf"{key}(?:\.\w+)*=[^A-Z…]\S*(?: \S+=\S+)*")
    found = set()
    for page in PAGES:
        experiment = "simclr_imagefolder" if page.stem == "your-own-images" else "simclr"
        spans = re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text()))
        found |= {(experiment, span) for span in spans if setting.fullmatch(span)}
    return sorted(found)


@pytest.mark.parametrize(("experiment", "words"), settings())
def test_settings_compose(experiment, words):
    composed([f"experiment={experiment}", *shlex.split(words)])


SHORT = ["trainer.max_epochs=2", *(
    f"+trainer.limit_{part}_batches=1" for part in ("train", "val", "test")
)]  # fmt: skip
DIGITS = ["data.renders=1", "model.encoder.width=8"]
PICTURES = ["trainer=cpu", "data.batch_size=4", "data.image_size=16"]


@pytest.fixture(scope="session")
def short_run(tmp_path_factory) -> Path:
    """The log_root of one short run of experiment=simclr, to be read only."""
    logs = tmp_path_factory.mktemp("docs") / "logs"
    subprocess.run(
        [sys.executable, "train.py", "experiment=simclr", *SHORT, *DIGITS, "trainer.max_epochs=1",
         f"log_root={logs}"], cwd=ROOT, check=True, capture_output=True
    )  # fmt: skip
    return logs


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [c for c in TRAIN if c not in COMPOSED_ALONE and "broken_gradient" not in c]
)
def test_train_commands_run(command, train, request, tmp_path):
    words = shlex.split(command)
    if words == ["--help"]:
        assert "python train.py experiment=simclr" in train("--help").out
        return
    words += SHORT
    if "data.root=DIR" in words:
        words[words.index("data.root=DIR")] = f"data.root={request.getfixturevalue('pictures')}"
        words += PICTURES
        if "data.train_per_class=500" in words:  # of which there are 20
            words += ["data.train_per_class=4", "data.eval_per_class=1"]
    else:
        words += DIGITS
    if "ckpt_path=last" in words:
        shutil.copytree(request.getfixturevalue("short_run"), tmp_path / "logs")
    if "sweep=optuna" in words:
        words.append("hydra.sweeper.n_trials=1")
    run = train(*words)
    assert run.status == 0, run.err
    assert list(tmp_path.rglob("results.json"))


@pytest.mark.slow
def test_the_first_screen_s_wrong_gradient(train, in_process, tmp_path):
    """The three lines are those of a real run, and its file is replayed by the command shown."""
    (command,) = [c for c in TRAIN if "broken_gradient" in c]
    run = train(*shlex.split(command), *DIGITS)
    assert run.status == 1
    shown = FENCE.findall(README.read_text())[1]
    assert shown[0] == "text"

    def pattern(text):  # which view is further off depends on the machine's roundings
        return re.sub(r"\d\.\de-\d+|/\S*/|logs/…/|z[12]:", "*", text)

    assert pattern(shown[1]) in pattern(run.err)
    assert "--replay FILE" in VERIFY
    (file,) = tmp_path.rglob("gradient_discrepancy-*.pt")
    assert in_process(sys.exit, verify.main(["--replay", str(file)])).status == 1


@pytest.mark.slow
@pytest.mark.parametrize("command", SAVED)
def test_programs_run_on_a_saved_run(command, short_run, pictures, in_process, tmp_path):
    program, *words = shlex.split(command)
    mains = {"evaluate.py": evaluate, "experiments.embed": embed, "experiments.export": export}
    named = {"data.root=DIR": f"data.root={pictures}", "out=OUT": f"out={tmp_path}/out"}
    logs = shutil.copytree(short_run, tmp_path / "logs")
    run = in_process(mains[program].main, [*(named.get(w, w) for w in words), f"log_root={logs}"])
    assert run.status == 0, run.err
    assert run.out


@pytest.mark.parametrize("command", [c for c in VERIFY if "--replay" not in c])
def test_verify_commands(command, monkeypatch):
    """With one op, on the CPU; the whole table is test_verify.py's."""
    words = shlex.split(command.replace("cuda", "cpu"))
    monkeypatch.setattr(verify.verify, "__defaults__", (OPS[:1], *verify.verify.__defaults__[1:]))
    surroundings = verify.verify_surroundings
    monkeypatch.setattr(surroundings, "__defaults__", (OPS[:1], *surroundings.__defaults__[1:]))
    assert verify.main(words) == 0


@pytest.mark.parametrize("command", PARSED)
def test_benchmarks_and_studies_take_their_arguments(command, monkeypatch):
    """The program's own parser reads them; then it ends."""
    module, *words = shlex.split(command)
    parse, parsed = argparse.ArgumentParser.parse_args, []

    def parse_and_leave(*arguments):
        parsed.append(parse(*arguments))
        raise SystemExit

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_leave)
    monkeypatch.setattr(sys, "argv", [module, *words])
    package = importlib.util.find_spec(module).submodule_search_locations is not None
    program = importlib.import_module(f"{module}.__main__" if package else module)
    with pytest.raises(SystemExit):
        program.main()
    assert len(parsed) == 1


@pytest.mark.parametrize("command", INSTALL)
def test_extras_exist(command):
    (what,) = (w for w in shlex.split(command) if w != "-e")
    extras = re.fullmatch(r"\.(?:\[(.*)\])?", what)[1]
    assert set(extras.split(",") if extras else []) <= set(PROJECT["optional-dependencies"])


def test_other_programs_take_their_arguments():
    (shown,) = after("tensorboard")
    program = TensorBoard()
    program.configure(["tensorboard", *shlex.split(shown)])
    assert program.flags.logdir == "logs"
    (command,) = (c for c in commands() if c.startswith("torchrun"))
    given = get_args_parser().parse_args(shlex.split(command)[1:])
    assert given.nnodes == "2"
    assert given.training_script == "train.py"


@pytest.mark.parametrize("status", [0, 138])
@pytest.mark.parametrize("before", [False, True])
def test_the_script_that_queues_again(status, before, tmp_path):
    """docs/training-jobs.md's, with programs in place of SLURM's that note their arguments."""
    blocks = [b for page in PAGES for language, b in FENCE.findall(page.read_text()) if "$" in b]
    (script,) = blocks
    for name, leaves in (("srun", status), ("scontrol", 0)):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/bin/sh\necho "{name} $@" >> calls\nexit {leaves}\n')
        program.chmod(0o755)
    if before:
        checkpoint = tmp_path / "logs/mine/checkpoints/last.ckpt"
        checkpoint.parent.mkdir(parents=True)
        checkpoint.touch()
    environment = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "SLURM_JOB_ID": "7"}
    subprocess.run(["bash", "-eu", "-c", script], cwd=tmp_path, env=environment, check=True)
    first, *again = (tmp_path / "calls").read_text().splitlines()
    words = first.removeprefix("srun python train.py ").split()
    assert ("ckpt_path=last" in words) is before
    composed(words)
    assert again == (["scontrol requeue 7"] if status else [])


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readme_s_links_suit_where_it_is_read():
    """PyPI needs absolute links, which need a repository; until there is one, relative ones."""
    relative = re.findall(r"\]\((?!https:)([^)]+)", README.read_text())
    assert bool(relative) != ("Repository" in PROJECT.get("urls", {}))


def test_the_site_builds(tmp_path):
    """Without a warning: no broken link or reference; and no page is left out of it."""
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    for folder in ("docs", "cosloss", "cosloss_pytest"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.so"))
    build = [sys.executable, "-m", "zensical", "build", "--strict"]
    built = subprocess.run(build, cwd=tmp_path, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    listed = re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert sorted(listed) == [str(p.relative_to(ROOT / "docs")) for p in PAGES[2:]]
    pages = {
        p.relative_to(tmp_path / "site"): p.read_text() for p in tmp_path.rglob("site/**/*.html")
    }
    assert len(pages) > len(listed)  # and 404.html
    for name, page in pages.items():
        assert not re.search(r'(?:src|rel="stylesheet" href)="(?:https?:)?//', page), name
    functions = pages[Path("api/functional/index.html")]
    for name in functional.__all__:
        assert f'id="cosloss.functional.{name}"' in functions
    assert "<math" in pages[Path("mathematics/index.html")]
    assert "$$" not in pages[Path("mathematics/index.html")]
    assert "sup_con_loss" in (tmp_path / "site/search.json").read_text()


def test_the_readme_is_short():
    lines = README.read_text().splitlines()
    assert len(lines) <= 160
    first_screen = "\n".join(lines[:22])
    for word in ("pip install", "```python", "| lightly |", "is wrong in batch", "[All pages]"):
        assert word in first_screen


def test_what_an_installation_brings_is_said():
    names = [re.match(r"[\w-]+", requirement)[0] for requirement in PROJECT["dependencies"]]
    brings = f"`pip install .` brings {' and '.join(names)}, no more"
    for page in (README, ROOT / "docs/using-the-losses.md"):
        assert brings in " ".join(page.read_text().split()), page.name
    assert re.search(rf"needs {' and '.join(names)} alone$", README.read_text(), re.M)


def test_the_file_map_is_true():
    text = README.read_text().partition("## File map")[2]
    named, folder = [], ROOT
    for indentation, names in re.findall(r"^(    |      )(\S+(?:, \S+)*)  ", text, re.M):
        if indentation == "    ":
            folder = ROOT / names if names.endswith("/") else ROOT
        named += [(ROOT if len(indentation) == 4 else folder) / n for n in names.split(", ")]
    assert not [path for path in named if not path.exists()]
    for package in (ROOT / "cosloss").glob("*/__init__.py"):
        assert package.parent in named, package.parent


@pytest.mark.parametrize(("loss", "numbers"), [("nt_xent", 3), ("sup_con", 4)])
def test_what_a_gathered_loss_sends(loss, numbers, monkeypatch):
    """Rows and then so many float64 numbers per row forward, and nothing backward."""
    sent = []

    def all_gather(parts, x):
        sent.append(x.shape)
        for part in parts:
            part.copy_(x)

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(distributed, "_all_gather", all_gather)
    z1, z2 = (torch.randn(6, 5, requires_grad=True) for _ in range(2))
    if loss == "nt_xent":
        rows, value = 12, functional.nt_xent_loss(z1, z2, gather_distributed=True)
    else:
        labels = torch.arange(6) // 2
        rows, value = 6, functional.sup_con_loss(z1, labels, gather_distributed=True)
    forward = list(sent)
    value.backward()
    assert (rows, 5) in forward
    assert forward[-1] == (rows, numbers)
    assert sent == forward
    said = "then three numbers per row (SupCon:"
    for page in ("many-gpus", "architecture", "mathematics"):
        assert said in " ".join((ROOT / f"docs/{page}.md").read_text().split())
