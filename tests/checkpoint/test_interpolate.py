from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from digrap_scale.checkpoint.interpolate import interpolate
from digrap_scale.errors import CheckpointError, ConfigError, SaveError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def tensors(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)

    def floats(*shape, kind=dtype):
        return torch.randn(shape, generator=generator).to(kind)

    return {
        "conv.weight": floats(5, 3, 3),
        "bn.running_mean": floats(5),
        "bn.num_batches_tracked": torch.tensor(10 * (seed + 1)),
        "scale": floats(),
        "empty": floats(0, 4),
        "mask": torch.tensor([True, seed == 0, False]),
        "half": floats(7, kind=torch.float16),
        "ids": torch.arange(3) + seed,
    }


def save(folder, state, *, shards=1):
    folder.mkdir(parents=True)
    names = sorted(state)
    if shards == 1:
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    else:
        weight_map = {}
        for i in range(shards):
            file_name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
            save_file({name: state[name] for name in names[i::shards]}, folder / file_name)
            weight_map.update(dict.fromkeys(names[i::shards], file_name))
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"from": folder.name}))
    (folder / "preprocessor_config.json").write_text("{}")
    (folder / "optimizer.pt").write_bytes(b"not copied")
    return folder


def load(folder):
    if (folder / WEIGHTS).exists():
        return load_file(folder / WEIGHTS)
    files = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
    return {name: tensor for file in files for name, tensor in load_file(folder / file).items()}


def expected(a, b, alpha):
    result = {}
    for name in b:
        if b[name].is_floating_point():
            result[name] = ((1 - alpha) * a[name].double() + alpha * b[name].double()).to(b[name].dtype)
        else:
            result[name] = b[name]
    return result


@pytest.mark.parametrize(("shards_a", "shards_b"), [(1, 1), (1, 3), (3, 2)])
@pytest.mark.parametrize("max_shard_bytes", [1, 100, 1 << 30])
def test_equals_the_formula(tmp_path, shards_a, shards_b, max_shard_bytes):
    a, b = tensors(0, torch.bfloat16), tensors(1)
    save(tmp_path / "a", a, shards=shards_a)
    save(tmp_path / "b", b, shards=shards_b)
    made = interpolate(
        tmp_path / "a", tmp_path / "b", tmp_path / "out", [0.0, 0.3, 1.0], max_shard_bytes=max_shard_bytes
    )
    assert made == {alpha: tmp_path / "out" / f"alpha-{alpha:g}" for alpha in (0.0, 0.3, 1.0)}
    for alpha, folder in made.items():
        result = load(folder)
        assert result.keys() == b.keys()
        for name, tensor in expected(a, b, alpha).items():
            assert result[name].dtype == b[name].dtype and result[name].shape == b[name].shape
            torch.testing.assert_close(result[name], tensor, msg=f"{name} at {alpha}")
        assert json.loads((folder / "config.json").read_text()) == {"from": "b"}
        assert (folder / "preprocessor_config.json").exists() and not (folder / "optimizer.pt").exists()
        assert (folder / INDEX).exists() == (max_shard_bytes < 1 << 30)
    assert all(torch.equal(tensor, load(made[1.0])[name]) for name, tensor in b.items())


def test_shards_keep_to_their_size_and_index(tmp_path):
    state = {f"w{i}": torch.randn(25) for i in range(10)}
    save(tmp_path / "a", state)
    save(tmp_path / "b", state)
    interpolate(tmp_path / "a", tmp_path / "b", tmp_path / "out", [0.5], max_shard_bytes=250)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"]["total_size"] == 1000
    assert set(index["weight_map"].values()) == {f"model-{i:05d}-of-00005.safetensors" for i in range(1, 6)}
    for file_name in set(index["weight_map"].values()):
        with safe_open(tmp_path / "out" / file_name, "pt") as file:
            assert sum(file.get_tensor(name).nbytes for name in file.keys()) <= 250  # noqa: SIM118
            assert file.metadata()["format"] == "pt"


