"""X-KD: distillation with the teacher's reward inferred beside it (2602.12674).

Each variant stands next to the method it extends, from the same start: sequence-level
beside SeqKD, GKD-style beside GKD, MiniLLM-style beside MiniLLM. No equation and no
hyper-parameter is published in what we have: `config()` is a setting of the kind these
parents are used in, a 7B teacher and a 1B student of one family on instructions.
`tiny()` is the wiring.

    python -m experiments.xkd --tiny
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax

from experiments.baselines import Gkd, GkdConfig, MiniLlm, MiniLlmConfig, SeqKd
from experiments.command import run_command
from experiments.course import Course
from experiments.imitation import prepare_imitation
from experiments.lab import Lab
from experiments.settings import (
    FitConfig,
    ModelConfig,
    PairsConfig,
    PolicyConfig,
    TaskConfig,
    WarmStartConfig,
)
from experiments.stages import Desk
from experiments.system import TOY_FIT, SystemConfig, run_system, toy_system
from experiments.trainer import Trainer
from rkd_jax.losses import generalized_jsd
from rkd_jax.losses.policy_gradient import CreditBaseline
from rkd_jax.models.api import CausalLM
from rkd_jax.models.heads import GaussianHead
from rkd_jax.objectives.reward_inference import RewardInference
from rkd_jax.objectives.xkd import make_xkd_gkd, make_xkd_minillm, make_xkd_sequence
from rkd_jax.types import ImitationSignal, Objective, Params


@dataclasses.dataclass(frozen=True)
class XkdConfig:
    """The regulariser, and the options of the parents; see `RewardInference`."""

    fit: FitConfig = FitConfig()
    minillm_fit: FitConfig = FitConfig()
    """MiniLLM-style: a policy gradient, of MiniLLM and beside reward inference."""
    minillm_baseline: CreditBaseline = "whitened"
    """Of a token's credit there: none, the mean of the other rows, or whitened as
    published."""
    w_x: float = 1.0
    """Weight of the regulariser."""
    q_source: Literal["log_probs", "raw_logits"] = "log_probs"
    td_weight: float = 0.1
    gamma: float = 1.0
    next_value: Literal["sampled", "expected"] = "sampled"
    td_sequences: Literal["fixed", "all"] = "fixed"
    rho: float = 0.5
    """GKD: share of rows the student writes."""
    beta: float = 0.5
    """GKD: of the generalised JSD."""


@dataclasses.dataclass(frozen=True)
class XkdExperiment(SystemConfig):
    """SeqKD, GKD and MiniLLM, each with and without reward inference."""

    out: str = "runs/xkd"
    """Output folder; the same command again resumes."""
    xkd: XkdConfig = XkdConfig()


class Xkd:
    """One parent with the regulariser.

    ``rho`` is the share of imitated responses that the student writes.
    """

    def __init__(
        self,
        lab: Lab,
        options: XkdConfig,
        make: Callable[[RewardInference], Objective],
        *,
        metric: str,
        rho: float,
        fit: FitConfig,
    ):
        self.lab, self.options, self.metric, self.rho = lab, options, metric, rho
        self.head = GaussianHead()
        inference = RewardInference(
            self.head.apply,
            q_source=options.q_source,
            gamma=options.gamma,
            td_weight=options.td_weight,
            next_value=options.next_value,
        )
        self.trainer = Trainer(lab, make(inference), fit)

    def train(self, desk: Desk, stage: str, course: Course, *, steps, seed) -> Params:
        """On the teacher's answers and, by ``rho``, on fresh samples; the policy."""
        width = self.lab.student.config.hidden_size
        start = {
            "policy": course.start,
            "reward_head": self.head.init(jax.random.key(seed), width),
        }
        params = self.trainer.train(
            desk,
            stage,
            start,
            course.demonstrations,
            steps=steps,
            seed=seed,
            prepare=self._prepare() if self.trainer.objective.requires else None,
            frozen=self.lab.frozen,
        )
        return params["policy"]

    def _prepare(self):
        lab, expected = self.lab, self.options.next_value == "expected"
        imitate = prepare_imitation(
            lab,
            rho=self.rho,
            policy=lambda params: params["policy"],
            teach=None if expected else lab.teach,
        )

        def prepare(state, batch):
            imitation, signal = imitate(state, batch)
            if self.rho and expected:
                fixed = lab.teacher_policy(lab.teacher_params, batch.teacher_sequences)
                signal = ImitationSignal(signal.log_probs, fixed)
            return imitation, signal

        return prepare


