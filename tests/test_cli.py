"""The command line on bad input: one line a problem, the right exit code, nothing written."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from digrap_scale.checkpoint.convert import convert
from digrap_scale.cli import main
from digrap_scale.errors import CheckpointError
from tests.models.tiny import save_vit  # a small random ViT in Hugging Face layout

ASSETS = Path(__file__).parent.parent / "digrap_scale" / "demo" / "assets" / "pictograms"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vit(tmp_path_factory.mktemp("vit"), classes=16)


@pytest.fixture
def values(model: Path, tmp_path: Path) -> dict:
    return {
        "run": {"folder": str(tmp_path / "run")},
        "model": {"path": str(model), "task": "classification"},
        "data": {"train": [str(ASSETS / "noto-train-*.tar")], "classes": str(ASSETS / "classes.json")},
        "method": {"name": "digrap", "strength_lr": 0.05},
        "optimizer": {"learning_rate": 1e-3},
        "training": {"steps": 3, "global_batch_samples": 8},
        "evaluation": {"suite": [{"name": "noto", "shards": [str(ASSETS / "noto-test-*.tar")], "shift": "id"}]},
        "logging": {"every_steps": 1, "tensorboard": False},
    }


def write(tmp_path: Path, values: dict) -> str:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    return str(file)


# override → what the line says
BAD = {
    "optimizer.learing_rate=1": "`learning_rate`",
    "optimzer.learning_rate=1": "`optimizer`",
    "optimizer.learning_rate=-1": "optimizer.learning_rate",
    "optimizer.learning_rate=.nan": "optimizer.learning_rate",
    "optimizer.learning_rate=1:30": "optimizer.learning_rate",
    "optimizer.learning_rate=fast": "optimizer.learning_rate",
    "optimizer.name=lion": "optimizer.name",
    "optimizer.eps=0": "optimizer.eps",
    "optimizer.betas=[0.9]": "optimizer.betas",
    "optimizer.momentum=0.9": "momentum",
    "optimizer.groups=[{pattern: '('}]": "pattern",
    "optimizer.groups=[{pattern: nothing_like_this}]": "nothing_like_this",
    "method.strength_lr=0": "strength_lr",
    "method.weight=1": "weight",
    "method={name: digrapp}": "digrap",
    "model.freeze=[nothing_like_this]": "nothing_like_this",
    "model.freeze=['.*']": "no parameter to train",
    "model.path=/nowhere/at/all": "/nowhere/at/all",
    "model.task=vqqa": "model.task",
    "model.lora={target_modules: nothing_like_this}": "nothing_like_this",
    "data.train=[/nowhere/x-*.tar]": "/nowhere/x-*.tar",
    "data.train=['pipe:cat /etc/passwd']": "pipe:",
    "data.classes=/nowhere/classes.json": "/nowhere/classes.json",
    "data.label_field=colour": "colour",
    "training.steps=0": "training.steps",
    "training.epochs=2": "epochs",
    "training.micro_batch_samples=3": "micro_batch_samples",
    "training.global_batch_samples=true": "global_batch_samples",
    "schedule.warmup_steps=99": "warmup_steps",
    "sharding.backend=zero4": "sharding.backend",
    "evaluation.suite=[{name: a, shards: [/nowhere/a.tar], shift: id}]": "/nowhere/a.tar",
    "evaluation.suite.0.shift=far-away": "shift",
    "run.seed=-1": "run.seed",
    "run.folder=": "run.folder",
}


@pytest.mark.parametrize("verb", ["validate", "train"])
@pytest.mark.parametrize("override", BAD)
def test_bad_config(verb: str, override: str, values: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main([verb, write(tmp_path, values), override])
    printed = capsys.readouterr().err.strip().splitlines()
    assert code == 2, printed
    assert any(BAD[override] in line for line in printed), printed
    assert "Traceback" not in "\n".join(printed)
    assert len(printed) <= 2, "more than a line for one problem"
    assert not (tmp_path / "run").exists(), "a run that cannot start left its folder"


def test_all_problems_at_once(values: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["optimizer.learning_rate=-1", "run.seed=-1", "data.wrkers=2"]
    assert main(["validate", write(tmp_path, values), *overrides]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 3


def test_good_config(values: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", write(tmp_path, values), "model.freeze=[embeddings]"]) == 0
    printed = capsys.readouterr().out
    assert "model.freeze 'embeddings'" in printed and "no problems found" in printed


def test_train_evaluate_and_refuse_to_overwrite(
    values: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, folder = write(tmp_path, values), Path(values["run"]["folder"])
    assert main(["train", file]) == 0
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert json.loads((folder / "status.json").read_text())["state"] == "done"
    assert (folder / "final" / "model.safetensors").is_file() and (folder / "results.md").is_file()
    before = json.loads((folder / "results.json").read_text())["rows"][0]["result"]
    assert main(["evaluate", file, "--weights", str(folder / "final")]) == 0
    after = json.loads((folder / "evaluation" / "results.json").read_text())["rows"][0]["result"]
    assert after == before
    capsys.readouterr()
    assert main(["train", file]) == 2
    assert "run.overwrite" in capsys.readouterr().err
    assert main(["train", file, "run.overwrite=true"]) == 0


def test_wrong_reference_is_exit_3(values: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch
    from safetensors.torch import save_file

    wrong = tmp_path / "wrong.safetensors"
    save_file({"something.else": torch.zeros(3)}, wrong)
    assert main(["train", write(tmp_path, values), f"reference.source={wrong}"]) == 3
    assert "reference.rename" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["reference.source", "model.path"])
def test_damaged_weights_are_exit_3(
    where: str, values: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whichever key names them; `validate` says so, too, of the reference."""
    whole = Path(values["model"]["path"])
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    os.truncate(cut / "model.safetensors", (cut / "model.safetensors").stat().st_size - 5)
    file = write(tmp_path, values)
    for verb in ("train", "validate") if where == "reference.source" else ("train",):
        assert main([verb, file, f"{where}={cut}"]) == 3
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "cut" in line]
        assert line.startswith(f"{where}: {cut}") and "the file has" in line, line


