"""The records that travel between the stages, and the letters of their axes.

Axis letters, the same everywhere:

========  ==========================================================
B         batch row (one record)
N         pair member, 0 = chosen, 1 = rejected
M         record (demonstration or pair) of a packed row
G         sample of the same prompt
P         prompt column (prompts are padded on the left)
T         target position: a column of the response (padded on the right)
L         P + T, all columns
V         vocabulary
K         top-k entry, or member of an ensemble
D         width of a hidden state
H         attention head
========  ==========================================================

Layout of a row: the prompt is left-padded to P columns, the response right-padded to T.
Column ``P`` is thus the first response token in every row, the state before target
``t`` is column ``P - 1 + t``, and the vocabulary head need never run on a prompt
position. Targets are shifted once, here: `Sequences.targets` are the last T columns,
and states are read one column earlier (`rkd_jax.models.api.response_hidden`). Nothing
else shifts. A packed row is the same layout at P = 1 (`rkd_jax.packed`).

Records are frozen dataclasses registered as pytrees: they cross `jax.jit` as they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeVar, dataclass_transform

import jax

Params = Any  # a pytree of arrays
_T = TypeVar("_T")
_static = partial(dataclasses.field, metadata={"static": True})  # of a struct: no array


@dataclass_transform(frozen_default=True)
def struct(cls: type[_T]) -> type[_T]:
    """Make ``cls`` a frozen dataclass that is also a pytree of its fields."""
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


class Pair(NamedTuple):
    """The same quantity for both responses of a preference pair, each ``[...]``.

    Example: ``Pair(chosen=-3.31, rejected=-1.97)``, summed log-probs in nats.
    """

    chosen: jax.Array
    rejected: jax.Array


@struct
class Prompts:
    """Tokenised prompts, padded on the left.

    Example, one prompt of two tokens in P = 4 columns::

        Prompts(tokens=[[0, 0, 7, 8]], mask=[[False, False, True, True]])
    """

    tokens: jax.Array  # int32[*batch, P]
    mask: jax.Array  # bool[*batch, P]


@struct
class Sequences:
    """Prompt and response in one row: left-padded prompt, right-padded response.

    Example, prompt ``7 8``, response ``5 6 2`` (2 = EOS, a target), P = 3, T = 4::

        Sequences(
            tokens=[[0, 7, 8, 5, 6, 2, 0]],
            token_mask=[[False, True, True, True, True, True, False]],
            response_mask=[[True, True, True, False]],
        )

    Packed rows have segment ids as well; `rkd_jax.packed` shows one.
    """

    tokens: jax.Array  # int32[*batch, P + T]
    token_mask: jax.Array  # bool[*batch, P + T], True on real tokens
    response_mask: jax.Array  # bool[*batch, T], True on response targets, EOS included
    segment_ids: jax.Array | None = None  # int32[*batch, P + T]; None: a record per row

    @property
    def targets(self) -> jax.Array:
        """int32[*batch, T]: the response tokens, aligned with ``response_mask``."""
        return self.tokens[..., self.prompt_width :]

    @property
    def prompt_width(self) -> int:
        """P, the number of prompt columns."""
        return self.tokens.shape[-1] - self.response_mask.shape[-1]

    @property
    def prompts(self) -> Prompts:
        """The prompt columns alone; of packed rows ValueError: they have no such."""
        if self.segment_ids is not None:
            raise ValueError("packed rows hold several prompts each; use make_batches")
        width = self.prompt_width
        return Prompts(self.tokens[..., :width], self.token_mask[..., :width])


@struct
class PromptBatch:
    """Prompts for the student and, possibly different, for the teacher.

    Example: ``PromptBatch(prompts=..., teacher_prompts=..., index=[17, 4])``.
    """

    prompts: Prompts  # [B, P]
    teacher_prompts: Prompts  # [B, P']; `prompts` when no teacher prompt is given
    index: jax.Array  # int32[B], position of the record in its source


@struct
class DemonstrationBatch:
    """One response per prompt, seen under the student's and the teacher's prompt.

    Example: ``DemonstrationBatch(sequences, teacher_sequences, index=[17, 4])``; the
    last T columns of both `Sequences` are the same response. Packed rows hold the same
    targets in the same columns; entry m of a row of ``index`` is segment m + 1.
    """

    sequences: Sequences  # [B, P + T]
    teacher_sequences: Sequences  # [B, P' + T], same T, same response
    index: jax.Array  # int32[B]; int32[B, M] of packed rows, -1 where no record is


@struct
class PreferenceBatch:
    """Two responses per prompt; member 0 was preferred with probability ``label``.

    Example: ``PreferenceBatch(sequences, teacher_sequences, label=[1.0], rewards=[[0.8,
    -0.1]], index=[3])``.
    """

    sequences: Sequences  # [B, 2, P + T]
    teacher_sequences: Sequences  # [B, 2, P' + T]
    label: jax.Array  # float32[B] in [0, 1]
    rewards: jax.Array  # float32[B, 2]; NaN where the record carries none
    index: jax.Array  # int32[B]


@struct
class GameBatch:
    """What one step of the min-max game looks at.

    Demonstrations and rollouts have B rows; the rows of pairs, which may be packed, are
    any multiple of B, so that the batch still splits evenly into micro-batches. What a
    method does not read is None.

    Example: ``GameBatch(demonstrations=..., rollouts=Sequences [B, G, P + T],
    preferences=...)``.
    """

    demonstrations: DemonstrationBatch  # the teacher's responses
    rollouts: Sequences | None  # [B, G, P + T], sampled from the current student
    preferences: PreferenceBatch | None = None


@struct
class ImitationBatch:
    """Fixed responses to infer a reward from, and the responses to imitate on.

    Methods that measure a divergence on samples still read the teacher's preferences
    off fixed responses. Example: ``ImitationBatch(demonstrations=..., imitated=None)``:
    both are the same, and one forward pass serves both.
    """

    demonstrations: DemonstrationBatch  # [B]
    imitated: DemonstrationBatch | None = None  # [B], e.g. samples of the student
    importance_weights: jax.Array | None = None  # float32[B, T], student over writer


@struct
class AnchoredPairs:
    """Preference pairs, and samples of the reference for the same prompts.

    Example: ``AnchoredPairs(pairs=..., samples=None)`` where nothing is penalised.
    """

    pairs: PreferenceBatch  # [B, 2]
    samples: DemonstrationBatch | None = None  # [B], sampled from the reference


@struct
class TrajectoryBatch:
    """Demonstrated trajectories of a control problem, padded on the right.

    Example, one trajectory of two steps in T = 3 columns, states of one number:
    ``TrajectoryBatch([[[0.1], [0.2], [0.0]]], [[1, 0, 0]], [[True, True, False]])``.
    """

    states: jax.Array  # float[B, T, S], before each action; or int32[B, T] of a table
    actions: jax.Array  # int32[B, T]
    mask: jax.Array  # bool[B, T], True on real steps


@struct
class TeacherSignal:
    """What the teacher says at every target, under its own prompt.

    Example: ``TeacherSignal(log_probs=float32[B, T, V])``.
    """

    log_probs: jax.Array  # float[B, T, V], natural log, -inf allowed


@struct
class TeacherStates:
    """The teacher's states before every target, under its own prompt.

    What its head says of them is left to the loss, so ``[B, T, V]`` numbers never
    exist; the head's parameters are in ``frozen["teacher"]``.

    Example: ``TeacherStates(hidden=bfloat16[B, T, D])``.
    """

    hidden: jax.Array  # float[B, T, D], D of the teacher


@struct
class TopkSignal:
    """The teacher's most likely tokens at every target, and their log-probs.

    The log-probs are those of the full softmax; what they leave is the tail's mass. An
    entry at -inf is absent. Example: ``TopkSignal(int32[B, T, 50], float32[B, T, 50])``
    """

    ids: jax.Array  # int32[B, T, K], distinct at each target
    log_probs: jax.Array  # float32[B, T, K], natural log, -inf allowed
    temperature: float | None = _static(default=None)  # of these; None: not known


@struct
class ReferenceSignal:
    """Summed log-probs of both responses under the frozen reference.

    Example: ``ReferenceSignal(log_probs=[[-3.0, -2.3]])`` for one pair.
    """

    log_probs: jax.Array  # float32[B, 2]; [B, M, 2] of packed pairs


@struct
class GameSignal:
    """The frozen quantities of the min-max game.

    The features are a frozen trunk's states after each target (`action_hidden`), for
    reward players that are a head on them; None when the reward player has a trunk of
    its own. The update fills ``pairs_per_prompt`` in. Example: ``GameSignal([0.41])``.
    """

    anchor_nll: jax.Array  # float32[pairs], of the MLE anchor; [rows, M] of packed ones
    demonstrations: jax.Array | None = None  # float[B, T, D]
    rollouts: jax.Array | None = None  # float[B, G, T, D]
    preferences: jax.Array | None = None  # float[pairs, 2, T, D]; packed [rows, T, D]
    pairs_per_prompt: jax.Array | None = None  # float32[B], all the same; None: counted


@struct
class ImitationSignal:
    """What the teacher says on the imitated responses, and on the demonstrations.

    Example: ``ImitationSignal(log_probs=float32[B, T, V])``.
    """

    log_probs: jax.Array  # float[B, T, V], on the imitated responses
    demonstration_log_probs: jax.Array | None = None  # float[B, T, V]; None: the same


@struct
class ShapingSignal:
    """The reference's log-probs of a pair, and what a teacher's values add to it.

    Example: ``ShapingSignal(log_probs=[[-3.0, -2.3]], shaping=[[-0.40, -0.34]])``.
    """

    log_probs: jax.Array | None  # float32[B, 2], summed, of the reference; None: none
    shaping: jax.Array  # float32[B, 2], nats; [B, M, 2] of packed pairs, as log_probs


@struct
class ReleaseSignal:
    """What the losses released with TVKD read of frozen models, summed per response.

    Example: ``ReleaseSignal(topk_ids=int32[1, 2, T, 50], next_values=[[1.9, 1.4]])``
    for the variant that reads no more than that.
    """

    topk_ids: jax.Array | None = None  # int32[B, 2, T, K], the teacher's likely tokens
    teacher: jax.Array | None = None  # float32[B, 2], log-probs of the targets' buckets
    reference: jax.Array | None = None  # float32[B, 2], log-probs of the targets
    values: jax.Array | None = None  # float32[B, 2], of the states before each target
    next_values: jax.Array | None = None  # float32[B, 2], of the states after each


@struct
class EnsembleSignal:
    """The reference's log-probs of a pair, and its rewards under K frozen models.

    Example: ``EnsembleSignal(log_probs=[[-3.0, -2.3]], rewards=float32[1, 2, K])``.
    """

    log_probs: jax.Array  # float32[B, 2], summed, of the reference
    rewards: jax.Array  # float32[B, 2, K]; [B, M, 2, K] of packed pairs


@struct
class WhiteBoxSignal:
    """The frozen quantities of the game with a teacher whose distribution is known.

    The features are a frozen trunk's states *before* each target, for critics that are
    a head on them; None when the critic has a trunk of its own. What a method does not
    require may be None. An objective that was given the model reads its states, [.., T,
    D], in the place of log-probs.

    Example: ``WhiteBoxSignal(anchor_nll=[0.41], rollouts=float32[B, G, T, V],
    preferences=float32[pairs, 2, T, V])``.
    """

    anchor_nll: jax.Array | None = None  # float32[pairs] or [pairs, critics]
    rollouts: jax.Array | None = None  # float[B, G, T, V], the teacher's log-probs
    preferences: jax.Array | None = None  # float[pairs, 2, T, V]
    demonstrations: jax.Array | None = None  # float[B, T, V], for the off-policy gap
    rollout_features: jax.Array | None = None  # float[B, G, T, D]
    preference_features: jax.Array | None = None  # float[pairs, 2, T, D]
    demonstration_features: jax.Array | None = None  # float[B, T, D]


@struct
class PreferenceSignal:
    """Frozen-trunk features of both responses of a pair, and how much each pair counts.

    For the features see `GameSignal`. Weights have mean 1 over the data set; those of
    an ensemble resample it for each member (`rkd_jax.signals.resampling`). Of packed
    pairs, features are [B, T, D] and weights [B, M] or [B, M, K].

    Example: ``PreferenceSignal(features=float32[B, 2, T, D], weights=None)``.
    """

    features: jax.Array | None = None  # float[B, 2, T, D]
    weights: jax.Array | None = None  # float32[B]; [B, K] for an ensemble


class Mean(NamedTuple):
    """A mean that still adds up: sum and weight, both float32 scalars.

    Example: ``Mean(total=12.0, weight=8.0)`` is the mean 1.5 over 8 tokens.
    """

    total: jax.Array
    weight: jax.Array


@struct
class LossOutput:
    """What an objective returns: sums, never means, so micro-batches add exactly.

    Example: ``LossOutput(12.0, 8.0, {"student/nll": Mean(12.0, 8.0)})``.
    """

    total: jax.Array  # float32[], the differentiated sum
    weight: jax.Array  # float32[], what the sum is divided by once all parts are in
    metrics: dict[str, Mean]


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a method minimises, for which player, from which signals.

    ``student_loss(params, critic, frozen, batch, signal, rng) -> LossOutput`` is
    differentiated in ``params``. ``critic_loss(critic, params, dual, frozen, batch,
    signal, rng) -> LossOutput`` is differentiated in ``critic``; None when there is no
    second player. Several steps of it are given ``critic_signal(params, frozen, batch,
    signal)`` for a signal: what all read of the student, once. ``dual_step(dual,
    metrics) -> dual`` moves the multiplier after them, given the critic's metrics as
    plain scalars. ``requires`` names the fields the signal must have. ``packed`` says
    that packed rows are understood; the update refuses them elsewhere. A batch that is
    cut is given ``whole_signal(batch, signal)`` before: what its parts cannot know.

    Example: ``Objective("sft", student_loss)``.
    """

    name: str
    student_loss: Callable[..., LossOutput]
    critic_loss: Callable[..., LossOutput] | None = None
    dual_step: Callable[[jax.Array, Mapping[str, jax.Array]], jax.Array] | None = None
    requires: tuple[str, ...] = ()
    packed: bool = False
    critic_signal: Callable[..., Any] | None = None
    whole_signal: Callable[[Any, Any], Any] | None = None
