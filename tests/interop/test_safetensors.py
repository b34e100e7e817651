"""Model folders: every tensor accounted for, and complete or absent."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from rkd_jax.data.tokenizer import byte_tokenizer
from rkd_jax.interop import WeightsError, load_model, names, safetensors
from rkd_jax.interop.hf_config import UnsupportedConfigError
from rkd_jax.models.decoder import Decoder, DecoderConfig

CONFIG = DecoderConfig(
    vocab_size=40,
    hidden_size=12,
    intermediate_size=10,
    num_layers=2,
    num_heads=3,
    num_kv_heads=1,
    head_dim=6,
    max_length=32,
    tie_embeddings=False,
)
VARIANTS = {
    "untied": CONFIG,
    "tied": dataclasses.replace(CONFIG, tie_embeddings=True),
    "biased": dataclasses.replace(CONFIG, attention_bias=True),
    "head_norms": dataclasses.replace(CONFIG, qk_norm=True),
    "bfloat16": dataclasses.replace(CONFIG, param_dtype="bfloat16"),
    "window": dataclasses.replace(CONFIG, sliding_window=7),
}


def _params(config):
    """Random parameters with the tree that the decoder itself declares."""
    shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0))
    noise = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(noise.normal(size=leaf.shape), leaf.dtype), shapes
    )


@pytest.fixture(scope="module")
def params():
    return _params(CONFIG)


@pytest.fixture
def folder(tmp_path, params):
    """A saved model in one file."""
    safetensors.save(tmp_path / "model", CONFIG, params)
    return tmp_path / "model"


def _rewrite(folder, change):
    """Apply ``change`` to the tensors of the folder's single file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def _rewrite_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert np.array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("max_shard_bytes", [10**9, 1000], ids=["single", "sharded"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip_is_exact(tmp_path, variant, max_shard_bytes):  # R32, R33
    config = VARIANTS[variant]
    params = _params(config)
    safetensors.save(tmp_path, config, params, max_shard_bytes=max_shard_bytes)
    index = tmp_path / "model.safetensors.index.json"
    assert index.exists() == (max_shard_bytes == 1000)
    assert (tmp_path / "model.safetensors").exists() != index.exists()
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1
    loaded_config, loaded = safetensors.load(tmp_path)
    assert loaded_config == config
    _assert_same(loaded, params)


def test_layout_of_the_stored_matrices(folder, params):
    stored = load_file(folder / "model.safetensors")
    attention = params["layers"]["attention"]
    for layer in range(CONFIG.num_layers):
        prefix = f"model.layers.{layer}.self_attn."
        query = np.asarray(attention["query"]["kernel"])[layer]
        output = np.asarray(attention["output"]["kernel"])[layer]
        for head in range(CONFIG.num_heads):
            rows = slice(head * CONFIG.head_dim, (head + 1) * CONFIG.head_dim)
            expected = query[:, head, :].T
            np.testing.assert_array_equal(
                stored[prefix + "q_proj.weight"][rows], expected
            )
            expected = output[head].T
            np.testing.assert_array_equal(
                stored[prefix + "o_proj.weight"][:, rows], expected
            )
    np.testing.assert_array_equal(stored["lm_head.weight"], params["head"]["kernel"].T)


def test_index_lists_every_tensor_once(tmp_path, params):
    safetensors.save(tmp_path, CONFIG, params, max_shard_bytes=1000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    stored = {
        name: path.name
        for path in tmp_path.glob("model-*.safetensors")
        for name in load_file(path)
    }
    assert index["weight_map"] == stored
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert index["metadata"]["total_size"] == 4 * count
    for file in set(stored.values()):
        tensors = load_file(tmp_path / file)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 1000


def test_types_are_converted_on_request(tmp_path, params):
    safetensors.save(tmp_path, CONFIG, params, dtype="bfloat16")
    config, loaded = safetensors.load(tmp_path)
    assert config.param_dtype == "bfloat16"
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    _assert_same(loaded, rounded)
    config, loaded = safetensors.load(tmp_path, param_dtype="float32")
    assert config.param_dtype == "float32"
    _assert_same(loaded, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), rounded))