def xkd_sequence(lab: Lab, options: XkdConfig) -> Xkd:
    """Likelihood of the teacher's answers, and the reward behind them."""
    return Xkd(
        lab,
        options,
        lambda inference: make_xkd_sequence(
            lab.student,
            inference,
            w_x=options.w_x,
            temperature=lab.policy.temperature,
        ),
        metric="student/nll",
        rho=0.0,
        fit=options.fit,
    )


def xkd_gkd(lab: Lab, options: XkdConfig) -> Xkd:
    """Generalised JSD, partly on the student's answers."""
    return Xkd(
        lab,
        options,
        lambda inference: make_xkd_gkd(
            lab.student,
            inference,
            functools.partial(generalized_jsd, beta=options.beta),
            teacher=_teacher(lab, options),
            w_x=options.w_x,
            temperature=lab.policy.temperature,
            td_sequences=options.td_sequences,
        ),
        metric="student/divergence",
        rho=options.rho,
        fit=options.fit,
    )


def xkd_minillm(lab: Lab, options: XkdConfig) -> Xkd:
    """Sequence-level reverse KL on the student's answers."""
    return Xkd(
        lab,
        options,
        lambda inference: make_xkd_minillm(
            lab.student,
            inference,
            teacher=_teacher(lab, options),
            w_x=options.w_x,
            temperature=lab.policy.temperature,
            baseline=options.minillm_baseline,
            td_sequences=options.td_sequences,
        ),
        metric="student/divergence",
        rho=1.0,
        fit=options.minillm_fit,
    )


def _teacher(lab: Lab, options: XkdConfig) -> CausalLM | None:
    """The model whose states are the signal; None for its log-probs."""
    return None if options.next_value == "expected" else lab.teacher


def config() -> XkdExperiment:
    """A 7B teacher and a 1B student of one family on instructions."""
    return XkdExperiment(
        models=ModelConfig(
            teacher="Llama-3.1-8B-Instruct", student="Llama-3.2-1B", dtype="bfloat16"
        ),
        task=TaskConfig(
            train_file="train_prompts.jsonl",
            held_out_file="held_out_prompts.jsonl",
            train_prompts=8192,
            held_out_prompts=512,
        ),
        policy=PolicyConfig(
            temperature=1.0, max_prompt=512, max_teacher_prompt=512, max_response=256
        ),
        warm_start=WarmStartConfig(prompts=4096, steps=200, batch_size=64),
        pairs=PairsConfig(rounds=0),
        updates=1000,
        xkd=XkdConfig(
            fit=FitConfig(learning_rate=5e-6, batch_size=64, accumulation=16),
            minillm_fit=FitConfig(learning_rate=5e-6, batch_size=64, accumulation=16),
        ),
    )


def tiny() -> XkdExperiment:
    """The same wiring with a random toy teacher."""
    return XkdExperiment(
        **toy_system(),
        out="runs/xkd-tiny",
        xkd=XkdConfig(fit=TOY_FIT, minillm_fit=TOY_FIT),
    )


def family(lab: Lab, options: XkdConfig) -> dict:
    """The three variants."""
    return {
        "X-KD sequence": xkd_sequence(lab, options),
        "X-KD GKD": xkd_gkd(lab, options),
        "X-KD MiniLLM": xkd_minillm(lab, options),
    }


def table(lab: Lab, config: XkdExperiment) -> dict:
    """All methods by the names they have in the report."""
    options = config.xkd
    gkd = GkdConfig(fit=options.fit, rho=options.rho, beta=options.beta)
    minillm = MiniLlmConfig(options.minillm_fit, baseline=options.minillm_baseline)
    return {
        "SeqKD": SeqKd(lab, options.fit),
        "GKD": Gkd(lab, gkd),
        "MiniLLM": MiniLlm(lab, minillm),
        **family(lab, options),
    }


def run(config: XkdExperiment) -> Path:
    """The parents, then the variants, from the same start."""
    return run_system(
        config,
        "xkd",
        "X-KD: distillation with reward inference",
        table,
    )


def main() -> None:
    """Command line."""
    run_command(run, config, tiny)


if __name__ == "__main__":
    main()
