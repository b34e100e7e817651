"""Records, readers, tokenization and batches.

record (text) -> `tokenize_record` (ids) -> `collate` (arrays); `make_batches` orders.

Two neighbours of `make_batches` leave less padding: `make_packed_batches` puts several
records into a row, `make_bucketed_batches` records of like length into a batch.

`make_batches` needs grain and the tokenizers need tokenizers; both are imported when
first asked for, so records and readers work without them.
"""

import importlib
from typing import TYPE_CHECKING, Any

from rkd_jax.data.collate import Batch, collate
from rkd_jax.data.inspection import check_end_of_turn, describe_batch
from rkd_jax.data.jsonl import append_jsonl, write_jsonl
from rkd_jax.data.packing import Padding, collate_packed, pack, padding_waste, unpack
from rkd_jax.data.records import (
    DemonstrationRecord,
    PreferenceRecord,
    PromptRecord,
    Record,
    RecordError,
    to_demonstration,
    to_prompt,
)
from rkd_jax.data.sources import (
    ReadReport,
    from_parquet,
    from_rows,
    from_tfds,
    read_jsonl,
)
from rkd_jax.data.tokenize import (
    TokenizeConfig,
    TokenizeReport,
    encode_prompt,
    survey,
    tokenize_record,
)

if TYPE_CHECKING:
    from rkd_jax.data.pipeline import BatchIterator, ZippedBatches, make_batches
    from rkd_jax.data.tokenizer import Tokenizer, byte_tokenizer, same_vocabulary
    from rkd_jax.data.windows import make_bucketed_batches, make_packed_batches

_LAZY = {
    "BatchIterator": "pipeline",
    "ZippedBatches": "pipeline",
    "make_batches": "pipeline",
    "make_bucketed_batches": "windows",
    "make_packed_batches": "windows",
    "Tokenizer": "tokenizer",
    "byte_tokenizer": "tokenizer",
    "same_vocabulary": "tokenizer",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_LAZY[name]}")
    return getattr(module, name)
