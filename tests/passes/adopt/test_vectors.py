"""Vectors that other tools add to activations, written as those tools write: against hooks that do what they do."""

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from austeer.compiler import InputError, Program, ProgramError, Refused, Scale, Shift, SpaceError, UsageError, interpret
from austeer.compiler.facts import read_facts
from austeer.passes.adopt.artefact import Adopted, Asked
from austeer.passes.adopt.formats import recognise
from tests.tiny import Tiny, load, logits, on_disk, tokens

TINY = Tiny("llama", layers=3)  # residual 20, heads 4 x 6
MODEL = on_disk(TINY)
Vectors = Mapping[int, "np.ndarray[Any, Any]"]


def vectors(*layers: int, width: int = 20) -> Vectors:
    rng = np.random.default_rng(0)
    return {layer: rng.normal(size=width).astype(np.float32) for layer in layers}


def adopted(path: Path, **asked: Any) -> Adopted:
    if "layers" in asked:
        asked["layers"] = frozenset(asked["layers"])
    kind, file = recognise(path)
    return kind.read(file, read_facts(MODEL), Asked(**asked))


def interpreted(found: Adopted) -> Tensor:
    model = load(MODEL)
    with interpret(model, Program.of(found.edits, model=MODEL)):
        return logits(model, tokens())


def hooked(place: Callable[[Any, int], Any], added: Vectors, *, at_input: bool = False) -> Tensor:
    """The logits with a vector added to what the module `place(model, layer)` returns, or receives."""
    model = load(MODEL)
    for layer, vector in added.items():
        if at_input:
            place(model, layer).register_forward_pre_hook(
                lambda _, args, v=vector: (args[0] + torch.tensor(v), *args[1:])
            )
        else:
            place(model, layer).register_forward_hook(lambda _m, _i, out, v=vector: plus(out, torch.tensor(v)))
    return logits(model, tokens())