def test_module_and_launcher_argument(tmp_path: Path) -> None:
    """`python -m digrap_scale`, with the argument that DeepSpeed's launcher puts before everything else."""
    environment = {**os.environ, "RANK": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "digrap_scale", "--local_rank=0", "validate", str(tmp_path / "missing.yaml")],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 2
    assert "missing.yaml" in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_overwrite_spares_what_is_not_a_run(values: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    precious = tmp_path / "run" / "data" / "precious.txt"
    precious.parent.mkdir(parents=True)
    precious.write_text("mine")
    (tmp_path / "run" / "config.yaml").write_text("a: project of another kind\n")
    assert main(["train", write(tmp_path, values), "run.overwrite=true"]) == 2
    assert "holds no run of ours" in capsys.readouterr().err
    assert precious.read_text() == "mine"


def test_overwrite_spares_its_own_inputs(values: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, final = write(tmp_path, values), tmp_path / "run" / "final"
    assert main(["train", file]) == 0
    capsys.readouterr()
    assert main(["train", file, "run.overwrite=true", f"model.path={final}"]) == 2
    assert str(final) in capsys.readouterr().err
    assert (final / "model.safetensors").is_file()


def test_evaluation_before_training(values: dict, tmp_path: Path) -> None:
    """The zero-shot table leaves the folder free; overrides may follow an option."""
    file = write(tmp_path, values)
    assert main(["evaluate", file, "--weights", values["model"]["path"], "evaluation.batch_samples=50"]) == 0
    assert main(["train", file]) == 0
    assert (tmp_path / "run" / "evaluation" / "results.md").is_file()


@pytest.mark.slow
def test_error_of_one_rank_is_told_by_that_rank(values: dict, tmp_path: Path) -> None:
    """A sample that only rank 1 reads is broken: its own line names it, and rank 0 reports a failed peer."""
    from digrap_scale.data.shards import write_shards

    meta = {"label": next(iter(json.loads((ASSETS / "classes.json").read_text())))}
    samples = [{"key": f"{i:03d}", "image": _webp(), "extension": "webp", "meta": meta} for i in range(40)]
    samples[36]["image"] = b"not an image"
    write_shards(samples, tmp_path / "shards", prefix="train", samples_per_shard=40)
    values["data"].update(train=[str(tmp_path / "shards" / "train-*.tar")], shuffle_buffer_samples=0)
    values["training"].update(steps=10)
    values["evaluation"]["suite"] = []
    file = write(tmp_path, values)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    done = subprocess.run(
        [*command, "digrap_scale", "train", file, "sharding.backend=ddp"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode != 0
    assert "sample 036" in done.stderr
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed" and status["exit_code"] in (2, 5, 143), status


@pytest.mark.parametrize(
    "overrides",
    [
        ["reference.placement=stream", "training.projection=fused"],
        ["reference.placement=cpu", "training.statistics=backward", "sharding.backend=fsdp2"],
    ],
    ids=["stream and fused", "backward"],
)
def test_ways_to_take_a_step(values: dict, tmp_path: Path, overrides: list[str]) -> None:
    """The same run as with everything as a matter of course, to float32 rounding."""
    values["training"].update(steps=6)
    norms = []
    for name, more in (("plain", []), ("other", overrides)):
        values["run"]["folder"] = str(tmp_path / name)
        assert main(["train", write(tmp_path, values), "logging.every_steps=1", *more]) == 0
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        norms.append([json.loads(line)["grad_norm"] for line in lines])
    assert len(norms[0]) == 6 and norms[1] == pytest.approx(norms[0], rel=1e-4)


# DeepSpeed asks for a CPU with float16 instructions; torch computes in float16 on any.
FLOAT16 = (
    "import sys; from deepspeed.accelerator import get_accelerator; get_accelerator().is_fp16_supported = lambda: True; "
    "from digrap_scale.cli import main; sys.exit(main(sys.argv[1:]))"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "float16"),
    [
        (["sharding.backend=zero1", "sharding.mixed_precision=bfloat16"], False),
        (["sharding.backend=zero2", "sharding.mixed_precision=float16", "sharding.offload=cpu"], True),
    ],
    ids=["zero1", "zero2"],
)
def test_train_on_zero(values: dict, tmp_path: Path, overrides: list[str], float16: bool) -> None:
    """Two processes under a launcher: steps, an overflow or two in float16, final weights and the table."""
    values["training"].update(steps=6)
    script = tmp_path / "train.py"
    script.write_text(FLOAT16)
    program = [str(script)] if float16 else ["-m", "digrap_scale"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *program]
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join(p for p in (str(Path.cwd()), os.environ.get("PYTHONPATH")) if p),
    }
    done = subprocess.run(
        [*command, "train", write(tmp_path, values), *overrides],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    folder = tmp_path / "run"
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "done"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert (folder / "final" / "model.safetensors").is_file() and (folder / "results.md").is_file()


def _webp() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(buffer, format="WEBP")
    return buffer.getvalue()


@pytest.mark.slow
def test_convert_knows_the_shipped_models_towers(tmp_path: Path) -> None:
    """In a process of its own: other tests have made transformers know them."""
    model = Path(__file__).parents[1] / "digrap_scale/demo/assets/pictogram_vlm"
    command = [sys.executable, "-m", "digrap_scale", "convert", str(model), str(tmp_path / "out"), "--to", "dcp"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    config = {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "vision_config": {"model_type": "?"},
    }
    shutil.copytree(model, tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="no model can be described by it") as refused:
        convert(tmp_path / "other", tmp_path / "no", "dcp")
    assert len(str(refused.value)) < 1000
