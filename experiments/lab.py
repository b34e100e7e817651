"""Everything an experiment trains with and against, loaded and compiled once.

A `Lab` holds the frozen models, the tokenizer, the oracle and one compiled function per
purpose, so no stage compiles what an earlier one already has. Its parameters say where
it is, on one device or on a mesh: its functions go there (`rkd_jax.placement`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax

from experiments.devices import open_meshes
from experiments.pupil import Pupil
from experiments.settings import (
    ExperimentConfig,
    PolicyConfig,
    RewardConfig,
    SettingsError,
)
from experiments.several_processes import AskedOnce
from experiments.teacher_student import cut_student, head_on, load_teacher, lower_part
from rkd_jax.data.tokenize import TokenizeConfig
from rkd_jax.data.tokenizer import Tokenizer
from rkd_jax.models.api import CausalLM
from rkd_jax.models.decoder import Decoder
from rkd_jax.models.heads import (
    HeadRewards,
    RewardModel,
    ScalarHead,
    head_sequence_rewards,
    head_token_rewards,
)
from rkd_jax.models.sampling import Samples, SamplingConfig, make_sampler
from rkd_jax.objectives.reward_model import TokenRewards
from rkd_jax.placement import follow_parameters
from rkd_jax.sharding import mesh_of
from rkd_jax.signals.oracles import Oracle, load_oracle
from rkd_jax.signals.teacher import (
    Scorer,
    make_features,
    make_sequence_scorer,
    make_teacher_log_probs,
)
from rkd_jax.types import Params, Prompts, Sequences, TeacherStates

READINGS = {
    "token": (head_token_rewards, RewardModel.token_rewards),
    "sequence": (head_sequence_rewards, RewardModel.sequence_rewards),
}
"""Of a reward: on given states, and on text."""
Sampler = Callable[[Params, Prompts, jax.Array], Samples]


@dataclasses.dataclass(frozen=True)
class Lab(Pupil):
    """The equipment of one experiment; everything is on the student's mesh but perhaps
    the teacher.

    ``trunk`` is the lower part of the teacher whose states the reward player reads, and
    ``reward_head`` what it trains on them; a player with a trained trunk starts from a
    copy of it, reads text and is given no states.
    """

    policy: PolicyConfig
    oracle: Oracle
    teacher: CausalLM
    teacher_params: Params
    trunk: CausalLM
    trunk_params: Params
    reward_head: ScalarHead
    trains_trunk: bool
    token_rewards: HeadRewards  # the reward player, on the trunk's states or on text
    text_rewards: TokenRewards  # on text, of `whole_reward`
    sample_teacher: Sampler  # one response per prompt
    sample_student: Sampler  # one response per prompt
    roll_out: Sampler  # G responses per prompt
    teacher_states: Scorer  # before each target
    teacher_policy: Scorer  # log-probs at the policies' temperature
    reference_scores: Scorer
    trunk_features: Scorer
    trunk_states: Scorer

    @functools.cached_property
    def frozen(self) -> dict[str, Params]:
        """What objectives read of models that are not trained: the teacher's head."""
        if mesh_of(self.teacher_params) == self.mesh:
            return {"teacher": self.teacher_params}
        return {"teacher": head_on(self.mesh, self.teacher, self.teacher_params)}

    def teach(self, sequences: Sequences) -> TeacherStates:
        """The signal of a divergence to the teacher."""
        return TeacherStates(self.teacher_states(self.teacher_params, sequences))

    @property
    def context(self) -> int:
        """Columns of the longest row that every model here can read."""
        return min(super().context, self.teacher.config.max_length)

    def new_reward(self, rng: jax.Array) -> Params:
        """What a reward player trains: it gives 0 everywhere."""
        head = self.reward_head.init(rng, self.trunk.config.hidden_size)
        return {"trunk": self.trunk_params, "head": head} if self.trains_trunk else head

    def whole_reward(self, params: Params) -> Params:
        """A reward player's parameters with the trunk, trained or not."""
        if self.trains_trunk:
            return params
        return {"trunk": self.trunk_params, "head": params}

    def features(self, sequences: Sequences) -> jax.Array | None:
        """States of the frozen trunk after each target, ``[*batch, T, D]``.

        None for reward players that train it.
        """
        if self.trains_trunk:
            return None
        return self.trunk_features(self.trunk_params, sequences)

    def states(self, sequences: Sequences) -> jax.Array:
        """States of the frozen trunk before each target, ``[*batch, T, D]``."""
        return self.trunk_states(self.trunk_params, sequences)


