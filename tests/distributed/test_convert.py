"""Conversion from what real ranks saved, and into what real ranks load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from digrap_scale.checkpoint.convert import convert
from digrap_scale.checkpoint.formats import open_source
from tests.distributed.convert_runs import CASES, TAG, load_all, save_all
from tests.distributed.ranks import run_ranks
from tests.distributed.vlm_models import make_vlm, save_vlm

FEW = [(1, "bfloat16"), (2, "float32"), (3, "float32"), (3, "bfloat16")]
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)], ids=["2 ranks", "3 ranks"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Weights]]:
    folder = tmp_path_factory.mktemp("saved")
    cases = CASES if request.param == 3 else FEW
    return folder, run_ranks(request.param, folder / "ranks", save_all, str(folder), cases)[0]


def contents(path: Path) -> Weights:
    source = open_source(path)
    whole = {name: tensor.read(0, tensor.numel).view(tensor.shape) for name, tensor in source.tensors.items()}
    return {**whole, **{alias: whole[name] for alias, name in source.aliases.items()}}


def assert_same(found: Weights, expected: Weights) -> None:
    for name, weight in expected.items():
        assert found[name].dtype == weight.dtype and torch.equal(found[name], weight), name


@pytest.mark.parametrize("case", [f"zero{stage}-{precision}" for stage, precision in CASES])
def test_deepspeed_checkpoints(saved: tuple[Path, dict[str, Weights]], tmp_path: Path, case: str) -> None:
    """Trained, frozen, tied, one-element and empty parameters, and buffers: bits as the engine has them."""
    folder, expected = saved
    if case not in expected:
        pytest.skip("every stage and precision is saved by three ranks (slow)")
    found = contents(folder / case)
    assert set(found) == {*expected[case], "head.weight"}
    assert_same(found, expected[case])
    assert torch.equal(found["head.weight"], found["embedding.weight"])
    assert_same(contents(folder / case / TAG), expected[case])  # the tag's folder itself
    convert(folder / case, tmp_path / "st", "safetensors", verify=True)
    assert_same(load_file(tmp_path / "st" / "model.safetensors"), expected[case])


@pytest.mark.parametrize("case", ["zero2-float32", "zero3-bfloat16"])
def test_universal_checkpoints(saved: tuple[Path, dict[str, Weights]], tmp_path: Path, case: str) -> None:
    """As DeepSpeed's own ds_to_universal makes them, frozen weights and buffers included."""
    from deepspeed.checkpoint import ds_to_universal

    folder, expected = saved
    (tmp_path / "out").mkdir()
    options = ["--input_folder", str(folder / case / TAG), "--output_folder", str(tmp_path / "out" / TAG)]
    workers = ["--num_extract_workers", "1", "--num_merge_workers", "1", "--inject_missing_state"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["ds_to_universal", *options, *workers])
        ds_to_universal.main(ds_to_universal.parse_arguments())
    (tmp_path / "out" / "latest_universal").write_text(TAG)
    found = contents(tmp_path / "out")
    assert open_source(tmp_path / "out").format == "universal"
    assert set(found) == {*expected[case], "head.weight"}
    assert_same(found, expected[case])


def test_dcp_of_fsdp2(saved: tuple[Path, dict[str, Weights]], tmp_path: Path) -> None:
    folder, expected = saved
    assert_same(contents(folder / "dcp"), expected["dcp"])
    assert set(contents(folder / "dcp")) == set(expected["dcp"])
    convert(folder / "dcp", tmp_path / "st", "safetensors", verify=True)
    assert_same(load_file(tmp_path / "st" / "model.safetensors"), expected["dcp"])


def test_engines_load_what_was_converted(saved: tuple[Path, dict[str, Weights]], tmp_path: Path) -> None:
    """--to zero for three ranks, from another number of ranks, another stage, and Hugging Face folders of real families."""
    folder, expected = saved
    sources = {"mixed-float32": folder / "zero3-float32", "mixed-bfloat16": folder / "zero3-bfloat16"}
    wanted = {"mixed-float32": expected["zero3-float32"], "mixed-bfloat16": expected["zero3-bfloat16"]}
    for kind in ("paligemma",):  # DeepSpeed itself cannot gather CLIP's 0-d logit_scale to load it
        sources[f"{kind}-float32"] = save_vlm(kind, tmp_path / kind)
        wanted[f"{kind}-float32"] = {
            name: parameter.detach().to(torch.bfloat16).float() for name, parameter in make_vlm(kind).named_parameters()
        }
    targets = {
        name: str(convert(source, tmp_path / f"{name}-zero", "zero", world_size=3, verify=True))
        for name, source in sources.items()
    }
    loaded = run_ranks(3, tmp_path / "load", load_all, targets)
    for rank in range(3):
        for name, weights in wanted.items():
            half = name.endswith("bfloat16")
            for key, weight in weights.items():
                # A weights-only load gives a bfloat16 engine bfloat16 masters: that is DeepSpeed's.
                value = weight.to(torch.bfloat16) if half and weight.is_floating_point() and key != "shift" else weight
                assert torch.equal(loaded[rank][name][key].float(), value.float()), (rank, name, key)
