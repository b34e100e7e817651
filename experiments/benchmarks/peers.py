"""The step of GKD in other libraries beside ours, on the same shapes.

One process, one machine; after two steps of warm-up all of them take turns, so that the
ratios mean something on a busy one. Each trains a Llama student with tied embeddings on
full rows with a generalised JSD (beta 0.5) to the teacher on the response, clips the
gradient and takes an AdamW step; the teacher runs inside the step.

========  ==============================================================================
rkd_jax   `experiments.benchmarks.step`, objective ``gkd``
torch     PyTorch and Llama of transformers, a loop that **we wrote** for this
          comparison: eager, SDPA attention, the head on response positions alone
trl       ``GKDTrainer.training_step`` of TRL, off-policy, and its optimiser
tunix     ``DistillationTrainer`` of Tunix is not run: its models and its loop cannot be
          given the same shapes and data from outside without rewriting them
========  ==============================================================================

    pip install torch "transformers>=4.57,<5"        # torch
    pip install trl==0.24.0                          # trl, beside the above
    python -m experiments.benchmarks.peers --json

What is not installed is named with what to install. PyTorch's ``bfloat16`` is autocast
over float32 parameters, as ours is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import tyro

from experiments.benchmarks.step import WARM_UP, StepBenchmark, setting_of, stepper
from experiments.benchmarks.step_cases import CASES, Setting

Step = Callable[[], float]
"""Takes one step; its seconds."""
BETA = 0.5

INSTALL = {
    "torch": ("torch", "transformers"),
    "trl": ("torch", "transformers", "trl", "datasets"),
}
"""What each of the others imports."""


@dataclasses.dataclass(frozen=True)
class PeersBenchmark:
    """Sizes as those of `experiments.benchmarks.step`, and who takes part."""

    peers: tuple[str, ...] = ("torch", "trl")
    """Beside rkd_jax."""
    sizes: StepBenchmark = StepBenchmark(objective="gkd")
    json: bool = False
    """Print one JSON line in place of the table."""


def ours(setting: Setting) -> Step:
    """The step of this library."""
    step, _ = stepper(CASES["gkd"](setting))
    return lambda: step()[1]


def plain_torch(setting: Setting) -> Step:
    """The step in PyTorch, written here."""
    import torch

    student, teacher = torch_llama(setting.student), torch_llama(setting.teacher)
    teacher.eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, weight_decay=0.0)
    tokens, autocast = torch_tokens(setting), torch_autocast(setting)
    states = slice(setting.prompt - 1, -1)

    def log_probs(model):
        hidden = model.model(input_ids=tokens).last_hidden_state[:, states]
        return torch.log_softmax(model.lm_head(hidden).float(), dim=-1)

    def step() -> float:
        start = time.perf_counter()
        with autocast():
            with torch.no_grad():
                teacher_log_probs = log_probs(teacher)
            loss = torch_jsd(log_probs(student), teacher_log_probs).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        float(loss)
        return time.perf_counter() - start

    return step


def trl(setting: Setting) -> Step:
    """The step of TRL's trainer: its loss, its backward pass, its optimiser."""
    import torch
    from datasets import Dataset
    from trl import GKDConfig, GKDTrainer

    tokens = torch_tokens(setting)
    folder = tempfile.TemporaryDirectory()
    options = GKDConfig(
        output_dir=folder.name,
        per_device_train_batch_size=setting.batch,
        lmbda=0.0,  # no samples of the student
        beta=BETA,
        temperature=1.0,
        learning_rate=1e-5,
        max_grad_norm=1.0,
        max_length=setting.length,
        gradient_checkpointing=False,
        bf16=setting.student.config.dtype == "bfloat16",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    trainer = GKDTrainer(
        model=torch_llama(setting.student),
        teacher_model=torch_llama(setting.teacher),
        args=options,
        train_dataset=Dataset.from_list([{"messages": talk}] * setting.batch),
        processing_class=word_tokenizer(),
    )
    trainer.create_optimizer()
    labels = tokens.clone()
    labels[:, : setting.prompt] = -100
    inputs = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "labels": labels,
        "prompts": tokens[:, : setting.prompt],
        "prompt_attention_mask": torch.ones_like(tokens[:, : setting.prompt]),
    }

    def step(keep=folder) -> float:
        start = time.perf_counter()
        loss = trainer.training_step(trainer.model, dict(inputs), setting.batch)
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        float(loss)
        return time.perf_counter() - start

    return step


