"""A checkpoint opens only if it is whole, unambiguous, and of a kind that can be compiled."""

import json
import os

import numpy as np
import pytest
from safetensors.numpy import save_file

from austeer.compiler.checkpoint import Checkpoint, files_to_copy, is_copied
from austeer.compiler.errors import CheckpointError, Refused
from austeer.compiler.tensors import to_float32

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
INDEX = "model.safetensors.index.json"


def tensors(*names):
    return {name: np.full((2, 3), number, np.float32) for number, name in enumerate(names)}


def single(path, config=CONFIG):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors("a.weight", "b.weight"), path / "model.safetensors")
    return path


def sharded(path, **places):
    """Two shards, 1 with a.weight and 2 with b.weight; `places` changes what the index says."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors("a.weight"), path / "model-1.safetensors")
    save_file(tensors("b.weight"), path / "model-2.safetensors")
    weight_map = {"a.weight": "model-1.safetensors", "b.weight": "model-2.safetensors"}
    weight_map |= {name.replace("_", "."): shard for name, shard in places.items()}
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def test_one_file(tmp_path):
    found = Checkpoint.open(single(tmp_path / "m"))
    assert (found.path, found.config, found.shards, found.index) == (
        tmp_path / "m",
        CONFIG,
        ("model.safetensors",),
        None,
    )
    assert found.headers["model.safetensors"].size == (tmp_path / "m/model.safetensors").stat().st_size
    assert (found.tensors.keys(), found.unindexed) == ({"a.weight", "b.weight"}, ())


def test_shards_with_an_index(tmp_path):
    found = Checkpoint.open(str(sharded(tmp_path / "m")))
    assert (found.shards, found.index) == (("model-1.safetensors", "model-2.safetensors"), INDEX)
    info = found.tensors["b.weight"]
    assert info.file == tmp_path / "m/model-2.safetensors"
    raw = info.file.read_bytes()[info.offset : info.offset + info.nbytes]
    assert np.array_equal(to_float32(raw, info.dtype), np.zeros(6))
    assert found.headers.keys() == set(found.shards)


def test_tensors_outside_the_index_are_kept_and_named(tmp_path):
    save_file(tensors("b.weight", "extra.inv_freq"), sharded(tmp_path / "m") / "model-2.safetensors")
    found = Checkpoint.open(tmp_path / "m")
    assert found.unindexed == ("extra.inv_freq",)
    assert "extra.inv_freq" in found.tensors


def test_an_index_of_the_single_file_is_not_ambiguous(tmp_path):
    path = single(tmp_path / "m")
    (path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(["a.weight", "b.weight"], "model.safetensors")}))
    found = Checkpoint.open(path)
    assert (found.shards, found.index) == (("model.safetensors",), INDEX)


def test_both_layouts_at_once_are_refused(tmp_path):
    sharded(single(tmp_path / "m"))
    with pytest.raises(Refused, match="engines differ in which one they load"):
        Checkpoint.open(tmp_path / "m")


@pytest.mark.parametrize(
    "shard",
    [
        "../m/model-1.safetensors",
        "/etc/passwd",
        "sub/model-1.safetensors",
        "sub\\model-1.safetensors",
        "C:model-1.safetensors",
        "..",
        ".safetensors",
        "",
        "model-1.bin",
        "model-1.safetensors\n",
        "model-1\0.safetensors",
        7,
        None,
    ],
)
def test_an_index_cannot_lead_out_of_the_directory(tmp_path, shard):
    with pytest.raises(CheckpointError, match=r"tensor 'a.weight' is said to be in .* not the plain name"):
        Checkpoint.open(sharded(tmp_path / "m", a_weight=shard))


def test_a_missing_shard(tmp_path):
    (sharded(tmp_path / "m") / "model-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-2.safetensors: this file of the weights is missing"):
        Checkpoint.open(tmp_path / "m")


def test_a_tensor_that_no_shard_holds(tmp_path):
    with pytest.raises(CheckpointError, match=r"'c.weight' should be in model-1.safetensors, and is in no shard"):
        Checkpoint.open(sharded(tmp_path / "m", c_weight="model-1.safetensors"))


def test_a_tensor_in_another_shard_than_the_index_says(tmp_path):
    path = sharded(tmp_path / "m")
    save_file(tensors("a.weight", "c.weight"), path / "model-1.safetensors")
    index = json.loads((path / INDEX).read_text())
    index["weight_map"]["c.weight"] = "model-2.safetensors"
    (path / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"should be in model-2.safetensors, and is in model-1.safetensors"):
        Checkpoint.open(path)


def test_the_same_tensor_in_two_shards(tmp_path):
    save_file(tensors("b.weight", "a.weight"), sharded(tmp_path / "m") / "model-2.safetensors")
    with pytest.raises(CheckpointError, match=r"'a.weight' is both in model-1.safetensors and in model-2"):
        Checkpoint.open(tmp_path / "m")


def test_a_damaged_shard_is_named(tmp_path):
    shard = sharded(tmp_path / "m") / "model-2.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=r"model-2.safetensors: the file is cut short: 5 of"):
        Checkpoint.open(tmp_path / "m")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "not JSON in UTF-8"),
        (b"[" * 200_000, "not JSON in UTF-8"),
        (b'{"a": "\xff"}', "not JSON in UTF-8"),
        (b"[]", "not an object"),
        (b"null", "not an object"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_damaged_json_is_named(tmp_path, name, text, words):
    (sharded(tmp_path / "m") / name).write_bytes(text)
    with pytest.raises(CheckpointError, match=f"{name}: .*{words}"):
        Checkpoint.open(tmp_path / "m")


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": ["a"]}])
def test_an_index_without_a_map(tmp_path, index):
    (sharded(tmp_path / "m") / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="there is no weight_map"):
        Checkpoint.open(tmp_path / "m")


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "is quantised.*Compile the unquantised model"),
        ({"compression_config": {"format": "int-quantized"}}, "is quantised.*Compile the unquantised model"),
        ({"auto_map": {"AutoModel": "m.M"}}, "Python code of its own.*delete auto_map"),
        ({"transformers_weights": "a.safetensors"}, "transformers_weights.*save_pretrained"),
        ({"text_config": {}}, r"\(text_config in config.json\).*Export its language model"),
        ({"vision_config": {}}, r"\(vision_config in config.json\).*Export its language model"),
        ({"audio_config": {}}, r"\(audio_config in config.json\).*Export its language model"),
        ({"architectures": ["T5ForConditionalGeneration"]}, "T5ForConditionalGeneration.*Export"),
    ],
)
def test_a_configuration_that_rules_the_model_out(tmp_path, extra, words):
    with pytest.raises(Refused, match=words):
        Checkpoint.open(single(tmp_path / "m", {**CONFIG, **extra}))


def test_fields_that_are_empty_rule_nothing_out(tmp_path):
    empty = {"quantization_config": None, "auto_map": {}, "architectures": None}
    assert Checkpoint.open(single(tmp_path / "m", {**CONFIG, **empty})).config["auto_map"] == {}


def test_quantised_weights_are_refused_and_masks_are_not(tmp_path):
    path = single(tmp_path / "m")
    save_file({"h.0.attn.bias": np.ones((1, 4), np.uint8)}, path / "model.safetensors")
    Checkpoint.open(path)
    save_file({"h.0.q_proj.qweight": np.ones((1, 4), np.int32)}, path / "model.safetensors")
    with pytest.raises(Refused, match=r"h.0.q_proj.qweight is stored as I32. Compile the unquantised"):
        Checkpoint.open(path)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["config.json", "pytorch_model.bin"], "as pickle.*save_pretrained.*spaces/safetensors/convert"),
        (["config.json", "consolidated.00.pth"], "as pickle"),
        (["consolidated.00.PT", "params.json"], "as pickle"),
        (["model.Q4_K_M.gguf"], "as GGUF.*the Hugging Face checkpoint it was made from"),
        (["config.json", "tf_model.h5"], "TensorFlow"),
        (["config.json", "flax_model.msgpack"], "JAX"),
        (
            ["config.json", "model.fp16.safetensors"],
            "only model.fp16.safetensors, which engines do not look for",
        ),
        (["adapter_config.json", "adapter_model.safetensors"], "is an adapter.*Merge it"),
        (["adapter_config.json", "config.json", "model.safetensors"], "is an adapter.*Merge it"),
    ],
)
def test_a_directory_of_another_kind_is_refused_with_the_way_out(tmp_path, names, words):
    for name in names:
        (tmp_path / name).write_text("{}")
    with pytest.raises(Refused, match=words):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([], "there is no config.json"),
        (["model.safetensors"], "there is no config.json"),
        (["config.json"], "there is no model.safetensors and no model.safetensors.index.json"),
    ],
)
def test_an_incomplete_directory(tmp_path, names, words):
    for name in names:
        (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match=words):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("m.gguf", "this is a GGUF file. Compile the Hugging Face checkpoint"),
        ("model.safetensors", "one file of weights; give the directory"),
        ("pytorch_model.bin", "this is a pickle"),
        ("model.zip", "this is a file; give a model directory"),
    ],
)
def test_a_file_is_not_a_directory(tmp_path, name, words):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(Refused, match=words):
        Checkpoint.open(tmp_path / name)


def test_nothing_there(tmp_path):
    (tmp_path / "broken").symlink_to("nowhere")
    for name in ("nothing", "broken"):
        with pytest.raises(CheckpointError, match="there is no such directory"):
            Checkpoint.open(tmp_path / name)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_for_a_shard_does_not_block(tmp_path):
    shard = sharded(tmp_path / "m") / "model-1.safetensors"
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(CheckpointError, match="missing"):
        Checkpoint.open(tmp_path / "m")


KEPT = """
LICENSE License.txt NOTICE USE_POLICY.md added_tokens.json additional_chat_templates/rag.jinja
chat_template.jinja chat_template.json config.json generation_config.json merges.txt qwen.tiktoken
special_tokens_map.json tokenizer.json tokenizer.model tokenizer_config.json vocab.json vocab.txt
""".split()
LEFT_OUT = """
README.md austeer.json consolidated.safetensors model-00003-of-00002.safetensors model.gguf optimizer.pt
preprocessor_config.json pytorch_model.bin modeling_x.py .gitattributes
""".split()


def test_what_is_copied_and_what_is_left_out(tmp_path):
    path = sharded(tmp_path / "m")
    for name in [
        *KEPT,
        *LEFT_OUT,
        "original/params.json",
        "onnx/model.onnx",
        "additional_chat_templates/x.py",
    ]:
        file = path / name
        file.parent.mkdir(exist_ok=True)
        file.touch()
    (path / "config.json").write_text(json.dumps(CONFIG))
    kept, left_out = files_to_copy(Checkpoint.open(path))
    assert kept == sorted([*KEPT, INDEX, "model-1.safetensors", "model-2.safetensors"])
    assert left_out == sorted([*LEFT_OUT, "original/", "onnx/", "additional_chat_templates/x.py"])


def test_a_model_in_the_hub_cache_is_read_through_its_links(tmp_path):
    blobs = tmp_path / "blobs"
    single(blobs)
    (blobs / "tokenizer.json").write_text("{}")
    snapshot = tmp_path / "snapshots"
    snapshot.mkdir()
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../blobs/{file.name}")
    found = Checkpoint.open(snapshot)
    assert files_to_copy(found) == (["config.json", "model.safetensors", "tokenizer.json"], [])
    (blobs / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer.json: this leads to no file"):
        files_to_copy(found)


@pytest.mark.parametrize(
    "name", ["original/tokenizer.model", "onnx/config.json", "LICENSES/mit", "tokenizer/a.json", "x/y.tiktoken"]
)
def test_nothing_is_copied_from_other_directories(name):
    assert not is_copied(name)
