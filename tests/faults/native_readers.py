"""Damaged files for readers that are not Python, in a process that they may take down.

``python -m tests.faults.native_readers FORMAT FOLDER CASES`` makes one whole file,
damages it in so many ways, and prints as JSON how often it was loaded and refused, and
what went wrong. The number of the present case is in ``FOLDER/case``: if the process
is gone, that one did it. Once the whole file has been read, the process may grow by
`MEMORY` bytes.
"""

import collections
import faulthandler
import json
import math
import resource
import sys
from pathlib import Path

import jax
import numpy as np

from rkd_jax.data.tokenizer import from_file
from rkd_jax.interop import UnsupportedConfigError, WeightsError, gguf, safetensors
from rkd_jax.signals.cache import CacheError
from rkd_jax.signals.cache_shards import summary, write_shard
from tests.faults import whole_files
from tests.faults.mutations import (
    SECONDS,
    check_message,
    damaged_bytes,
    damaged_json,
    verdict,
)
from tests.signals import tiny_cache

MEMORY = 400 * 2**20
MODEL_ERRORS = (FileNotFoundError, UnsupportedConfigError, WeightsError)
TEXTS = ("", "a b1", "naïve <|im_end|> 🏳️‍🌈\x00\n", "</s>" * 50)


def _header(data):
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), 8 + size


class Safetensors:
    """One file, damaged anywhere, or in what its header says."""

    errors = MODEL_ERRORS

    def __init__(self, folder):
        whole_files.model_folder(folder / "m")
        self.folder = folder / "m"
        self.path = self.folder / "model.safetensors"
        self.whole = self.path.read_bytes()
        self.header, self.end = _header(self.whole)

    def damage(self, seed):
        data = damaged_bytes(self.whole, seed, spots=range(0, self.end, 40))
        if seed % 2:
            header = damaged_json(self.header, seed)
            data = len(header).to_bytes(8, "little") + header + self.whole[self.end :]
        self.path.write_bytes(data)

    def read(self):
        config, params = safetensors.load(self.folder)
        self.compare(config, params, [self.path])

    def compare(self, config, params, files):
        stored = {}
        for file in files:
            stored |= _header(file.read_bytes())[0]
        stored.pop("__metadata__", None)
        leaves = jax.tree.leaves(params)
        kinds = {tensor["dtype"] for tensor in stored.values()}
        width = {"F64": "float64", "F16": "float16", "BF16": "bfloat16"}
        kind = width.get(min(kinds), "float32") if len(kinds) == 1 else "float32"
        assert {config.param_dtype, *(str(leaf.dtype) for leaf in leaves)} == {kind}
        sizes = [math.prod(tensor["shape"]) for tensor in stored.values()]
        assert sum(sizes) == sum(leaf.size for leaf in leaves)
        embedding = stored["model.embed_tokens.weight"]["shape"]
        assert list(params["embed"]["embedding"].shape) == embedding


class Sharded(Safetensors):
    """Several files and their index, either of them damaged."""

    def __init__(self, folder):
        self.folder = folder / "m"
        whole_files.model_folder(self.folder, sharded=True)
        self.index = self.folder / "model.safetensors.index.json"
        self.shards = sorted(self.folder.glob("model-*"))
        assert len(self.shards) > 1
        self.contents = {p: p.read_bytes() for p in (self.index, *self.shards)}
        # What a name that leads out of the folder would find.
        (folder / "x").write_bytes(self.contents[self.shards[0]])

    def damage(self, seed):
        for path, content in self.contents.items():
            path.write_bytes(content)
        shard = self.shards[seed % len(self.shards)]
        content = self.contents[shard]
        if seed % 3 == 0:
            shard.write_bytes(damaged_bytes(content, seed, spots=range(0, 500, 40)))
        elif seed % 10 == 1:
            shard.unlink()
        else:
            index = json.loads(self.contents[self.index])
            self.index.write_bytes(damaged_json(index, seed))

    def read(self):
        config, params = safetensors.load(self.folder)
        names = set(json.loads(self.index.read_bytes())["weight_map"].values())
        assert names <= {path.name for path in self.shards}
        self.compare(config, params, [self.folder / name for name in names])