def test_transformers_loads_the_result(tmp_path):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    models = [CLIPVisionModel(config) for _ in range(2)]
    with torch.no_grad():
        for model in models:
            for parameter in model.parameters():
                parameter.normal_()
    for name, model in zip("ab", models, strict=True):
        model.save_pretrained(tmp_path / name)
    interpolate(tmp_path / "a", tmp_path / "b", tmp_path / "out", [0.25], max_shard_bytes=500)
    mixed = dict(CLIPVisionModel.from_pretrained(tmp_path / "out").named_parameters())
    a, b = (dict(model.named_parameters()) for model in models)
    for name, parameter in mixed.items():
        torch.testing.assert_close(parameter, 0.75 * a[name] + 0.25 * b[name])


def test_infinite_values_survive_the_ends(tmp_path):
    state = {"mask": torch.tensor([-math.inf, 0.0])}
    save(tmp_path / "a", state)
    save(tmp_path / "b", state)
    for alpha, folder in interpolate(tmp_path / "a", tmp_path / "b", tmp_path / "out", [0, 0.5, 1]).items():
        assert load(folder)["mask"].tolist() == [-math.inf, 0.0], alpha


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.pop("scale"), r"only in .*a: scale"),
        (lambda b: b.update(head=torch.zeros(2)), r"only in .*b: head"),
        (lambda b: b.update(scale=torch.zeros(2)), r"scale: shape \[\] in A, \[2\] in B"),
        (lambda b: b.update(ids=torch.zeros(3)), r"ids: dtype I64 in A, F32 in B"),
    ],
)
def test_differences_are_listed(tmp_path, change, message):
    b = tensors(1)
    change(b)
    save(tmp_path / "a", tensors(0))
    save(tmp_path / "b", b)
    with pytest.raises(CheckpointError, match=message):
        interpolate(tmp_path / "a", tmp_path / "b", tmp_path / "out", [0.5])
    assert not (tmp_path / "out").exists()


def test_quantised_weights_are_refused(tmp_path):
    state = {"w": torch.zeros(4).to(torch.float8_e4m3fn)}
    save(tmp_path / "a", state)
    save(tmp_path / "b", state)
    with pytest.raises(CheckpointError, match="w: dtype F8_E4M3 is quantised"):
        interpolate(tmp_path / "a", tmp_path / "b", tmp_path / "out", [0.5])


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ('{"weight_map": {"w": "../a/model.safetensors"}}', "tensor w points to '../a/model.safetensors'"),
        ('{"weight_map": {"w": "/etc/x.safetensors"}}', "tensor w points to '/etc/x.safetensors'"),
        ('{"weight_map": {"w": "sub\\\\..\\\\..\\\\x.safetensors"}}', "tensor w points to"),
        ('{"weight_map": {"w": "C:x.safetensors"}}', "tensor w points to"),
        ('{"weight_map": {"w": "weights.bin"}}', "tensor w points to 'weights.bin'"),
        ('{"weight_map": {"w": 3}}', "tensor w points to 3"),
        ('{"weight_map": {"w": "gone.safetensors"}}', "w is in gone.safetensors, which is missing"),
        ('{"weight_map": {"v": "part.safetensors"}}', "listed: v; stored: w"),
        ('{"weight_map": []}', ": not a safetensors index"),
        ("[", ": not a safetensors index"),
        ("[" * 100_000, ": not a safetensors index"),
    ],
)
def test_bad_indexes_are_refused(tmp_path, index, message):
    save(tmp_path / "a", {"w": torch.zeros(2)})
    b = save(tmp_path / "b", {"w": torch.zeros(2)})
    (b / WEIGHTS).rename(b / "part.safetensors")
    (b / INDEX).write_text(index)
    with pytest.raises(CheckpointError, match=message):
        interpolate(tmp_path / "a", b, tmp_path / "out", [0.5])


