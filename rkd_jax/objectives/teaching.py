"""How far a student is from its teacher, along given responses.

A teacher that is a model gives its states as the signal (`TeacherStates`) and its head
out of ``frozen["teacher"]``: no array over the vocabulary is ever kept. One that is
known by its log-probs gives those (`TeacherSignal`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from rkd_jax.losses import (
    linear_divergence,
    linear_sequence_reverse_kl,
    sequence_reverse_kl,
)
from rkd_jax.masking import fill_masked
from rkd_jax.models.api import CausalLM
from rkd_jax.objectives.policy import Reading, frozen_params

Divergence = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class Teaching:
    """Where the teacher's distributions come from.

    Example: ``Teaching(None)`` reads log-probs from the signal, ``Teaching(teacher)``
    the states of that model.
    """

    teacher: CausalLM | None

    @property
    def requires(self) -> tuple[str, ...]:
        """The field of the signal."""
        return ("log_probs",) if self.teacher is None else ("hidden",)

    def divergence(
        self, divergence: Divergence, seen: Reading, frozen: Any, signal: Any
    ) -> jax.Array:
        """``[*batch, T]``, nats; gradient flows to the student alone."""
        if self.teacher is None:
            teacher = fill_masked(signal.log_probs, seen.sequences.response_mask)
            return divergence(seen.logits, jax.lax.stop_gradient(teacher))
        return linear_divergence(
            *self._sides(seen, frozen, signal),
            divergence=divergence,
            **self._options(seen, frozen),
        )

    def sequence_reverse_kl(
        self, seen: Reading, frozen: Any, signal: Any, **options: Any
    ) -> jax.Array:
        """`rkd_jax.losses.sequence_reverse_kl` with its options, ``[*batch, T]``."""
        targets = seen.sequences.targets
        if self.teacher is None:
            mask = seen.sequences.response_mask
            return sequence_reverse_kl(
                seen.logits, signal.log_probs, targets, mask, **options
            )
        return linear_sequence_reverse_kl(
            *self._sides(seen, frozen, signal),
            targets,
            **self._options(seen, frozen),
            **options,
        )

    def _sides(self, seen: Reading, frozen: Any, signal: Any) -> tuple[jax.Array, ...]:
        """States and head of student and teacher."""
        student = seen.states.before, seen.model.head(seen.params)
        head = self.teacher.head(frozen_params(frozen, "teacher"))
        return *student, signal.hidden, head

    def _options(self, seen: Reading, frozen: Any) -> dict[str, Any]:
        """What else the fused losses want to know of both."""
        teacher = frozen_params(frozen, "teacher")
        return {
            "mask": seen.sequences.response_mask,
            "temperature": seen.temperature,
            "student_bias": seen.model.head_bias(seen.params),
            "teacher_bias": self.teacher.head_bias(teacher),
            "student_softcap": seen.model.config.logit_softcap,
            "teacher_softcap": self.teacher.config.logit_softcap,
        }
