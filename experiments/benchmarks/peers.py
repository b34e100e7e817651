"""A step of distillation in other libraries beside ours, on the same shapes.

One process, one machine; after two steps of warm-up all of them take turns, so that the
ratios mean something on a busy one. Each trains a Llama student with tied embeddings on
full rows with a divergence to the teacher on the response, clips the gradient and takes
an AdamW step; the teacher runs inside the step.

=======  ============  =================================================================
rkd_jax  gkd, kd       `experiments.benchmarks.step`
torch    gkd, kd       PyTorch and Llama of transformers, a loop that **we wrote** for
                       this comparison: eager, SDPA attention, the head on response
                       positions alone
trl      gkd           ``GKDTrainer.training_step`` of TRL, off-policy, its optimiser
tunix    kd            ``DistillationTrainer`` of Tunix with its ``LogitStrategy`` and
                       its Llama 3; float32
=======  ============  =================================================================

gkd is the generalised JSD at beta 0.5, kd the forward KL.

    pip install torch "transformers>=4.57,<5"   # torch
    pip install trl                             # trl, beside the above; 0.24, 1.16
    pip install google-tunix==0.1.7             # tunix
    python -m experiments.benchmarks.peers --sizes.objective gkd --json

What is not installed is named with what to install, and what fails with its error.
PyTorch's ``bfloat16`` is autocast over float32 parameters, as ours is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.command_line import run_benchmark
from experiments.benchmarks.peer_models import torch_llama, tunix_llama, word_tokenizer
from experiments.benchmarks.step import WARM_UP, StepBenchmark, setting_of, stepper
from experiments.benchmarks.step_cases import CASES, Setting

Step = Callable[[], float]
"""Takes one step; its seconds."""
BETA = 0.5

INSTALL = {
    "torch": ("torch", "transformers"),
    "trl": ("torch", "transformers", "trl"),
    "tunix": ("tunix",),
}
"""What each of the others imports."""
OBJECTIVES = {"torch": ("kd", "gkd"), "trl": ("gkd",), "tunix": ("kd",)}
PACKAGES = {"tunix": "google-tunix"}
"""Of modules that are named otherwise."""


@dataclasses.dataclass(frozen=True)
class PeersBenchmark:
    """Sizes as those of `experiments.benchmarks.step`, and who takes part."""

    peers: tuple[str, ...] = ("torch", "trl", "tunix")
    """Beside rkd_jax; who lacks the objective is left out."""
    sizes: StepBenchmark = StepBenchmark(objective="gkd")
    """The objective is gkd or kd."""
    json: bool = False
    """Print one JSON line in place of the table."""


def ours(setting: Setting, objective: str) -> Step:
    """The step of this library."""
    step, _ = stepper(CASES[objective](setting))
    return lambda: step()[1]


def plain_torch(setting: Setting, objective: str) -> Step:
    """The step in PyTorch, written here."""
    import torch

    student, teacher = torch_llama(setting.student), torch_llama(setting.teacher)
    teacher.eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, weight_decay=0.0)
    tokens, autocast = torch_tokens(setting), torch_autocast(setting)
    states = slice(setting.prompt - 1, -1)
    divergence = torch_jsd if objective == "gkd" else torch_kl

    def log_probs(model):
        hidden = model.model(input_ids=tokens).last_hidden_state[:, states]
        return torch.log_softmax(model.lm_head(hidden).float(), dim=-1)

    def step() -> float:
        start = time.perf_counter()
        with autocast():
            with torch.no_grad():
                teacher_log_probs = log_probs(teacher)
            loss = divergence(log_probs(student), teacher_log_probs).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        float(loss.detach())
        return time.perf_counter() - start

    return step


def trl(setting: Setting, objective: str) -> Step:
    """The step of TRL's trainer: its loss, its backward pass, its optimiser."""
    import torch
    from datasets import Dataset

    try:
        from trl.experimental.gkd import GKDConfig, GKDTrainer
    except ModuleNotFoundError:  # older ones, such as 0.24
        from trl import GKDConfig, GKDTrainer

    del objective
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
        float(loss.detach())
        return time.perf_counter() - start

    return step