def test_unreadable_weights(tmp_path):
    a = save(tmp_path / "a", tensors(0))
    b = save(tmp_path / "b", tensors(1))
    (a / WEIGHTS).write_bytes((a / WEIGHTS).read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"a/model.safetensors: not a readable safetensors file"):
        interpolate(a, b, tmp_path / "out", [0.5])
    (a / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="a: has neither model.safetensors nor"):
        interpolate(a, b, tmp_path / "out", [0.5])
    with pytest.raises(CheckpointError, match="nowhere: does not exist"):
        interpolate(tmp_path / "nowhere", b, tmp_path / "out", [0.5])


@pytest.mark.parametrize(
    ("out", "alphas", "message"),
    [
        ("out", [], "no alpha given"),
        ("out", [1.5], "alpha is 1.5"),
        ("out", [float("nan")], "alpha is nan"),
        ("out", [0.5, 0.5], "name one twice"),
        ({0.5: "out"}, [0.5, 0.6], "no output folder given for alpha 0.6"),
        ({0.5: "out", 0.7: "other"}, [0.5], "for alpha 0.7, which is not asked for"),
        ({0.5: "out", 0.6: "x/../out"}, [0.5, 0.6], "share the output folder"),
        ("b", [0.5], "is one of the inputs"),
    ],
)
def test_bad_requests(tmp_path, out, alphas, message):
    a, b = save(tmp_path / "a", tensors(0)), save(tmp_path / "b", tensors(1))
    target = {k: tmp_path / v for k, v in out.items()} if isinstance(out, dict) else tmp_path / out
    with pytest.raises(ConfigError, match=message):
        interpolate(a, b, target, alphas)


def test_existing_output_is_kept_unless_asked(tmp_path):
    a, b = save(tmp_path / "a", tensors(0)), save(tmp_path / "b", tensors(1))
    out = save(tmp_path / "out", {"mine": torch.zeros(1)})
    with pytest.raises(SaveError, match="out: it exists"):
        interpolate(a, b, out, [0.5])
    assert list(load(out)) == ["mine"]
    interpolate(a, b, out, [0.5], overwrite=True)
    assert load(out).keys() == tensors(0).keys()


def test_full_disk_leaves_nothing(tmp_path):
    """A file size limit stands in for the full disk: the system refuses the write in the same place."""
    state = {f"w{i}": torch.zeros(100_000) for i in range(4)}
    save(tmp_path / "a", state)
    save(tmp_path / "b", state)
    script = f"""
import resource, signal
from digrap_scale.checkpoint.interpolate import interpolate
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000))
interpolate({str(tmp_path / "a")!r}, {str(tmp_path / "b")!r}, {str(tmp_path / "out")!r}, [0.2, 0.8])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "SaveError: disk full saving" in done.stderr and "model.safetensors; free space" in done.stderr
    assert list((tmp_path / "out").iterdir()) == []


STREAMED = "interpolate(folder / 'a', folder / 'b', folder / 'out', [0.2, 0.8])"
ALL_AT_ONCE = """
a, b = (load_file(folder / name / "model.safetensors") for name in "ab")
kept = {name: 0.8 * a[name] + 0.2 * b[name] for name in a}
"""


@pytest.mark.slow
@pytest.mark.parametrize(("work", "fits"), [(STREAMED, True), (ALL_AT_ONCE, False)])
def test_peak_memory_is_a_few_tensors(tmp_path, work, fits):
    """Twenty tensors of 8 MB and two α under a hard limit: room for the mapped inputs and ten tensors more.

    The second case shows that the limit bites: one whole result in memory does not fit.
    """
    state = {f"w{i:02d}": torch.zeros(2_000_000) for i in range(20)}
    save(tmp_path / "a", state)
    save(tmp_path / "b", state)
    script = f"""
import resource, torch
from pathlib import Path
from safetensors.torch import load_file
from digrap_scale.checkpoint.interpolate import interpolate
torch.set_num_threads(1)
folder = Path({str(tmp_path)!r})
now = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmData"))
limit = now + (2 * 20 + 10) * 8_000_000
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
{work}
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode == 0) == fits, done.stderr
