"""Files: what was saved comes back, and whatever else a file holds is an ArtefactError."""

from __future__ import annotations

import copy
import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed import COMPOSITIONS, TinyResNet, batch, prepared, tiny_vit
from torch import Tensor, nn

from tersor import compress, models
from tersor.compress import ArtefactError, FakeQuantize, ModelSource, NMSparse, Recipe, Rule, artefact

SOURCE = ModelSource("tersor", "deit_tiny", {"image_size": 8, "patch_size": 4, "dim": 16, "depth": 1, "num_heads": 2})
MIXED = Recipe(
    Rule(FakeQuantize(3, method="lts")),
    Rule(FakeQuantize(4), NMSparse(2, 4), layers=["*.attn.qkv"]),
    Rule(NMSparse(1, 8), layers=["*.mlp.fc1"]),
    Rule(compress.Binarize("ste"), layers=["*.attn.proj"]),
)


def converted() -> nn.Module:
    model = SOURCE.build()
    compress.prepare_(model, MIXED, 1)
    compress.calibrate_(model, torch.randn(4, 3, 8, 8))
    compress.step(model)
    return compress.convert_(model)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """A file with layers of all kinds, and the model in it."""
    torch.manual_seed(11)
    model = converted()
    path = tmp_path_factory.mktemp("artefact") / "model.safetensors"
    compress.save(model, path, SOURCE, {"classes": ["a", "b"], "accuracy": 0.5})
    return path, model