class Gguf:
    """A file whose head is damaged more often than its tensors."""

    errors = MODEL_ERRORS

    def __init__(self, folder):
        self.folder, self.path = folder, folder / "tiny.gguf"
        whole_files.gguf_file(self.path)
        self.whole = self.path.read_bytes()
        reader = gguf.GGUFFile(self.path).reader
        fields = reader.fields.values()
        keys = [field.offset for field in fields]
        values = [field.offset + 8 + len(field.name) for field in fields]
        tensors = [tensor.field.offset for tensor in reader.tensors]
        self.spots = [4, 8, 16, *keys, *values, *values, *tensors]

    def damage(self, seed):
        self.path.write_bytes(damaged_bytes(self.whole, seed, self.spots))

    def read(self):
        file = gguf.GGUFFile(self.path)
        config, params = gguf.load(file)
        leaves = jax.tree.leaves(params)
        assert {str(leaf.dtype) for leaf in leaves} == {"float32"}
        sizes = [int(tensor.n_elements) for tensor in file.reader.tensors]
        assert sum(sizes) == sum(leaf.size for leaf in leaves)
        assert params["embed"]["embedding"].shape == (8, config.hidden_size)
        _use(gguf.tokenizer(file))


class Tokenizers:
    """A `tokenizer.json`; what is loaded has to encode and decode as well."""

    errors = ValueError

    def __init__(self, folder):
        self.folder = whole_files.model_folder(folder / "m")
        self.path = self.folder / "tokenizer.json"
        self.whole = self.path.read_bytes()

    def damage(self, seed):
        data = damaged_bytes(self.whole, seed)
        if seed % 5:
            data = damaged_json(json.loads(self.whole), seed)
        self.path.write_bytes(data)

    def read(self):
        _use(from_file(self.folder))


def _use(tokenizer):
    assert 0 <= tokenizer.vocab_size <= 2**31
    for text in TEXTS:
        for encode in (tokenizer.encode, _chat(tokenizer)):
            try:
                ids = encode(text)
            except ValueError as error:
                check_message(error, "")
                continue
            assert all(0 <= i < tokenizer.vocab_size for i in ids)
            assert isinstance(tokenizer.decode(ids), str)


def _chat(tokenizer):
    return lambda text: tokenizer.encode_chat([{"role": "user", "content": text}])


class Shards:
    """Shards of a cache, damaged as files or in the records that they hold."""

    errors = (CacheError, FileNotFoundError)

    def __init__(self, folder):
        self.folder = whole_files.cache_folder(folder / "c")
        self.batch = tiny_cache.batch_of(tiny_cache.demonstrations())
        paths = sorted(self.folder.glob("shard-*"))
        self.contents = {path: path.read_bytes() for path in paths}
        self.manifest = (self.folder / "manifest.json").read_text()
        self.payloads = whole_files.cache_payloads()
        self.path = paths[0]

    def damage(self, seed):
        for path, content in self.contents.items():
            path.write_bytes(content)
        number = seed % 3
        self.path = self.folder / f"shard-{number:05d}.array_record"
        if seed % 4 == 0:
            payloads = self.payloads[3 * number : 3 * number + 3]
            payloads[0] = damaged_bytes(payloads[0], seed)
            write_shard(self.path, payloads)
        else:
            whole = self.contents[self.path]
            spots = range(0, len(whole), 64)
            self.path.write_bytes(damaged_bytes(whole, seed, spots))
        manifest = json.loads(self.manifest)
        if seed % 8:  # the size gives nothing away
            manifest["shards"][number]["bytes"] = self.path.stat().st_size
        (self.folder / "manifest.json").write_text(json.dumps(manifest))

    def read(self):
        signal = tiny_cache.open_cache(self.folder).topk(self.batch)
        mask = self.batch.sequences.response_mask
        assert signal.ids.shape == signal.log_probs.shape == (*mask.shape, 5)
        assert (signal.ids.dtype, signal.log_probs.dtype) == (np.int32, np.float32)
        assert (signal.ids >= 0).all()
        assert (signal.log_probs <= 1e-3).all()
        summary(self.path, whole_files.CACHE_SETTINGS, first=0)


FORMATS = {
    "safetensors": Safetensors,
    "sharded": Sharded,
    "gguf": Gguf,
    "tokenizer": Tokenizers,
    "shards": Shards,
}


def _main(name, folder, cases):
    folder, found = Path(folder), collections.Counter()
    subject = FORMATS[name](folder)
    subject.read()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    faults = []
    with (folder / "case").open("w") as file:
        for seed in range(int(cases)):
            file.seek(0)
            file.write(f"{seed}\n")
            file.flush()
            faulthandler.dump_traceback_later(2 * SECONDS, exit=True)
            try:
                subject.damage(seed)
                found[verdict(subject.read, subject.errors, subject.folder)] += 1
            except BaseException as error:
                faults.append((seed, f"{type(error).__name__}: {error}"[:300]))
    faulthandler.cancel_dump_traceback_later()
    found = {kind: found[kind] for kind in ("loaded", "refused")}
    print(json.dumps({**found, "faults": faults}))


if __name__ == "__main__":
    _main(*sys.argv[1:])