def test_a_mixture_of_types_is_read_as_float32(folder, params):
    def change(tensors):
        for name in tensors:
            if "norm" not in name:
                tensors[name] = tensors[name].astype(jnp.bfloat16)

    _rewrite(folder, change)
    config, loaded = safetensors.load(folder)
    assert config.param_dtype == "float32"
    _assert_same(loaded["final_norm"], params["final_norm"])
    expected = params["embed"]["embedding"].astype(jnp.bfloat16).astype(jnp.float32)
    _assert_same(loaded["embed"]["embedding"], expected)


def test_leaves_go_straight_to_their_devices(folder, params):
    mesh = jax.make_mesh(
        (2,),
        ("fsdp",),
        devices=jax.devices()[:2],
        axis_types=(jax.sharding.AxisType.Auto,),
    )
    split, whole = (NamedSharding(mesh, PartitionSpec(*a)) for a in (("fsdp",), ()))
    shardings = jax.tree.map(lambda _: split, params)
    shardings["final_norm"]["scale"] = whole
    _, loaded = safetensors.load(folder, shardings=shardings)
    _assert_same(loaded, params)
    leaf = loaded["embed"]["embedding"]
    assert [s.data.shape for s in leaf.addressable_shards] == [(20, 12), (20, 12)]
    assert loaded["final_norm"]["scale"].sharding == whole


def test_tokenizer_and_ids_travel_along(tmp_path, params):
    tokenizer = byte_tokenizer()
    config = dataclasses.replace(CONFIG, vocab_size=258, tie_embeddings=True)
    safetensors.save(
        tmp_path, config, _params(config), tokenizer=tokenizer, metadata={"step": "7"}
    )
    decoder, _, again = load_model(tmp_path)
    assert decoder.config == config
    assert again.fingerprint() == tokenizer.fingerprint()
    assert again.chat_template == tokenizer.chat_template
    expected = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": None}
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation == expected
    content = json.loads((tmp_path / "config.json").read_text())
    assert expected.items() <= content.items()
    with safetensors.safe_open(tmp_path / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"step": "7", "format": "pt"}


# What is wrong with a folder


def test_missing_tensor(folder):
    name = "model.layers.1.mlp.up_proj.weight"
    _rewrite(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(WeightsError) as error:
        safetensors.load(folder)
    assert str(error.value) == (
        f"{folder}/model.safetensors: tensor {name} is missing; expected shape (10, 12)"
    )


def test_unexpected_tensor(folder):
    _rewrite(folder, lambda tensors: tensors.update(score=np.ones((1, 12))))
    with pytest.raises(
        WeightsError, match=r"model\.safetensors: unexpected tensor score"
    ):
        safetensors.load(folder)


def test_layers_beyond_the_configuration_are_unexpected(folder):
    _rewrite_json(folder / "config.json", num_hidden_layers=1)
    with pytest.raises(WeightsError, match=r"unexpected tensor model\.layers\.1\."):
        safetensors.load(folder)


def test_wrong_shape(folder):
    _rewrite_json(folder / "config.json", vocab_size=41)
    message = r"model.embed_tokens.weight has shape \(40, 12\); expected \(41, 12\)"
    with pytest.raises(WeightsError, match=message):
        safetensors.load(folder)


def test_truncated_file(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(WeightsError, match=r"model\.safetensors: not a complete") as e:
        safetensors.load(folder)
    assert "\n" not in str(e.value)


def test_integer_tensor(folder):
    def change(tensors):
        tensors["model.norm.weight"] = np.ones(12, np.int8)

    _rewrite(folder, change)
    with pytest.raises(WeightsError, match=r"model\.norm\.weight is stored as I8"):
        safetensors.load(folder)


@pytest.fixture
def index(tmp_path, params):
    """The index of a sharded folder."""
    safetensors.save(tmp_path / "sharded", CONFIG, params, max_shard_bytes=1000)
    return tmp_path / "sharded" / "model.safetensors.index.json"


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "a\\b"],
)
def test_an_index_cannot_leave_its_folder(index, name):
    weight_map = json.loads(index.read_text())["weight_map"]
    _rewrite_json(index, weight_map=weight_map | {"model.norm.weight": name})
    with pytest.raises(WeightsError, match="is not a file name in this folder"):
        safetensors.load(index.parent)