def parts(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the tensors' bytes of a safetensors file."""
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def whole(header: dict[str, Any] | str, data: bytes) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def rewritten(path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], Any], target: Path) -> Path:
    """A file with another description or other tensors and a check sum that fits, as an attacker would write it."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, framework="pt") as file:
        description = json.loads(file.metadata()["tersor"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    changed = change(description, tensors)
    text = json.dumps(description if changed is None else changed)
    save_file(tensors, target, {"tersor": text, "sha256": artefact._digest(text, tensors)})
    return target


def assert_refused(path: Path, match: str = "") -> None:
    with pytest.raises(ArtefactError, match=match) as caught:
        compress.load(path)
    assert str(path) in str(caught.value)


def test_all_of_it_comes_back(saved: tuple[Path, nn.Module]) -> None:
    path, model = saved
    found = compress.read(path)
    assert found.source == SOURCE
    assert found.metadata == {"classes": ["a", "b"], "accuracy": 0.5}
    assert found.layers == model.compression.applied  # type: ignore[union-attr]
    assert found.skipped == model.compression.skipped  # type: ignore[union-attr]
    assert found.tensors.keys() == model.state_dict().keys()
    images = torch.randn(2, 3, 8, 8)
    for each in (compress.load(path), compress.load(path, SOURCE.build().train())):
        assert not any(module.training for module in each.modules())
        assert torch.equal(each(images), model(images))
        assert torch.equal(copy.deepcopy(each)(images), model(images))
    import pickle

    assert torch.equal(pickle.loads(pickle.dumps(compress.load(path)))(images), model(images))


@pytest.mark.parametrize("name", ["lsq+lbc", "lbc", "reste"])
def test_a_loaded_model_can_be_saved_again(name: str, tmp_path: Path) -> None:
    model = prepared(TinyResNet, COMPOSITIONS[name], 1)
    compress.step(model)
    compress.convert_(model)
    first, second = tmp_path / "first", tmp_path / "second"
    compress.save(model, first)
    compress.save(compress.load(first, TinyResNet()), second)
    assert parts(first.read_bytes()) == parts(second.read_bytes())


def test_half_precision_models_load_in_the_model_s_precision(tmp_path: Path) -> None:
    model = prepared(TinyResNet, COMPOSITIONS["lsq"], 1)
    compress.convert_(model).half()
    compress.save(model, tmp_path / "half")
    loaded = compress.load(tmp_path / "half", TinyResNet())
    images = batch()[0]
    torch.testing.assert_close(loaded(images), model(images.half()).float(), rtol=0.02, atol=0.02)
    assert torch.equal(compress.load(tmp_path / "half", TinyResNet().half())(images.half()), model(images.half()))


def test_files_are_as_large_as_the_report_says(tmp_path: Path) -> None:
    """But for the layers that have no weight of their own, and the header."""
    model: Any = prepared(TinyResNet, (FakeQuantize(4), NMSparse(2, 4)), 1)
    compress.step(model)
    expected = compress.report(model).total.bytes
    compress.convert_(model)
    report = compress.report(model)
    path = tmp_path / "model"
    compress.save(model, path)
    data = parts(path.read_bytes())[1]
    assert len(data) == sum(value.nbytes for value in model.state_dict().values())
    assert len(data) == report.total.bytes
    fixed = {"numbers": 28, "lower": 4, "upper": 4}
    extra = sum(fixed.get(name.rpartition(".")[2], 0) for name in model.state_dict())
    folded = 4 * sum(module.shape[0] for module in model.modules() if hasattr(module, "NUMBERS")) + 4 * 8
    assert report.total.bytes == expected + extra + folded  # of norms: one bias more for each channel


def test_what_cannot_be_saved(tmp_path: Path, saved: tuple[Path, nn.Module]) -> None:
    model = prepared(TinyResNet, COMPOSITIONS["lsq"])
    path = tmp_path / "model"
    with pytest.raises(ValueError, match="model must be converted by convert_, got one that trains"):
        compress.save(model, path)
    with pytest.raises(ValueError, match="must have been prepared"):
        compress.save(TinyResNet(), path)
    for metadata in ({"a": {1, 2}}, {"a": float("nan")}, {"a": torch.zeros(1)}, {1: 2, "a": 3}):
        with pytest.raises(TypeError, match="metadata must be of what JSON can hold"):
            compress.save(saved[1], path, metadata=metadata)
    with pytest.raises(TypeError, match="metadata must be a mapping, got list"):
        compress.save(saved[1], path, metadata=["a"])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="source must be a ModelSource or None, got str"):
        compress.save(saved[1], path, "deit_tiny")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="options must be of what JSON can hold"):
        compress.save(saved[1], path, ModelSource("tersor", "deit_tiny", {"linear": nn.Linear}))
    with pytest.raises(OSError, match="nowhere"):
        compress.save(saved[1], tmp_path / "nowhere" / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_an_interrupted_save_leaves_the_old_file(
    where: str, tmp_path: Path, saved: tuple[Path, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model"
    compress.save(saved[1], path, metadata={"old": True})
    content = path.read_bytes()

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, where, interrupt)
        with pytest.raises(KeyboardInterrupt):
            compress.save(saved[1], path)
    assert [each.name for each in tmp_path.iterdir()] == ["model"]
    assert path.read_bytes() == content
    compress.save(saved[1], path)
    assert compress.read(path).metadata == {}


def test_missing_files_and_other_kinds_of_files(tmp_path: Path) -> None:
    for call in (compress.read, compress.load):
        with pytest.raises(FileNotFoundError):
            call(tmp_path / "nowhere")
        with pytest.raises(OSError, match="directory"):
            call(tmp_path)
    from safetensors.torch import save_file

    path = tmp_path / "other"
    save_file({"a": torch.zeros(2)}, path)
    assert_refused(path, "a safetensors file, but not one that tersor.compress.save wrote")
    torch.save(nn.Linear(2, 2).state_dict(), path)
    assert_refused(path, "not a safetensors file, or damaged")
    for content in (b"", b"\0" * 8, b"\xff" * 64, b"text"):
        path.write_bytes(content)
        assert_refused(path, "not a safetensors file, or damaged")


def damaged(content: bytes, seed: int) -> tuple[str, bytes]:
    """One of many kinds of damage, at a random place."""
    rng = random.Random(seed)
    header = 8 + struct.unpack("<Q", content[:8])[0]
    kind = ("flip in the header", "flip in the data", "swap", "zeros", "insert", "delete", "append")[seed % 7]
    changed = bytearray(content)
    place = rng.randrange(header) if kind == "flip in the header" else rng.randrange(header, len(content) - 70)
    if kind.startswith("flip"):
        changed[place] ^= 1 << rng.randrange(8)
    elif kind == "swap":
        other = rng.randrange(len(content) - 70)
        changed[place : place + 32], changed[other : other + 32] = (
            changed[other : other + 32],
            changed[place : place + 32],
        )
    elif kind == "zeros":
        changed[place - 64 : place + 64] = bytes(128)
    elif kind == "insert":
        changed[place:place] = rng.randbytes(rng.randrange(1, 9))
    elif kind == "delete":
        del changed[place : place + rng.randrange(1, 9)]
    else:
        changed += rng.randbytes(rng.randrange(1, 65))
    return kind, bytes(changed)


def test_damage_of_any_kind_is_found(saved: tuple[Path, nn.Module], tmp_path: Path) -> None:
    content, path = saved[0].read_bytes(), tmp_path / "damaged"
    same = 0
    for seed in range(1500):
        kind, changed = damaged(content, seed)
        path.write_bytes(changed)
        if changed == content:
            same += 1
            continue
        try:
            found = compress.read(path)
        except ArtefactError:
            continue
        header, data = parts(changed)  # nothing may differ that matters: such as the spaces at the header's end
        assert (header, data) == parts(content), (seed, kind)
        assert found.metadata["accuracy"] == 0.5
    assert same < 20


def test_cut_off_anywhere(saved: tuple[Path, nn.Module], tmp_path: Path) -> None:
    content, path = saved[0].read_bytes(), tmp_path / "cut"
    for size in range(0, len(content), 64):
        path.write_bytes(content[:size])
        with pytest.raises(ArtefactError):
            compress.read(path)


def test_header_edits(saved: tuple[Path, nn.Module], tmp_path: Path) -> None:
    """Of every tensor its shape, dtype and place, with the check sum as it was."""
    header, data = parts(saved[0].read_bytes())
    path = tmp_path / "edited"
    names = [name for name in header if name != "__metadata__"]
    edits: list[Callable[[dict[str, Any]], Any]] = [
        lambda entry: entry.update(shape=[*entry["shape"], 1]),
        lambda entry: entry.update(shape=[2**62]),
        lambda entry: entry.update(shape=[2**33, 2**33]),
        lambda entry: entry.update(shape=[-1]),
        lambda entry: entry.update(shape="x"),
        lambda entry: entry.update(dtype={"U8": "I8", "F32": "I32", "I32": "F32"}[entry["dtype"]]),
        lambda entry: entry.update(dtype="F8_E4M3"),
        lambda entry: entry.update(dtype="X9"),
        lambda entry: entry.update(data_offsets=[entry["data_offsets"][0], entry["data_offsets"][1] + 8]),
        lambda entry: entry.update(data_offsets=[0, 2**63]),
        lambda entry: entry.update(data_offsets=entry["data_offsets"][::-1]),
        lambda entry: entry.pop("shape"),
    ]
    for name in names:
        for edit in edits:
            changed = copy.deepcopy(header)
            edit(changed[name])
            if changed == header:
                continue
            path.write_bytes(whole(changed, data))
            with pytest.raises(ArtefactError):
                compress.read(path)
    for removed in (*names[:5], "__metadata__"):
        path.write_bytes(whole({key: value for key, value in header.items() if key != removed}, data))
        assert_refused(path)
    for key, value in (("tersor", "{}"), ("tersor", "[" * 100000), ("sha256", "0" * 64), ("tersor", "null")):
        changed = copy.deepcopy(header)
        changed["__metadata__"][key] = value
        path.write_bytes(whole(changed, data))
        assert_refused(path, "damaged")
    for header_text in ("[]", "null", "{", '{"a": 1}'):
        path.write_bytes(whole(header_text, data))
        assert_refused(path)


def layer(description: dict[str, Any]) -> dict[str, Any]:
    return description["layers"]["blocks.0.attn.qkv"][0]


def renamed(description: dict[str, Any], new: str) -> None:
    description["layers"][new] = description["layers"].pop(next(iter(description["layers"])))


DESCRIPTIONS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "newer format": (lambda d: d.update(format=2), "of format 2, written by a newer tersor; this one reads up to 1"),
    "older format": (lambda d: d.update(format=0), "its format must be 1, got 0"),
    "format true": (lambda d: d.update(format=True), "its format must be 1, got True"),
    "format text": (lambda d: d.update(format="1"), "its format must be 1, got '1'"),
    "no format": (lambda d: d.pop("format") and None, "its format must be 1, got None"),
    "a list": (lambda d: [d], "its format must be 1, got None"),
    "a number": (lambda d: 3, "its format must be 1, got None"),
    "no layers": (lambda d: d.pop("layers") and None, "KeyError: 'layers'"),
    "layers empty": (lambda d: d.update(layers={}), "layers must have transforms"),
    "layers a list": (lambda d: d.update(layers=[]), "layers must be a table, got list"),
    "a layer empty": (lambda d: d["layers"].update(head=[]), "layers must have transforms"),
    "a layer of numbers": (lambda d: d["layers"].update(head=[1, 2]), "description cannot be used"),
    "a layer of text": (lambda d: d["layers"].update(head="lsq"), "layers must have transforms"),
    "unknown transform": (
        lambda d: layer(d).update(transform="Prune"),
        "transform 'Prune', which this tersor does not",
    ),
    "no transform": (lambda d: layer(d).pop("transform") and None, "KeyError: 'transform'"),
    "transform a list": (lambda d: layer(d).update(transform=[]), "transform \\[\\], which"),
    "unknown option": (lambda d: layer(d).update(speed=3), "unexpected keyword argument 'speed'"),
    "option of another type": (lambda d: layer(d).update(bits="4"), "bits must be an int, got str"),
    "option out of range": (lambda d: layer(d).update(bits=10**30), "bits must be 2 to 8"),
    "option infinite": (lambda d: layer(d).update(percentile=1e999), "percentile must be above 50"),
    "twice": (lambda d: d["layers"]["blocks.0.attn.qkv"].append(layer(d)), "must come once per layer"),
    "method of the file's no more": (lambda d: layer(d).update(method="pact"), "method must be one of"),
    "unknown layer": (lambda d: renamed(d, "nowhere"), "each rule must match a layer"),
    "a norm": (lambda d: renamed(d, "norm"), "each rule must match a layer"),
    "name empty": (lambda d: renamed(d, ""), "each rule must match a layer"),
    "folded a list": (lambda d: d.update(folded=["a"]), "folded must be a table, got list"),
    "folded numbers": (lambda d: d.update(folded={"head": 3}), "description cannot be used: TypeError"),
    "folded nowhere": (lambda d: d.update(folded={"head": ["a.b", None, False]}), "does not fit DeiT: .*no attribute"),
    "folded no norm": (
        lambda d: d.update(folded={"patch_embed.proj": ["head", None, False]}),
        "is no norm that can go into",
    ),
    "folded the model": (lambda d: d.update(folded={"": ["", None, False]}), "is no norm that can go into"),
    "skipped numbers": (lambda d: d.update(skipped={"head": 3}), "skipped must be of text"),
    "metadata a list": (lambda d: d.update(metadata=[]), "metadata must be a table"),
    "source text": (lambda d: d.update(source="tersor:deit_tiny"), "model must have place, name, options"),
    "source false": (lambda d: d.update(source=False), "model must have place, name, options"),
    "source short": (lambda d: d["source"].pop("options") and None, "model must have place, name, options"),
    "no source": (lambda d: d.update(source=None), "says not what model it is: give one"),
    "place unknown": (lambda d: d["source"].update(place="os"), "place must be one of tersor, torchvision, timm"),
    "place with a dot": (lambda d: d["source"].update(place="tersor.models"), "place must be one of"),
    "place a number": (lambda d: d["source"].update(place=1), "place must be of another type"),
    "name unknown": (lambda d: d["source"].update(name="alexnet"), "tersor has no model 'alexnet'"),
    "name of a module": (lambda d: d["source"].update(name="sys"), "tersor has no model 'sys'"),
    "name of a loader": (lambda d: d["source"].update(name="load_checkpoint"), "tersor has no model 'load_checkpoint'"),
    "name of a loss": (lambda d: d["source"].update(name="cf_vit_loss"), "tersor has no model 'cf_vit_loss'"),
    "name private": (lambda d: d["source"].update(name="__builtins__"), "name must be a model's"),
    "name with a path": (lambda d: d["source"].update(name="../deit"), "name must be a model's"),
    "options a list": (lambda d: d["source"].update(options=[]), "options must be of another type"),
    "options of others": (lambda d: d["source"]["options"].update(layers=3), "unexpected keyword argument 'layers'"),
    "options of another type": (lambda d: d["source"]["options"].update(dim="16"), "dim must be an int"),
    "options nested": (lambda d: d["source"]["options"].update(dim={"a": [1]}), "dim must be an int"),
    "options of another size": (lambda d: d["source"]["options"].update(dim=32), "does not fit DeiT"),
    "options that take all memory": (
        lambda d: d["source"]["options"].update(dim=2**18, num_heads=2**12),
        "has 8\\d+ weights, which are not in",
    ),
    "options that ask for weights": (
        lambda d: d["source"]["options"].update(pretrained=True),
        "options must be of the architecture only, got 'pretrained'",
    ),
}


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_descriptions_with_a_check_sum_that_fits(name: str, saved: tuple[Path, nn.Module], tmp_path: Path) -> None:
    change, message = DESCRIPTIONS[name]
    assert_refused(rewritten(saved[0], lambda description, _: change(description), tmp_path / "edited"), message)


def replace(name: str, value: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        key = next(each for each in tensors if each.endswith(name))
        tensors[key] = value(tensors[key])

    return change


def set_number(place: int, number: int) -> Callable[[Tensor], Tensor]:
    return lambda numbers: numbers.index_fill(0, torch.tensor(place), number)


TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing": (lambda t: t.pop("head.weight"), "Missing key"),
    "missing codes": (lambda t: t.pop("blocks.0.attn.qkv.codes"), "Missing key"),
    "missing numbers": (lambda t: t.pop("blocks.0.attn.qkv.numbers"), "Missing key"),
    "missing bounds": (lambda t: t.pop("blocks.0.attn.qkv.lower"), "Missing key"),
    "one more": (lambda t: t.update(extra=torch.zeros(3)), "Unexpected key"),
    "one more of a layer": (lambda t: t.update({"head.scale": torch.zeros(3)}), "Unexpected key"),
    "shape": (replace("head.weight", lambda t: t[:-1].clone()), "size mismatch"),
    "dtype": (
        replace("head.weight", lambda t: t.to(torch.int32)),
        "head.weight must be torch.float32, got torch.int32",
    ),
    "codes of another dtype": (replace("codes", lambda t: t.float()), "must be torch.uint8, got torch.float32"),
    "codes cut off": (replace("codes", lambda t: t[:-1].clone()), "codes: must be uint8 of shape"),
    "codes too long": (replace("qkv.codes", lambda t: t.new_zeros(2**20)), "codes: must be uint8 of shape"),
    "index out of range": (
        replace("qkv.index", lambda t: t.new_full(t.shape, 255)),
        "groups do not have 2 places below 4",
    ),
    "index twice": (replace("qkv.index", torch.zeros_like), "groups do not have 2 places below 4"),
    "index of a sparse layer": (
        replace("fc1.index", lambda t: t.new_full(t.shape, 255)),
        "do not have 1 places below 8",
    ),
    "index of another shape": (replace("qkv.index", lambda t: t[:, :-1].clone()), "index: must be \\(48, 2\\), got"),
    "scale NaN": (replace("qkv.scale", lambda t: t * float("nan")), "scale: must be finite"),
    "scale infinite": (replace("qkv.scale", lambda t: t / 0), "scale: must be finite"),
    "scale of another shape": (replace("qkv.scale", lambda t: t[:3].clone()), "size mismatch"),
    "scale of two dimensions": (replace("qkv.scale", lambda t: t[None].clone()), "size mismatch"),
    "bias NaN": (replace("qkv.bias", lambda t: t * float("nan")), "bias: must be finite"),
    "bounds crossed": (replace("qkv.upper", lambda t: t - 100), "the input's bounds must be finite and not equal"),
    "bounds NaN": (replace("qkv.lower", lambda t: t * float("nan")), "lower: must be finite"),
    "bounds of another shape": (replace("qkv.lower", lambda t: t.repeat(2)), "size mismatch"),
    "numbers of another size": (replace("qkv.numbers", lambda t: t[:-1].clone()), "numbers: must be 7 of int32"),
    "numbers of another dtype": (replace("qkv.numbers", lambda t: t.float()), "numbers must be torch.int32"),
    "binary weights cut off": (replace("proj.packed", lambda t: t[:-1].clone()), "size mismatch"),
    **{
        f"number {place} is {number}": (replace("qkv.numbers", set_number(place, number)), "numbers|codes|index")
        for place, numbers in enumerate(
            [
                (0, 1, 8, 9, -1, 2**31 - 1),
                (0, 3, -1),
                (1, -129, 2**31 - 1),
                (2**31 - 1, -(2**31), 200),
                (0, 1, 9),
                (3,),
                (8,),
            ]
        )
        for number in numbers
    },
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_with_a_check_sum_that_fits(name: str, saved: tuple[Path, nn.Module], tmp_path: Path) -> None:
    edit, message = TENSORS[name]

    def change(tensors: dict[str, Tensor]) -> None:
        edit(tensors)

    assert_refused(rewritten(saved[0], lambda _, tensors: change(tensors), tmp_path / "edited"), message)


def test_random_tensors_with_a_check_sum_that_fits(saved: tuple[Path, nn.Module], tmp_path: Path) -> None:
    """Whatever loads also runs, and gives numbers of the right shape."""
    images = torch.randn(2, 3, 8, 8)
    loaded = 0
    for seed in range(40):
        rng = random.Random(seed)

        def scramble(_: Any, tensors: dict[str, Tensor], rng: random.Random = rng) -> None:
            name = rng.choice([each for each in sorted(tensors) if tensors[each].numel()])
            flat = tensors[name].clone().reshape(-1).view(torch.uint8)
            for _ in range(rng.randrange(1, 9)):
                flat[rng.randrange(len(flat))] = rng.randrange(256)
            tensors[name] = flat.view(tensors[name].dtype).reshape(tensors[name].shape)

        try:
            model = compress.load(rewritten(saved[0], scramble, tmp_path / "scrambled"))
        except ArtefactError:
            continue
        loaded += 1
        assert model(images).shape == (2, 1000)
    assert 0 < loaded < 40


def test_models_that_are_not_the_file_s(saved: tuple[Path, nn.Module]) -> None:
    path = saved[0]
    for model in (TinyResNet(), tiny_vit(), nn.Linear(2, 2), models.deit_tiny()):
        with pytest.raises(ArtefactError, match=f"does not fit {type(model).__name__}"):
            compress.load(path, model)
    with pytest.raises(ArtefactError, match=r"does not fit DeiT: .*must not be prepared yet"):
        compress.load(path, compress.prepare_(SOURCE.build(), MIXED))


def test_a_check_sum_does_not_depend_on_the_order_and_does_on_all_else() -> None:
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(0), "c": torch.tensor(True)}
    digest = artefact._digest("text", tensors)
    assert artefact._digest("text", dict(reversed(tensors.items()))) == digest
    others = [
        ("Text", tensors),
        ("text", {**tensors, "d": torch.zeros(0)}),
        ("text", {**tensors, "a": tensors["a"].view(3, 2)}),
        ("text", {**tensors, "a": tensors["a"].view(torch.int32)}),
        ("text", {**tensors, "a": -tensors["a"]}),
        ("text", {**tensors, "b": torch.zeros(0, 2)}),
        ("text", {"a": tensors["a"], "b": tensors["b"], "C": tensors["c"]}),
    ]
    assert len({digest, *(artefact._digest(*each) for each in others)}) == len(others) + 1