def open_lab(config: ExperimentConfig) -> Lab:
    """Load the teacher, cut the student out of it, compile."""
    mesh, teacher_mesh = open_meshes(config.mesh, config.teacher_mesh)
    teacher, teacher_params, tokenizer = load_teacher(config.models, teacher_mesh)
    student, student_params = cut_student(config.models, teacher, teacher_params, mesh)
    if tokenizer.chat_template is None or tokenizer.eos_id is None:
        lacking = "chat template" if tokenizer.eos_id else "end-of-sequence token"
        raise SettingsError(
            f"the tokenizer of {config.models.teacher} has no {lacking}; name one in "
            "its tokenizer_config.json"
        )
    lab = make_lab(
        teacher,
        teacher_params,
        student,
        student_params,
        tokenizer=tokenizer,
        rows=row_layout(config.policy),
        oracle=AskedOnce(load_oracle(config.oracle), config.oracle_calls),
        policy=config.policy,
        reward=config.reward,
    )
    if config.warm_start.steps:
        lab.check_rows("--warm-start.batch-size", config.warm_start.batch_size)
    return lab


def make_lab(
    teacher: Decoder,
    teacher_params: Params,
    student: CausalLM,
    student_params: Params,
    *,
    tokenizer: Tokenizer,
    rows: TokenizeConfig,
    oracle: Oracle,
    policy: PolicyConfig,
    reward: RewardConfig,
) -> Lab:
    """The equipment around any teacher and student of one tokenizer."""
    # The reward player learns beside the student, on its devices.
    mesh = mesh_of(student_params)
    trunk, trunk_params = lower_part(teacher, teacher_params, reward.layers, mesh)
    head = ScalarHead(bound=reward.bound)
    on_states, on_text = READINGS[reward.level]
    text_rewards = functools.partial(on_text, RewardModel(trunk, head))
    trains_trunk = reward.trunk == "trained"

    def sampler(model: CausalLM, samples: int) -> Sampler:
        config = sampling_config(policy, tokenizer, samples=samples)
        # Texts are put together on the host.
        return follow_parameters(make_sampler(model, config), to_host=True)

    return Lab(
        policy=policy,
        tokenizer=tokenizer,
        rows=rows,
        oracle=oracle,
        teacher=teacher,
        teacher_params=teacher_params,
        student=student,
        student_params=student_params,
        trunk=trunk,
        trunk_params=trunk_params,
        reward_head=head,
        trains_trunk=trains_trunk,
        token_rewards=text_rewards if trains_trunk else on_states(head),
        text_rewards=text_rewards,
        sample_teacher=sampler(teacher, 1),
        sample_student=sampler(student, 1),
        roll_out=sampler(student, policy.samples_per_prompt),
        teacher_states=follow_parameters(make_features(teacher, states="before")),
        teacher_policy=follow_parameters(
            make_teacher_log_probs(teacher, temperature=policy.temperature)
        ),
        reference_scores=follow_parameters(
            make_sequence_scorer(student, temperature=policy.temperature)
        ),
        trunk_features=follow_parameters(make_features(trunk)),
        trunk_states=follow_parameters(make_features(trunk, states="before")),
    )


def sampling_config(
    policy: PolicyConfig, tokenizer: Tokenizer, *, samples: int
) -> SamplingConfig:
    """How policies write, whoever does."""
    return SamplingConfig(
        max_new_tokens=policy.max_response,
        temperature=policy.temperature,
        eos_ids=(tokenizer.eos_id,),
        samples_per_prompt=samples,
        gather=policy.gather_weights,
    )


def row_layout(policy: PolicyConfig) -> TokenizeConfig:
    """One width each, and for the teacher a second one for its plain prompts."""
    wide, plain = policy.max_teacher_prompt, policy.max_prompt
    return TokenizeConfig(
        max_prompt=plain,
        max_response=policy.max_response,
        max_teacher_prompt=wide,
        teacher_prompt_buckets=(plain, wide) if plain < wide else (wide,),
        chat=True,
    )