def test_missing_shard(index):
    shard = sorted(index.parent.glob("model-*"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"{shard.name}: no such file"):
        safetensors.load(index.parent)


def test_tensor_in_two_shards(index):
    first, second = sorted(index.parent.glob("model-*"))[:2]
    save_file(load_file(first) | load_file(second), second)
    with pytest.raises(
        WeightsError, match=f"{second.name}: .* is in {first.name} as well"
    ):
        safetensors.load(index.parent)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": []}'])
def test_broken_index(index, content):
    index.write_text(content)
    with pytest.raises(WeightsError, match=r"model\.safetensors\.index\.json: "):
        safetensors.load(index.parent)


def test_rotary_frequencies_of_old_files_are_ignored(folder, params):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    _rewrite(folder, lambda tensors: tensors.update({name: np.ones(3, np.float32)}))
    _assert_same(safetensors.load(folder)[1], params)


def test_a_tied_head_may_be_stored_but_must_agree(tmp_path):
    config = VARIANTS["tied"]
    params = _params(config)
    safetensors.save(tmp_path, config, params)
    embedding = np.array(params["embed"]["embedding"])
    _rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": embedding}))
    _assert_same(safetensors.load(tmp_path)[1], params)
    embedding[0, 0] += 1.0
    _rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": embedding}))
    with pytest.raises(WeightsError, match=r"lm_head\.weight differs from"):
        safetensors.load(tmp_path)


def test_folders_that_hold_no_model(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        load_model(tmp_path)
    with pytest.raises(FileNotFoundError, match="give the model's folder"):
        load_model(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor"):
        load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"config\.json: not valid JSON"):
        load_model(folder)


def test_unsupported_attribute_names_the_file(folder):
    _rewrite_json(folder / "config.json", mlp_bias=True)
    with pytest.raises(UnsupportedConfigError, match=r"config\.json: mlp_bias=True"):
        safetensors.load(folder)


# What is wrong with a save


def test_a_folder_with_content_is_kept(folder, params):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(FileExistsError, match="overwrite=True"):
        safetensors.save(folder, CONFIG, params)
    assert before == {path: path.read_bytes() for path in folder.iterdir()}
    (folder / "old").touch()
    doubled = jax.tree.map(lambda leaf: 2 * leaf, params)
    safetensors.save(folder, CONFIG, doubled, overwrite=True)
    _assert_same(safetensors.load(folder)[1], doubled)
    assert not (folder / "old").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_an_interrupted_save_changes_nothing(folder, params, monkeypatch):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    written = []

    def fail_on_the_second(tensors, path, metadata):
        if written:
            raise OSError("disk full")
        written.append(path)
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr(safetensors, "save_file", fail_on_the_second)
    with pytest.raises(OSError, match="disk full"):
        safetensors.save(folder, CONFIG, params, max_shard_bytes=1000, overwrite=True)
    assert before == {path: path.read_bytes() for path in folder.iterdir()}
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_what_a_killed_save_of_the_same_process_number_left_is_no_obstacle(
    folder, params
):
    for part in ("partial", "previous"):
        left = folder.parent / f".{folder.name}.{part}-{os.getpid()}"
        left.mkdir()
        (left / "config.json").write_text("{")
    safetensors.save(folder, CONFIG, params, overwrite=True)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_parameters_must_fit(tmp_path, params):
    def save(changed):
        safetensors.save(tmp_path / "x", CONFIG, changed)

    with pytest.raises(
        WeightsError, match=r"no leaf head/kernel; expected shape \(12, 40"
    ):
        save({k: v for k, v in params.items() if k != "head"})
    with pytest.raises(WeightsError, match="unexpected leaf lora"):
        save(params | {"lora": jnp.ones(1)})
    with pytest.raises(
        WeightsError, match=r"head/kernel has shape \(40, 12\); expected"
    ):
        save(params | {"head": {"kernel": jnp.ones((40, 12))}})
    assert not (tmp_path / "x").exists()


def test_no_family_can_express_the_configuration(tmp_path, params):
    config = dataclasses.replace(CONFIG, logit_softcap=3.0)
    with pytest.raises(UnsupportedConfigError, match="logit_softcap=3.0"):
        safetensors.save(tmp_path / "x", config, params)
    assert not (tmp_path / "x").exists()


def test_the_table_covers_the_decoder_exactly():
    for config in VARIANTS.values():
        shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0))
        assert len(names.leaves(config, shapes)) == len(jax.tree.leaves(shapes))


def test_torch_is_never_imported():  # R37
    code = "import sys, rkd_jax.interop; print({'torch', 'gguf'} & set(sys.modules))"
    command = [sys.executable, "-W", "ignore", "-c", code]
    root = Path(safetensors.__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