STEPS = {"rkd_jax": ours, "torch": plain_torch, "trl": trl}


def torch_jsd(student, teacher):
    """Generalised JSD of log-probs ``[.., V]``, ``[..]``."""
    import torch

    log_beta, log_rest = np.log(BETA), np.log(1.0 - BETA)
    mixture = torch.logaddexp(teacher + log_beta, student + log_rest)
    to_teacher = (teacher.exp() * (teacher - mixture)).sum(-1)
    to_student = (student.exp() * (student - mixture)).sum(-1)
    return BETA * to_teacher + (1.0 - BETA) * to_student


def torch_llama(model):
    """transformers' Llama of a decoder's shape, with random float32 parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = model.config
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_length,
            tie_word_embeddings=True,
            use_cache=False,
            attn_implementation="sdpa",
        )
    )


def torch_tokens(setting: Setting):
    """The rows that `ours` imitates, int64[B, L]."""
    import torch

    rows = CASES["gkd"](setting).batch.imitated.sequences.tokens
    return torch.from_numpy(np.asarray(rows, np.int64))


def torch_autocast(setting: Setting) -> Callable[[], Any]:
    """bfloat16 arithmetic, or nothing."""
    import torch

    if setting.student.config.dtype == "float32":
        return contextlib.nullcontext
    return lambda: torch.autocast("cpu", torch.bfloat16)


def word_tokenizer():
    """The least that TRL's constructor wants; the timed rows never pass through it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(("<pad>", "<eos>", "<unk>", "a", "b"))}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['content'] }} <eos> {% endfor %}"
    )
    return tokenizer


def missing(name: str) -> list[str]:
    """What has to be installed for a peer."""
    return [m for m in INSTALL[name] if importlib.util.find_spec(m) is None]


def measure(config: PeersBenchmark) -> dict[str, Any]:
    """Median seconds of everyone who is installed, and their ratios to ours."""
    unknown = sorted(set(config.peers) - set(INSTALL))
    if unknown:
        raise ValueError(f"peer {unknown[0]!r} is not one of {', '.join(INSTALL)}")
    setting = setting_of(config.sizes)
    absent = {name: lacks for name in config.peers if (lacks := missing(name))}
    names = ["rkd_jax", *(name for name in config.peers if name not in absent)]
    steps = {name: STEPS[name](setting) for name in names}
    for _ in range(WARM_UP):
        for step in steps.values():
            step()
    seconds = {name: [] for name in names}
    for _ in range(config.sizes.steps):
        for name, step in steps.items():
            seconds[name].append(step())
    medians = {name: float(np.median(times)) for name, times in seconds.items()}
    return {
        "device": jax.devices()[0].device_kind,
        "versions": versions(names),
        **dataclasses.asdict(config.sizes),
        "s_per_step": medians,
        "ratio_to_rkd_jax": {n: s / medians["rkd_jax"] for n, s in medians.items()},
        "to_install": absent,
    }


def versions(names: list[str]) -> dict[str, str]:
    """Of everything that took part."""
    packages = {"jax", *(m for name in names for m in INSTALL.get(name, ()))}
    return {name: importlib.metadata.version(name) for name in sorted(packages)}


def main() -> None:
    """Command line."""
    config = tyro.cli(PeersBenchmark, description=__doc__)
    try:
        found = measure(config)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if config.json:
        print(json.dumps(found))
        return
    print(f"{found['device']}, {found['versions']}")
    for name, seconds in found["s_per_step"].items():
        print(f"{name:>8} {seconds:8.3f} s  {found['ratio_to_rkd_jax'][name]:6.2f}")
    for name, lacks in found["to_install"].items():
        print(f"{name:>8} is not measured: pip install {' '.join(lacks)}")


if __name__ == "__main__":
    main()