def tunix(setting: Setting, objective: str) -> Step:
    """The step of Tunix's trainer: its teacher pass, its loss, its update."""
    import optax
    from flax import nnx
    from tunix.distillation import distillation_trainer, strategies

    del objective
    if setting.student.config.dtype != "float32":
        raise ValueError("the tunix peer is float32: --sizes.dtype float32")
    rows = setting.length, setting.prompt
    columns = jnp.arange(rows[0], dtype=jnp.int32)

    def forward(model, input_tokens, input_mask):
        del input_mask
        positions = jnp.broadcast_to(columns[None], input_tokens.shape)
        seen = (columns[:, None] >= columns[None, :])[None]
        seen = jnp.broadcast_to(seen, (len(input_tokens), rows[0], rows[0]))
        logits, _ = model(input_tokens, positions, None, seen)
        return logits[:, rows[1] - 1 : -1]

    def labels(input_tokens, input_mask):
        del input_mask
        targets = input_tokens[:, rows[1] :]
        return jax.nn.one_hot(targets, setting.student.config.vocab_size)

    trainer = distillation_trainer.DistillationTrainer(
        tunix_llama(setting.student),
        tunix_llama(setting.teacher),
        strategies.LogitStrategy(forward, forward, labels, temperature=1.0, alpha=1.0),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-5, weight_decay=0)),
        distillation_trainer.TrainingConfig(eval_every_n_steps=10**9),
    )
    update, _ = trainer.jit_train_and_eval_step(cache_nnx_graph=True)
    tokens = CASES["kd"](setting).batch.sequences.tokens
    given = distillation_trainer.TrainingInput(tokens, jnp.ones_like(tokens))

    def step() -> float:
        start = time.perf_counter()
        loss, _, _ = update(trainer._prepare_inputs(given))
        jax.block_until_ready((loss, nnx.state(trainer.model)))
        return time.perf_counter() - start

    return step


STEPS = {"rkd_jax": ours, "torch": plain_torch, "trl": trl, "tunix": tunix}


def torch_jsd(student, teacher):
    """Generalised JSD of log-probs ``[.., V]``, ``[..]``."""
    import torch

    log_beta, log_rest = np.log(BETA), np.log(1.0 - BETA)
    mixture = torch.logaddexp(teacher + log_beta, student + log_rest)
    to_teacher = (teacher.exp() * (teacher - mixture)).sum(-1)
    to_student = (student.exp() * (student - mixture)).sum(-1)
    return BETA * to_teacher + (1.0 - BETA) * to_student


def torch_kl(student, teacher):
    """Forward KL of log-probs ``[.., V]``, ``[..]``."""
    return (teacher.exp() * (teacher - student)).sum(-1)


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


def missing(name: str) -> list[str]:
    """What has to be installed for a peer."""
    lacking = [m for m in INSTALL[name] if importlib.util.find_spec(m) is None]
    return [PACKAGES.get(module, module) for module in lacking]


def warmed(names: list[str], setting: Setting, objective: str):
    """Steps by name after their warm-up, and the errors of other libraries by name.

    They change faster than we can follow; one that fails leaves the others measured.
    """
    steps: dict[str, Step] = {}
    failed: dict[str, str] = {}
    for name in names:
        try:
            step = STEPS[name](setting, objective)
            for _ in range(WARM_UP):
                step()
        except Exception as error:
            if name == "rkd_jax":
                raise
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            steps[name] = step
    return steps, failed


def measure(config: PeersBenchmark) -> dict[str, Any]:
    """Median seconds of everyone who is installed, and their ratios to ours.

    Who is not measured stands in ``to_install``, with what it lacks, or in ``failed``,
    with its error.

    Raises:
        ValueError: an unknown peer, or an objective that none of them has.
    """
    unknown = sorted(set(config.peers) - set(INSTALL))
    if unknown:
        raise ValueError(f"peer {unknown[0]!r} is not one of {', '.join(INSTALL)}")
    objective = config.sizes.objective
    asked = [name for name in config.peers if objective in OBJECTIVES[name]]
    if not asked:
        raise ValueError(f"none of {config.peers} has the objective {objective}")
    setting = setting_of(config.sizes)
    absent = {name: lacks for name in asked if (lacks := missing(name))}
    names = ["rkd_jax", *(name for name in asked if name not in absent)]
    steps, failed = warmed(names, setting, objective)
    seconds = {name: [] for name in steps}
    for _ in range(config.sizes.steps):
        for name, step in steps.items():
            seconds[name].append(step())
    medians = {name: float(np.median(times)) for name, times in seconds.items()}
    return {
        "device": jax.devices()[0].device_kind,
        "versions": versions(list(steps)),
        **dataclasses.asdict(config.sizes),
        "s_per_step": medians,
        "ratio_to_rkd_jax": {n: s / medians["rkd_jax"] for n, s in medians.items()},
        "to_install": absent,
        "failed": failed,
    }


def versions(names: list[str]) -> dict[str, str]:
    """Of everything that took part."""
    modules = {"jax", *(m for name in names for m in INSTALL.get(name, ()))}
    packages = sorted(PACKAGES.get(module, module) for module in modules)
    return {name: importlib.metadata.version(name) for name in packages}


def run(config: PeersBenchmark) -> None:
    """Measure and print."""
    found = measure(config)
    if config.json:
        print(json.dumps(found))
        return
    print(f"{found['device']}, {found['versions']}")
    for name, seconds in found["s_per_step"].items():
        print(f"{name:>8} {seconds:8.3f} s  {found['ratio_to_rkd_jax'][name]:6.2f}")
    for name, lacks in found["to_install"].items():
        print(f"{name:>8} is not measured: pip install {' '.join(lacks)}")
    for name, error in found["failed"].items():
        print(f"{name:>8} is not measured, it failed: {error}")


def main() -> None:
    """Command line."""
    run_benchmark(run, PeersBenchmark)


if __name__ == "__main__":
    main()