def plus(output: Any, vector: Tensor) -> Any:
    return (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector


def assert_same(found: Adopted, expected: Tensor) -> None:
    scale = expected.abs().max()
    assert (interpreted(found) - expected).abs().max() < 1e-5 * scale
    assert (logits(load(MODEL), tokens()) - expected).abs().max() > 1e-2 * scale


def block(model: Any, layer: int) -> Any:
    return model.model.layers[layer]


# ---- control vectors ----------------------------------------------------------------------


def gguf_of(
    path: Path, directions: Mapping[str, Any], architecture: str = "controlvector", hint: str = "llama"
) -> Path:
    gguf = pytest.importorskip("gguf", reason="gguf, which repeng writes its files with, is not installed")
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string(f"{architecture}.model_hint", hint)
    writer.add_uint32(f"{architecture}.layer_count", len(directions))
    for name, direction in directions.items():
        writer.add_tensor(name, direction)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def control_vector(path: Path, directions: Vectors, **more: Any) -> Path:
    return gguf_of(path, {f"direction.{layer}": direction for layer, direction in directions.items()}, **more)


def test_a_control_vector_is_added_after_its_block(tmp_path: Path) -> None:
    found = adopted(control_vector(tmp_path / "v.gguf", vectors(2, 1)))
    assert_same(found, hooked(block, vectors(2, 1)))
    assert [(edit.layer, edit.site) for edit in found.edits] == [(1, "residual"), (2, "residual")]
    assert found.notes == ()


def test_layers_of_a_control_vector(tmp_path: Path) -> None:
    path = control_vector(tmp_path / "v.gguf", vectors(2, 1))
    assert [edit.layer for edit in adopted(path, layers=[2]).edits] == [2]
    with pytest.raises(InputError, match=r"no vector for layer 0, which --layers names; there are 1, 2"):
        adopted(path, layers=[0, 2])


def test_what_a_control_vector_says_of_its_model_is_compared(tmp_path: Path) -> None:
    notes = adopted(control_vector(tmp_path / "v.gguf", vectors(0), hint="mistral")).notes
    assert notes[0] == "it says it was made for a 'mistral' model, and model is a 'llama'"
    assert "llama.cpp refuses it" in notes[1]


def test_half_precision_directions(tmp_path: Path) -> None:
    half = {layer: vector.astype(np.float16) for layer, vector in vectors(1).items()}
    (edit,) = adopted(control_vector(tmp_path / "v.gguf", half)).edits
    assert isinstance(edit, Shift)
    assert (edit.vector == half[1].astype(np.float32)).all()


@pytest.mark.parametrize(
    ("directions", "more", "error", "words"),
    [
        ({"direction.1": np.ones(20, np.float32)}, {"architecture": "llama"}, InputError, "holds a 'llama'"),
        ({"direction.-1": np.ones(20, np.float32)}, {}, InputError, "'direction.-1' is not called direction.N"),
        ({"direction.01": np.ones(20, np.float32)}, {}, InputError, "'direction.01' is not called"),
        ({"direction.1.x": np.ones(20, np.float32)}, {}, InputError, "'direction.1.x' is not called"),
        ({"direction.1": np.ones((1, 20), np.float32)}, {}, ProgramError, r"got shape \(1, 20\)"),
        ({"direction.1": np.full(20, np.nan, np.float32)}, {}, ProgramError, "nan or infinity"),
        ({"direction.1": np.ones(20, np.int32)}, {}, InputError, "is of I32"),
        ({"direction.1": np.ones(19, np.float32)}, {}, SpaceError, "has 19 values; the residual space"),
        ({"direction.3": np.ones(20, np.float32)}, {}, ProgramError, "layers 0 to 2"),
    ],
)
def test_bad_control_vectors(
    directions: Any, more: dict[str, str], error: type[Exception], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        Program.of(adopted(gguf_of(tmp_path / "v.gguf", directions, **more)).edits, model=MODEL)


# ---- CAST ---------------------------------------------------------------------------------


def svec(path: Path, directions: Any, **more: Any) -> Path:
    variances = {str(layer): 0.5 for layer in directions}
    fields = {"model_type": "llama", "directions": directions, "explained_variances": variances, **more}
    path.write_text(json.dumps(fields))
    return path


def lists(found: Vectors) -> dict[str, list[float]]:
    return {str(layer): vector.tolist() for layer, vector in found.items()}


def test_a_cast_direction_is_added_before_its_block(tmp_path: Path) -> None:
    found = adopted(svec(tmp_path / "v.svec", lists(vectors(0, 1, 2))), layers=[1, 2])
    added = {layer: vectors(0, 1, 2)[layer] for layer in (1, 2)}
    assert_same(found, hooked(block, added, at_input=True))
    assert [edit.layer for edit in found.edits] == [0, 1]
    assert "conditions" in found.notes[-1]


@pytest.mark.parametrize(
    ("directions", "layers", "error", "words"),
    [
        ({"1": [0.0] * 20}, None, UsageError, "say --layers, as behavior_layer_ids; it has 1 to 1"),
        ({"0": [0.0] * 20}, [0], Refused, "leave 0 out of --layers"),
        ({"1": [0.0] * 20}, [2], InputError, "no direction for layer 2"),
        ({"-1": [0.0] * 20}, [1], InputError, "the layer '-1'"),
        ({"²": [0.0] * 20}, [1], InputError, "the layer '²'"),
        ({"1": [0.0] * 19 + [float("nan")]}, [1], ProgramError, "nan"),
        ({"1": [[0.0] * 20]}, [1], ProgramError, "expected one dimension"),
        ({"1": "AAAA"}, [1], ProgramError, "not a vector of numbers"),
        ({"1": [0.0] * 19}, [1], SpaceError, "has 19 values"),
        ({}, [1], InputError, "no `directions`"),
        ([], [1], InputError, "no `directions`"),
    ],
)
def test_bad_svec(directions: Any, layers: Any, error: type[Exception], words: str, tmp_path: Path) -> None:
    asked = {} if layers is None else {"layers": layers}
    with pytest.raises(error, match=words):
        Program.of(adopted(svec(tmp_path / "v.svec", directions), **asked).edits, model=MODEL)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x80", "[" * 100_000])
def test_an_svec_that_is_no_json(text: str, tmp_path: Path) -> None:
    (tmp_path / "v.svec").write_text(text, "latin-1")
    with pytest.raises(InputError, match="JSON"):
        adopted(tmp_path / "v.svec", layers=[1])


# ---- steering-lite ------------------------------------------------------------------------


def steering_lite(path: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    cfg = {"method": "mean_diff", "layers": None, "target": "residual", "target_submodule": None, "coeff": 1.0}
    save_file(tensors, path, metadata={"cfg": json.dumps({**cfg, "dtype": "bfloat16", "seed": 0, **config})})
    return path


def named(found: Vectors, pattern: str) -> dict[str, Tensor]:
    return {pattern.format(layer): torch.tensor(vector) for layer, vector in found.items()}


@pytest.mark.parametrize("pattern", ["layer{}.v", "layer{}.shared.v"])
def test_steering_lite_adds_coeff_times_v_after_the_block(pattern: str, tmp_path: Path) -> None:
    found = adopted(steering_lite(tmp_path / "v.safetensors", named(vectors(0, 2), pattern), coeff=-0.5))
    assert_same(found, hooked(block, {layer: -0.5 * vector for layer, vector in vectors(0, 2).items()}))


def test_components_of_steering_lite_are_summed(tmp_path: Path) -> None:
    components = torch.tensor(np.stack(list(vectors(0, 1, 2).values())))
    (edit,) = adopted(steering_lite(tmp_path / "v.safetensors", {"layer1.V": components}, method="pca")).edits
    assert isinstance(edit, Shift)
    assert np.allclose(edit.vector, components.sum(0), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "config", "error", "words"),
    [
        ("layer1.v", {"coeff": ["1"]}, ProgramError, "coeff"),
        ("layer1.v", {"method": "spherical"}, Refused, "'spherical' does not add a constant; only mean_diff, pca"),
        ("layer1.v", {"target": "attn_out"}, Refused, "output of a block"),
        ("layer1.v", {"target_submodule": "mlp.down_proj"}, Refused, "output of a block"),
        ("layer1.v", {"coeff": float("nan")}, ProgramError, "coeff"),
        ("layer1.w", {}, InputError, "'layer1.w' is not called layerN.v"),
        ("sub::layers.1.mlp::v", {}, InputError, "not called layerN.v"),
    ],
)
def test_bad_steering_lite(name: str, config: Any, error: type[Exception], words: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=words):
        adopted(steering_lite(tmp_path / "v.safetensors", {name: torch.ones(20)}, **config))


@pytest.mark.parametrize("cfg", ["", "{", "[]", "[" * 100_000])
def test_a_steering_lite_configuration_that_is_no_object(cfg: str, tmp_path: Path) -> None:
    save_file({"layer1.v": torch.ones(20)}, tmp_path / "v.safetensors", metadata={"cfg": cfg})
    with pytest.raises(InputError, match="`cfg` is not"):
        adopted(tmp_path / "v.safetensors")


# ---- steering-vectors ---------------------------------------------------------------------

PLACES: dict[str, Callable[[Any, int], Any]] = {
    "residual": block,
    "attn": lambda model, layer: block(model, layer).self_attn,
    "ffn": lambda model, layer: block(model, layer).mlp,
}
LAYER_TYPES = {"decoder_block": "residual", "self_attn": "attn", "mlp": "ffn"}


def saved(path: Path, tensors: dict[str, Tensor], **metadata: str) -> Path:
    save_file(tensors, path, metadata=metadata or None)
    return path


@pytest.mark.parametrize("pattern", ["{}", "layer_{}", "layers.{}", "layer{}"])
@pytest.mark.parametrize("site", PLACES)
def test_vectors_by_layer_at_the_site_that_is_named(site: str, pattern: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "v.safetensors", named(vectors(0, 2), pattern))
    assert_same(adopted(path, site=site), hooked(PLACES[site], vectors(0, 2)))


@pytest.mark.parametrize("layer_type", LAYER_TYPES)
def test_vectors_with_their_layer_type(layer_type: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "v.safetensors", named(vectors(1), "{}"), layer_type=layer_type)
    assert_same(adopted(path), hooked(PLACES[LAYER_TYPES[layer_type]], vectors(1)))


def test_the_site_is_never_guessed(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="say --site"):
        adopted(saved(tmp_path / "v.safetensors", named(vectors(1), "{}")))


@pytest.mark.parametrize(
    ("tensors", "metadata", "error", "words"),
    [
        ({"x": 20}, {}, InputError, "'x' is not named after a layer"),
        ({"01": 20}, {}, InputError, "'01' is not named"),
        ({"1": 20, "layer_1": 20}, {}, InputError, "two tensors are named after one layer"),
        ({"1": 24}, {}, SpaceError, "has 24 values"),
        ({"9": 20}, {}, ProgramError, "layers 0 to 2"),
    ],
)
def test_bad_vectors_by_layer(
    tensors: dict[str, int], metadata: Any, error: type[Exception], words: str, tmp_path: Path
) -> None:
    path = saved(tmp_path / "v.safetensors", {name: torch.ones(size) for name, size in tensors.items()}, **metadata)
    with pytest.raises(error, match=words):
        Program.of(adopted(path, site="residual").edits, model=MODEL)


def test_a_layer_type_without_a_site(tmp_path: Path) -> None:
    path = saved(tmp_path / "v.safetensors", named(vectors(1), "{}"), layer_type="input_layernorm")
    with pytest.raises(Refused, match="'input_layernorm'; only decoder_block"):
        adopted(path)


def test_a_program_is_no_artefact(tmp_path: Path) -> None:
    Program.of([Scale(0, "ffn", (1,), 0.5)], model=MODEL).save(tmp_path / "p.safetensors")
    with pytest.raises(InputError, match="a program already"):
        adopted(tmp_path / "p.safetensors")


# ---- LoFiT --------------------------------------------------------------------------------


def lofit_tensors(layers: tuple[int, ...], head_dim: int = 6, heads: int = 4) -> dict[str, Tensor]:
    torch.manual_seed(0)
    names = [f"model.layers.{i}.self_attn.attn_{kind}.{h}" for i in layers for kind in "Av" for h in range(heads)]
    return {name: torch.randn(head_dim) for name in names}


def test_lofit_scales_and_then_shifts_each_head(tmp_path: Path) -> None:
    tensors = lofit_tensors((0, 2))
    found = adopted(saved(tmp_path / "model.safetensors", {**tensors, "model.norm.weight": torch.ones(20)}))

    def heads(layer: int, kind: str) -> Tensor:
        return torch.cat([tensors[f"model.layers.{layer}.self_attn.attn_{kind}.{head}"] for head in range(4)])

    model = load(MODEL)
    for layer in (0, 2):
        scale, shift = 1 + heads(layer, "A"), heads(layer, "v")
        block(model, layer).self_attn.o_proj.register_forward_pre_hook(
            lambda _, args, scale=scale, shift=shift: (args[0] * scale + shift,)
        )
    assert_same(found, logits(model, tokens()))
    assert found.notes == ("1 other tensors are taken for the frozen base and left out",)


def test_heads_that_lofit_did_not_train_stay(tmp_path: Path) -> None:
    tensors = {"model.layers.1.self_attn.attn_v.2": torch.ones(6), "model.layers.1.self_attn.attn_A.0": torch.zeros(6)}
    (edit,) = adopted(saved(tmp_path / "model.safetensors", tensors)).edits
    assert isinstance(edit, Shift)
    assert edit.vector.tolist() == [0] * 12 + [1] * 6 + [0] * 6


@pytest.mark.parametrize(("head", "size"), [(4, 6), (0, 5), (0, 24), (0, 0), (10**6 - 1, 6)])
def test_lofit_heads_that_do_not_fit(head: int, size: int, tmp_path: Path) -> None:
    tensors = {f"model.layers.0.self_attn.attn_v.{head}": torch.ones(size)}
    with pytest.raises(InputError, match=rf"head {head} has {size} units; the model has 4 heads of 6"):
        adopted(saved(tmp_path / "model.safetensors", tensors))


# ---- arrays -------------------------------------------------------------------------------


def npy(path: Path, array: Any, **more: Any) -> Path:
    np.save(path, array, **more)
    return path


@pytest.mark.parametrize("shape", [(3, 24), (3, 4, 6), (12, 6)])
def test_head_shifts_in_an_array(shape: tuple[int, ...], tmp_path: Path) -> None:
    shift = vectors(0, 2, width=24)
    rows = np.zeros((3, 24))
    rows[[0, 2]] = list(shift.values())
    found = adopted(npy(tmp_path / "v.npy", rows.reshape(shape)), site="heads")
    assert_same(found, hooked(lambda model, layer: block(model, layer).self_attn.o_proj, shift, at_input=True))
    assert [edit.layer for edit in found.edits] == [0, 2]


@pytest.mark.parametrize("site", PLACES)
def test_residual_shifts_in_an_array(site: str, tmp_path: Path) -> None:
    rows = np.stack(list(vectors(0, 1, 2).values()))
    assert_same(adopted(npy(tmp_path / "v.npy", rows), site=site), hooked(PLACES[site], vectors(0, 1, 2)))


@pytest.mark.parametrize(
    ("array", "site", "error", "words"),
    [
        (np.ones((3, 24)), None, UsageError, "say --site heads"),
        (np.ones((3, 24)), "residual", SpaceError, r"shape \[3, 24\]; shifts at site residual of model have \[3, 20\]"),
        (np.ones((3, 20)), "heads", SpaceError, r"have \[3, 24\] or \[3, 4, 6\] or \[12, 6\]"),
        (np.ones((3, 4, 5)), "heads", SpaceError, r"shape \[3, 4, 5\]"),
        (np.ones((2, 24)), "heads", SpaceError, r"shape \[2, 24\]"),
        (np.array([[0, 1], [2, 3]]), "heads", InputError, r"list of \(layer, head\) pairs"),
        (np.ones((3, 24), np.complex64), "heads", InputError, "complex64"),
        (np.full((3, 24), np.inf), "heads", ProgramError, "nan or infinity"),
        (np.full((3, 24), 1e300), "heads", ProgramError, "nan or infinity"),
    ],
)
def test_bad_arrays(array: Any, site: Any, error: type[Exception], words: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=words):
        adopted(npy(tmp_path / "v.npy", array), site=site)


class Attack:
    """Creates a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return (Path.touch, (self.trace,))


def test_an_array_of_objects_is_not_unpickled(tmp_path: Path) -> None:
    path = npy(tmp_path / "v.npy", np.array([[Attack(tmp_path / "ran")]], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match=r"not an \.npy file of plain numbers"):
        adopted(path, site="heads")
    np.load(path, allow_pickle=True)  # the attack works where it is let in
    assert (tmp_path / "ran").exists()


def npy_header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK\x03\x04" + bytes(40),
        b"\x80\x04K\x01.",
        npy_header("{'descr': '<f8', 'fortran_order': False, 'shape': (1099511627776, 1048576), }\n"),
        npy_header("{'descr': '<f8', 'fortran_order': False, 'shape': (-3, 24), }\n") + bytes(600),
        npy_header("{'descr': '<f8', 'fortran_order': False, 'shape': (3, 24), }\n") + bytes(10),
        npy_header("{'descr': '|O', 'fortran_order': False, 'shape': (3, 24), }\n") + bytes(600),
        npy_header("__import__('os')\n"),
        npy_header("(" * 500 + "\n"),
    ],
)
def test_damaged_arrays(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "v.npy").write_bytes(data)
    with pytest.raises(InputError, match=r"not an \.npy file of plain numbers"):
        adopted(tmp_path / "v.npy", site="heads")


# ---- no format ----------------------------------------------------------------------------


def test_names_that_tell_no_format(tmp_path: Path) -> None:
    (tmp_path / "v.bin").write_bytes(b"x")
    with pytest.raises(InputError, match=r"known are \.safetensors, \.gguf, \.svec, \.npy, \.pt, and folders"):
        adopted(tmp_path / "v.bin")
    with pytest.raises(InputError, match=r"neither adapter_config\.json nor all_scores\.pt"):
        adopted(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        adopted(tmp_path / "nothing.gguf")
