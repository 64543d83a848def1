"""Any format into any other and back: the same bits; damaged inputs are one line, and nothing is written."""

from __future__ import annotations

import json
import math
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from digrap_scale.checkpoint import layout
from digrap_scale.checkpoint.convert import convert
from digrap_scale.checkpoint.formats import WRITERS, open_source, zero_writer
from digrap_scale.checkpoint.formats.base import Box, Files, boxed
from digrap_scale.cli import main
from digrap_scale.errors import CheckpointError, ConfigError, SaveError
from tests.checkpoint.test_safe_pickle import Hostile
from tests.distributed.vlm_models import KINDS, make_vlm, vlm_inputs

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool]


def values(shape: list[int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 100
    return (numbers > 0) if dtype == torch.bool else numbers.to(dtype)


def some_state() -> dict[str, torch.Tensor]:
    shapes = {
        "a.weight": [5, 3],
        "a.bias": [3],
        "one": [1],
        "scalar": [],
        "none": [0, 4],
        "deep": [2, 3, 4],
        "b.weight": [7, 2],
    }
    return {name: values(shape, torch.float32, seed) for seed, (name, shape) in enumerate(shapes.items())}


def save(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def contents(path: Path) -> dict[str, torch.Tensor]:
    return {name: t.read(0, t.numel).view(t.shape) for name, t in open_source(path).tensors.items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(found[name], tensor), name


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_round_trips(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Tensors of any shape and dtype, through any two formats, for any number of ranks."""
    folder = tmp_path_factory.mktemp("trip")
    kinds = st.tuples(st.lists(st.integers(0, 7), max_size=3), st.sampled_from(DTYPES))
    state = {f"t{i}": values(*kind, i) for i, kind in enumerate(data.draw(st.lists(kinds, min_size=1, max_size=6)))}
    path = save(folder / "start", state)
    for step, to in enumerate(data.draw(st.lists(st.sampled_from(sorted(WRITERS)), min_size=1, max_size=2))):
        ranks = None if to == "safetensors" else data.draw(st.integers(1, 9))
        size = data.draw(st.sampled_from([1, 100, 1 << 30]))
        path = convert(path, folder / f"{step}-{to}", to, world_size=ranks, max_shard_bytes=size, verify=True)
        if to == "zero":  # holds float32 masters
            state = {name: t.float() if t.is_floating_point() else t for name, t in state.items()}
    assert_same(contents(path), state)


def test_dcp_is_what_torch_reads(tmp_path: Path) -> None:
    state = some_state()
    path = convert(save(tmp_path / "hf", state), tmp_path / "dcp", "dcp", world_size=3)
    loaded = {name: torch.empty_like(tensor) for name, tensor in state.items()}
    dcp.load(loaded, checkpoint_id=path, no_dist=True)
    assert_same(loaded, state)


def test_zero_is_what_deepspeed_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By DeepSpeed's own script, with tensors in one sub-group and in several."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    state = some_state()
    source = save(tmp_path / "hf", state)
    for sub_group in (10**9, 4):
        monkeypatch.setattr(zero_writer, "SUB_GROUP_ELEMENTS", sub_group)
        for ranks in (1, 3, 4):
            path = convert(source, tmp_path / f"zero-{sub_group}-{ranks}", "zero", world_size=ranks)
            assert_same(dict(get_fp32_state_dict_from_zero_checkpoint(str(path))), state)


def test_shards_and_index(tmp_path: Path) -> None:
    path = convert(save(tmp_path / "hf", some_state()), tmp_path / "out", "safetensors", max_shard_bytes=100)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    files = {name: load_file(path / name) for name in set(index["weight_map"].values())}
    assert all(sum(t.nbytes for t in f.values()) <= 100 for f in files.values()) and len(files) > 2
    assert {name: file for file, held in files.items() for name in held} == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in some_state().values())


def test_dtype_changes_floating_point_only(tmp_path: Path) -> None:
    state = {**some_state(), "ids": torch.arange(3)}
    path = convert(save(tmp_path / "hf", state), tmp_path / "out", "safetensors", dtype="bfloat16", verify=True)
    assert_same(contents(path), {n: t.bfloat16() if t.is_floating_point() else t for n, t in state.items()})


def outputs(model: torch.nn.Module, kind: str) -> torch.Tensor:
    inputs = {key: value for key, value in vlm_inputs(kind, 0).items() if key != "labels"}
    with torch.no_grad():
        found = model.eval()(**inputs)
    return found.logits_per_image if kind == "clip" else found.logits


def adapted(kind: str, folder: Path, **options: Any) -> PeftModel:
    """A model with an adapter that does something; its base is in ``base``, its adapter, as PEFT saves it, in ``adapter``."""
    model = make_vlm(kind)
    model.save_pretrained(folder / "base")
    wrapped = get_peft_model(model, LoraConfig(r=4, **options))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 10)
    wrapped.save_pretrained(folder / "adapter")
    return wrapped


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_opens_the_result(tmp_path: Path, kind: str) -> None:
    """Hugging Face → ZeRO-3 for two ranks → DCP → sharded Hugging Face: identical logits in plain transformers."""
    model = make_vlm(kind)
    model.save_pretrained(tmp_path / "hf")
    path = tmp_path / "hf"
    for to, ranks in (("zero", 2), ("dcp", 3), ("safetensors", None)):
        path = convert(path, tmp_path / to, to, world_size=ranks, max_shard_bytes=4000, companions=tmp_path / "hf")
    assert len(list(path.glob("model-*.safetensors"))) > 1
    assert torch.equal(outputs(type(model).from_pretrained(path), kind), outputs(model, kind))
    names = set(open_source(tmp_path / "dcp").tensors)  # the model's own names: its state dict loads it
    assert names == set(model.state_dict())


@pytest.mark.parametrize(
    ("kind", "targets", "options"),
    [
        (
            "paligemma",
            ["q_proj", "down_proj"],
            {"alpha_pattern": {"q_proj": 32}, "rank_pattern": {"q_proj": 2}, "bias": "all"},
        ),
        ("llava", ["q_proj", "embed_tokens"], {"use_rslora": True}),
        ("clip", ["q_proj", "visual_projection"], {"use_dora": True, "modules_to_save": ["text_projection"]}),
    ],
)
def test_merged_adapter_is_peft_s(tmp_path: Path, kind: str, targets: list[str], options: dict[str, Any]) -> None:
    wrapped = adapted(kind, tmp_path, lora_alpha=8, target_modules=targets, **options)
    path = convert(tmp_path / "adapter", tmp_path / "out", "safetensors", merge_into=tmp_path / "base", verify=True)
    found = outputs(type(wrapped.get_base_model()).from_pretrained(path), kind)
    torch.testing.assert_close(found, outputs(wrapped, kind), rtol=1e-5, atol=1e-5)
    assert torch.equal(found, outputs(wrapped.merge_and_unload(), kind))


def test_training_checkpoint_with_its_adapter_is_merged(tmp_path: Path) -> None:
    """Base and adapter in one checkpoint, under PEFT's names, as a run or a DeepSpeed engine saves them."""
    targets = ["q_proj", "position_embedding"]
    wrapped = adapted("clip", tmp_path, target_modules=targets, modules_to_save=["text_projection"])
    dcp.save({"model": wrapped.state_dict()}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    with pytest.raises(CheckpointError, match="adapter_config.json"):
        convert(tmp_path / "dcp", tmp_path / "out", "safetensors", merge_into="")
    arguments = ["convert", str(tmp_path / "dcp"), str(tmp_path / "out"), "--to", "safetensors", "--merge-adapter"]
    assert main([*arguments, "--companions", str(tmp_path / "adapter")]) == 0
    assert_same(contents(tmp_path / "out"), dict(wrapped.merge_and_unload().state_dict()))
    assert not (tmp_path / "out" / "adapter_config.json").exists()  # else transformers takes it for an adapter
    with pytest.raises(CheckpointError, match="adapter named default"):
        convert(
            save(tmp_path / "hf", some_state()), tmp_path / "x", "dcp", merge_into="", companions=tmp_path / "adapter"
        )


def test_adapter_stays_an_adapter(tmp_path: Path) -> None:
    model = get_peft_model(make_vlm("llava"), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    path = convert(tmp_path / "adapter", tmp_path / "out", "safetensors", dtype="bfloat16")
    again = PeftModel.from_pretrained(make_vlm("llava"), path)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert torch.equal(again.get_parameter(name).bfloat16(), parameter.bfloat16()), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type IA3 cannot be merged here"),
        ({"init_lora_weights": "pissa"}, "'pissa' changes the base's weights"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"use_dora": True}, "DoRA is merged here for linear layers with their magnitudes only"),
    ],
)
def test_other_adapters_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    base = save(tmp_path / "base", {"m.weight": torch.zeros(4, 3)})
    (tmp_path / "adapter").mkdir()
    parts = {"lora_A": torch.ones(2, 3), "lora_B": torch.ones(4, 2)}
    save_file(
        {f"base_model.model.m.{part}.weight": value for part, value in parts.items()},
        tmp_path / "adapter" / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "adapter", tmp_path / "out", "safetensors", merge_into=base)
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    path = convert(tmp_path / "adapter", tmp_path / "out", "safetensors", merge_into=base)
    assert torch.equal(contents(path)["m.weight"], torch.full((4, 3), 4.0))
    save(tmp_path / "other", {"n.weight": torch.zeros(4, 3)})
    with pytest.raises(CheckpointError, match=r"adapts m.weight, which .*other does not have \(nearest: n.weight\)"):
        convert(tmp_path / "adapter", tmp_path / "out2", "safetensors", merge_into=tmp_path / "other")


def optimizer_file(folder: Path, rank: int, part: int = 0) -> Path:
    return folder / "global_step0" / f"zero_pp_rank_{rank}_mp_rank_{part:02d}_optim_states.pt"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def drop_chunk(folder: Path) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.state_dict_metadata["a.weight"].chunks.pop()
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


DAMAGES: list[tuple[str, Callable[[Path], Any], str]] = [
    ("zero", lambda f: optimizer_file(f, 1).unlink(), "found 2 ranks|rank 1 is missing"),
    ("zero", lambda f: optimizer_file(f, 2).unlink(), "of 3 ranks at stage .* found 2 ranks"),
    ("zero", lambda f: shutil.copy(optimizer_file(f, 0), optimizer_file(f, 3)), "of 3 ranks at stage .* found 4 ranks"),
    ("zero", lambda f: cut(optimizer_file(f, 1)), r"zero_pp_rank_1_\S+: not a readable PyTorch file"),
    ("zero", lambda f: torch.save({"x": 1}, optimizer_file(f, 0)), "expected a ZeRO optimizer's state"),
    ("zero", lambda f: torch.save(Hostile(f / "proof"), optimizer_file(f, 0)), r"refused: it names (posix|os)\.system"),
    ("zero", lambda f: (f / "latest").write_text("../elsewhere"), "names the tag '../elsewhere'"),
    ("zero", lambda f: (f / "latest").write_text("global_step9"), "'global_step9', which is missing"),
    ("zero", lambda f: optimizer_file(f, 0).rename(optimizer_file(f, 0, part=1)), "tensor or pipeline parallelism"),
    ("dcp", lambda f: (f / "__1_0.distcp").unlink(), r"__1_0\.distcp: missing"),
    ("dcp", lambda f: cut(f / "__1_0.distcp"), r"__1_0\.distcp"),
    ("dcp", drop_chunk, "a.weight: expected 15 elements, found 12 in its parts"),
    ("dcp", lambda f: (f / ".metadata").write_bytes(pickle.dumps(Hostile(f / "proof"))), r"refused: it names (posix|os)\.system"),
    ("safetensors", lambda f: cut(f / "model.safetensors"), "model.safetensors: not a readable safetensors file"),
    ("safetensors", lambda f: (f / "model.safetensors").unlink(), "no checkpoint of a known format"),
]  # fmt: skip


@pytest.mark.parametrize(("to", "damage", "message"), DAMAGES)
def test_damaged_inputs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], to: str, damage: Callable[[Path], Any], message: str
) -> None:
    """Exit 3, one line, nothing written, nothing run."""
    source = convert(
        save(tmp_path / "hf", some_state()), tmp_path / "in", to, world_size=None if to == "safetensors" else 3
    )
    damage(source)
    assert main(["convert", str(source), str(tmp_path / "made" / "out"), "--to", "dcp"]) == 3
    line = capsys.readouterr().err.strip()
    assert "\n" not in line
    with pytest.raises(CheckpointError, match=message):
        convert(source, tmp_path / "made" / "out", "dcp")
    assert not (tmp_path / "made").exists() or not list((tmp_path / "made").iterdir())
    assert not (source / "proof").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "gguf"}, "--to gguf: expected one of safetensors, dcp, zero"),
        ({"to": "zero"}, "--to zero needs --world-size"),
        ({"to": "zero", "world_size": 2, "dtype": "bfloat16"}, "float32 masters"),
        ({"to": "dcp", "world_size": 0}, "--world-size 0: expected at least 1"),
        ({"to": "safetensors", "world_size": 2}, "does not apply to safetensors"),
        ({"to": "safetensors", "dtype": "int8"}, "--dtype int8"),
        ({"to": "safetensors", "merge_into": "x"}, "is no PEFT adapter"),
        ({"to": "safetensors", "companions": "nowhere"}, "expected a folder with config"),
        ({"to": "safetensors", "out": "hf"}, "would take the place of the source"),
    ],
)
def test_bad_requests(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    source = save(tmp_path / "hf", some_state())
    options = {"out": "out", **options}
    with pytest.raises(ConfigError, match=message):
        convert(source, tmp_path / options.pop("out"), **options)
    assert not (tmp_path / "out").exists()


def test_verification_finds_a_wrong_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = WRITERS["safetensors"]

    def flip(source: Any, folder: Path, options: Any) -> None:
        write(source, folder, options)
        content = bytearray((folder / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (folder / "model.safetensors").write_bytes(content)

    monkeypatch.setitem(WRITERS, "safetensors", flip)
    source = save(tmp_path / "hf", some_state())
    with pytest.raises(SaveError, match="verification failed: .*: expected SHA-256"):
        convert(source, tmp_path / "out", "safetensors", verify=True)
    assert not (tmp_path / "out").exists()


def test_our_own_checkpoints(tmp_path: Path) -> None:
    """The layout of docs/checkpoints.md, made by hand."""
    state = {"w": torch.randn(3, 2), "frozen": torch.randn(2).bfloat16(), "buffer": torch.arange(2)}
    folder = tmp_path / "step-40"
    dcp.save(
        {**{f"model.{name}": t for name, t in state.items()}, "optimizer.state.w.exp_avg": torch.ones(3, 2)},
        checkpoint_id=folder / "dcp",
        no_dist=True,
    )
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    facts = {"step": 40, "trained": ["w"], "frozen": ["frozen"], "buffers": ["buffer"], "tied": {"head": "w"}}
    (folder / "state.json").write_text(json.dumps(facts))
    sums = layout.encode({"files": {name: layout.checksum(folder / name) for name in layout.files_of(folder)}})
    (folder / "checksums.json").write_text(sums)
    with pytest.raises(CheckpointError, match="step-40: incomplete"):
        convert(folder, tmp_path / "out", "safetensors")
    (folder / "COMMITTED").write_text(layout.committed_mark(40, sums))
    path = convert(folder, tmp_path / "out", "safetensors", verify=True)
    assert_same(contents(path), state)
    assert (path / "config.json").is_file() and open_source(folder).aliases == {"head": "w"}
    data = next((folder / "dcp").glob("*.distcp"))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"distcp: its SHA-256 differs"):
        convert(folder, tmp_path / "out2", "safetensors")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_boxes_in_any_piece(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """A tensor cut into boxes along every dim, read in any interval."""
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    whole = torch.arange(math.prod(shape), dtype=torch.int32).view(shape)
    parts = [((0,) * len(shape), whole)]
    for dim in range(len(shape)):
        at = data.draw(st.integers(0, shape[dim]))
        parts = [
            (tuple(s + (shift if d == dim else 0) for d, s in enumerate(starts)), piece)
            for starts, part in parts
            for shift, piece in ((0, part.narrow(dim, 0, at)), (at, part.narrow(dim, at, part.shape[dim] - at)))
        ]
    file = tmp_path_factory.mktemp("boxes") / "data"
    boxes, content = [], b""
    for starts, part in parts:
        boxes.append(Box(file, len(content), starts, tuple(part.shape)))
        content += part.contiguous().numpy().tobytes()
    file.write_bytes(content)
    tensor = boxed("t", shape, torch.int32, boxes, Files())
    start, stop = sorted(data.draw(st.lists(st.integers(0, whole.numel()), min_size=2, max_size=2)))
    assert torch.equal(tensor.read(start, stop), whole.reshape(-1)[start:stop])
    full = [box for box in boxes if box.numel]
    with pytest.raises(CheckpointError, match="in its parts"):
        boxed("t", shape, torch.int32, full[1:], Files())


def test_overlapping_parts_are_refused(tmp_path: Path) -> None:
    parts = [
        Box(tmp_path / "f", 0, (0, 0), (2, 2)),
        Box(tmp_path / "f", 0, (1, 0), (2, 2)),
        Box(tmp_path / "f", 0, (3, 0), (1, 2)),
    ]
    with pytest.raises(CheckpointError, match=r"parts at \[0, 0\] and \[1, 0\] overlap"):
        boxed("t", (5, 2), torch.float32, parts, Files())


def test_a_small_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not taken for an output that cannot be written."""
    make_vlm("clip").save_pretrained(tmp_path / "hf")
    opened = Path.open

    def refused(path: Path, *args: Any, **options: Any) -> Any:
        if path == tmp_path / "hf" / "config.json" and args == ("rb",):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **options)

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(CheckpointError, match="hf/config.json: cannot be read .Permission denied"):
        convert(tmp_path / "hf", tmp_path / "out", "safetensors")
    assert not (tmp_path / "out").exists()
